"""Sheets: the targets that one launch of updates can write, none of them twice.

Usually there is one sheet. A second dtype among the targets makes another one, and so does a
parameter that is a factor twice: its updates are added one after the other, in the order of the
products. Atomic additions would need no second launch, but their sums differ from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from frobdecay.gradient.bucketed import turns

Form = tuple[torch.dtype, tuple[int, ...]]
"""Of a target: dtype, strides."""


@dataclass
class Sheet:
    """Targets that one launch B can write at once: of one dtype, and none twice.

    Attributes:
        dtype: of the targets.
        addresses: one a slot, 0 for none.
    """

    dtype: torch.dtype
    addresses: list[int]


def sheets(
    places: Sequence[int], dtypes: Sequence[torch.dtype], groups: Sequence[int]
) -> list[Sheet]:
    """Distribute targets over launches, so that no two programs of one write the same numbers.

    Args:
        places: addresses of the targets, one a slot; 0 for none.
        dtypes: of the targets, one a slot; any for none.
        groups: from ``overlapping``.
    """
    wanted = [slot for slot, place in enumerate(places) if place]
    order = turns([places[slot] for slot in wanted], [groups[slot] for slot in wanted])
    found: dict[tuple[int, torch.dtype], Sheet] = {}
    for turn, slot in zip(order, wanted, strict=True):
        key = turn, dtypes[slot]
        if key not in found:
            found[key] = Sheet(dtypes[slot], [0] * len(places))
        found[key].addresses[slot] = places[slot]
    return list(found.values())
