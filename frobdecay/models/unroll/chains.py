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
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from frobdecay.algebra.reading import Matricization
from frobdecay.product.holding import dense_type, lists_of
from frobdecay.weights.forms.convolution import Half, halves, kernels
from frobdecay.weights.lowrank import LowRank

UNROLLED = "_unrolled"
"""The attribute by which a chain says that it stands for a layer of another class."""

_POINTWISE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


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
        fits = _halves(module, view) is not None
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


def _halves(module: _ConvNd, view: Matricization) -> tuple[Half, Half] | None:
    """What V and U hold of the weight, or None where V has not the inputs and U the outputs."""
    found = halves(view)
    if found is None or view.batch != (module.groups,) * (module.groups > 1):
        return None
    into = 0 if isinstance(module, _ConvTransposeNd) else 1
    return found if found[into].side == 1 else None


def _conv_chain(
    module: nn.Module, view: Matricization, factors: tuple[Tensor, ...]
) -> list[nn.Module]:
    assert isinstance(module, _ConvNd)
    found = _halves(module, view)
    assert found is not None
    U, *inner, V = factors
    half = {
        one.side: (one, kernel)
        for one, kernel in zip(found, kernels(found, view, (U, V)), strict=True)
    }
    middle = [_pointwise(M, module.groups, len(module.kernel_size)) for M in reversed(inner)]
    return [_link(module, *half[1], V), *middle, _link(module, *half[0], U, module.bias)]


def _link(
    module: _ConvNd, half: Half, weight: Tensor, source: Tensor, bias: Any = None
) -> nn.Module:
    """A convolution with the module's settings along its own kernel dimensions."""
    kind: Any = dense_type(module)
    into, out, settings = weight.shape[1] * module.groups, weight.shape[0], {}
    if isinstance(module, _ConvTransposeNd):
        into, out = out, into
        settings = {"output_padding": half.own(module.output_padding, 0)}
    layer = kind(
        into,
        out,
        tuple(weight.shape[2:]),
        stride=half.own(module.stride, 1),
        padding=half.own(module.padding, 0),
        dilation=half.own(module.dilation, 1),
        groups=module.groups,
        padding_mode=module.padding_mode,
        bias=False,
        device="meta",
        **settings,
    )
    return _fill(layer, weight, source, bias)


def _pointwise(M: Tensor, groups: int, dims: int) -> nn.Module:
    """An inner factor, as a 1×1 convolution."""
    r, s = M.shape[-2:]
    kind = _POINTWISE[dims]
    layer = kind(s * groups, r * groups, 1, groups=groups, bias=False, device="meta")
    return _fill(layer, M.reshape(-1, s, *[1] * dims), M)


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
