"""How attention is laid out: the notation, and the types that are known.

The types of transformers are a table, ``families.csv``, one row a type; they are never imported.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import NoneType
from typing import Any, NamedTuple

from torch import nn


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


def projections(layout: str) -> list[Projection]:
    """Read the submodules that project, those of queries, keys and values first.

    Args:
        layout: their dotted paths. Behind a colon the order in a packed one, "qkv:qkv proj", in
            brackets where it is repeated for every key head, "query_key_value:(qkv) dense"; ".T"
            at the end of weights stored inputs×outputs, "c_attn.T:qkv c_proj.T".
    """
    found = []
    for word in layout.split():
        path, _, order = word.partition(":")
        parts = [part for part in "qkv" if part in order] or [""]
        transposed = path.endswith(".T")
        found += [linear(path.removesuffix(".T"), part, order, transposed) for part in parts]
    return found


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
        return (projections(parts) if isinstance(parts, str) else parts)[ROLES.index(role)]


ROLES = ("query", "key", "value", "output")


def owner_of(module: nn.Module, place: Place) -> tuple[nn.Module, str]:
    """The module that holds the parameter of a place, and what it calls it."""
    path, _, attribute = place.path.rpartition(".")
    return module.get_submodule(path), attribute


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


def _timm(module: Any) -> Attention:
    return Attention(
        "qkv:qkv proj",
        module.num_heads,
        module.head_dim,
        scores_fixed=_between("q_norm k_norm", module),
        outputs_fixed=_between("norm gate", module),
    )


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads")
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")
_SCORES = (  # what types have, or have not, between queries and keys, by its name
    "q_norm k_norm q_layernorm k_layernorm query_layernorm key_layernorm q_layer_norm k_layer_norm "
    "qk_norm distance_embedding rel_pos_h pos_key_proj pos_query_proj clip_qkv"
)
_OUTPUTS = "attn_sub_norm inner_attn_ln v_norm gate_proj clip_qkv rotary_value"


def _known(layout: str, scores: str, outputs: str) -> Callable[[nn.Module], Attention]:
    """Read a type whose layout is written down; numbers and sizes of heads are the module's."""
    layouts = [projections(one) for one in layout.split("|")]

    def read(module: nn.Module) -> Attention:
        there = (one for one in layouts if all(_is_there(module, part) for part in one))
        parts = next(there, layouts[-1])
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
            outputs_fixed=outputs or _between(_OUTPUTS, own, config),
        )

    return read


def _is_there(module: nn.Module, projection: Projection) -> bool:
    path = projection.weight.path.rpartition(".")[0]
    return path in dict(module.named_modules())


def _length(module: nn.Module, projection: Projection, side: int) -> int:
    """Number of outputs (0) or inputs (1) of a projection."""
    shape: Any = getattr(*owner_of(module, projection.weight)).shape
    return int(shape[side ^ projection.inputs_first])


def _number(names: Sequence[str], *owners: Any) -> int:
    """The first of these attributes that is a number, of the first owner that has one; or 0."""
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((number for number in found if isinstance(number, int) and number), 0)


_REASONS = {
    "rotary": "rotary embeddings between the factors turn queries and keys",
    "positions": "positions between the factors meet queries or keys alone",
    "cosine": "queries and keys are normalized between the factors",
    "biases": "biases of its own between the factors",
    "": "",
}
TRANSFORMERS: dict[str, tuple[str, str, str]] = {
    f"transformers.models.{row['type']}": (
        row["layout"], _REASONS[row["scores"]], _REASONS[row["outputs"]]
    )
    for row in csv.DictReader(files(__package__).joinpath("families.csv").open(encoding="utf-8"))
}  # fmt: skip
"""Full name of a type of transformers -> its layout, and what is between the factors.

A type is in the table because a test read the same products off its own forward; another that
looks like it is left alone until it is tested. "|" stands between layouts, for modules of one
type where the first is not there.
"""
READERS: dict[type | str, Callable[[nn.Module], Attention]] = {
    nn.MultiheadAttention: _multihead,
    "timm.layers.attention.Attention": _timm,
    **{name: _known(*row) for name, row in TRANSFORMERS.items()},
}
"""Type or qualified name -> what reads its modules; those of transformers are rows of a table."""
