"""Which part of a factor a process holds, read from the placements of a ``DTensor``.

A mesh dimension cuts a dimension of the parameter into equal chunks, the last ones shorter or
empty. Seen as the factor, such a part is a block if the cuts run along axes of the view: rows of
U, or the ``h`` of ``"(h d) e -> h e d"`` between heads, but not within a head. ``place`` answers
that for all processes of the mesh at once, because all have to draw the same conclusions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from frobdecay.product.factor import Factor, is_sharded
from frobdecay.product.product import Product

Range = tuple[int, int]
"""Start and length along one dimension or axis."""

Cuts = dict[int, Range] | None
"""The axes of the view that a part covers in part only; None for a part that is no block."""

Splits = tuple[tuple[int, ...], ...]
"""For each dimension of a parameter, the mesh dimensions that cut it, in the order they do."""


@dataclass(frozen=True)
class Placed:
    """A sharded factor and what this process holds of it.

    Attributes:
        factor: the factor.
        sizes: of the factor's view as a whole.
        cuts: for every process of the mesh, the part as a block of the view.
        box: the part as slices of the parameter as a whole.
        contributes: whether of all copies of the part, this process' is the one that counts.
    """

    factor: Factor
    sizes: tuple[int, ...]
    cuts: tuple[Cuts, ...]
    box: tuple[slice, ...]
    contributes: bool
    _own: Cuts
    _axes: tuple[tuple[int, int] | None, ...]  # (dimension, entries a step) of every axis
    _corner: tuple[int, ...]  # the entry of the parameter where the view begins

    def view(self, part: Tensor) -> Tensor:
        """See this process' part, or a tensor of its shape, as the factor; where it is a block."""
        assert self._own is not None
        sizes = [self._own[a][1] if a in self._own else n for a, n in enumerate(self.sizes)]
        strides = [0 if axis is None else part.stride(axis[0]) * axis[1] for axis in self._axes]
        first = sum(at * stride for at, stride in zip(self._corner, part.stride(), strict=True))
        return part.as_strided(sizes, strides, part.storage_offset() + first)

    def part(self, seen: Tensor, rest: float = 0.0) -> Tensor:
        """This process' part of what is seen as the whole factor, with ``rest`` beside that."""
        full = seen.new_full(self.factor.param.shape, rest)
        self.factor.view(full).copy_(seen)
        return full[self.box]

    def slices(self, axes: int) -> tuple[slice, ...]:
        """The block along the first axes of the view."""
        assert self._own is not None
        ranges = [self._own.get(axis, (0, self.sizes[axis])) for axis in range(axes)]
        return tuple(slice(start, start + length) for start, length in ranges)


def part_of(tensor: Any) -> Tensor:
    """This process' part of a sharded tensor, in its memory, not for autograd; else the tensor."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():
        part: Tensor = tensor.to_local()
        return part


def part_number(tensor: Any) -> int:
    """The number of this process' part among all parts: copies have the same; 0 if not sharded."""
    number = 0
    if is_sharded(tensor):
        mesh = tensor.device_mesh
        for placement, size, at in zip(
            tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True
        ):
            number = number if placement.is_replicate() else number * size + at
    return number


def refuse_unfit(product: Product) -> None:
    """Refuse factors whose parts cannot be told, before anything is sent.

    Raises:
        ValueError: names the product and the factor.
    """
    for factor in product.factors:
        param: Any = factor.param
        where = f"{product.name} ({factor.attribute})"
        if not is_sharded(param):
            raise ValueError(
                f"{where}: expected a DTensor, as other factors of this product are, got a plain "
                "tensor; shard or distribute all of them together (Replicate() for copies)"
            )
        first: Any = product.params[0]
        if param.device_mesh != first.device_mesh:
            raise ValueError(
                f"{where}: expected all factors of a product on one mesh, got {param.device_mesh} "
                f"and {first.device_mesh}; put them into one fully_shard call, and distribute "
                "those that tensor parallelism leaves alone with Replicate()"
            )
        if any(placement.is_partial() for placement in param.placements):
            raise ValueError(
                f"{where}: expected placements Shard or Replicate, got {param.placements}: of a "
                "sum that is not added up no process knows a part; redistribute it first"
            )
        if param.device_mesh.get_coordinate() is None:
            raise ValueError(
                f"{where}: expected this process to be part of the mesh {param.device_mesh}; pass "
                "the products that it holds"
            )
        own = _ranges(tuple(param.shape), tuple(param.device_mesh.shape), _splits(param),
                      tuple(param.device_mesh.get_coordinate()))  # fmt: skip
        held = tuple(part_of(param).shape)
        if tuple(length for _, length in own) != held:
            raise ValueError(
                f"{where}: expected a part of shape {tuple(length for _, length in own)} of "
                f"{tuple(param.shape)} under {param.placements}, got {held}; only parts as "
                "fully_shard, parallelize_module and distribute_tensor make them are understood"
            )


def check_targets(factors: Sequence[tuple[Product, Factor]], targets: Sequence[Any]) -> None:
    """Refuse gradients that are divided in another way than their parameters.

    Raises:
        ValueError: names the product and the factor.
    """
    for (product, factor), target in zip(factors, targets, strict=True):
        param: Any = factor.param
        if target is None or not is_sharded(param):
            continue
        found = getattr(target, "device_mesh", None), getattr(target, "placements", None)
        if found != (param.device_mesh, param.placements):
            raise ValueError(
                f"{product.name} ({factor.attribute}): expected a gradient that is placed like its "
                f"parameter, {param.placements} on {param.device_mesh}, got {found[1]} on "
                f"{found[0]}; set grad = grad.redistribute(placements=param.placements)"
            )


def place(factor: Factor) -> Placed:
    """Say what the processes hold of a sharded factor."""
    param: Any = factor.param
    mesh, splits = param.device_mesh, _splits(param)
    shape, sizes = tuple(param.shape), tuple(mesh.shape)
    outline = factor.outline()
    axes, corner = _axes(outline, shape)
    coordinate = tuple(mesh.get_coordinate())
    everyone = itertools.product(*(range(size) for size in sizes))
    cuts = {
        at: _cuts(_ranges(shape, sizes, splits, at), shape, outline.shape, axes, corner)
        for at in everyone
    }
    cutting = {d for dims in splits for d in dims}
    return Placed(
        factor,
        tuple(outline.shape),
        tuple(cuts.values()),
        tuple(slice(a, a + n) for a, n in _ranges(shape, sizes, splits, coordinate)),
        all(at == 0 for d, at in enumerate(coordinate) if d not in cutting),
        cuts[coordinate],
        axes or (),
        corner,
    )


def _splits(param: Any) -> Splits:
    """Read the placements. FSDP cuts what tensor parallelism has cut: ``_StridedShard``."""
    found: list[list[int]] = [[] for _ in param.shape]
    later: list[list[int]] = [[] for _ in param.shape]
    for d, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        into = later if hasattr(placement, "split_factor") else found
        into[placement.dim].append(d)
    return tuple(tuple(plain + strided[::-1]) for plain, strided in zip(found, later, strict=True))


@lru_cache(maxsize=1 << 16)
def _ranges(
    shape: tuple[int, ...], mesh: tuple[int, ...], splits: Splits, coordinate: tuple[int, ...]
) -> tuple[Range, ...]:
    """What the process at a coordinate of the mesh holds along each dimension."""
    found = []
    for length, dims in zip(shape, splits, strict=True):
        start = 0
        for d in dims:
            chunk = -(-length // mesh[d])
            skipped = min(coordinate[d] * chunk, length)
            start, length = start + skipped, min(chunk, length - skipped)
        found.append((start, length))
    return tuple(found)


def _axes(
    outline: Tensor, shape: tuple[int, ...]
) -> tuple[tuple[tuple[int, int] | None, ...] | None, tuple[int, ...]]:
    """What every axis of a view is in the parameter: (dimension, entries of it a step).

    Returns:
        None for an axis of length 1, None for all where an axis runs over several dimensions; and
        the index where the view begins.
    """
    contiguous = [prod(shape[d + 1 :]) for d in range(len(shape))]
    rest, corner = int(outline.storage_offset()), []
    for stride in contiguous:
        corner.append(rest // stride if stride else 0)
        rest = rest % stride if stride else 0
    found: list[tuple[int, int] | None] = []
    for size, step in zip(outline.shape, outline.stride(), strict=True):
        if size == 1:
            found.append(None)
            continue
        fits = [
            d
            for d, stride in enumerate(contiguous)
            if stride <= step and step * size <= stride * shape[d]
        ]
        if not fits:
            return None, tuple(corner)
        found.append((fits[0], step // contiguous[fits[0]]))
    return tuple(found), tuple(corner)


def _cuts(
    ranges: Sequence[Range],
    shape: Sequence[int],
    sizes: Sequence[int],
    axes: tuple[tuple[int, int] | None, ...] | None,
    corner: Sequence[int],
) -> Cuts:
    """A part of the parameter as a block of its view."""
    found: dict[int, Range] = {}
    for dim, (start, length) in enumerate(ranges):
        if axes is None:
            return None
        if length == shape[dim]:
            continue
        covering = [
            axis
            for axis, known in enumerate(axes)
            if known and known[0] == dim and known[1] * sizes[axis] == shape[dim]
        ]
        if len(covering) != 1 or corner[dim]:
            return None
        step = axes[covering[0]][1]  # type: ignore[index]
        if start % step or length % step:
            return None
        found[covering[0]] = start // step, length // step
    return found
