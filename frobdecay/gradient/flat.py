"""Many tensors as views of one buffer: one operator where there was one a tensor.

A model has hundreds of factors, most of few shapes. What is done to each number alike is done to
the buffer; what goes from the tensors to the buffer or back is one foreach operator. Views of one
shape are made together, so that the number of calls is that of shapes and batches.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from operator import attrgetter

import torch
from torch import Tensor

from frobdecay.gradient.likeness import Likeness

_BATCH = 1 << 22  # entries in one buffer: bounds the temporaries of rounding to about 100 MB
_ALIGNED = 8  # entries between starts of views: 16 bytes in half precision, for wide accesses


def batches(
    tensors: Mapping[int, Tensor], about: Callable[[Tensor], object] = attrgetter("device", "dtype")
) -> list[list[int]]:
    """Divide tensors into batches of those alike that are worth one buffer.

    Args:
        tensors: by any number.
        about: what has to be equal in a batch.

    Returns:
        Their numbers, in order in each batch; of more than 2²² entries only where one tensor has.
    """
    found: defaultdict[object, list[list[int]]] = defaultdict(list)
    entries: Counter[object] = Counter()
    for k, tensor in tensors.items():
        kind, size = about(tensor), tensor.numel()
        if not found[kind] or entries[kind] + size > _BATCH:
            found[kind].append([])
            entries[kind] = 0
        found[kind][-1].append(k)
        entries[kind] += size
    return [batch for alike in found.values() for batch in alike]


def stacked(
    function: Callable[[Tensor], Tensor], tensors: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """A function of one tensor, called with a stack of all that are of one shape and kind.

    Args:
        function: (stack, …) -> (stack, …), of each entry what it would be of that alone; a new
            tensor, for what it gets may be a view of the only one.
        tensors: what it is called with, by any number.
    """
    found: dict[int, Tensor] = {}
    for batch in batches(tensors, attrgetter("shape", "dtype", "device")):
        alike = [tensors[k] for k in batch]
        made = function(torch.stack(alike) if len(alike) > 1 else alike[0][None])
        found.update(zip(batch, made.unbind(), strict=True))
    return found


class Layout:
    """Where tensors are in a buffer of one axis: as they lie in memory, without gaps within.

    Args:
        tensors: of any shapes; none is kept.

    Attributes:
        entries: the length of the buffer.

    Examples:
        >>> import torch
        >>> layout = Layout([torch.ones(2, 3), torch.ones(4), torch.ones(2, 3)])
        >>> buffer = torch.arange(layout.entries)
        >>> [view.tolist() for view in layout.views(buffer)]
        [[[0, 1, 2], [3, 4, 5]], [16, 17, 18, 19], [[8, 9, 10], [11, 12, 13]]]
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        alike: defaultdict[object, list[int]] = defaultdict(list)
        for k, tensor in enumerate(tensors):
            alike[tensor.shape, tensor.stride()].append(k)
        self.entries = 0
        order = [k for members in alike.values() for k in members]
        self._places = sorted(range(len(order)), key=order.__getitem__)
        self._stacks: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        for members in alike.values():
            first = tensors[members[0]]
            # Strides like the tensor's own are what foreach operators need to be one kernel.
            dense = first if first.is_contiguous() else torch.empty_like(first, device="meta")
            step = -(-prod(first.shape) // _ALIGNED) * _ALIGNED
            shape, strides = (len(members), *first.shape), (step, *dense.stride())
            self._stacks.append((shape, strides, self.entries))
            self.entries += len(members) * step

    def views(self, buffer: Tensor) -> list[Tensor]:
        """See a buffer's entries as tensors, in the order and of the shapes of those given."""
        found = [view for stack in self._stacks for view in buffer.as_strided(*stack).unbind()]
        return [found[place] for place in self._places]


class Batched:
    """The batches of tensors and their layouts, as they were at the last call of tensors alike."""

    def __init__(self) -> None:
        self._likeness: Likeness | None = None
        self._made: list[tuple[list[int], Layout]] = []

    def of(self, tensors: Sequence[Tensor]) -> list[tuple[list[int], Layout]]:
        """Numbers of the tensors in each batch, and their layout in a buffer of it."""
        if self._likeness is None or not self._likeness.of(tensors):
            self._likeness = Likeness(tensors)
            divided = batches(dict(enumerate(tensors)))
            self._made = [(batch, Layout([tensors[k] for k in batch])) for batch in divided]
        return self._made
