"""The program stays small enough to be read in one sitting."""

import ast
import tokenize
from pathlib import Path

from conftest import ROOT

SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "eval", "prepare_data")]
KERNELS = set((ROOT / "kernels").glob("*.py"))
PROGRAM = [*SCRIPTS, *(ROOT / "zsseg").glob("*.py")]


def imported(file: Path) -> set[Path]:
    """The project's own files that `file` imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {path for name in names if (path := ROOT / (name.replace(".", "/") + ".py")).is_file()}


def tokens(file: Path) -> int:
    """Of the code: without comments, docstrings and layout."""
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
    with open(file, "rb") as content:
        found = [token for token in tokenize.tokenize(content.readline) if token.type not in layout]
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    documentable = (
        node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)
    )
    return len(found) - sum(ast.get_docstring(node) is not None for node in documentable)


def test_length():
    """In tokens, so that nothing is gained by long lines."""
    program, kernels = ({file.name: tokens(file) for file in files} for files in (PROGRAM, KERNELS))
    assert sum(program.values()) <= 80_500, program
    assert sum(kernels.values()) <= 16_000, kernels


def test_functions_are_short():
    long = {}
    for file in PROGRAM:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long[f"{file.name}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert not long, long


def test_kernels_know_nothing_of_the_rest():
    for file in KERNELS:
        assert imported(file) <= KERNELS and len(file.read_text().splitlines()) <= 400, file


def test_the_package_does_not_import_the_scripts():
    for file in (ROOT / "zsseg").glob("*.py"):
        assert not imported(file) & set(SCRIPTS)
