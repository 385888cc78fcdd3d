"""How a weight of any shape is read as a matrix: an einops pattern with its sizes filled in.

    "o i kh kw -> (o kh) (i kw)"        one matrix, rows (o kh), columns (i kw)
    "(g o) i kh kw -> g (o kh) (i kw)"  a batch of g matrices, one for each group

The right side is: any number of batch axes, then the rows, then the columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from numbers import Integral

from einops import EinopsError, rearrange
from torch import Tensor

_ITEM = re.compile(r"\(([^()]*)\)|([^\s()]+)")


def _items(side: str, pattern: str) -> tuple[tuple[str, ...], ...]:
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


@dataclass(frozen=True)
class Matricization:
    """A one-to-one map between tensors of one shape and (batches of) matrices.

    Attributes:
        pattern: the einops pattern, tensor on the left, matrix on the right.
        sizes: axis name -> length, for every axis of the pattern.
        tensor_axes, batch_axes, row_axes, column_axes: axis names in order; ``tensor_axes``
            holds one tuple for every dimension of the tensor.

    Examples:
        >>> import torch
        >>> view = Matricization.of("o i kh kw -> (o kh) (i kw)", (8, 4, 3, 3))
        >>> view.matrix_shape
        (24, 12)
        >>> weight = torch.randn(8, 4, 3, 3)
        >>> torch.equal(view.tensor(view.matrix(weight)), weight)
        True
    """

    pattern: str
    sizes: Mapping[str, int] = field(hash=False)
    tensor_axes: tuple[tuple[str, ...], ...]
    batch_axes: tuple[str, ...]
    row_axes: tuple[str, ...]
    column_axes: tuple[str, ...]

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
        tensor_axes, matrix, sizes = fit_pattern(pattern, shape, axes)
        if any(len(item) != 1 for item in matrix[:-2]):
            raise ValueError(f"expected single batch axes before the rows in {pattern!r}")
        return cls(
            pattern,
            sizes,
            tensor_axes,
            tuple(item[0] for item in matrix[:-2]),
            matrix[-2],
            matrix[-1],
        )

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(prod(self.sizes[a] for a in item) for item in self.tensor_axes)

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the batch axes."""
        return tuple(self.sizes[a] for a in self.batch_axes)

    @cached_property
    def rows(self) -> int:
        """m, the rows of each matrix."""
        return prod(self.sizes[a] for a in self.row_axes)

    @cached_property
    def columns(self) -> int:
        """n, the columns of each matrix."""
        return prod(self.sizes[a] for a in self.column_axes)

    @cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*batch, m, n)."""
        return (*self.batch, self.rows, self.columns)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Read a tensor of ``shape`` as (*batch, m, n): a view where the memory layout allows."""
        try:
            return rearrange(tensor, self.pattern, **self.sizes)
        except EinopsError:
            raise ValueError(
                f"expected a tensor of shape {self.shape} for the pattern {self.pattern!r}, "
                f"got {tuple(tensor.shape)}"
            ) from None

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of ``matrix``."""
        left, _, right = self.pattern.partition("->")
        return rearrange(matrix, f"{right} -> {left}", **self.sizes)


def fit_pattern(
    pattern: str, shape: tuple[int, ...], axes: Mapping[str, int] | None
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...], dict[str, int]]:
    """Read a one-to-one pattern and fit it to a shape.

    Returns:
        The items left of the arrow, those right of it, each a tuple of axis names, and the lengths
        of all axes.

    Raises:
        TypeError: the pattern is no string, or a length no int.
        ValueError: the pattern cannot be read, is not one-to-one, or does not fit the shape.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"expected a pattern, a string such as 'o i -> o i', got {pattern!r}")
    for name, length in dict(axes or {}).items():
        if isinstance(length, bool) or not isinstance(length, Integral):
            raise TypeError(f"expected the length of the axis {name!r} as an int, got {length!r}")
        if length < 1:
            raise ValueError(f"expected the length of the axis {name!r} above 0, got {length}")
    tensor_axes, items = _parsed(pattern)
    if len(tensor_axes) != len(shape):
        raise ValueError(
            f"expected a tensor with {len(tensor_axes)} dimensions for the pattern "
            f"{pattern!r}, got shape {tuple(shape)}"
        )
    return tensor_axes, items, _fill(tensor_axes, tuple(shape), dict(axes or {}), pattern)


@lru_cache(1024)
def _parsed(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """The items of both sides of a one-to-one pattern: read once, however many weights have it."""
    left, arrow, right = pattern.partition("->")
    if not arrow:
        raise ValueError(f"expected a pattern 'tensor -> rows columns', got {pattern!r}")
    tensor_axes, items = _items(left, pattern), _items(right, pattern)
    if len(items) < 2:
        raise ValueError(f"expected rows and columns right of '->' in the pattern {pattern!r}")
    flat_left = [name for item in tensor_axes for name in item]
    flat_right = [name for item in items for name in item]
    if sorted(flat_left) != sorted(flat_right) or len(set(flat_left)) != len(flat_left):
        raise ValueError(
            f"expected the same axes, each once, on both sides of the pattern {pattern!r}"
        )
    return tensor_axes, items


def _fill(
    tensor_axes: tuple[tuple[str, ...], ...],
    shape: tuple[int, ...],
    sizes: dict[str, int],
    pattern: str,
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
