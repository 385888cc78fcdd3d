r"""Attention: for each head, the query–key and the output–value product.

Attention never uses one of its four weights alone. For each head, with x the inputs of queries,
y those of keys and values, and a the attention weights,

    scores   x W_qᵀ (y W_kᵀ)ᵀ = x (W_qᵀ W_k) yᵀ    query–key      U = W_qᵀ, V = W_kᵀ    (e×d)
    outputs  (a y W_vᵀ) W_oᵀ  = a y (W_o W_v)ᵀ     output–value   U = W_o,  V = W_vᵀ    (e×d)

so that weight decay on each of the four is a penalty on nuclear norms (Khodak et al., ICLR 2021,
arXiv:2105.01029). Biases are left alone. Where several query heads share a key head, the product
is that of the key head with all of them stacked; ‖·‖² is the sum over the query heads.

These are the products of dense attention: a weight that is factorized or otherwise parametrized,
quantized, or has an adapter beside it is not what the layer multiplies with, and makes none. Of a
packed weight (queries, keys and values in one) either all parts are factors or none is, so that
its weight decay can be taken over.

Note [between the factors]. The product leaves out what a module does to queries and keys on their
way to each other. Rotary embeddings turn both: positions i and j meet in W_qᵀ R(j−i) W_k, and the
product is that of relative position 0. R is orthogonal, so it keeps the norm of every factor, but
not that of the product: small at 0 need not be small elsewhere. A normalization of queries and
keys takes the scale of W_q and W_k out of the scores, so that decay acts through the effective
step size. With either, other factors of the same product are another function, and ``balance_``
refuses. Scaling, masks, position biases, softmax and dropout act on the scores: nothing changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frobdecay.product.factor import Factor, is_sharded
from frobdecay.product.families import LEFT, TRANSFORMERS
from frobdecay.product.product import Product


class Place(NamedTuple):
    """Where a weight or bias is: dotted path of the parameter, and which part of a packed one.

    Attributes:
        path: of the parameter.
        part: "q", "k" or "v" of a packed one.
        order: of the parts there, such as "qkv", each with all its heads; in brackets, "(qkv)",
            for every key head its queries, the key and the value.
    """

    path: str
    part: str = ""
    order: str = ""


class Projection(NamedTuple):
    """One of the four linear maps; ``inputs_first`` for weights stored inputs×outputs."""

    weight: Place
    bias: Place
    inputs_first: bool = False


def linear(path: str, part: str = "", order: str = "", inputs_first: bool = False) -> Projection:
    """A projection by a submodule with ``weight`` and ``bias``, or a part of a packed one."""
    weight, bias = (Place(f"{path}.{name}", part, order) for name in ("weight", "bias"))
    return Projection(weight, bias, inputs_first)


@functools.cache
def projections(layout: str) -> tuple[Projection, ...]:
    """Read the submodules that project, those of queries, keys and values first.

    Args:
        layout: their dotted paths. Behind a colon the order in a packed one, "qkv:qkv proj", in
            brackets where it is repeated for every key head, "query_key_value:(qkv) dense"; ".T"
            at the end of weights stored inputs×outputs, "c_attn.T:qkv c_proj.T".
    """
    found: list[Projection] = []
    for word in layout.split():
        path, _, order = word.partition(":")
        parts = [part for part in "qkv" if part in order] or [""]
        transposed = path.endswith(".T")
        found += [linear(path.removesuffix(".T"), part, order, transposed) for part in parts]
    return tuple(found)


@dataclass(frozen=True)
class Attention:
    """What there is to know about an attention module.

    Attributes:
        projections: of queries, keys and values, and the output's; or their layout, such as
            "q_proj k_proj v_proj o_proj" or "qkv:qkv proj" (see ``projections``).
        heads: number of query heads.
        size: of each head, d.
        sharing: number of query heads that share one key and value head.
        value_size: of each head of values, if it is another.
        scores_fixed, outputs_fixed: what acts between queries and keys, or values and outputs;
            see Note [between the factors].
    """

    projections: Sequence[Projection] | str
    heads: int
    size: int
    sharing: int = 1
    value_size: int | None = None
    scores_fixed: str | None = None
    outputs_fixed: str | None = None

    def part(self, role: str) -> Projection:
        """The projection with this role."""
        parts = self.projections
        return (projections(parts) if isinstance(parts, str) else parts)[_ROLES.index(role)]


_ROLES = ("query", "key", "value", "output")


def _owner(module: nn.Module, place: Place) -> tuple[nn.Module, str]:
    path, _, attribute = place.path.rpartition(".")
    return module.get_submodule(path), attribute


class LeftAlone(NamedTuple):
    """What a provider yields in the place of a product that it does not make: its name, and why."""

    name: str
    reason: str


def provider(
    read: Callable[[nn.Module], Attention], kind: type | str | None = None
) -> Callable[[nn.Module, str], list[Product | LeftAlone]]:
    """Make a provider for one type of attention module, as ``register_products`` takes them.

    Args:
        read: says of a module where its projections are; an AttributeError will be explained.
        kind: the type or its qualified name; what subclasses do in a ``forward`` of their own is
            not known, and their products are ``fixed``. What is known by name only is left alone
            where it is not as it was.

    Returns:
        A provider of "<name>.query_key" and "<name>.output_value". It raises a ValueError that
        names the module where the weights do not have the heads that the attributes say.
    """

    def provide(module: nn.Module, name: str) -> list[Product | LeftAlone]:
        called = f"{name or 'the model'} ({type(module).__name__})"
        try:
            attention = read(module)
            if kind is not None and _overridden(module, kind):
                own = f"a forward of its own in {type(module).__name__} between the factors"
                attention = replace(attention, scores_fixed=own, outputs_fixed=own)
            return list(_products(module, name, attention, called))
        except AttributeError as error:
            if isinstance(kind, str):
                return [LeftAlone(name, f"{type(module).__name__} is not as it is known: {error}")]
            raise ValueError(
                f"{called}: expected what modules of this type have, but {error}; {_REMEDY}"
            ) from error

    return provide


def _overridden(module: nn.Module, kind: type | str) -> bool:
    """Whether a subclass of the type has another ``forward``."""
    bases: tuple[Any, ...] = type(module).__mro__
    (known,) = (b for b in bases if kind in (b, f"{b.__module__}.{b.__qualname__}"))
    return type(module).forward is not known.forward


_REMEDY = (
    "make attributes and weights agree, or register a provider for this type with "
    "frobdecay.register_products (one that yields nothing leaves it out)"
)


def _products(
    module: nn.Module, name: str, attention: Attention, called: str
) -> Iterator[Product | LeftAlone]:
    factors = {role: _weight(module, attention, role, called) for role in _ROLES}
    packed = any(attention.part(role).weight.order for role in _ROLES)
    why = {role: factor for role, factor in factors.items() if isinstance(factor, str)}
    for product, left, right, fixed in (
        ("query_key", "query", "key", attention.scores_fixed),
        ("output_value", "output", "value", attention.outputs_fixed),
    ):
        u, v = factors[left], factors[right]
        path = f"{name}.{product}".lstrip(".")
        if isinstance(u, Factor) and isinstance(v, Factor) and not (packed and why):
            biases = tuple(_bias(module, attention, role) for role in (left, right))
            yield Product(path, (u, v), batch=1, biases=biases, fixed=fixed)
        else:
            yield LeftAlone(path, why.get(left) or why.get(right) or next(iter(why.values())))


def _weight(module: nn.Module, attention: Attention, role: str, called: str) -> Factor | str:
    """The weight, seen as (heads, [queries,] width, size); or why it is not used as it is."""
    projection = attention.part(role)
    owner, attribute = _owner(module, projection.weight)
    weight = owner._parameters.get(attribute)
    path = projection.weight.path
    if weight is None:
        return f"{path} is computed from other parameters, such as factors"
    if owner is not module and (owner._modules or set(owner._parameters) - {"weight", "bias"}):
        return f"{path} has more beside it, such as an adapter"
    if not _plain(weight):
        return f"{path} does not hold the numbers themselves"
    heads_first = projection.inputs_first == (role == "output")
    axes = _heads(attention, role, projection.weight)
    expected, got = prod(axes.values()), weight.shape[0 if heads_first else 1]
    if expected != got:
        raise ValueError(
            f"{called}: expected {path} to hold {expected} = "
            f"{' × '.join(f'{length} {_AXES[axis]}' for axis, length in axes.items())} by "
            f"{'inputs' if role == 'output' else 'outputs'} ({attention.heads} heads in all), got "
            f"{got} of shape {tuple(weight.shape)}; {_REMEDY}"
        )
    stored = "{} e" if heads_first else "e {}"
    return _factor(module, attention, role, projection.weight, stored, "e")


def _bias(module: nn.Module, attention: Attention, role: str) -> Factor | None:
    """The bias as (heads, [queries,] 1, size): one more row of the factor; None without one."""
    place = attention.part(role).bias
    owner, attribute = _owner(module, place)
    if role == "output" or getattr(owner, attribute, None) is None:
        return None  # the output's bias comes after the product
    return _factor(module, attention, role, place, "{}", "1")


_AXES = {"n": "heads", "g": "key heads", "q": "queries", "d": "numbers"}


def _heads(attention: Attention, role: str, place: Place) -> dict[str, int]:
    """The axes of the side of the heads, and their lengths; in packed blocks all heads are one."""
    shared, groups = attention.sharing, attention.heads // attention.sharing
    if place.order:
        each = sum(shared if part == "q" else 1 for part in place.order.strip("()"))
        axes = {"g": groups, "n": each} if place.order.startswith("(") else {"n": groups * each}
    else:
        axes = {"g": groups}
        if shared > 1 and role in ("query", "output"):
            axes["q"] = shared
    size = attention.value_size if role in ("value", "output") else None
    return {**axes, "d": size or attention.size}


def _factor(
    module: nn.Module, attention: Attention, role: str, place: Place, stored: str, width: str
) -> Factor:
    """See a parameter, stored as said around its side of heads, as (heads, [queries,] width, d)."""
    owner, attribute = _owner(module, place)
    axes = _heads(attention, role, place)
    side, rows = f"({' '.join(axes)})", f"{width} d"
    if not place.order:
        pattern = f"{stored.format(side)} -> {' '.join([*axes][:-1])} {rows}"
        return Factor(owner, attribute, pattern, tuple(axes.items()))
    shared, groups = attention.sharing, attention.heads // attention.sharing
    parts = place.order.strip("()")
    counts = [shared if part == "q" else 1 for part in parts]
    start, count = sum(counts[: parts.index(place.part)]), counts[parts.index(place.part)]
    index: int | tuple[int, int] = (start * groups, (start + count) * groups)
    lead, apart = "n", "(g q)"
    if "g" in axes:
        index = (start, start + count) if count > 1 else start
        lead, apart = "n g", "q g"
    then = f"{apart} {rows} -> g q {rows}" if count > 1 else None
    sizes = tuple({**axes, "g": groups, "q": shared}.items())
    return Factor(owner, attribute, f"{stored.format(side)} -> {lead} {rows}", sizes, index, then)


def _plain(weight: Tensor) -> bool:
    """Whether a parameter holds the numbers themselves; sharded ones do, quantized ones do not."""
    numbers = weight.is_floating_point() and weight.layout == torch.strided
    return numbers and (type(weight) is nn.Parameter or is_sharded(weight))


def _between(names: str, *owners: Any) -> str | None:
    """Say which of these attributes are there and do something."""
    there = [
        name
        for name in names.split()
        for value in (getattr(owner, name, None) for owner in owners)
        if value is not False and not isinstance(value, nn.Identity | NoneType)
    ]
    return f"{' and '.join(dict.fromkeys(there))} between the factors" if there else None


def _multihead(module: Any) -> Attention:
    """torch: packed where keys and values have the width of queries; biases always packed."""
    packed = module._qkv_same_embed_dim

    def part(name: str) -> Projection:
        weight = Place("in_proj_weight", name, "qkv") if packed else Place(f"{name}_proj_weight")
        return Projection(weight, Place("in_proj_bias", name, "qkv"))

    added = None if module.bias_k is None else "add_bias_kv=True adds a key and a value of its own"
    return Attention(
        [*map(part, "qkv"), linear("out_proj")],
        module.num_heads,
        module.head_dim,
        scores_fixed=added,
        outputs_fixed=added,
    )


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads")
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")
_SCORES = (  # what types have, or have not, between queries and keys, by its name
    "q_norm k_norm q_layernorm k_layernorm query_layernorm key_layernorm q_layer_norm k_layer_norm "
    "qk_norm distance_embedding rel_pos_h pos_key_proj pos_query_proj clip_qkv"
)
_OUTPUTS = "attn_sub_norm inner_attn_ln v_norm gate_proj clip_qkv rotary_value"


def _known(
    layout: str, scores: str = "", outputs: str = "", names: str = _OUTPUTS
) -> Callable[[nn.Module], Attention]:
    """Read a type whose layout is written down; numbers and sizes of heads are the module's."""

    def read(module: nn.Module) -> Attention:
        layouts = [projections(one) for one in layout.split("|")]
        there = {f"{path}.weight" for path, _ in module.named_modules()}
        fit = (one for one in layouts if there.issuperset(part.weight.path for part in one))
        parts = next(fit, layouts[-1])
        key, output = parts[1], parts[3]
        own = module.get_submodule(parts[0].weight.path.rpartition(".")[0].rpartition(".")[0])
        config = getattr(own, "config", None)
        inner, rows = _length(module, output, 1), _length(module, key, 0)
        size = _number(_SIZES, own, module)
        heads = _number(_HEADS, own, module, config) or inner // (size or inner)
        value_size = inner // heads
        packed = key.weight.order.strip("()")  # "qkv" or "kv" if so
        groups = rows // (size or value_size)
        groups = (groups - heads * ("q" in packed)) // 2 if packed else groups
        return Attention(
            parts,
            heads,
            size or value_size,
            heads // groups if groups > 0 and heads % groups == 0 else 1,
            value_size,
            scores_fixed=scores or _between(_SCORES, own, config),
            outputs_fixed=outputs or _between(names, own, config),
        )

    return read


def _length(module: nn.Module, projection: Projection, side: int) -> int:
    """Number of outputs (0) or inputs (1) of a projection."""
    shape: Any = getattr(*_owner(module, projection.weight)).shape
    return int(shape[side ^ projection.inputs_first])


def _number(names: Sequence[str], *owners: Any) -> int:
    """The first of these attributes that is a number, of the first owner that has one; or 0."""
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((number for number in found if isinstance(number, int) and number), 0)


_READERS: dict[type | str, Callable[[nn.Module], Attention]] = {
    nn.MultiheadAttention: _multihead,
    "timm.layers.attention.Attention": _known("qkv:qkv proj", names=f"{_OUTPUTS} norm gate"),
    **{name: _known(*row) for name, row in TRANSFORMERS.items()},
}


def _leave(reason: str) -> Callable[[nn.Module, str], list[Product | LeftAlone]]:
    """A provider of no product, but of the reason."""
    return lambda module, name: [LeftAlone(name, f"{type(module).__name__}: {reason}")]


ATTENTION: dict[type | str, Callable[[nn.Module, str], list[Product | LeftAlone]]] = {
    **{kind: provider(read, kind) for kind, read in _READERS.items()},
    **{name: _leave(reason) for name, reason in LEFT.items()},
}
"""Type or qualified name -> its provider."""
