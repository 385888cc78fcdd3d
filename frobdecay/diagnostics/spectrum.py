"""Singular values and balance of a chain of factors, from r×r matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import nan, prod

import torch
from torch import Tensor

from frobdecay.product.product import Product

# Note [spectrum]
# With U = Q_U R_U and V = Q_V R_V (thin QR) the singular values of U M Vᵀ are those of the r×r
# matrix R_U M R_Vᵀ. The other way to r×r, the eigenvalues of Lᵀ(VᵀV)L with UᵀU = L Lᵀ, squares
# the condition number: against a float64 SVD of the dense 768×3072 product, r = 192, condition
# 1e8, the smallest singular values were off by 8e-2 relative in float64, after QR by 8e-10, and
# QR took less time (13 ms against 15). Factors that are float32 are exact in float64, so ranks
# near rounding are counted right. Only triangles leave the device, and norms and Grams of the
# factors are those of their triangles: everything else is small and happens on the CPU.


def triangles(product: Product) -> list[Tensor]:
    """The factors with both ends shrunk to R of their QR: float64, on the CPU."""
    views, batch = product.views(), product.batch
    if views[0].device.type == "mps":  # has no float64
        views = tuple(view.cpu() for view in views)
    ends = (0, len(views) - 1)
    return [
        (_triangle(view.double(), batch) if k in ends else view.double()).cpu()
        for k, view in enumerate(views)
    ]


def _triangle(view: Tensor, batch: int) -> Tensor:
    """R (*batch, ≤r, r) of the factor with all its axes but the last as rows."""
    r: Tensor = torch.linalg.qr(view.flatten(batch, -2), mode="r").R
    return r


def spectrum_of(factors: Sequence[Tensor], batch: int) -> Tensor:
    """Singular values; an inner factor with further axes has them on V's side.

    A NaN for each matrix of the batch where a factor has a NaN or an infinity.
    """
    if not all(bool(factor.isfinite().all()) for factor in factors):
        # LAPACK raises on NaN; a record of a run that diverged should not
        return factors[0].new_full((*factors[0].shape[:batch], 1), nan)
    right = factors[-1]
    for inner in reversed(factors[1:-1]):
        summed = inner.ndim - batch - 2
        lifted = right[(..., *(None for _ in range(summed)), slice(None), slice(None))]
        right = _triangle(lifted @ inner.mT, batch)
    spectrum: Tensor = torch.linalg.svdvals(factors[0] @ right.mT)
    return spectrum


def imbalance_of(factors: Sequence[Tensor], batch: int) -> float:
    """The largest relative difference of neighbours' Grams at the bond between them."""
    found = []
    for k, (left, right) in enumerate(pairwise(factors)):
        ours = left.mT @ left
        theirs = right.mT @ right if k == len(factors) - 2 else right @ right.mT
        ours, theirs = (
            gram if gram.ndim == batch + 2 else gram.flatten(batch, -3).sum(batch)
            for gram in (ours, theirs)
        )
        scale = (ours.norm() + theirs.norm()).clamp_min(torch.finfo(ours.dtype).tiny)
        found.append((ours - theirs).norm() / scale)
    return float(torch.stack(found).max())


def rank_of(product: Product, spectrum: Tensor) -> int:
    """Singular values above the rounding of the factors, for each matrix of the batch."""
    views = product.views()
    size = max(prod(view.shape[product.batch : -1]) for view in views)
    eps = min(torch.finfo(view.dtype).eps for view in views)
    floor = spectrum[..., :1] * size * min(eps, torch.finfo(torch.float32).eps)
    return int((spectrum > floor).sum())
