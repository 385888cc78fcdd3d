"""Sheets: the targets that one launch of updates can write, none of them twice.

Usually there is one sheet. A second dtype among the targets makes another one, and so does a
parameter that is a factor twice: its updates are added one after the other, in the order of the
products. Atomic additions would need no second launch, but their sums differ from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from frobdecay.gradient.triton.tables import Slot

Seen = tuple[int, torch.dtype, tuple[int, ...]]
"""Of a target: address, dtype, strides."""


@dataclass
class Sheet:
    """Targets that one launch B can write at once: of one dtype, and none twice.

    Attributes:
        dtype: of the targets.
        addresses: one a slot, 0 for none.
    """

    dtype: torch.dtype
    addresses: list[int]


def overlapping(slots: Sequence[Slot]) -> list[int]:
    """Number the slots so that those whose memory may overlap have one number."""
    spans = []
    for slot in slots:
        axes = zip(slot.view.shape, slot.view.stride(), strict=True)
        last = sum((size - 1) * step for size, step in axes)
        stop = slot.address + (last + 1) * slot.view.element_size()
        spans.append((slot.address, stop, slot.number))
    groups, end, group = [0] * len(slots), 0, 0
    for start, stop, number in sorted(spans):
        group += start >= end
        end = max(end, stop)
        groups[number] = group
    return groups


def sheets(
    slots: Sequence[Slot], targets: Sequence[Seen | None], groups: Sequence[int]
) -> list[Sheet]:
    """Distribute targets over launches, so that no two programs of one write the same numbers.

    Args:
        slots: all of a plan.
        targets: address, dtype and strides, one a slot; None for none.
        groups: from ``overlapping``.
    """
    addresses = [0 if target is None else target[0] for target in targets]
    taken = [address for address in addresses if address]
    dtypes = {target[1] for target in targets if target is not None}
    if len(dtypes) == 1 and len({*taken}) == len(taken) and len({*groups}) == len(groups):
        return [Sheet(dtypes.pop(), addresses)]
    return _in_turns(slots, targets, groups)


def _in_turns(
    slots: Sequence[Slot], targets: Sequence[Seen | None], groups: Sequence[int]
) -> list[Sheet]:
    found: dict[tuple[int, torch.dtype], Sheet] = {}
    turns: dict[object, int] = {}
    for slot, group, target in zip(slots, groups, targets, strict=True):
        if target is None:
            continue
        address, dtype, _ = target
        turn = max(turns.get(("group", group), 0), turns.get(("address", address), 0))
        turns["group", group] = turns["address", address] = turn + 1
        sheet = found.setdefault((turn, dtype), Sheet(dtype, [0] * len(slots)))
        sheet.addresses[slot.number] = address
    return list(found.values())
