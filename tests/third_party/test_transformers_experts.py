"""Stacks of experts in transformers: every class that holds one is read, the right way round."""

import ast
import pathlib
import types

import pytest

transformers = pytest.importorskip("transformers")

import attention_probe as probe  # noqa: E402
from einops import rearrange  # noqa: E402
from torch import nn  # noqa: E402

from frobdecay import factorize  # noqa: E402
from frobdecay.weights.layouts import layouts  # noqa: E402

EXPERTS, INNER = 3, 20
OPTIONS = {
    **dict.fromkeys(
        ["intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "output_size",
         "expert_ffn_hidden_size"], INNER),
    **dict.fromkeys(
        ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], EXPERTS),
    "num_experts_per_tok": 2, "input_size": probe.WIDTH,
}  # fmt: skip


def _classes():
    """Full names of the classes that are called experts, or parts of them, and hold parameters."""
    root = pathlib.Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.ClassDef) and node.name.endswith(("Experts", "ExpertGLU"))
            if named and "nn.Parameter" in ast.unparse(node):
                yield f"transformers.models.{path.parent.name}.{path.stem}.{node.name}"


CLASSES = [*_classes()]


def build(name):
    """A tiny one, with random weights."""
    try:
        return probe.build(name, **OPTIONS)
    except ValueError:  # its configuration is not to be had in this size
        config = types.SimpleNamespace(**{**probe.OPTIONS, **OPTIONS, "hidden_activation": "gelu"})
        return probe._randomized(probe.kind_of(name)(config).double())


@pytest.mark.covers("C6")
@pytest.mark.parametrize("name", CLASSES, ids=lambda name: name.rpartition(".")[2])
def test_every_stack_is_read_by_outputs_and_inputs(name):
    """What goes down has the inner size as its inputs, what goes up as outputs, gated or not.

    All of them are factorized, and of no matrix nothing is said.
    """
    module = build(name)
    read = layouts(module)
    stacks = {key: p for key, p in module.named_parameters(recurse=False) if p.ndim > 1}
    weights = {key: p for key, p in stacks.items() if "bias" not in key}
    assert weights
    assert weights.keys() <= read.keys()
    for key, weight in weights.items():
        _, outputs, inputs = rearrange(weight, read[key].pattern, **read[key].axes).shape
        down = key in ("down_proj", "w2")
        assert (inputs == INNER) if down else (outputs in (INNER, 2 * INNER)), key
    model = nn.ModuleDict({"experts": module})
    matrices = {key for key, p in model.named_parameters() if p.ndim > 1}
    plan = factorize(model, rank=2)
    assert {row.name for row in plan.rows} >= matrices  # a matrix of biases, too
    assert {row.name for row in plan.rows if row.rank == 2} == {f"experts.{key}" for key in weights}
