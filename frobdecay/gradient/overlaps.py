"""Which tensors share memory, and when each is written then: never two of them at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor


def overlapping(views: Sequence[Tensor]) -> list[int]:
    """Number the views so that those whose memory may overlap have one number.

    Views that interleave, such as columns of one matrix, count as overlapping.
    """
    spans = []
    for i, view in enumerate(views):
        last = sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
        start = view.data_ptr()
        spans.append((start, start + (last + 1) * view.element_size(), i))
    groups, end, group = [0] * len(views), 0, 0
    for start, stop, i in sorted(spans):
        group += start >= end
        end = max(end, stop)
        groups[i] = group
    return groups


def turns(addresses: Sequence[int], groups: Sequence[int]) -> list[int]:
    """Say when each target is written, so that no two of one turn share memory.

    Args:
        addresses: of the targets; equal ones are one target.
        groups: of the factors they belong to, from ``overlapping``.
    """
    if len({*groups}) == len(groups) == len({*addresses}):
        return [0] * len(groups)
    found: list[int] = []
    taken: defaultdict[tuple[str, int], int] = defaultdict(int)  # turns so far
    for address, group in zip(addresses, groups, strict=True):
        turn = max(taken["address", address], taken["group", group])
        taken["address", address] = taken["group", group] = turn + 1
        found.append(turn)
    return found
