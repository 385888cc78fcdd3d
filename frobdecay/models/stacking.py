"""Spectral initialization of many weights: those of equal shape together, as one batch.

A small decomposition costs more calls than arithmetic. Weights that are read as matrices of equal
shape, dtype, device and rank are therefore decomposed as one batch, which computes the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.spectral import spectral_init
from frobdecay.models.candidates import Entry
from frobdecay.weights.lowrank import LowRank

# Entries of a stack, unless one weight alone has more: 8 MB, and a few times that while the
# decomposition works in float64.
STACKED = 2**20


class Stacks:
    """Factors for weights that are registered one after the other, a stack ahead.

    Args:
        chosen: what is going to be registered, in this order.
    """

    def __init__(self, chosen: Sequence[Entry]) -> None:
        self.made: dict[int, Any] = {id(entry): _made(entry) for entry in chosen}
        self._stacks: dict[int, list[Entry]] = {}
        self._ready: dict[int, tuple[Tensor, ...]] = {}
        largest = max((entry.dense for entry in chosen), default=0)
        alike: dict[Any, list[Entry]] = defaultdict(list)
        for entry in chosen:
            if (key := self._key(entry)) is not None:
                alike[key].append(entry)
        for entries in alike.values():
            count = max(1, max(STACKED, largest) // entries[0].dense)
            for start in range(0, len(entries), count):
                stack = entries[start : start + count]
                self._stacks |= {id(entry): stack for entry in stack if len(stack) > 1}

    def _key(self, entry: Entry) -> Any:
        """What weights of one stack share; None for initializations that are no function of it."""
        made, tensor = self.made[id(entry)], entry.weight.tensor
        own = isinstance(made, LowRank) and type(made).right_inverse is LowRank.right_inverse
        if not own or made.init is not spectral_init or tensor is None:
            return None
        shape = made.matricize(entry.shape).matrix_shape
        return shape[-2:], tensor.dtype, tensor.device, entry.rank, made.depth

    def with_factors(self, entry: Entry, register: Callable[[Any], None]) -> None:
        """Call ``register`` with the entry's parametrization, its decomposition done already."""
        made = self.made[id(entry)]
        stack = self._stacks.get(id(entry))
        if stack is None:
            register(made)
            return
        if id(entry) not in self._ready:
            self._ready |= self._decomposed(stack)
        factors = self._ready.pop(id(entry))
        made.init = lambda weight, rank, *, depth: factors
        try:
            register(made)
        finally:
            made.init = spectral_init

    def _decomposed(self, stack: Sequence[Entry]) -> dict[int, tuple[Tensor, ...]]:
        """Factors of the weights of a stack, by entry's id, each with memory of its own."""
        made = self.made[id(stack[0])]
        matrices = []
        for entry in stack:
            assert entry.weight.tensor is not None
            view = self.made[id(entry)].matricize(entry.shape)
            matrices.append(view.matrix(entry.weight.tensor.detach()))
        joined = torch.cat([matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices])
        done = spectral_init(joined, stack[0].rank, depth=made.depth)
        found, start = {}, 0
        for entry, matrix in zip(stack, matrices, strict=True):
            batch = matrix.shape[:-2]
            end = start + prod(batch)
            found[id(entry)] = tuple(
                f[start:end].reshape(*batch, *f.shape[-2:]).clone() for f in done
            )
            start = end
        return found


def _made(entry: Entry) -> Any:
    assert entry.make is not None
    assert entry.rank is not None
    return entry.make(entry.rank)
