"""The program stays small enough to be read in one sitting."""

import ast
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


def test_length():
    lengths = {file.name: len(file.read_text().splitlines()) for file in PROGRAM}
    assert sum(lengths.values()) <= 7500 and max(lengths.values()) <= 425, lengths


def test_training_needs_few_files():
    closure, waiting = set(), [ROOT / "train.py"]
    while waiting:
        file = waiting.pop()
        if file not in closure:
            closure.add(file)
            waiting += imported(file) - KERNELS  # they are read when they are to be changed
    assert 10 <= len(closure) <= 25, sorted(f.name for f in closure)
    assert sum(len(f.read_text().splitlines()) for f in closure) <= 5500


def test_kernels_know_nothing_of_the_rest():
    for file in KERNELS:
        assert imported(file) <= KERNELS and len(file.read_text().splitlines()) <= 400, file


def test_the_package_does_not_import_the_scripts():
    for file in (ROOT / "zsseg").glob("*.py"):
        assert not imported(file) & set(SCRIPTS)
