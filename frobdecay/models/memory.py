"""Which tensors share memory: exactly, whatever their strides and dtypes.

Spans of addresses say who may have a byte in common with whom. Between tensors with gaps, such as
slices of columns, the runs of bytes inside of the spans decide: runs that share nothing cover as
much together as each alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn


class _Place:
    """Where a tensor lies, in bytes.

    Attributes:
        key: whose.
        device: its device.
        start, end: of all of it.
    """

    def __init__(self, key: int, tensor: Tensor) -> None:
        self.key, self.device, self.start = key, str(tensor.device), tensor.data_ptr()
        self._run, self._steps = tensor.element_size(), list[tuple[int, int]]()
        axes = zip(tensor.stride(), tensor.shape, strict=True)
        for stride, count in sorted((s * tensor.element_size(), n) for s, n in axes):
            if stride <= self._run:
                self._run += stride * (count - 1)
            else:
                self._steps.append((stride, count))
        self.end = self.start + self._run + sum(s * (n - 1) for s, n in self._steps)

    @cached_property
    def runs(self) -> tuple[Tensor, Tensor]:
        """Starts and ends of its parts without gaps, sorted by start."""
        starts = torch.tensor([self.start], dtype=torch.int64, device="cpu")
        for stride, count in self._steps:
            offsets = torch.arange(count, dtype=torch.int64, device="cpu") * stride
            starts = (starts[:, None] + offsets).flatten()
        starts = starts.sort().values
        return starts, starts + self._run

    @cached_property
    def size(self) -> int:
        """How many bytes it covers."""
        return _covered(*self.runs)


def _covered(starts: Tensor, ends: Tensor) -> int:
    """Bytes in runs, sorted by start, that may overlap."""
    reached = ends.cummax(0).values
    before = torch.cat([starts[:1], reached[:-1]])
    return int((reached - torch.maximum(starts, before)).clamp_min(0).sum())


def _disjoint(places: Sequence[_Place]) -> bool:
    starts, order = torch.cat([place.runs[0] for place in places]).sort()
    ends = torch.cat([place.runs[1] for place in places])[order]
    return _covered(starts, ends) == sum(place.size for place in places)


def overlaps(tensors: Mapping[int, Tensor]) -> Iterator[tuple[int, int]]:
    """Pairs of keys of dense tensors that have a byte in common."""
    places = [_Place(key, tensor) for key, tensor in tensors.items() if has_memory(tensor)]
    places.sort(key=lambda place: (place.device, place.start))
    for cluster in _clusters(places):
        if len(cluster) > 1 and not _disjoint(cluster):
            yield from _pairs(cluster)


def has_memory(tensor: Tensor) -> bool:
    """Whether it is a plain dense tensor that lies somewhere, by its strides."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested or tensor.is_meta:
        return False
    return tensor.layout == torch.strided and tensor.numel() > 0 and tensor.data_ptr() != 0


def _clusters(places: Iterable[_Place]) -> Iterator[list[_Place]]:
    """Neighbours whose spans hang together."""
    cluster: list[_Place] = []
    reached = 0
    for place in places:
        if cluster and (place.device != cluster[0].device or place.start >= reached):
            yield cluster
            cluster, reached = [], 0
        cluster.append(place)
        reached = max(reached, place.end)
    yield cluster


def _pairs(cluster: Sequence[_Place]) -> Iterator[tuple[int, int]]:
    live: list[_Place] = []
    for place in cluster:
        live = [other for other in live if other.end > place.start]
        yield from ((o.key, place.key) for o in live if not _disjoint((o, place)))
        live.append(place)
