"""Probes: where in a module's forward pass a weight meets its inputs, and makes its outputs.

The truncation of an m×n matrix needs the second moment of its inputs (n×n) or that of its outputs
(m×m), whichever is smaller: a layer that is 11008 wide and puts out 4096 numbers costs what those
cost. The outputs of a convolution are rows of m channels, so that no patch is ever unfolded.

    Linear, Conv1D            inputs, or outputs where those are fewer
    Conv, Bilinear            outputs; inputs of a 1×1 kernel where those are fewer
    Embedding                 how often each row is looked up
    stacks of experts         inputs, or outputs where those are fewer, of each expert
    MultiheadAttention        inputs of in_proj; outputs of out_proj, which are the module's
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from frobdecay.algebra.reading import Matricization
from frobdecay.algebra.scaling import DTYPES
from frobdecay.models.select import Weight
from frobdecay.weights.layouts import is_kind

EXPERTS = ("transformers.models.dbrx.*ExpertGLU", "transformers.models.*Experts")
CONV1D = "transformers.pytorch_utils.Conv1D"
KNOWN = ("torch.nn.", CONV1D.rpartition(".")[0], "timm.layers.linear", "timm.layers.conv2d_same")
"""Where the forward passes are written that do with a weight what torch's layers do."""

Call = tuple[tuple[Any, ...], Mapping[str, Any], Any]
"""Arguments, keyword arguments and result of a forward pass."""


@dataclass(frozen=True)
class Probe:
    """How the moment of one weight, or of one part of a packed weight, is taken.

    Attributes:
        name: of the weight, with "#k" for part k.
        module: whose forward pass is watched.
        of: what is smaller, and taken, unless the inputs are counted already for another weight.
        batch: groups of outputs, each with a moment of its own.
        size: k of the moment.
        inputs: the call's inputs (…, n); None where they are never seen.
        outputs: the call's outputs (…, m), or (…, g·m) of g groups; of rows, indices (…, 1).
        attribute: of the module, if it multiplies with slices of it itself; see ``inside.py``.
    """

    name: str
    module: nn.Module
    of: Literal["inputs", "outputs", "rows"]
    size: int
    batch: tuple[int, ...] = ()
    inputs: Callable[[Call], Tensor] | None = None
    outputs: Callable[[Call], Tensor] | None = None
    attribute: str = ""


def first(call: Call) -> Tensor:
    """The first argument, however it was given."""
    args, named, _ = call
    found: Tensor = args[0] if args else next(iter(named.values()))
    return found


def _indices(call: Call) -> Tensor:
    return first(call).unsqueeze(-1)


def result(call: Call) -> Tensor:
    """What the module returned, the first of several."""
    made = call[2]
    found: Tensor = made[0] if isinstance(made, tuple) else made
    return found


def probes(weight: Weight, tree: Mapping[str, nn.Module]) -> list[Probe] | str:
    """How to take the moment of a weight, or why there is none.

    Args:
        weight: with a tensor.
        tree: the model's modules by name.
    """
    module, tensor = weight.module, weight.parameter
    if tensor.dtype not in DTYPES:
        return f"its inputs are not summed at dtype {tensor.dtype}"
    holder = _attention(weight, tree)
    if holder is not None:
        return [Probe(weight.name, holder, "outputs", len(tensor), outputs=result)]
    experts, layout = any(is_kind(module, kind) for kind in EXPERTS), weight.layout
    # The forward may be its own, or that of its class.
    if not experts and not str(module.forward.__module__).startswith(KNOWN):
        return f"{type(module).__name__} has a forward of its own"
    unwatched = f"the inputs of {type(module).__name__} are not watched"
    if layout is None:
        return unwatched
    view = Matricization.of(layout.channel or layout.pattern, tuple(tensor.shape), layout.axes)
    of: Literal["inputs", "outputs"] = "outputs" if view.rows < view.columns else "inputs"
    smaller = partial(Probe, weight.name, module, of, min(view.rows, view.columns), view.batch)
    if experts:
        return [smaller(attribute=weight.attribute)]
    if isinstance(module, nn.Linear) or is_kind(module, CONV1D):
        return [smaller(inputs=first, outputs=result)]
    if isinstance(module, _ConvNd):
        return [_convolution(weight.name, module, view)]
    if isinstance(module, nn.Bilinear):
        return [Probe(weight.name, module, "outputs", view.rows, outputs=result)]
    if isinstance(module, nn.Embedding):
        return [Probe(weight.name, module, "rows", view.rows, outputs=_indices)]
    if isinstance(module, nn.MultiheadAttention):
        return _packed(weight, module, view.columns)
    return unwatched


def _attention(weight: Weight, tree: Mapping[str, nn.Module]) -> nn.Module | None:
    """The attention that reads the weight of its ``out_proj`` itself."""
    above = [tree.get(path.rpartition(".")[0]) for path in weight.paths]
    reads = (m for m in above if isinstance(m, nn.MultiheadAttention))
    return next((m for m in reads if m.out_proj is weight.module), None)


def _convolution(name: str, module: _ConvNd, view: Matricization) -> Probe:
    axes = len(module.kernel_size)
    alone = set(module.kernel_size) == {1} and module.padding in ("valid", "same", (0,) * axes)
    narrow = not view.batch and view.columns < view.rows
    if alone and narrow and not isinstance(module, _ConvTransposeNd):
        steps: Any = tuple(slice(None, None, step) for step in module.stride)

        def inputs(call: Call) -> Tensor:
            return first(call)[(..., *steps)].movedim(-1 - axes, -1)

        return Probe(name, module, "inputs", view.columns, inputs=inputs)

    def outputs(call: Call) -> Tensor:
        return result(call).movedim(-1 - axes, -1)

    return Probe(name, module, "outputs", view.rows, view.batch, outputs=outputs)


def _packed(weight: Weight, module: nn.MultiheadAttention, size: int) -> list[Probe]:
    """Queries, keys and values: one moment where they are the same tensor."""
    parts = {"q_proj_weight": [0], "k_proj_weight": [1], "v_proj_weight": [2]}
    return [
        Probe(f"{weight.name}#{k}", module, "inputs", size, inputs=partial(_argument, k))
        for k in parts.get(weight.attribute, [0, 1, 2])
    ]


def _argument(k: int, call: Call) -> Tensor:
    """A query, a key or a value."""
    args, named, _ = call
    found: Tensor = args[k] if k < len(args) else named[("query", "key", "value")[k]]
    return found
