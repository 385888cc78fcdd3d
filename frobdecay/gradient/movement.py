"""How far factors move in a step, from a copy of them that is made before it.

One buffer holds the copies of many. They stay as they are: of a step that is 10⁸ times a factor,
new + (old − new) has nothing left of old.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from frobdecay.algebra.precision import HALF
from frobdecay.algebra.sharpness import norms_above
from frobdecay.gradient.bucketed import Grams
from frobdecay.gradient.flat import Batched, stacked


class Movement:
    """Where the factors are now, to find out later how far they have moved.

    Args:
        held: what this process has of every factor.
        moving: of every factor, whether it may move.
        batched: kept from step to step.
    """

    @torch.no_grad()
    def __init__(self, held: Sequence[Tensor], moving: Sequence[bool], batched: Batched) -> None:
        self._factors = len(held)
        chosen = [k for k, moves in enumerate(moving) if moves]
        self._copies: dict[int, Tensor] = {}
        for batch, layout in batched.of([held[k] for k in chosen]):
            members = [chosen[i] for i in batch]
            tensors = [held[k] for k in members]
            first = tensors[0]
            dtype = torch.float32 if first.dtype in HALF else first.dtype
            buffer = torch.empty(layout.entries, dtype=dtype, device=first.device)
            views = layout.views(buffer)
            torch._foreach_copy_(views, tensors)
            self._copies.update(zip(members, views, strict=True))

    def copies(self) -> list[Tensor | None]:
        """The copy of every factor, None of those that may not move."""
        return [self._copies.get(k) for k in range(self._factors)]

    @torch.no_grad()
    def steps(self, held: Sequence[Tensor]) -> list[Tensor | None]:
        """New − old of every factor, as the copies are; None of those that may not move."""
        alike: dict[object, list[int]] = defaultdict(list)
        for k, copy in self._copies.items():
            alike[copy.device, held[k].dtype].append(k)
        found: list[Tensor | None] = [None] * self._factors
        for members in alike.values():
            now, then = [held[k] for k in members], [self._copies[k] for k in members]
            for k, step in zip(members, torch._foreach_sub(now, then), strict=True):
                found[k] = step
        return found


def norms_of(grams: Grams, wanted: Collection[int]) -> dict[int, Tensor]:
    """Spectral norms from above, (*batch) for each factor that is wanted, from their Grams."""
    return stacked(norms_above, {k: grams[k] for k in wanted})
