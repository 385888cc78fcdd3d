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

# From the bottom up. A module imports from its own layer or from those below.
LAYERS = [
    {
        "algebra.matricize",
        "algebra.precision",
        "algebra.chain",
        "algebra.structures",
        "algebra.shifted",
        "factor",
        "product",
        "algebra.scaling",
        "algebra.svd",
        "algebra.spectral",
    }
    | {
        "adapters",
        "balancing",
        "holding",
        "partitions",
        "algebra.stars",
        "algebra.tensorize",
        "algebra.decompositions",
    },
    {"_triton", "grouped.tiles", "grouped.tables", "grouped.sheets", "grouped.refusals"}
    | {"grouped.executor", "bucketed", "backends", "placement", "distributed", "accumulate"},
    {"forms.product_tensor", "forms.cost", "forms.matrix", "forms.dense", "forms.shapes"}
    | {"forms.tensors", "forms.attention", "forms.table", "factored"},
    {"modules.layouts", "parametrizations", "parallel", "tensorized.base", "tensorized.kinds"},
    {
        "modules.memory",
        "modules.selection",
        "modules.support",
        "modules.candidates",
        "modules.surgery",
    }
    | {"modules.stacking", "modules.progress", "modules.untying"}
    | {"modules.restoring", "modules.records", "modules.slots", "modules.files"}
    | {"modules.formats", "checkpoints", "modules.bytecode", "modules.readers"}
    | {"modules.unrolling", "plan", "ranks", "providers.attention", "registry", "merging"}
    | {"providers.lora"},
    {"wrapper.proxy", "wrapper.rates", "wrapper.param_groups", "wrapper.rounding"}
    | {"wrapper.decay", "wrapper.conventions", "wrapper.checks", "wrapper.stability"}
    | {"optimizer", "groups", "factory", "flambe"},
    {"measurement", "diagnostics"},
    {"cli.reading", "cli.inspecting", "cli.merging", "cli.main", "__main__"},
    {"__init__"},
]
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


def test_every_module_has_a_layer():
    """The table of layers names every file, and no other."""
    assert set(FILES) == set().union(*LAYERS)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downward(module):
    """No module imports from a layer above its own."""
    level = {name: k for k, layer in enumerate(LAYERS) for name in layer}
    upward = {name for name in imports(module) if level[name] > level[module]}
    assert not upward


def test_imports_have_no_cycle():
    """Within a layer, too, there is an order."""
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
