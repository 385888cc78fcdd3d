"""The package as a whole: its surface, its layers, its documents."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import frobdecay

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "frobdecay"

# From the bottom up. A room imports from the floors below, and its files from each other.
FLOORS = [
    {"algebra"},
    {"product"},
    {"weights", "gradient"},
    {"models", "optim"},
    {"diagnostics"},
    {"cli"},
]
ROOF = {"__init__", "__main__"}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent == PACKAGE or path.stem != "__init__"
}


def imports(module: str) -> set[str]:
    """Names of the package's modules that a module imports, at any depth of its code."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("frobdecay"):
            _, _, name = (node.module or "").partition(".")
            found |= {name, *(f"{name}.{a.name}".strip(".") for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {
                a.name.partition(".")[2] for a in node.names if a.name.startswith("frobdecay")
            }
    return found & set(FILES)


def room(module: str) -> str:
    """The folder at the package's top that a module lies in; of what lies there, the module."""
    return module.partition(".")[0]


@pytest.mark.parametrize("module", [name for name in FILES if name not in ROOF])
def test_imports_go_downward(module):
    """No module imports from its own floor, but for its room, or from one above."""
    level = {name: k for k, floor in enumerate(FLOORS) for name in floor}
    own = room(module)
    upward = {
        name
        for name in map(room, imports(module))
        if name in level and own in level and name != own and level[name] >= level[own]
    }
    assert not upward


def test_imports_have_no_cycle():
    """Within a room, too, there is an order."""
    order = graphlib.TopologicalSorter({name: imports(name) for name in FILES})
    assert len(list(order.static_order())) == len(FILES)


def test_all_is_sorted_and_complete():
    """``__all__`` is sorted, exists, and holds every public name that the package imports."""
    assert frobdecay.__all__ == sorted(frobdecay.__all__)
    public = {
        name
        for name, value in vars(frobdecay).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public <= set(frobdecay.__all__) | {"annotations"}
    assert all(hasattr(frobdecay, name) for name in frobdecay.__all__)


@pytest.mark.covers("D4")
def test_core_imports_torch_and_einops_only():
    """A fresh interpreter imports the package, and no optional dependency with it (D4)."""
    optional = {"triton", "matplotlib", "rich", "sklearn", "tensorboard", "transformers", "peft"}
    optional |= {"safetensors"}
    code = f"import sys, frobdecay; print(sorted({optional!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_files_can_be_read_in_one_sitting(path):
    """No file of the package is longer than 400 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_a_file_of_tests_that_cannot_be_imported_fails(pytestconfig):
    """Told to ignore import errors of doctests, pytest skips the whole file and succeeds."""
    assert not pytestconfig.getoption("doctest_ignore_import_errors")
