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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frobdecay.product.factor import Factor, is_sharded
from frobdecay.product.product import Product


class Place(NamedTuple):
    """Where a weight or bias is: dotted path of the parameter, and part ``slot`` of ``slots``."""

    path: str
    slot: int = 0
    slots: int = 1


class Projection(NamedTuple):
    """One of the four linear maps; ``inputs_first`` for weights stored inputs×outputs."""

    weight: Place
    bias: Place
    inputs_first: bool = False


def linear(path: str, slot: int = 0, slots: int = 1, inputs_first: bool = False) -> Projection:
    """A projection by a submodule with ``weight`` and ``bias``."""
    weight, bias = (Place(f"{path}.{name}", slot, slots) for name in ("weight", "bias"))
    return Projection(weight, bias, inputs_first)


@dataclass(frozen=True)
class Attention:
    """What there is to know about an attention module.

    Attributes:
        projections: of queries, keys and values, and the output's.
        heads: number of query heads.
        size: of each head, d.
        sharing: number of query heads that share one key and value head.
        scores_fixed, outputs_fixed: what acts between queries and keys, or values and outputs;
            see Note [between the factors].
    """

    projections: Sequence[Projection]
    heads: int
    size: int
    sharing: int = 1
    scores_fixed: str | None = None
    outputs_fixed: str | None = None

    def part(self, role: str) -> Projection:
        """The projection with this role."""
        return self.projections[_ROLES.index(role)]


_ROLES = ("query", "key", "value", "output")


def provider(
    read: Callable[[nn.Module], Attention], kind: type | str | None = None
) -> Callable[[nn.Module, str], list[Product]]:
    """Make a provider for one type of attention module, as ``register_products`` takes them.

    Args:
        read: says of a module where its projections are; an AttributeError will be explained.
        kind: the type or its qualified name; what subclasses do in a ``forward`` of their own is
            not known, and their products are ``fixed``.

    Returns:
        A provider of "<name>.query_key" and "<name>.output_value". It raises a ValueError that
        names the module where the weights do not have the heads that the attributes say.
    """

    def provide(module: nn.Module, name: str) -> list[Product]:
        called = f"{name or 'the model'} ({type(module).__name__})"
        try:
            attention = read(module)
            if kind is not None and _overridden(module, kind):
                own = f"a forward of its own in {type(module).__name__} between the factors"
                attention = replace(attention, scores_fixed=own, outputs_fixed=own)
            return list(_products(module, name, attention, called))
        except AttributeError as error:
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


def _products(module: nn.Module, name: str, attention: Attention, called: str) -> Iterator[Product]:
    factors = {role: _weight(module, attention, role, called) for role in _ROLES}
    packed = any(projection.weight.slots > 1 for projection in attention.projections)
    if packed and None in factors.values():
        return
    for product, left, right, fixed in (
        ("query_key", "query", "key", attention.scores_fixed),
        ("output_value", "output", "value", attention.outputs_fixed),
    ):
        u, v = factors[left], factors[right]
        if u is not None and v is not None:
            biases = tuple(_bias(module, attention, role) for role in (left, right))
            path = f"{name}.{product}".lstrip(".")
            yield Product(path, (u, v), batch=1, biases=biases, fixed=fixed)


def _weight(module: nn.Module, attention: Attention, role: str, called: str) -> Factor | None:
    """The weight, seen as (heads, [queries,] width, size); None where it is not used as it is."""
    projection = attention.part(role)
    owner, attribute = _owner(module, projection.weight)
    weight = owner._parameters.get(attribute)
    alone = owner is module or not (owner._modules or set(owner._parameters) - {"weight", "bias"})
    if weight is None or not alone or not _plain(weight):
        return None
    groups, axes = _heads(attention, role, projection.weight)
    heads_first = projection.inputs_first == (role == "output")
    expected, got = prod(axes.values()), weight.shape[0 if heads_first else 1]
    if expected != got:
        raise ValueError(
            f"{called}: expected {projection.weight.path} to hold {expected} = "
            f"{' × '.join(f'{length} {_AXES[axis]}' for axis, length in axes.items())} by "
            f"{'inputs' if role == 'output' else 'outputs'} ({attention.heads} heads in all), got "
            f"{got} of shape {tuple(weight.shape)}; {_REMEDY}"
        )
    stored = f"({groups} d) e" if heads_first else f"e ({groups} d)"
    return _factor(owner, attribute, f"{stored} -> {groups} e d", axes, projection.weight)


def _bias(module: nn.Module, attention: Attention, role: str) -> Factor | None:
    """The bias as (heads, [queries,] 1, size): one more row of the factor; None without one."""
    place = attention.part(role).bias
    owner, attribute = _owner(module, place)
    if role == "output" or getattr(owner, attribute, None) is None:
        return None  # the output's bias comes after the product
    groups, axes = _heads(attention, role, place)
    return _factor(owner, attribute, f"({groups} d) -> {groups} 1 d", axes, place)


def _factor(
    owner: nn.Module, attribute: str, pattern: str, axes: dict[str, int], place: Place
) -> Factor:
    index = place.slot if place.slots > 1 else None
    return Factor(owner, attribute, pattern, tuple(axes.items()), index)


_AXES = {"p": "parts", "h": "key heads", "q": "queries", "d": "numbers"}


def _heads(attention: Attention, role: str, place: Place) -> tuple[str, dict[str, int]]:
    """The axes before the width, as in a pattern, and the lengths of all but the width."""
    axes = {"h": attention.heads // attention.sharing}
    if place.slots > 1:
        axes = {"p": place.slots, **axes}
    if attention.sharing > 1 and role in ("query", "output"):
        axes["q"] = attention.sharing
    return " ".join(axes), {**axes, "d": attention.size}


def _owner(module: nn.Module, place: Place) -> tuple[nn.Module, str]:
    path, _, attribute = place.path.rpartition(".")
    return module.get_submodule(path), attribute


def _plain(weight: Tensor) -> bool:
    """Whether a parameter holds the numbers themselves; sharded ones do, quantized ones do not."""
    numbers = weight.is_floating_point() and weight.layout == torch.strided
    return numbers and (type(weight) is nn.Parameter or is_sharded(weight))


def _linears(*paths: str) -> list[Projection]:
    return [linear(path) for path in paths]


def _between(module: nn.Module, *names: str) -> str | None:
    """Say which of these submodules are there and do something."""
    there = [
        name
        for name in names
        if not isinstance(getattr(module, name, None), nn.Identity | NoneType)
    ]
    return f"{' and '.join(there)} between the factors" if there else None


def _multihead(module: Any) -> Attention:
    """torch: packed where keys and values have the width of queries; biases always packed."""
    packed = module._qkv_same_embed_dim

    def part(slot: int, name: str) -> Projection:
        weight = Place("in_proj_weight", slot, 3) if packed else Place(f"{name}_proj_weight")
        return Projection(weight, Place("in_proj_bias", slot, 3))

    added = None if module.bias_k is None else "add_bias_kv=True adds a key and a value of its own"
    return Attention(
        [part(0, "q"), part(1, "k"), part(2, "v"), linear("out_proj")],
        module.num_heads,
        module.head_dim,
        scores_fixed=added,
        outputs_fixed=added,
    )


def _bert(module: Any) -> Attention:
    parts = _linears("self.query", "self.key", "self.value", "output.dense")
    own = module.self
    fixed = _between(own, "distance_embedding")
    return Attention(parts, own.num_attention_heads, own.attention_head_size, scores_fixed=fixed)


def _gpt2(module: Any) -> Attention:
    """Packed, inputs×outputs; in cross-attention the queries are apart."""
    parts = [linear("c_attn", k, 3, inputs_first=True) for k in range(3)]
    if module.is_cross_attention:
        parts = [linear("c_attn", k, 2, inputs_first=True) for k in range(2)]
        parts.insert(0, linear("q_attn", inputs_first=True))
    parts.append(linear("c_proj", inputs_first=True))
    return Attention(parts, module.num_heads, module.head_dim)


def _llama(module: Any) -> Attention:
    return Attention(
        _linears("q_proj", "k_proj", "v_proj", "o_proj"),
        module.config.num_attention_heads,
        module.head_dim,
        module.num_key_value_groups,
        scores_fixed="rotary embeddings between the factors turn queries and keys",
    )


def _t5(module: Any) -> Attention:
    return Attention(_linears(*"qkvo"), module.n_heads, module.key_value_proj_dim)


def _vit(module: Any) -> Attention:
    parts = _linears("q_proj", "k_proj", "v_proj", "o_proj")
    return Attention(parts, module.num_attention_heads, module.head_dim)


def _timm(module: Any) -> Attention:
    return Attention(
        [*(linear("qkv", k, 3) for k in range(3)), linear("proj")],
        module.num_heads,
        module.head_dim,
        scores_fixed=_between(module, "q_norm", "k_norm"),
        outputs_fixed=_between(module, "norm", "gate"),
    )


_MODELS = "transformers.models"
_READERS: dict[type | str, Callable[[nn.Module], Attention]] = {
    nn.MultiheadAttention: _multihead,
    f"{_MODELS}.bert.modeling_bert.BertAttention": _bert,
    f"{_MODELS}.roberta.modeling_roberta.RobertaAttention": _bert,
    f"{_MODELS}.gpt2.modeling_gpt2.GPT2Attention": _gpt2,
    f"{_MODELS}.llama.modeling_llama.LlamaAttention": _llama,
    f"{_MODELS}.mistral.modeling_mistral.MistralAttention": _llama,
    f"{_MODELS}.mixtral.modeling_mixtral.MixtralAttention": _llama,
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2Attention": _llama,
    f"{_MODELS}.qwen3.modeling_qwen3.Qwen3Attention": _llama,
    f"{_MODELS}.qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention": _llama,
    f"{_MODELS}.t5.modeling_t5.T5Attention": _t5,
    f"{_MODELS}.vit.modeling_vit.ViTAttention": _vit,
    "timm.layers.attention.Attention": _timm,
}
ATTENTION: dict[type | str, Callable[[nn.Module, str], list[Product]]] = {
    kind: provider(read, kind) for kind, read in _READERS.items()
}
"""Type or qualified name -> its provider. A new type is one more line above."""
