"""First and second moments of what a layer sees, summed over batches as they come.

A batch is multiplied in its own dtype, in float32 at least, and added to sums in float64, so that
the number of batches costs no digits. Nor does a mean that is large beside what varies: rows are
summed less a pivot, the mean of the first. Nor does their size: they are multiplied at unit size,
see ``scaling.py``. A second moment is symmetric: only the blocks on and below the diagonal are
computed, ten of sixteen.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log2

import torch
from torch import Tensor

from frobdecay.algebra.precision import full_precision
from frobdecay.algebra.scaling import exponents, times_power

ROWS, BLOCKS, NARROW = 1 << 14, 4, 256
"""Rows that are multiplied at once; blocks along an axis, for matrices that are not narrow."""

MODEST = 20
"""Exponents of two of the largest entry, up or down, with which squares keep their digits."""


class _Sums:
    """Sums in the attributes that a subclass names."""

    names: tuple[str, ...]

    def parts(self) -> tuple[Tensor, ...]:
        """The sums."""
        return tuple(getattr(self, name) for name in self.names)

    def become(self, *parts: Tensor) -> None:
        """Take other sums in the place of ``parts``."""
        for name, part in zip(self.names, parts, strict=True):
            setattr(self, name, part)


class Moment(_Sums):
    """Σ w, Σ w x and Σ w x xᵀ over rows x (*batch, k).

    Args:
        batch: of matrices that are summed each for itself, such as experts or groups of channels.
        size: k.
        dtype: of the sums.
        device: of the sums.

    Attributes:
        count: number of rows, (*batch).
        first: (*batch, k).
        second: (*batch, k, k), of which only the half on and below the diagonal counts; see
            ``full``.
        pivot: (*batch, k), what rows are summed less of, until ``parts`` or ``full`` is asked for.
    """

    names = ("count", "first", "second")

    def __init__(
        self, batch: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.count = torch.zeros(batch, dtype=torch.float64, device="cpu")
        self.first = torch.zeros(*batch, size, dtype=dtype, device=device)
        self.second = torch.zeros(*batch, size, size, dtype=dtype, device=device)
        self.pivot: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor, at: int | None = None) -> None:
        """Add rows.

        Args:
            rows: (*batch, N, k), or (N, k) for one of a batch.
            at: that one.
        """
        rows = rows.detach()
        self.pivot = torch.zeros_like(self.first) if self.pivot is None else self.pivot
        count, first, second, pivot = (
            held if at is None else held[at]
            for held in (self.count, self.first, self.second, self.pivot)
        )
        with full_precision(rows.device.type):
            for part in torch.split(rows, ROWS, -2) if rows.numel() else ():
                wide = part.to(torch.promote_types(part.dtype, torch.float32))
                if bool((count == 0).any()):
                    mean = wide.mean(-2, dtype=pivot.dtype).to(pivot)
                    pivot += mean * (count == 0).unsqueeze(-1).to(pivot)
                wide = wide - pivot.to(wide).unsqueeze(-2)
                first += wide.sum(-2).to(first)
                exponent = exponents(wide, (-2, -1))
                modest = bool((exponent.abs() <= MODEST).all())
                if not modest:
                    limit = round(log2(torch.finfo(second.dtype).max))
                    exponent = exponent.clamp(2 - limit, limit)
                    size = times_power(torch.ones_like(exponent, dtype=second.dtype), 2 * exponent)
                    wide = times_power(wide, -exponent)
                for block in _blocks(wide.shape[-1]):
                    found = (wide[..., block].mT @ wide[..., : block.stop]).to(second.device)
                    second[..., block, : block.stop] += found if modest else found * size.to(second)
                count += part.shape[-2]

    def finite(self) -> bool:
        """Whether no row held NaN or infinity, nor what its square leaves the sums' dtype with."""
        sums = self.first, self.second.diagonal(dim1=-2, dim2=-1)
        return all(bool(part.isfinite().all()) for part in sums)

    def parts(self) -> tuple[Tensor, ...]:
        """The sums, of whole rows."""
        if (pivot := self.pivot) is not None:
            self.pivot, k = None, pivot.shape[-1]
            n = self.count.to(pivot).unsqueeze(-1)
            for one, other in ((self.first, pivot), (pivot, self.first + n * pivot)):
                self.second.view(-1, k, k).baddbmm_(one.reshape(-1, k, 1), other.reshape(-1, 1, k))
            self.first += n * pivot
        return super().parts()

    def full(self) -> Tensor:
        """Σ w x xᵀ in float64, both halves."""
        lower = self.parts()[-1].double().tril()
        return lower + lower.tril(-1).mT


def _blocks(size: int) -> Iterator[slice]:
    """An axis in blocks of rows of a triangle."""
    step = size if size <= NARROW else -(-size // BLOCKS)
    yield from (slice(start, min(start + step, size)) for start in range(0, size, step))


class Frequencies(_Sums):
    """How often each row of a table is looked up; see ``Moment``.

    Attributes:
        count: number of look-ups, ().
        second: (k,), of each row.
    """

    names = ("count", "second")

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device="cpu")
        self.second = torch.zeros(size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, rows: Tensor, at: int | None = None) -> None:
        """Add indices of rows, of any shape; a table is no batch, so that ``at`` is None."""
        found = torch.bincount(rows.reshape(-1), minlength=len(self.second))
        self.second += found.to(self.second.device)
        self.count += rows.numel()

    def finite(self) -> bool:
        """Always: indices are."""
        return True
