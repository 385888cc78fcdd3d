"""Spectral initialization of many weights: those of equal shape together, as one batch.

A small decomposition costs more calls than arithmetic. Weights that are read as matrices of equal
shape, dtype, device and rank are therefore decomposed as one batch, which computes the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.calibrated.truncation import Metric
from frobdecay.algebra.spectral import spectral_init
from frobdecay.models.budget.entry import Entry
from frobdecay.product.names import naming
from frobdecay.weights.lowrank import LowRank

# Entries of a stack, unless one weight alone has more: 8 MB, and a few times that while the
# decomposition works in float64.
STACKED = 2**20


def with_factors(chosen: Sequence[Entry]) -> Iterator[tuple[Entry, Sequence[Tensor]]]:
    """Decompose weights in order, each when its turn comes or with a stack that it is in.

    Args:
        chosen: the weights that have a rank; nothing is changed.

    Yields:
        each, and the factors.

    Raises:
        TypeError, ValueError, RuntimeError: an initialization that fails, naming the weight.
    """
    stacks = {id(entry): stack for stack in _stacks(chosen) for entry in stack}
    ready: dict[int, Sequence[Tensor]] = {}
    for entry in chosen:
        key, tensor = id(entry), entry.weight.parameter
        with naming(entry.weight.name):
            if key in stacks and key not in ready:
                ready |= _decomposed(stacks[key])
            if entry.metric is not None:
                factors = _calibrated(entry, entry.metric())
            else:
                factors = ready.pop(key) if key in stacks else entry.made.right_inverse(tensor)
        yield entry, factors


def _stacks(chosen: Sequence[Entry]) -> Iterator[list[Entry]]:
    """What is to be decomposed together: at least two of a kind."""
    largest = max((entry.dense for entry in chosen), default=0)
    alike: dict[Any, list[Entry]] = defaultdict(list)
    for entry in chosen:
        if (key := _alike(entry)) is not None:
            alike[key].append(entry)
    for entries in alike.values():
        count = max(1, max(STACKED, largest) // entries[0].dense)
        parts = (entries[start : start + count] for start in range(0, len(entries), count))
        yield from (part for part in parts if len(part) > 1)


def _alike(entry: Entry) -> Any:
    """What weights of one stack share; None for initializations that are no function of it."""
    made, tensor = entry.made, entry.weight.tensor
    own = isinstance(made, LowRank) and type(made).right_inverse is LowRank.right_inverse
    if not own or made.init is not spectral_init or tensor is None or entry.metric is not None:
        return None
    shape = made.matricize(entry.shape).matrix_shape
    return shape[-2:], tensor.dtype, tensor.device, made.rank, made.depth


def _calibrated(entry: Entry, metric: Metric) -> Sequence[Tensor]:
    """Factors in the metric of the data; the error and what moves the bias are noted."""
    made = entry.made
    made.adopt(entry.shape)
    matrix = made.matricization.matrix(entry.weight.parameter.detach())
    found = metric.factors(matrix, made.rank, depth=made.depth)
    entry.error, entry.shift = found.error, found.shift
    if found.plain:
        which = f" in {', '.join(map(str, found.plain))} of {prod(matrix.shape[:-2])}"
        why = "nothing but zeros was seen" if metric.mean is None else "its outputs did not vary"
        entry.note = f"init='spectral'{which if matrix.ndim > 2 else ''}: {why}"
    return found.factors


def _decomposed(stack: Sequence[Entry]) -> dict[int, Sequence[Tensor]]:
    """Factors of the weights of a stack, by entry's id, each with memory of its own."""
    matrices = []
    for entry in stack:
        entry.made.adopt(entry.shape)
        matrices.append(entry.made.matricization.matrix(entry.weight.parameter.detach()))
    joined = torch.cat([matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices])
    done = spectral_init(joined, stack[0].made.rank, depth=stack[0].made.depth)
    counts = [prod(matrix.shape[:-2]) for matrix in matrices]
    parts = zip(*(torch.split(factor, counts) for factor in done), strict=True)
    return {
        id(entry): [f.reshape(*matrix.shape[:-2], *f.shape[-2:]).clone() for f in factors]
        for entry, matrix, factors in zip(stack, matrices, parts, strict=True)
    }
