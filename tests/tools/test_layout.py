"""What may import what: the method first, machinery above it (CONTRIBUTING.md)."""

import ast
import sys

import pytest

from tests.helpers.scripts import ROOT

LEVELS = (("kernel",), ("",), ("utils",), ("pretrained",), ("training", "sampling"),
          ("evaluate", "convert", "page"), ("show", "bench", "experiments"))
RANK = {package: rank for rank, packages in enumerate(LEVELS) for package in packages}
FILES = sorted((ROOT / "equimini").rglob("*.py"))


def package_of(parts: list[str]) -> str:
    """The package in equimini/ that a dotted name lies in; '' for the method's modules."""
    return parts[0] if parts and parts[0] in RANK else ""


def imports(path) -> list[str]:
    """Dotted names of all that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_its_own_package_or_a_lower_one(path):
    mine = package_of(list(path.relative_to(ROOT / "equimini").parts[:-1]))
    assert mine in RANK
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "equimini":
            theirs = package_of(rest)
            assert theirs == mine or RANK[theirs] < RANK[mine], f"{path} imports {name}"
        elif mine in ("", "kernel"):
            assert first in sys.stdlib_module_names or first in ("torch", "numpy"), (
                f"{path} is of the method and imports {name}")
        assert not (ROOT / f"{first}.py").exists() or first == "setup", (
            f"{path} imports the script {first}.py")


def test_no_circles():
    """Modules can be sorted so that each imports earlier ones only."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
             for p in FILES}
    needs = {name: {n if n in names else n.rpartition(".")[0] for n in imports(path)} & {*names}
             for name, path in names.items()}
    done: set[str] = set()
    while ready := {name for name, need in needs.items() if name not in done and need <= done}:
        done |= ready
    assert done == {*names}, f"in a circle: {sorted({*names} - done)}"


def test_the_method_stays_small():
    """What a reader of the paper sees first."""
    front = [path.read_text() for path in (ROOT / "equimini").glob("*.py")]
    assert len(front) <= 15  # with __init__.py
    assert sum(len(text.splitlines()) for text in front) <= 2425  # mean_flow.py: beyond the paper
    assert all(text.startswith('"""') for text in front)


def test_python_3_10_can_read_it():
    """What later versions added and this one's parser lets pass: x[*k, 1] and except*."""
    for path in (*FILES, *ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            index = node.slice if isinstance(node, ast.Subscript) else None
            elements = index.elts if isinstance(index, ast.Tuple) else []
            bare = elements and elements[0].col_offset == index.col_offset  # no parenthesis
            starred = bare and any(isinstance(x, ast.Starred) for x in elements)
            assert not starred and type(node).__name__ != "TryStar", f"{path}:{node.lineno}"
