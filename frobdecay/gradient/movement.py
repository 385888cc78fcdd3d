"""How far factors move in a step, from a copy of them that is made before it.

One buffer holds the copies of many. They stay as they are: of a step that is 10⁸ times a factor,
new + (old − new) has nothing left of old.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from frobdecay.algebra.precision import common_dtype
from frobdecay.algebra.sharpness import norms_above
from frobdecay.gradient.bucketed import Grams
from frobdecay.gradient.flat import Batched, stacked


class Movement:
    """Where the factors are now, to find out later how far they have moved.

    Args:
        held: what this process has of every factor.
        moving: the numbers of those that may move.
        batched: kept from step to step.

    Attributes:
        copies: of those that may move, by their numbers.
    """

    @torch.no_grad()
    def __init__(self, held: Sequence[Tensor], moving: Sequence[int], batched: Batched) -> None:
        self.copies: dict[int, Tensor] = {}
        self._batches: list[tuple[list[int], list[Tensor]]] = []
        for batch, layout in batched.of([held[k] for k in moving]):
            members = [moving[i] for i in batch]
            tensors = [held[k] for k in members]
            dtype, device = common_dtype(tensors), tensors[0].device
            views = layout.views(torch.empty(layout.entries, dtype=dtype, device=device))
            torch._foreach_copy_(views, tensors)
            self._batches.append((members, views))
            self.copies.update(zip(members, views, strict=True))

    @torch.no_grad()
    def steps(self, held: Sequence[Tensor]) -> dict[int, Tensor]:
        """New − old, as the copies are."""
        found: dict[int, Tensor] = {}
        for members, then in self._batches:
            now = [held[k] for k in members]
            found.update(zip(members, torch._foreach_sub(now, then), strict=True))
        return found


def norms_of(grams: Grams, wanted: Collection[int]) -> dict[int, Tensor]:
    """Spectral norms from above, (*batch) for each factor that is wanted, from their Grams."""
    return stacked(norms_above, {k: grams[k] for k in wanted})
