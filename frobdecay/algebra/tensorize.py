"""How a weight of any shape is read as a tensor with d modes, and which ranks that tensor has.

    "o i kh kw -> o i (kh kw)"              out, in and kernel: three modes
    "(o p) (i j) -> (o i) (p j)"            a matrix as a tensor, its axes split and paired
    "flat"                                  the entries in order, as d modes of similar size

"flat" is the rule of the released research code of Khodak et al. (2021): d equal modes where the
number N of entries allows it; else the weight's own axes if they are d; else the smallest divisor
of at least N^(1/d), as often as needed, and what is left.

Ranks that are one number, an int for all or a fraction, are cut down to what fits; a rank for each
mode or bond has to fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor

from frobdecay.algebra.reading import Matricization, Reading, fit, written
from frobdecay.algebra.spectral import plain_rank, resolve_rank

FLAT = "flat"

Rank = int | float | Sequence[int | float | None]


def flat_modes(shape: Sequence[int], order: int) -> tuple[int, ...]:
    """Sizes of the modes when all entries are read in order; see the module's docstring.

    Args:
        shape: of the weight.
        order: d, how many modes.

    Raises:
        ValueError: the number of entries is a prime.

    Examples:
        >>> flat_modes((160, 160), 3), flat_modes((64, 64), 3), flat_modes((640, 320), 3)
        ((32, 32, 25), (16, 16, 16), (64, 64, 50))
    """
    count = prod(shape)
    least = max(round(count ** (1 / order)), 2)
    if least**order == count:
        return (least,) * order
    if len(shape) == order:
        return tuple(shape)
    modes, left = [], count
    for _ in range(order - 1):
        modes.append(_divisor(left, least))
        left //= modes[-1]
    if max(modes) == count:
        raise ValueError(
            f"expected a weight with entries that can be split into modes, got {count} of them, "
            "which have no divisors; take LowRank or leave it dense"
        )
    return (*modes, left)


def _divisor(count: int, least: int) -> int:
    """The smallest divisor of ``count`` that is at least ``least``, or ``count``."""
    small = [d for d in range(1, math.isqrt(count) + 1) if count % d == 0]
    return next((d for d in (*small, *(count // d for d in small[::-1])) if d >= least), count)


@dataclass(frozen=True)
class Tensorization:
    """A one-to-one map between weights of one shape and tensors with d modes.

    Attributes:
        pattern: the einops pattern, or "flat".
        shape: of the weight.
        modes: n_1, …, n_d.
        reading: the pattern, fitted to the shape; None of "flat".

    Examples:
        >>> import torch
        >>> view = Tensorization.of("o i kh kw -> o i (kh kw)", (8, 4, 3, 3))
        >>> view.modes
        (8, 4, 9)
        >>> weight = torch.randn(8, 4, 3, 3)
        >>> torch.equal(view.back(view.read(weight)), weight)
        True
    """

    pattern: str
    shape: tuple[int, ...]
    modes: tuple[int, ...]
    reading: Reading | None = None

    # Plans ask a reading for these two, whether it is a Matricization or this.
    batch = ()

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The modes."""
        return self.modes

    @classmethod
    def of(
        cls,
        pattern: str,
        shape: tuple[int, ...],
        axes: Mapping[str, int] | None = None,
        order: int = 3,
    ) -> Tensorization:
        """Fit a pattern to a shape.

        Args:
            pattern: ``"weight axes -> mode mode …"``, or "flat".
            shape: of the weight.
            axes: lengths that the pattern needs.
            order: d, for "flat".

        Raises:
            ValueError: the pattern cannot be read, is not one-to-one, or does not fit the shape.
        """
        if pattern == FLAT:
            if axes:
                raise ValueError(f"expected no axes for the pattern {FLAT!r}, got {dict(axes)}")
            return cls(FLAT, tuple(shape), flat_modes(shape, order))
        weight_axes, mode_axes, sizes = fit(pattern, tuple(shape), axes)
        reading = Reading(pattern, sizes, weight_axes, mode_axes)
        return cls(pattern, tuple(shape), reading.read_shape, reading)

    def read(self, weight: Tensor) -> Tensor:
        """Read a weight as a tensor with d modes."""
        return weight.reshape(self.modes) if self.reading is None else self.reading.read(weight)

    def back(self, tensor: Tensor) -> Tensor:
        """The inverse of ``read``; contiguous."""
        if self.reading is None:
            return tensor.reshape(self.shape)
        return self.reading.back(tensor).contiguous()

    def cuts(self) -> Iterator[tuple[int, Matricization]]:
        """Where the tensor may be cut into a matrix that layers can apply from either side.

        Yields:
            k, and how the matrix of the first k modes by the others is read as the weight. Its
            rows hold all of the weight's first axis and none of the second, or the other way
            round, and every further axis (of a kernel) as a whole or not at all.
        """
        if self.reading is None or len(self.shape) < 2:
            return
        weight_axes, mode_axes = self.reading.tensor_axes, self.reading.read_axes
        first, second, *rest = map(set, weight_axes)
        for k in range(1, len(mode_axes)):
            rows, columns = (
                tuple(a for item in part for a in item) for part in (mode_axes[:k], mode_axes[k:])
            )
            held = set(rows)
            apart = (first <= held and not second & held) or (second <= held and not first & held)
            if apart and all(item <= held or not item & held for item in rest):
                pattern = f"{written(weight_axes)} -> {written((rows, columns))}"
                yield k, Matricization.of(pattern, self.shape, self.reading.sizes)


# --- ranks ----------------------------------------------------------------------------------------


def plain_ranks(rank: Any) -> int | float | tuple[int | float | None, ...]:
    """One rank, or one for each mode or bond, as plain numbers; None keeps a mode whole.

    Raises:
        TypeError, ValueError: no number, nor a sequence of numbers and None; as ``plain_rank``.

    Examples:
        >>> plain_ranks([4, None, 0.5]), plain_ranks(True + 1)
        ((4, None, 0.5), 2)
    """
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        return tuple(one if one is None else plain_rank(one) for one in rank)
    return plain_rank(rank)


def tucker_ranks(rank: Rank, modes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a Tucker core.

    Args:
        rank: an int for all modes, or a fraction of each n_k, cut down to what fits; or one for
            each mode, of which None keeps the mode whole.
        modes: n_1, …, n_d.

    Raises:
        ValueError: not as many ranks as modes, or one above n_k or above the product of the
            others (where the core's slices would depend on each other).

    Examples:
        >>> tucker_ranks(16, (64, 3, 9)), tucker_ranks(0.25, (64, 32, 9))
        ((16, 3, 9), (16, 8, 2))
    """
    wanted = _each(rank, modes, modes, "mode")
    found = list(wanted)
    for _ in found:  # a rank that shrinks may leave another too large
        found = [
            min(r, modes[k], prod(found[:k]) * prod(found[k + 1 :])) for k, r in enumerate(found)
        ]
    return _fitting(rank, wanted, found, "Tucker ranks", modes)


def train_ranks(rank: Rank, modes: Sequence[int]) -> tuple[int, ...]:
    """The bonds of a tensor train, r_1, …, r_{d−1}.

    Args:
        rank: an int for all bonds, or a fraction of min(n_k, n_{k+1}), cut down to what fits; or
            one for each bond.
        modes: n_1, …, n_d.

    Raises:
        ValueError: not as many ranks as bonds, or one above n_k times its neighbour.

    Examples:
        >>> train_ranks(0.25, (32, 32, 25)), train_ranks(100, (4, 5, 6, 7))
        ((8, 6), (4, 20, 7))
    """
    wanted = _each(rank, [min(pair) for pair in pairwise(modes)], modes, "bond")
    found = [1, *wanted, 1]
    for k in range(1, len(modes)):
        found[k] = min(found[k], found[k - 1] * modes[k - 1])
    for k in reversed(range(1, len(modes))):
        found[k] = min(found[k], found[k + 1] * modes[k])
    return _fitting(rank, wanted, found[1:-1], "tensor train ranks", modes)


def cp_rank(rank: Rank, modes: Sequence[int]) -> int:
    """The number of terms of a CP tensor: an int, or a fraction of the smallest mode.

    Both may exceed the smallest mode; a CP rank may, and be of use.

    Raises:
        TypeError: a rank for each mode, of which CP has but one.
    """
    if isinstance(rank, Sequence):
        raise TypeError(f"expected one rank, an int or a float, for CP, got {rank!r}")
    return resolve_rank(rank, min(modes), min(modes))


def _each(rank: Rank, wholes: Sequence[int], modes: Sequence[int], what: str) -> list[int]:
    """A rank for each of the sizes that fractions are fractions of."""
    if not isinstance(rank, Sequence) or isinstance(rank, str):
        return [resolve_rank(rank, n, n) for n in wholes]
    if len(rank) != len(wholes):
        raise ValueError(
            f"expected {len(wholes)} ranks, one for each {what} of {_times(modes)}, got "
            f"{tuple(rank)}"
        )
    if what == "bond" and None in rank:
        raise TypeError(f"expected a number for each {what}, got {tuple(rank)}")
    pairs = zip(rank, wholes, strict=True)
    return [n if r is None else resolve_rank(r, n, n) for r, n in pairs]


def _fitting(
    rank: Rank, wanted: list[int], found: list[int], what: str, modes: Sequence[int]
) -> tuple[int, ...]:
    if wanted != found and isinstance(rank, Sequence):
        raise ValueError(
            f"expected {what} that fit {_times(modes)}, got {tuple(wanted)}, the largest up to "
            f"which are {tuple(found)}"
        )
    return tuple(found)


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))
