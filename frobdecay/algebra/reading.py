"""How a weight is rearranged to a matrix or a tensor: an einops pattern with its sizes filled in.

    "o i kh kw -> (o kh) (i kw)"        one matrix, rows (o kh), columns (i kw)
    "(g o) i kh kw -> g (o kh) (i kw)"  a batch of g matrices, one for each group

A reading is one-to-one: every axis is on both sides, once. For a matrix the right side is: any
number of batch axes, then the rows, then the columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from numbers import Integral
from typing import TypeVar

from einops import EinopsError, rearrange
from torch import Tensor

Axes = tuple[tuple[str, ...], ...]
"""Names of axes, a tuple for each dimension."""

_ITEM = re.compile(r"\(([^()]*)\)|([^\s()]+)")
_Self = TypeVar("_Self", bound="Reading")


@dataclass(frozen=True)
class Reading:
    """A one-to-one map between tensors of one shape and tensors of another.

    Attributes:
        pattern: the einops pattern, from the tensor on the left to what it is read as.
        sizes: axis name -> length, for every axis of the pattern.
        tensor_axes, read_axes: axis names of the left and of the right side.
    """

    pattern: str
    sizes: Mapping[str, int] = field(hash=False)
    tensor_axes: Axes
    read_axes: Axes

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self._lengths(self.tensor_axes)

    @cached_property
    def read_shape(self) -> tuple[int, ...]:
        """Shape of what it is read as."""
        return self._lengths(self.read_axes)

    def _lengths(self, axes: Axes) -> tuple[int, ...]:
        return tuple(prod(self.sizes[name] for name in item) for item in axes)

    def read(self, tensor: Tensor) -> Tensor:
        """Read a tensor of ``shape``: a view where the memory layout allows."""
        try:
            return rearrange(tensor, self.pattern, **self.sizes)
        except EinopsError:
            raise ValueError(
                f"expected a tensor of shape {self.shape} for the pattern {self.pattern!r}, "
                f"got {tuple(tensor.shape)}"
            ) from None

    def back(self, read: Tensor) -> Tensor:
        """The inverse of ``read``."""
        return rearrange(read, self._inverse, **self.sizes)

    @cached_property
    def _inverse(self) -> str:
        return f"{written(self.read_axes)} -> {written(self.tensor_axes)}"

    def of_axes(self: _Self, tensor_axes: Axes) -> _Self:
        """The same for a tensor that has the axes otherwise: transposed, or reshaped."""
        pattern = f"{written(tensor_axes)} -> {written(self.read_axes)}"
        return replace(self, pattern=pattern, tensor_axes=tensor_axes)


@dataclass(frozen=True)
class Matricization(Reading):
    """A one-to-one map between tensors of one shape and (batches of) matrices.

    Examples:
        >>> import torch
        >>> view = Matricization.of("o i kh kw -> (o kh) (i kw)", (8, 4, 3, 3))
        >>> view.matrix_shape
        (24, 12)
        >>> weight = torch.randn(8, 4, 3, 3)
        >>> torch.equal(view.tensor(view.matrix(weight)), weight)
        True
    """

    @classmethod
    def of(
        cls, pattern: str, shape: tuple[int, ...], axes: Mapping[str, int] | None = None
    ) -> Matricization:
        """Fit a pattern to a shape.

        Args:
            pattern: ``"tensor axes -> batch axes, rows, columns"``.
            shape: the tensor's shape.
            axes: lengths that the shape alone does not give, such as the ``g`` of ``(g o)``.

        Raises:
            ValueError: the pattern cannot be read, is not one-to-one, or does not fit the shape.
        """
        tensor_axes, matrix, sizes = fit(pattern, shape, axes)
        if any(len(item) != 1 for item in matrix[:-2]):
            raise ValueError(f"expected single batch axes before the rows in {pattern!r}")
        return cls(pattern, sizes, tensor_axes, matrix)

    @cached_property
    def straight(self) -> bool:
        """Whether the tensor is the matrix itself."""
        return self.tensor_axes == self.read_axes

    @cached_property
    def batch_axes(self) -> tuple[str, ...]:
        """Axis names of the batch."""
        return tuple(name for (name,) in self.read_axes[:-2])

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Axis names of the rows, in order."""
        return self.read_axes[-2]

    @property
    def column_axes(self) -> tuple[str, ...]:
        """Axis names of the columns, in order."""
        return self.read_axes[-1]

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*batch, m, n)."""
        return self.read_shape

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the batch axes."""
        return self.read_shape[:-2]

    @property
    def rows(self) -> int:
        """m, the rows of each matrix."""
        return self.read_shape[-2]

    @property
    def columns(self) -> int:
        """n, the columns of each matrix."""
        return self.read_shape[-1]

    def matrix(self, tensor: Tensor) -> Tensor:
        """Read a tensor of ``shape`` as (*batch, m, n): a view where the memory layout allows."""
        return self.read(tensor)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of ``matrix``."""
        return self.back(matrix)


def written(axes: Axes) -> str:
    """One side of a pattern.

    Examples:
        >>> written((("g",), ("o", "kh")))
        'g (o kh)'
    """
    return " ".join(item[0] if len(item) == 1 else f"({' '.join(item)})" for item in axes)


def dimensions(pattern: str) -> int:
    """Count the dimensions of the tensors that a pattern reads, whatever else is wrong with it."""
    return len(_ITEM.findall(pattern.partition("->")[0]))


def fit(
    pattern: str, shape: tuple[int, ...], axes: Mapping[str, int] | None
) -> tuple[Axes, Axes, dict[str, int]]:
    """Read a one-to-one pattern and fit it to a shape.

    Args:
        pattern: ``"tensor axes -> read axes"``.
        shape: the tensor's shape.
        axes: lengths that the shape alone does not give, such as the ``g`` of ``(g o)``.

    Returns:
        The axes of both sides, and the lengths of all.

    Raises:
        TypeError: the pattern is no string, or a length no int.
        ValueError: the pattern cannot be read, is not one-to-one, or does not fit the shape.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"expected a pattern, a string such as 'o i -> o i', got {pattern!r}")
    sizes = plain_axes(axes)
    tensor_axes, read_axes = _sides(pattern)
    if len(tensor_axes) != len(shape):
        raise ValueError(
            f"expected a tensor with {len(tensor_axes)} dimensions for the pattern "
            f"{pattern!r}, got shape {tuple(shape)}"
        )
    return tensor_axes, read_axes, _fill(tensor_axes, tuple(shape), sizes, pattern)


def plain_axes(axes: Mapping[str, int] | None) -> dict[str, int]:
    """Lengths of axes as plain numbers, which files can hold; numpy's are taken as well.

    Raises:
        TypeError, ValueError: a length that is no int, or below 1.
    """
    given = dict(axes or {})
    for name, length in given.items():
        if isinstance(length, bool) or not isinstance(length, Integral):
            raise TypeError(f"expected the length of the axis {name!r} as an int, got {length!r}")
        if length < 1:
            raise ValueError(f"expected the length of the axis {name!r} above 0, got {length}")
    return {name: int(length) for name, length in given.items()}


@lru_cache(1024)
def _sides(pattern: str) -> tuple[Axes, Axes]:
    """The axes of both sides of a one-to-one pattern: read once, however many weights have it."""
    left, arrow, right = pattern.partition("->")
    if not arrow:
        raise ValueError(f"expected a pattern 'tensor -> rows columns', got {pattern!r}")
    tensor_axes, read_axes = _items(left, pattern), _items(right, pattern)
    if len(read_axes) < 2:
        raise ValueError(f"expected rows and columns right of '->' in the pattern {pattern!r}")
    flat_left = [name for item in tensor_axes for name in item]
    flat_right = [name for item in read_axes for name in item]
    if sorted(flat_left) != sorted(flat_right) or len(set(flat_left)) != len(flat_left):
        raise ValueError(
            f"expected the same axes, each once, on both sides of the pattern {pattern!r}"
        )
    return tensor_axes, read_axes


def _items(side: str, pattern: str) -> Axes:
    """Split one side of a pattern into its items, each a tuple of axis names."""
    if re.sub(_ITEM, "", side).strip():
        raise ValueError(f"cannot read the pattern {pattern!r}: unbalanced parentheses")
    items = tuple(
        tuple(m.group(1).split()) if m.group(1) is not None else (m.group(2),)
        for m in _ITEM.finditer(side)
    )
    for name in (name for item in items for name in item):
        if not name.isidentifier():
            raise ValueError(f"cannot read the pattern {pattern!r}: {name!r} is not an axis name")
    return items


def _fill(
    tensor_axes: Axes, shape: tuple[int, ...], sizes: dict[str, int], pattern: str
) -> dict[str, int]:
    """Lengths of all axes from the shape and the given ones."""
    known = {a for item in tensor_axes for a in item}
    if set(sizes) - known:
        raise ValueError(f"axes {sorted(set(sizes) - known)} are not in the pattern {pattern!r}")
    for item, length in zip(tensor_axes, shape, strict=True):
        missing = [a for a in item if a not in sizes]
        given = prod(sizes[a] for a in item if a in sizes)
        if len(missing) > 1:
            raise ValueError(
                f"give the lengths of all but one of {missing} for the pattern {pattern!r}"
            )
        if missing and given and length % given == 0:
            sizes[missing[0]] = length // given
        elif missing or given != length:
            raise ValueError(
                f"the pattern {pattern!r} does not fit the shape {shape}: "
                f"{' '.join(item)} = {length} with {sizes}"
            )
    return sizes
