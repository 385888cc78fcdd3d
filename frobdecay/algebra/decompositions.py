"""Decompositions of tensors: a dense tensor in, the factors of a spectral initialization out.

    hosvd, hooi   Tucker         core, then U_k for each mode whose rank is below its size
    tt_svd        tensor train   U (n_1×r_1), cores (n_k×r_{k−1}×r_k), V (n_d×r_{d−1})
    cp_als        CP             U_k (n_k×r)

For d = 2 the first two are the truncated singular value decomposition, and the train's factors
those of ``spectral_init``. All work in float64 on the tensor at unit size, give the dtype and
device of what they got, fix signs, and draw nothing from the global generator: the same tensor
gives the same factors, in the sense of ``spectral_init``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from frobdecay.algebra.contraction import plan
from frobdecay.algebra.network import Network, cp, tucker
from frobdecay.algebra.scaling import (
    check_not_zero,
    check_weight,
    exponents,
    times_power,
    work_dtype,
)
from frobdecay.algebra.spectral import orthonormal_rows
from frobdecay.algebra.svd import resolution
from frobdecay.algebra.tensorize import cp_rank, train_ranks, tucker_ranks

SWEEPS, TOLERANCE = 200, 1e-4
"""An iteration ends when a sweep lowers the relative error by less than the tolerance. Gaussian
tensors from 8×8×5 to 64×64×50, at ranks from 2 to 64, took ``cp_als`` 9 to 173 sweeps."""


def _work(tensor: Tensor, shares: int) -> tuple[Tensor, Tensor]:
    """The tensor in float64 at unit size, X·2⁻ᵉ, and e, a multiple of the number of shares.

    Raises:
        TypeError, ValueError: what has no decomposition to train from.
    """
    check_weight(tensor, "the tensor")
    check_not_zero(tensor)
    exponent = exponents(tensor.detach(), range(tensor.ndim), shares).reshape(())
    return times_power(tensor.detach().to(work_dtype(tensor)), -exponent), exponent


def _leading(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r left singular vectors and their values; the largest entry of each is positive."""
    m, n = matrix.shape
    if n > 2 * m:  # a triangle with the same left vectors: as exact as the matrix itself
        matrix = torch.linalg.qr(matrix.mT, mode="r").R.mT
    p, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    p = p[:, :r]
    return p * p.gather(0, p.abs().argmax(0, keepdim=True)).sign(), s[:r]


# --- Tucker ---------------------------------------------------------------------------------------


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply a tensor along one mode: (…, r, …) with (n, r) is (…, n, …)."""
    if mode == tensor.ndim - 1:
        return tensor @ matrix.mT
    shape = tensor.shape
    seen = tensor.reshape(prod(shape[:mode]), shape[mode], -1)  # no transposed copy is made
    return (matrix @ seen).reshape(*shape[:mode], matrix.shape[0], *shape[mode + 1 :])


def _around(network: Network, k: int, tensor: Tensor, others: Mapping[int, Tensor]) -> Tensor:
    """What is around factor k in ⟨X, W⟩: the tensor X, contracted with all others by number."""
    terms = (network.output, *(network.terms[j] for j in others))
    tensors = [tensor, *others.values()]
    return plan(terms, network.terms[k], tuple([t.shape for t in tensors])).result(tensors)


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Read a tensor as a matrix whose rows are one mode."""
    return tensor.movedim(mode, 0).flatten(1)


def tucker_dense(core: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """Multiply a core by factors {mode: (n_k, r_k)}, in their order."""
    for mode, U in factors.items():
        core = mode_product(core, U, mode)
    return core


def _projected(tensor: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """The tensor in the coordinates of the bases: around the core."""
    network = tucker(tensor.ndim, [mode for mode in range(tensor.ndim) if mode not in bases])
    return _around(network, 0, tensor, dict(enumerate(bases.values(), 1)))


def _bases(tensor: Tensor, ranks: Sequence[int]) -> dict[int, Tensor]:
    """The leading left vectors along each mode that is to be smaller."""
    smaller = [mode for mode, (r, n) in enumerate(zip(ranks, tensor.shape, strict=True)) if r < n]
    return {mode: _leading(unfold(tensor, mode), ranks[mode])[0] for mode in smaller}


@torch.no_grad()
def hosvd(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """Decompose into a Tucker tensor: each U_k spans the leading left vectors of mode k.

    The truncated higher-order singular value decomposition. Its error is at most √d times the
    smallest at these ranks. (De Lathauwer, De Moor, Vandewalle 2000, doi:10.1137/S0895479896305696)

    Args:
        tensor: (n_1, …, n_d).
        ranks: r_k, at most n_k; a mode with r_k = n_k stays whole and gets no factor.

    Returns:
        The core (r_1, …, r_d), which holds the scale, then for each mode that is not whole U_k
        (n_k, r_k) with orthonormal columns; contiguous, with the tensor's dtype and device.

    Raises:
        TypeError, ValueError: a tensor with NaN, or that is zero or not real and dense; ranks
            that do not fit.

    Examples:
        >>> import torch
        >>> core, U = hosvd(torch.ones(4, 3, 2), (2, 3, 2))
        >>> core.shape, U.shape
        (torch.Size([2, 3, 2]), torch.Size([4, 2]))
    """
    return hooi(tensor, ranks, sweeps=0)


def _scaled_core(
    tensor: Tensor, core: Tensor, bases: list[Tensor], exponent: Tensor
) -> tuple[Tensor, ...]:
    """The core with the scale; what the dtype's normal numbers do not hold goes to the first U_k.

    A core's entry can be √N times the tensor's largest, N its number of entries.
    """
    largest, info = torch.frexp(core.abs().max()).exponent + exponent, torch.finfo(tensor.dtype)
    least, most = math.frexp(info.tiny / info.eps)[1], math.frexp(info.max)[1] - 1
    excess = largest - largest.clamp(least, most)
    if bases:
        exponent, bases[0] = exponent - excess, times_power(bases[0], excess)
    return tuple(_like(tensor, times_power(core, exponent), *bases))


@torch.no_grad()
def hooi(
    tensor: Tensor, ranks: Sequence[int], *, sweeps: int = SWEEPS, tolerance: float = TOLERANCE
) -> tuple[Tensor, ...]:
    """Improve ``hosvd``: each U_k in turn, from the tensor in the others' coordinates.

    The higher-order orthogonal iteration. No sweep raises the error; it ends at a local minimum.

    Args:
        tensor: as for ``hosvd``, and so is what is returned and raised.
        ranks: likewise.
        sweeps: at most so many.
        tolerance: ends when a sweep lowers the relative error by less.

    Examples:
        >>> import torch
        >>> core, *factors = hooi(torch.ones(4, 3, 2), (1, 1, 1))
        >>> round(core.item() ** 2, 4)
        24.0
    """
    (work, exponent), ranks = _work(tensor, 1), tucker_ranks(ranks, tensor.shape)
    bases = _bases(work, ranks)
    core, norm, before = _projected(work, bases), work.norm(), math.inf
    for _ in range(sweeps if len(bases) > 1 else 0):
        for mode in bases:
            others = {m: U for m, U in bases.items() if m != mode}
            bases[mode] = _leading(unfold(_projected(work, others), mode), ranks[mode])[0]
        core = _projected(work, bases)
        error = float((norm**2 - core.norm() ** 2).clamp_min(0).sqrt() / norm)
        if before - error < tolerance:
            break
        before = error
    return _scaled_core(tensor, core, list(bases.values()), exponent)


# --- tensor train ---------------------------------------------------------------------------------


@torch.no_grad()
def tt_svd(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """Decompose into a tensor train by truncated decompositions from left to right.

    Its error is at most √(d−1) times the smallest at these ranks. (Oseledets 2011,
    doi:10.1137/090752286.) The bonds are balanced as by ``spectral_init``: the singular values at a
    bond are split evenly, so that the Gram of everything left of it equals that of everything
    right of it, and no column is zero.

    Args:
        tensor: (n_1, …, n_d).
        ranks: r_1, …, r_{d−1}, each at most n_k times its neighbour.

    Returns:
        U (n_1, r_1), then for each inner mode a core (n_k, r_{k−1}, r_k), then V (n_d, r_{d−1});
        contiguous, with the tensor's dtype and device.

    Raises:
        TypeError, ValueError: a tensor with NaN, or that is zero or not real and dense; ranks
            that do not fit.

    Examples:
        >>> import torch
        >>> [tuple(core.shape) for core in tt_svd(torch.ones(4, 3, 2), (2, 1))]
        [(4, 2), (3, 2, 1), (2, 1)]
    """
    (rest, exponent), ranks = _work(tensor, 2), train_ranks(ranks, tensor.shape)
    least = resolution(tensor.dtype)
    lefts: list[Tensor] = []  # (r_{k−1}, n_k, r_k) with orthonormal columns
    for n, r in zip(tensor.shape, ranks, strict=False):
        before = lefts[-1].shape[-1] if lefts else 1
        rest = rest.reshape(before * n, -1)
        basis, _ = _leading(rest, r)
        lefts.append(basis.reshape(before, n, -1))
        rest = basis.mT @ rest
    first, *inner, last = _balanced(lefts, rest, ranks, least)
    # Every bond has the scale to both of its sides, so that only the ends have it, half each.
    first, last = (times_power(end, exponent >> 1) for end in (first, last))
    return tuple(_like(tensor, first, *inner, last))


def _balanced(
    lefts: Sequence[Tensor], last: Tensor, ranks: Sequence[int], least: float
) -> list[Tensor]:
    """Split the singular values at every bond evenly, from right to left.

    Args:
        lefts: the cores but the last one, with orthonormal columns.
        last: (r_{d−1}, n_d), which holds the scale.
        ranks: columns at each bond; missing ones are spread, see ``spectral_init``.
        least: share of a bond's largest singular value below which there is only rounding.
    """
    out: list[Tensor] = []
    center = last.unsqueeze(-1)  # (r_{k−1}, n_k, columns at bond k)
    behind: tuple[Tensor, Tensor] | None = None  # 1/√S and rows that spread it, at bond k
    for core, r in zip(reversed(lefts), reversed(ranks), strict=True):
        p, s, q = torch.linalg.svd(center.flatten(1), full_matrices=False)
        alive = s > least * s[0]
        p, s, q = p[:, alive], s[alive], q[alive]
        sign = q.gather(1, q.abs().argmax(1, keepdim=True)).sign()
        p, q = p * sign.mT, q * sign
        whole = torch.eye(r, dtype=s.dtype, device=s.device)
        spread = orthonormal_rows(len(s), r, s) if len(s) < r else whole
        inner = (s.sqrt().unsqueeze(1) * q).reshape(-1, *center.shape[1:])
        out.append(_after(torch.tensordot(spread.mT, inner, dims=1), behind))
        behind = s.rsqrt().unsqueeze(1), spread
        center = core @ (p * s)
    out.append(_after(center, behind))
    first, *inner, end = reversed(out)
    cores = [core.transpose(0, 1) for core in inner]  # (n_k, r_{k−1}, r_k), as a chain sums them
    return [first.squeeze(0), *cores, end.squeeze(-1).mT]


def _after(core: Tensor, behind: tuple[Tensor, Tensor] | None) -> Tensor:
    """Take the bond's values out of the core, whose other half the next core has."""
    return core if behind is None else core @ (behind[0] * behind[1])


# --- CP -------------------------------------------------------------------------------------------


@torch.no_grad()
def cp_als(
    tensor: Tensor, rank: int, *, sweeps: int = SWEEPS, tolerance: float = TOLERANCE
) -> tuple[Tensor, ...]:
    """Decompose into r terms by alternating least squares, from the leading left vectors.

    A local minimum: there is no way to the best CP tensor, and it may not exist. Where a rank
    exceeds a mode, the columns that the vectors lack are drawn by a generator of their own. All
    columns of a term get the same norm, so that the factors' Grams have equal diagonals.

    Args:
        tensor: (n_1, …, n_d).
        rank: r.
        sweeps: at most so many.
        tolerance: converged when a sweep lowers the relative error by less.

    Returns:
        U_1 (n_1, r), …, U_d (n_d, r), contiguous, with the tensor's dtype and device.

    Raises:
        TypeError, ValueError: a tensor with NaN, or that is zero or not real and dense; ranks
            that do not fit.

    Warns:
        RuntimeWarning: not converged; the factors are those of the last sweep.

    Examples:
        >>> import torch
        >>> U = cp_als(torch.ones(4, 3, 2), 1)
        >>> [tuple(factor.shape) for factor in U]
        [(4, 1), (3, 1), (2, 1)]
    """
    (work, exponent), rank = _work(tensor, tensor.ndim), cp_rank(rank, tensor.shape)
    factors = list(_start(work, rank))
    size, norm, change = work.new_ones(rank), work.norm(), math.inf
    before = math.inf
    for _ in range(sweeps):
        size, error = _sweep(work, factors, norm)
        change, before = before - error, error
        if change < tolerance:
            break
    else:
        warnings.warn(
            f"alternating least squares of a {tuple(tensor.shape)} tensor at rank {rank} did not "
            f"converge in {sweeps} sweeps: the last one lowered the error by {change:.1e} to "
            f"{before:.3f}; take more sweeps, or go on with these factors",
            RuntimeWarning,
            stacklevel=3,
        )
    each = exponent // tensor.ndim
    return tuple(_like(tensor, *(times_power(U, each) for U in _shared(factors, size))))


def _start(work: Tensor, rank: int) -> Iterator[Tensor]:
    """Unit columns: leading left vectors, then random ones."""
    for mode, n in enumerate(work.shape):
        basis, _ = _leading(unfold(work, mode), rank)
        generator = torch.Generator(device="cpu").manual_seed(mode)
        shape = (n, rank - basis.shape[1])
        more = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        yield torch.cat([basis, torch.nn.functional.normalize(more, dim=0).to(work)], 1)


def _sweep(work: Tensor, factors: list[Tensor], norm: Tensor) -> tuple[Tensor, float]:
    """Update every factor in place; return the terms' norms and the relative error."""
    size, inner, network = norm, norm, cp(work.ndim)
    for mode in range(len(factors)):
        others = {k: U for k, U in enumerate(factors) if k != mode}
        gram = reduce(torch.mul, [U.mT @ U for U in others.values()])
        image = _around(network, mode, work, others)
        solved = image @ torch.linalg.pinv(gram, hermitian=True)
        size = solved.norm(dim=0)
        # A term without size keeps its direction, or it would never train.
        factors[mode] = torch.where(size > 0, solved / size.clamp_min(1e-300), factors[mode])
        inner = (image * solved).sum()  # ⟨W, Ŵ⟩ = ‖Ŵ‖² after a least-squares update
    error = (norm**2 - inner).clamp_min(0).sqrt() / norm
    return size, float(error)


def _shared(factors: Sequence[Tensor], size: Tensor) -> list[Tensor]:
    """Give each term's norm to its columns in equal parts."""
    order, alive = len(factors), size > resolution(torch.float64) * size.max()
    each = torch.where(alive, size, size.max()) ** (1 / order)
    last = torch.where(alive, each, 0.0)  # a term without size: one column is zero, and trains
    return [*(U * each for U in factors[:-1]), factors[-1] * last]


def _like(tensor: Tensor, *found: Tensor) -> list[Tensor]:
    """Contiguous, with the dtype of the tensor that was decomposed."""
    return [factor.to(tensor.dtype).contiguous() for factor in found]
