"""The laws of the house: who imports whom, who writes where, and how much there may be of it."""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT, process

SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "eval", "prepare_data")]
FLAT = sorted((ROOT / "zsseg").glob("*.py"))
APPS = sorted((ROOT / "zsseg" / "apps").glob("*.py"))
PREPARE = sorted((ROOT / "zsseg" / "prepare").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
PROGRAM = [*SCRIPTS, *FLAT, *APPS, *PREPARE]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NETWORKS = ("clip", "tokenizer", "prompts", "backbone", "maskformer", "per_pixel")
METHOD = (*NETWORKS, "matcher", "losses", "regions", "segmenter")
OUTSIDE = {"torch", "torchvision", "scipy", "numpy", "ftfy", "regex", "kernels"}  # for the method
FILES = {"pathlib", "os", "shutil", "tempfile", "subprocess", "multiprocessing", "urllib", "io"}

MAX_PROGRAM = 48_000
MAX_KERNELS = 12_500
MAX_FUNCTION = 60
MAX_TRAINING_LOOP = 110
MAX_TEST_LINES = 8_000
MAX_PAGE_BYTES = 12_000
BLOCK = 6  # lines of code that may not stand in two places


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def place(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{node.lineno}"


def imported(file: Path) -> Iterator[tuple[ast.stmt, str]]:
    """All that a file imports, wherever in it: `from a import b` is a and a.b."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not getattr(node, "level", 0), f"{place(file, node)}: a relative import"
            yield from ((node, name) for name in start)
            yield from ((node, ".".join([*start, alias.name])) for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def importing(files: list[Path], *packages: str) -> list[str]:
    """Where `files` import anything of `packages`."""
    found = ((file, *pair) for file in files for pair in imported(file))
    inside = lambda name: any(is_within(name, package) for package in packages)
    return [f"{place(file, node)}: {name}" for file, node, name in found if inside(name)]


# --- imports


def test_kernels_know_nothing_of_the_rest():
    assert not importing(KERNELS, "zsseg", "tests", "train", "eval", "prepare_data")


def test_networks_and_method_know_tensors_only():
    """No configuration but their own section, no files, no processes, no downloads."""
    ours = [f"zsseg.{name}" for name in (*METHOD, "utils")]
    wrong = []
    for file in (ROOT / "zsseg" / f"{name}.py" for name in METHOD):
        for node, module in imported(file):
            top = module.split(".")[0]
            if top == "zsseg":
                fine = module == top or any(is_within(module, name) for name in ours)
            else:
                fine = top in OUTSIDE | (sys.stdlib_module_names - FILES)
            wrong += [] if fine else [f"{place(file, node)}: {module}"]
        calls = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
        wrong += [place(file, c) for c in calls if getattr(c.func, "id", "") == "open"]
    assert not wrong, wrong


def test_the_flat_floor_does_not_know_the_side_rooms():
    """But for the lazy `load` of zsseg/__init__.py."""
    flat = [file for file in FLAT if file.name != "__init__.py"]
    assert not importing(flat, "zsseg.apps", "zsseg.prepare")
    outer = tree(ROOT / "zsseg" / "__init__.py").body
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in outer)


def test_the_side_rooms_do_not_know_each_other():
    assert not importing(APPS, "zsseg.prepare") and not importing(PREPARE, "zsseg.apps")


def test_nobody_imports_the_scripts():
    assert not importing(PROGRAM, "train", "eval", "prepare_data", "tests")


def test_the_command_line_imports_the_standard_library_alone():
    """--help, a typo or a missing file answer at once: torch takes seconds."""
    for words in (["train.py", "--help"], ["eval.py", "--help"], ["prepare_data.py", "--help"]):
        done = process("-X", "importtime", *words)
        assert "zsseg.utils" in done.stderr and "usage:" in done.stdout + done.stderr, done.stderr
        loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
        heavy = loaded & {*OUTSIDE, "PIL", "tqdm", "triton", "wandb"}
        assert not heavy, (words, heavy)


# --- nobody writes into another's object


def base(node: ast.expr, *kinds: type) -> ast.expr:
    """What is left of `a.b[c]` without its attributes or indices."""
    while isinstance(node, kinds):
        node = node.value
    return node


def written(node: ast.AST) -> list[ast.Attribute]:
    """The attributes that a statement writes: `a.b = `, `a.b[c] = `, `a.b += `, setattr(a, ...)."""
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    flat = [t for target in targets for t in (getattr(target, "elts", None) or [target])]
    found = [base(target, ast.Subscript) for target in flat]
    return [target for target in found if isinstance(target, ast.Attribute)]


# Where it is right: PyTorch and Python ask for it, or the object was made a line before.
MAY_WRITE = {
    "train.py": {"optimizer", "group"},  # found_inf, that fused optimizers read; learning rates
    "kernels/mask_loss.py": {"ctx"},
    "zsseg/distributed.py": {"torch"},  # settings of the whole process
    "zsseg/utils.py": {"sys"},  # streams that survive their reader
}


def writes(file: Path) -> Iterator[str]:
    """Where attributes of a parameter or of an imported name are written."""
    module = tree(file)
    nodes = [n for n in ast.walk(module) if isinstance(n, ast.Import | ast.ImportFrom)]
    aliases = [alias for node in nodes for alias in node.names]
    imported = {(alias.asname or alias.name).split(".")[0] for alias in aliases}
    allowed = MAY_WRITE.get(str(file.relative_to(ROOT)), set())
    for function in ast.walk(module):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
        own = {name.id for name in names if isinstance(name.ctx, ast.Store)}  # its own objects
        arguments = function.args
        given = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        foreign = {*given, *imported} - own - allowed - {"self", "cls"}
        for node in ast.walk(function):
            targets = written(node)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
                targets = node.args[:1]
            roots = [base(target, ast.Attribute, ast.Subscript) for target in targets]
            found = [root.id for root in roots if getattr(root, "id", "") in foreign]
            yield from (f"{place(file, node)}: {name}" for name in found)


def test_nobody_writes_into_another_s_object():
    """No loader edits the configuration, no page replaces a method; as far as a syntax tree shows:
    attributes of parameters and of imported modules and classes, not through further names.
    """
    found = [line for file in (*PROGRAM, *KERNELS) for line in writes(file)]
    assert not found, found


# --- sizes

LAYOUT = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")
LAYOUT = {getattr(tokenize, name) for name in LAYOUT}
# From Python 3.12 on an f-string is many tokens; here it is one in every version.
F_START, F_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))


def tokens(text: str) -> int:
    """Of the code: without comments, docstrings and layout."""
    count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth -= token.type == F_END
        count += not depth and token.type not in LAYOUT and token.type != F_START
        depth += token.type == F_START
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))
    return count - sum(ast.get_docstring(node) is not None for node in nodes)


def test_tokens_are_counted_alike_in_every_python():
    assert tokens('"""Doc."""\nx = f"{a + f(b)!r:>{width}} {{}}"  # comment\n') == 3
    assert tokens('def f(a):\n    """Doc."""\n    return f"a" "b" + \'c\'\n') == 11
    assert tokens('x = f"""{\na\n}"""\n') == 3


def test_length():
    """In tokens, so that nothing is gained by long lines."""
    for files, most in ((PROGRAM, MAX_PROGRAM), (KERNELS, MAX_KERNELS)):
        sizes = {str(f.relative_to(ROOT)): tokens(f.read_text("utf-8")) for f in files}
        assert sum(sizes.values()) <= most, (sum(sizes.values()), sizes)


def test_functions_are_short():
    """But the training loop, which is read once and better whole."""
    long = []
    for file in PROGRAM:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                is_loop = file.name == "train.py" and node.name == "train"
                lines = node.end_lineno - node.lineno + 1
                if lines > (MAX_TRAINING_LOOP if is_loop else MAX_FUNCTION):
                    long.append(f"{place(file, node)}: {node.name} has {lines} lines")
    assert not long, long


def test_lines():
    """At most 100 columns, formatted by ruff alone."""
    wrong = []
    for file in (*PROGRAM, *KERNELS, *TESTS):
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            is_long = len(line) > 100 and "# noqa: E501" not in line
            if (is_long and file not in TESTS) or "fmt: " + "skip" in line:
                wrong.append(f"{file.relative_to(ROOT)}:{number}")
    assert not wrong, wrong


def test_one_statement_a_line():
    """Not `a, b = f(x), g(x)`."""
    simple = ast.Name | ast.Constant | ast.Attribute
    wrong = []
    for file in PROGRAM:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                values = getattr(node.value, "elts", [])
                wrong += [] if all(isinstance(v, simple) for v in values) else [place(file, node)]
    assert not wrong, wrong


def code_lines(file: Path) -> list[str]:
    """Lines of a file with code on them: no comments, docstrings, imports, blank lines."""
    text = file.read_text("utf-8")
    module = ast.parse(text)
    skip = set()
    for node in ast.walk(module):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            skip |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    found = [line.split("  # ")[0].strip() for number, line in lines if number not in skip]
    return [line for line in found if line and not line.startswith("#")]


def test_clones():
    """Less than 2 % of the program's lines of code stand in a block of six that is elsewhere, too;
    blocks of closing brackets do not count.
    """
    places = defaultdict(set)
    total = 0
    for file in PROGRAM:
        lines = code_lines(file)
        total += len(lines)
        for start in range(len(lines) - BLOCK + 1):
            block = tuple(lines[start : start + BLOCK])
            if sum(len(line) > 8 for line in block) >= BLOCK - 1:
                places[block].add((file, start))
    repeated = [found for found in places.values() if len(found) > 1]
    cloned = {(f, s + i) for found in repeated for f, s in found for i in range(BLOCK)}
    names = sorted({f"{f.name}: {code_lines(f)[s]}" for found in repeated for f, s in found})
    assert len(cloned) < 0.02 * total, (len(cloned), total, names)


def test_the_tests_are_short_too():
    """Those that are collected; benchmarks are not."""
    files = [file for file in TESTS if "benchmarks" not in file.parts]
    lines = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in files}
    assert sum(lines.values()) <= MAX_TEST_LINES, (sum(lines.values()), lines)


def test_every_promise_names_its_tests():
    text = (ROOT / "tests" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+\.py.*)` \|$", text, re.MULTILINE)
    assert len(rows) > 30
    for group in (group for row in rows for group in row.split("; ")):
        file, _, names = group.partition("::")
        for name in re.findall(r"test_\w+", names):
            source = (ROOT / "tests" / file).read_text("utf-8")
            assert f"def {name}(" in source, (file, name)


def test_pages_are_small():
    pages = (ROOT / "README.md", ROOT / "zsseg" / "apps" / "report.html")
    sizes = {page.name: page.stat().st_size for page in pages}
    assert max(sizes.values()) <= MAX_PAGE_BYTES, sizes


def test_nothing_is_written_for_one_machine():
    """No paths of the machine that somebody worked on."""
    path = re.compile("/(tmp|work|root|home)/")
    names = ("README.md", "pyproject.toml", "requirements.txt", ".ci/run")
    files = [*SCRIPTS, *(ROOT / name for name in names)]
    for folder in ("zsseg", "kernels", "configs", "tests"):
        texts = (ROOT / folder).rglob("*.*")
        files += (file for file in texts if file.suffix in {".py", ".toml", ".md", ".html"})
    found = {str(file): path.findall(file.read_text("utf-8")) for file in files}
    assert not any(found.values()), {file: paths for file, paths in found.items() if paths}
