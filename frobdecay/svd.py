"""Truncated singular value decompositions, W ≈ P S Qᵀ, at a fraction of a full one's time.

``truncated_svd`` is exact, ``sketched_svd`` is randomized. Both take (*batch, m, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["resolution", "sketched_svd", "truncated_svd", "work_dtype"]

OVERSAMPLED, POWERS = 10, 2
"""More columns of a sketch than the rank, and power iterations, as Halko et al. advise."""


def truncated_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading min(r, m, n) singular triples, P S Qᵀ, in float64.

    The smaller Gram's eigenvectors give the truncated decomposition at a fraction of an SVD's
    time. They resolve singular values down to √eps₆₄ ≈ 1e-8 of the largest, which is finer than
    float32 weights are known; float64 weights take the SVD itself.
    """
    if weight.dtype == torch.float64:
        p, s, qh = torch.linalg.svd(weight, full_matrices=False)
        return p[..., :r], s[..., :r], qh.mT[..., :r]
    if weight.shape[-2] < weight.shape[-1]:
        q, s, p = truncated_svd(weight.mT, r)
        return p, s, q
    # Scaled to about unit size, so that the Gram neither overflows nor underflows; by a power of
    # two, which rounds nothing, and whose inverse is a float32, too.
    weight = weight.float()
    high, low = (reduce((-2, -1), keepdim=True) for reduce in (weight.amax, weight.amin))
    largest = torch.maximum(high, -low)
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    size = torch.ldexp(torch.ones_like(largest, dtype=work_dtype(weight)), exponent)
    p, s, q = _in_float32(weight, size, r) or _in_float64(weight, size, r)
    return p, s * size.squeeze(-1), q


def _in_float64(weight: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triples of weight/size from the eigenvectors of its Gram."""
    scaled = weight.to(size.dtype) / size
    q = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors.flip(-1)[..., :r]
    return *_normalized(scaled @ q), q


def _in_float32(weight: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same in half of the time, or None where it could be less exact.

    Note [float32 subspace]. Rounding moves the Gram by a share of eps₃₂ of its largest
    eigenvalue σ₁², and so loses at most r·eps₃₂·σ₁² of the square that the leading subspace holds.
    That has to be far below the square of the error, ‖W‖² − Σσᵢ², for which a weight without much
    of a spectrum is the rule. Within the subspace everything is float64 again: an r×r problem.
    """
    n = weight.shape[-1]
    if 2 * r > n or weight.device.type != "cpu" or not _multiplies_in_float32():
        return None
    # contiguous, because the layout would change the rounding
    scaled = weight.contiguous() * size.reciprocal().float()
    basis = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors.flip(-1)[..., :r]
    image, basis = (scaled @ basis).double(), basis.double()
    # One step of Newton's: orthonormal to eps₃₂², for which float64 has room.
    polish = torch.eye(r, dtype=size.dtype).mul(1.5) - 0.5 * (basis.mT @ basis)
    rotation = torch.linalg.eigh(polish.mT @ (image.mT @ image) @ polish).eigenvectors.flip(-1)
    turn = polish @ rotation
    p, s = _normalized(image @ turn)
    left = torch.linalg.vector_norm(scaled, dim=(-2, -1), dtype=size.dtype).square()
    left = left - s.square().sum(-1)
    lost = r * torch.finfo(torch.float32).eps * s[..., 0].square()
    return (p, s, basis @ turn) if bool((lost <= 1e-5 * left).all()) else None


def _multiplies_in_float32() -> bool:
    """Whether matrix products on the CPU have not been allowed fewer digits."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision in ("none", "ieee")


def _normalized(p: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of norm 1, and the norms."""
    s = torch.linalg.vector_norm(p, dim=-2)
    return p / s.clamp_min(torch.finfo(s.dtype).tiny).unsqueeze(-2), s


def resolution(dtype: torch.dtype) -> float:
    """The share of the largest singular value below which there is only rounding."""
    return 1e-14 if dtype == torch.float64 else 1e-8


def sketched_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of the weight's projection on what a sketch spans."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    columns = min(r + OVERSAMPLED, *weight.shape[-2:])
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (*weight.shape[:-2], weight.shape[-1], columns)
    sketch = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
    basis = torch.linalg.qr(weight @ sketch).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ basis).Q).Q
    p, s, q = truncated_svd(basis.mT @ weight, r)
    return basis.to(p.dtype) @ p, s, q


def work_dtype(tensor: Tensor) -> torch.dtype:
    """float64, except on devices that do not have it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
