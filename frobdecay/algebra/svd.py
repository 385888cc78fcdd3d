"""Truncated singular value decompositions, W ≈ P S Qᵀ, at a fraction of a full one's time.

``truncated_svd`` is exact, ``sketched_svd`` is randomized. Both take a (*batch, m, n) weight at
unit size (``scaling.Unit``) and read it in blocks: beside the weight there are P, and one matrix
of the smaller Gram's size or two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frobdecay.algebra.scaling import Unit, work_dtype

Triples = tuple[Tensor, Tensor, Tensor]
"""P (*batch, m, k), the singular values (*batch, k) and Q (*batch, n, k)."""

OVERSAMPLED, POWERS = 10, 2
"""More columns of a sketch than the rank, and power iterations, as Halko et al. advise."""


def truncated_svd(unit: Unit, r: int) -> Triples:
    """The leading min(r, m, n) singular triples, P S Qᵀ, in float64 but for a float32 P or Q.

    The smaller Gram's eigenvectors give the truncated decomposition at a fraction of an SVD's
    time. They resolve singular values down to √eps₆₄ ≈ 1e-8 of the largest, which is finer than
    float32 weights are known; float64 weights take the SVD itself.
    """
    if unit.weight.dtype == torch.float64:
        p, s, qh = torch.linalg.svd(unit.whole(torch.float64), full_matrices=False)
        return p[..., :r], s[..., :r], qh.mT[..., :r]
    if unit.shape[-2] < unit.shape[-1]:
        q, s, p = truncated_svd(unit.mT, r)
        return p, s, q
    return _in_float32(unit, r) or svd_by_gram(unit, r)


def gram(unit: Unit, dtype: torch.dtype) -> Tensor:
    """WᵀW (*batch, n, n), summed over blocks of rows."""
    *batch, _, n = unit.shape
    found = torch.zeros(*batch, n, n, dtype=dtype, device=unit.weight.device)
    flat = found.view(-1, n, n)
    for _, block in unit.blocks(dtype):
        rows = block.view(-1, *block.shape[-2:])
        flat.baddbmm_(rows.mT, rows)
    return found


def leading(gram: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r largest eigenvalues and their vectors, found in the memory of the Gram."""
    vectors = gram.mT  # as LAPACK wants it; a Gram is symmetric
    values = gram.new_empty(gram.shape[:-1])
    torch.linalg.eigh(vectors, out=(values, vectors))
    last = slice(max(0, gram.shape[-1] - r), None)
    return values[..., last].flip(-1), vectors[..., last].flip(-1)


def svd_by_gram(unit: Unit, r: int) -> Triples:
    """Triples of a tall matrix, down to 1e-8 of the largest, from the eigenvectors of the Gram."""
    _, q = leading(gram(unit, work := work_dtype(unit.weight)), r)
    p = q.new_empty(*unit.shape[:-1], q.shape[-1], dtype=torch.float32)
    squares = q.new_zeros(*unit.shape[:-2], q.shape[-1])
    for rows, block in unit.blocks(work):
        image = block @ q
        squares += image.square().sum(-2)
        p[..., rows, :] = image
    s = squares.sqrt()
    return p.div_(_above_zero(s)), s, q


def _in_float32(unit: Unit, r: int) -> Triples | None:
    """The same in half of the time, or None where it could be less exact.

    Note [float32 subspace]. Rounding moves the Gram by a share of eps₃₂ of its largest
    eigenvalue σ₁², and so loses at most r·eps₃₂·σ₁² of the square that the leading subspace holds.
    That has to be far below the square of the error, ‖W‖² − Σσᵢ², for which a weight without much
    of a spectrum is the rule. Within the subspace everything is float64 again: an r×r problem.
    """
    *batch, m, n = unit.shape
    if 2 * r > n or unit.weight.device.type != "cpu" or not _multiplies_in_float32():
        return None
    _, basis = leading(gram(unit, torch.float32), r)
    p, wide = basis.new_empty(*batch, m, r), torch.float64
    inner, total = basis.new_zeros(*batch, r, r, dtype=wide), basis.new_zeros(batch, dtype=wide)
    for rows, block in unit.blocks(torch.float32):
        image = (block @ basis).double()
        inner += image.mT @ image
        total += torch.linalg.vector_norm(block, dim=(-2, -1), dtype=wide).square()
        p[..., rows, :] = image
    turn, squares = _turn(basis, inner)
    lost = r * torch.finfo(torch.float32).eps * squares[..., 0]
    if not bool((lost <= 1e-5 * (total - squares.sum(-1))).all()):
        return None
    s = squares.sqrt()
    q = basis.double() @ turn
    turn.div_(_above_zero(s))
    for rows in unit.rows():
        p[..., rows, :] = p[..., rows, :].double() @ turn
    return p, s, q


def _turn(basis: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """T (r×r) with which B T has the leading singular vectors for columns, and σ².

    Args:
        basis: B (n×r), orthonormal to eps₃₂.
        inner: (WB)ᵀWB.
    """
    wide = basis.to(inner.dtype)
    # One step of Newton's, 3/2 − BᵀB/2: orthonormal to eps₃₂², for which float64 has room.
    polish = (wide.mT @ wide).mul_(-0.5)
    polish.diagonal(dim1=-2, dim2=-1).add_(1.5)
    del wide
    squares, vectors = leading(polish.mT @ inner @ polish, basis.shape[-1])
    return polish @ vectors, squares.clamp_min(0)


def _above_zero(s: Tensor) -> Tensor:
    """Norms of columns that one may divide by."""
    return s.clamp_min(torch.finfo(s.dtype).tiny).unsqueeze(-2)


def _multiplies_in_float32() -> bool:
    """Whether matrix products on the CPU have not been allowed fewer digits."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision in ("none", "ieee")


def resolution(dtype: torch.dtype) -> float:
    """The share of the largest singular value below which there is only rounding."""
    return 1e-14 if dtype == torch.float64 else 1e-8


def sketched_svd(unit: Unit, r: int) -> Triples:
    """The leading singular triples of the weight's projection on what a sketch spans."""
    work, device = torch.promote_types(unit.weight.dtype, torch.float32), unit.weight.device
    *batch, m, n = unit.shape
    columns = min(r + OVERSAMPLED, m, n)
    generator = torch.Generator(device=device).manual_seed(0)
    sketch = torch.randn(*batch, n, columns, generator=generator, dtype=work, device=device)
    basis = torch.linalg.qr(_times(unit, sketch)).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(_times(unit, torch.linalg.qr(_transposed_times(unit, basis)).Q)).Q
    projected = _transposed_times(unit, basis).mT
    p, s, q = truncated_svd(Unit(projected, torch.zeros_like(unit.exponent)), r)
    return basis.to(p.dtype) @ p, s, q


def _times(unit: Unit, right: Tensor) -> Tensor:
    """W X."""
    found = right.new_empty(*unit.shape[:-1], right.shape[-1])
    for rows, block in unit.blocks(right.dtype):
        found[..., rows, :] = block @ right
    return found


def _transposed_times(unit: Unit, left: Tensor) -> Tensor:
    """Wᵀ Y."""
    found = left.new_zeros(*unit.shape[:-2], unit.shape[-1], left.shape[-1])
    for rows, block in unit.blocks(left.dtype):
        found += block.mT @ left[..., rows, :]
    return found
