"""A layer whose weight is a product, as a chain of plain layers.

    Linear      x → Linear(Vᵀ) → Linear(M) … → Linear(U, bias)
    Conv        x → Conv(V, its kernel axes) → Conv(M, 1×1) … → Conv(U, its kernel axes, bias)
    Embedding   ids → Embedding(U) → Linear(M) … → Linear(V)

A convolution's stride, padding and dilation go, axis by axis, to the link that has that kernel
axis; all links keep the groups. The chain says what the layer said of itself, its ``in_features``,
``kernel_size`` or ``num_embeddings``; what it lacks is the weight and the bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from frobdecay.algebra.reading import Matricization
from frobdecay.product.holding import dense_type, lists_of
from frobdecay.weights.lowrank import LowRank

UNROLLED = "_unrolled"
"""The attribute by which a chain says that it stands for a layer of another class."""


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _chain(module: nn.Module) -> Callable[..., list[nn.Module]] | None:
    """What builds the chain for this very type; subclasses have a forward of their own."""
    kind = dense_type(module)
    return _CHAINS.get(kind) or _CHAINS.get(_name(kind))


def lacking(module: nn.Module) -> set[str]:
    """The attributes of a layer that its chain does not have."""
    held = {"parametrizations", *lists_of(module), *module._parameters, *vars(module)}
    return held - _OF_EVERY_MODULE - set(_plain(module))


def _plain(module: nn.Module) -> dict[str, Any]:
    """What a layer says of itself in numbers and words; its chain says it, too."""
    table = {**vars(module), **{k: v for k, v in module._parameters.items() if v is None}}
    own = {name: value for name, value in table.items() if name not in _OF_EVERY_MODULE}
    return {name: value for name, value in own.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    known = type(value).__module__ in ("builtins", "torch") and not callable(value)
    return known and not isinstance(value, Tensor | nn.Module)


def why_not_unrolled(module: nn.Module) -> str | None:
    """Say why this parametrized layer cannot be a chain of plain layers, if so."""
    kind = dense_type(module)
    held = lists_of(module)
    if _chain(module) is None:
        return f"a {_name(kind)} reads its weight itself"
    if list(held) != ["weight"] or len(held["weight"]) > 1:
        return "it has other parametrizations too"
    if not isinstance(held["weight"][0], LowRank):
        return f"a {type(held['weight'][0]).__name__} is not a chain"
    if "forward" in vars(module):
        return "it has a forward of its own, put there by somebody"
    others = {*module._parameters, *module._buffers, *module._modules}
    if others - {"weight", "bias", "parametrizations"}:
        return f"it holds {sorted(others - {'weight', 'bias', 'parametrizations'})} besides"
    view: Any = held["weight"][0].matricization
    if isinstance(module, _ConvNd):
        fits = _Axes.of(module, view) is not None
    else:
        order = 1 if _name(kind) not in _CHAINS else -1  # stored outputs × inputs, or transposed
        fits = not view.batch and (view.row_axes, view.column_axes)[::order] == view.tensor_axes
    return None if fits else f"the pattern {view.pattern!r} does not give two layers"


def unrolled(module: nn.Module) -> nn.Sequential:
    """Build the chain; it holds the bias and the numbers of the factors, and the hooks.

    Call it only where ``why_not_unrolled`` has nothing against it.
    """
    weight = lists_of(module)["weight"]
    factors = tuple(getattr(weight, f"original{i}") for i in range(weight.ntensors))
    build = _chain(module)
    assert build is not None
    layers = build(module, weight[0].matricization, factors)
    built = nn.Sequential(*layers).train(module.training)
    vars(built).update(copy.deepcopy(_plain(module)), **{UNROLLED: True})
    for name, value in vars(module).items():
        # The very dictionaries: handles that were given out can still remove their hooks.
        if name in _HOOKS:
            built.__dict__[name] = value
    return built


_OF_EVERY_MODULE = {*vars(nn.Sequential()), "forward"}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _fill(layer: nn.Module, weight: Tensor, source: Tensor, bias: Any = None) -> nn.Module:
    """Give a layer that was built on the meta device its numbers: no copy where none is needed."""
    layer.weight = nn.Parameter(weight.detach().contiguous(), source.requires_grad)
    if bias is not None:
        layer.bias = bias
    return layer


def _linear(weight: Tensor, source: Tensor, bias: Any = None) -> nn.Module:
    m, n = weight.shape
    return _fill(nn.Linear(n, m, bias=False, device="meta"), weight, source, bias)


def _linear_chain(
    module: nn.Module, view: Matricization, factors: tuple[Tensor, ...]
) -> list[nn.Module]:
    U, *inner, V = factors
    middle = [_linear(M, M) for M in reversed(inner)]
    return [_linear(V.mT, V), *middle, _linear(U, U, module.bias)]


def _embedding_chain(
    module: nn.Module, view: Matricization, factors: tuple[Tensor, ...]
) -> list[nn.Module]:
    U, *inner, V = factors
    table = nn.Embedding(U.shape[0], U.shape[1], device="meta")
    table.padding_idx = module.padding_idx  # type: ignore[assignment]
    return [_fill(table, U, U), *(_linear(M.mT, M) for M in inner), _linear(V, V)]


@dataclass(frozen=True)
class _Axes:
    """The axes of a convolution's weight by what they are for, as einops writes them.

    Attributes:
        groups: the batch axis, or nothing.
        outs, ins: output and input channels of one group.
        kernel: one item a kernel dimension.
        rows: whether that dimension is in the rows, in U.
    """

    groups: str
    outs: str
    ins: str
    kernel: tuple[str, ...]
    rows: tuple[bool, ...]

    @classmethod
    def of(cls, module: _ConvNd, view: Matricization) -> _Axes | None:
        """Sort the axes, or None where U has not the outputs and V the inputs."""
        batch = view.batch_axes
        first, second, *kernel = view.tensor_axes
        if first[: len(batch)] != batch or view.batch != (module.groups,) * (module.groups > 1):
            return None
        outs, ins = first[len(batch) :], second
        if isinstance(module, _ConvTransposeNd):
            outs, ins = ins, outs
        rows = [set(item) <= set(view.row_axes) for item in kernel]
        columns = [set(item) <= set(view.column_axes) for item in kernel]
        if not (set(outs) <= set(view.row_axes) and set(ins) <= set(view.column_axes)):
            return None
        if any(row == column for row, column in zip(rows, columns, strict=True)):
            return None
        return cls(
            " ".join(batch), " ".join(outs), " ".join(ins), tuple(map(_item, kernel)), tuple(rows)
        )

    def left(self, axes: Sequence[str]) -> str:
        """How a factor is stored."""
        return f"{self.groups} ({' '.join(axes)}) r"

    def right(self, first: str, second: str, mine: Sequence[bool]) -> str:
        """How a link's weight is stored: kernel dimensions of others are 1."""
        kernel = (axes if own else "1" for axes, own in zip(self.kernel, mine, strict=True))
        return f"({self.groups} {first}) ({second}) {' '.join(kernel)}"


def _item(axes: tuple[str, ...]) -> str:
    return f"({' '.join(axes)})"


def _conv_chain(
    module: nn.Module, view: Matricization, factors: tuple[Tensor, ...]
) -> list[nn.Module]:
    assert isinstance(module, _ConvNd)
    axes = _Axes.of(module, view)
    assert axes is not None
    U, *inner, V = factors
    columns, none = tuple(not row for row in axes.rows), (False,) * len(axes.rows)
    links = [  # each factor, how it is stored, its outputs, inputs and kernel dimensions
        (V, axes.left(view.column_axes), "r", axes.ins, columns),
        *((M, f"{axes.groups} r r2", "r", "r2", none) for M in reversed(inner)),
        (U, axes.left(view.row_axes), axes.outs, "r", axes.rows),
    ]
    chain: list[Any] = []
    for factor, left, out, into, mine in links:
        ends = (into, out) if isinstance(module, _ConvTransposeNd) else (out, into)
        right = axes.right(*ends, mine)
        weight = rearrange(factor, f"{left} -> {right}", **_known(view, left))
        chain.append(_link(module, weight, factor, mine))
    chain[-1].bias = module.bias
    return chain


def _known(view: Matricization, left: str) -> dict[str, int]:
    """The lengths of the axes of a pattern."""
    names = left.replace("(", " ").replace(")", " ").split()
    return {name: view.sizes[name] for name in names if name in view.sizes}


def _link(module: _ConvNd, weight: Tensor, source: Tensor, mine: tuple[bool, ...]) -> nn.Module:
    """A convolution with the module's settings along its own kernel dimensions."""
    kind: Any = dense_type(module)

    def own(setting: Any, other: int) -> Any:
        if isinstance(setting, str):  # "same" and "valid" hold for a kernel of 1 too
            return setting
        return tuple(s if is_mine else other for s, is_mine in zip(setting, mine, strict=True))

    into, out, settings = weight.shape[1] * module.groups, weight.shape[0], {}
    if isinstance(module, _ConvTransposeNd):
        into, out = out, into
        settings = {"output_padding": own(module.output_padding, 0)}
    layer = kind(
        into,
        out,
        tuple(weight.shape[2:]),
        stride=own(module.stride, 1),
        padding=own(module.padding, 0),
        dilation=own(module.dilation, 1),
        groups=module.groups,
        padding_mode=module.padding_mode,
        bias=False,
        device="meta",
        **settings,
    )
    return _fill(layer, weight, source)


_CHAINS: dict[type | str, Callable[..., list[nn.Module]]] = {
    nn.Linear: _linear_chain,
    "transformers.pytorch_utils.Conv1D": _linear_chain,  # x W, with U along the outputs too
    nn.Embedding: _embedding_chain,
    **dict.fromkeys(
        (
            nn.Conv1d,
            nn.Conv2d,
            nn.Conv3d,
            nn.ConvTranspose1d,
            nn.ConvTranspose2d,
            nn.ConvTranspose3d,
        ),
        _conv_chain,
    ),
}
