"""Records of factorized weights: what a file has to say besides the factors' numbers.

    {"version": 1,
     "weights": {"conv.weight": {
         "kind": "LowRank",
         "shape": [8, 4, 3, 3],
         "config": {"rank": 2, "pattern": "o i kh kw -> (o kh) (i kw)", …}}},
     "tied": {"decoder.weight": "encoder.weight"}}

A kind is a name in ``KINDS`` and is called with its ``config``: nothing is
imported, unpickled or evaluated. The factors are ``conv.parametrizations.weight.original0``, ….
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from math import prod
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from frobdecay.models.select import Weight
from frobdecay.product.holding import factorized
from frobdecay.weights.parametrization import KINDS

HEADER = "frobdecay"
RECORDS_VERSION = 1

# Beyond these a record is no weight's; a file must not make us count to what it says.
_ENTRIES, _MANY = 2**40, 64


def factor_key(name: str, i: int | str) -> str:
    """The key of factor i of the weight ``name`` in a ``state_dict``."""
    path, _, attribute = name.rpartition(".")
    return f"{path}.parametrizations.{attribute}.original{i}".lstrip(".")


_FACTOR = re.compile(r"(?P<path>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.original\d+", re.S)


def weight_of(key: str) -> str | None:
    """The weight whose factor a key of a ``state_dict`` is, by ``factor_key``; None for others."""
    met = _FACTOR.fullmatch(key)
    return met["path"] + met["name"] if met else None


def record_of(weight: Weight) -> dict[str, Any]:
    """The record of one factorized weight.

    Raises:
        ValueError: a kind that no file can name, or another parametrization on top.
    """
    held = factorized(weight.module)[weight.attribute]
    if len(held) > 1:
        raise ValueError(
            f"{weight.name} has {type(held[1]).__name__} on top of {type(held[0]).__name__}, which "
            "a file cannot tell; remove one of the two"
        )
    kind = type(held[0])
    if KINDS.get(kind.__name__) is not kind:
        raise ValueError(
            f"{weight.name} is parametrized by {kind.__module__}.{kind.__qualname__}, which is not "
            f"among the known kinds {sorted(KINDS)}; add it to frobdecay.weights.parametrization."
            "KINDS here and where the file is to be loaded"
        )
    record: dict[str, Any] = json.loads(json.dumps(held[0].record()))  # as it comes back
    return record


def rebuild(name: str, record: Mapping[str, Any]) -> Any:
    """Make the parametrization of a record, fitted to its shape.

    Raises:
        ValueError: an unknown kind, or a config or a shape that is none; names the weight.
    """
    kind, config = record.get("kind"), record.get("config")
    shape: Any = record.get("shape")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"{name} is of kind {short(kind)}, but known are {sorted(KINDS)}; upgrade frobdecay, "
            "or add a kind of your own to frobdecay.weights.parametrization.KINDS"
        )
    if not isinstance(config, Mapping) or not _is_shape(shape) or _many(config):
        raise ValueError(
            f"{name}: expected a config and a shape in its record, got {short(record)}"
        )
    try:
        made: Any = KINDS[kind](**config)
        made.adopt(tuple(shape))
        if not all(map(_is_shape, shapes := made.factor_shapes(tuple(shape)))):
            raise ValueError(f"no factors are of shapes {short(shapes)}")
    except Exception as error:  # whatever a kind, which may be another's, does with what it gets
        raise ValueError(f"{name}: {kind} cannot be made from its record: {error}") from error
    return made


def _is_shape(shape: Any) -> bool:
    sizes = isinstance(shape, list | tuple) and all(type(n) is int and n > 0 for n in shape)
    return sizes and len(shape) <= _MANY and prod(shape) <= _ENTRIES


def _many(config: Mapping[Any, Any]) -> bool:
    """Whether a kind would count for long: factors, modes, or the axes of a pattern."""
    counts = [config.get("depth"), config.get("modes")]
    pattern = config.get("pattern")
    counts.append(len(pattern) // 8 if isinstance(pattern, str) else None)
    return any(isinstance(count, int) and count > _MANY for count in counts)


def parse_records(
    text: str, names: Collection[str]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Read the header of a file.

    Args:
        text: of the header.
        names: of the tensors in the file.

    Returns:
        Weight name -> record, and tied name -> the name its numbers are saved under.

    Raises:
        ValueError: not such a header, one of a later version, or one that ties what is not there.
    """
    try:
        header = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its structure is not JSON: {error}") from None
    found, tied = check_structure(header)
    for name, source in tied.items():
        if source not in names or name in names:
            there = "which is not in the file" if source not in names else "but has its own numbers"
            raise ValueError(f"{name} is said to be {source}, {there}")
    return found, tied


def check_structure(header: Any) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """The weights and the ties of a structure as JSON gives it, in a file's header or elsewhere.

    Raises:
        ValueError: none, or one of a later version.
    """
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"expected a structure with a version, got {short(header)}")
    if version > RECORDS_VERSION:
        raise ValueError(
            f"its structure is of version {version}, but this frobdecay reads up to "
            f"{RECORDS_VERSION}; upgrade frobdecay"
        )
    found, tied = header.get("weights"), header.get("tied", {})
    if not isinstance(found, dict) or not all(isinstance(r, dict) for r in found.values()):
        raise ValueError(f"expected a table of weights in its structure, got {short(found)}")
    if not isinstance(tied, dict) or not all(isinstance(n, str) for n in tied.values()):
        raise ValueError(f"expected a table of tied names in its structure, got {short(tied)}")
    return found, tied


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no name may have two meanings."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"a name twice among {short([name for name, _ in pairs])}")
    return made


@torch.no_grad()
def dense_weight(made: Any, factors: Sequence[Tensor]) -> Tensor:
    """Multiply out what ``factors_of`` found."""
    made.materialized = True
    dense: Tensor = made(*factors)
    return dense


def factors_of(
    name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Any, list[Tensor]]:
    """The parametrization of one weight and its factors, in order.

    Raises:
        ValueError: factors that are missing or do not fit their record or each other.
    """
    made = rebuild(name, record)
    shapes = [tuple(shape) for shape in made.factor_shapes(tuple(record["shape"]))]
    found = [tensors.get(factor_key(name, i)) for i in range(len(shapes))]
    got = [None if factor is None else tuple(factor.shape) for factor in found]
    if got != shapes:
        raise ValueError(f"{name}: expected factors of shapes {shapes}, got {got}")
    factors = [factor for factor in found if factor is not None]
    whole = all(f.layout == torch.strided and not f.is_meta and not f.is_quantized for f in factors)
    dtypes = {factor.dtype for factor in factors}
    if not whole or len(dtypes) > 1 or not factors[0].is_floating_point():
        kinds = [f"{f.dtype}, {f.layout}, {f.device}" for f in factors]
        raise ValueError(f"{name}: expected dense factors of one floating dtype, got {kinds}")
    return made, factors
