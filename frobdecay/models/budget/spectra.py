"""Singular values of weights that are read as matrices, and the share of ‖W‖² that a rank keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from frobdecay.algebra.scaling import Unit, times_power, work_dtype
from frobdecay.algebra.svd import gram


def singular_values(matrix: Tensor) -> Tensor:
    """σ (*batch, k), largest first, from the smaller Gram; in float64 where there is one."""
    unit = Unit(matrix)
    tall = unit if matrix.shape[-2] >= matrix.shape[-1] else unit.mT
    squares = torch.linalg.eigvalsh(gram(tall, work_dtype(matrix))).flip(-1).clamp_min(0)
    return times_power(squares.sqrt(), unit.exponent.squeeze(-1))


def shares(sigma: Tensor) -> Tensor:
    """The share of Σσ² that each further rank keeps, (k,), of all matrices of a batch together.

    In float64, on the CPU; zeros where there are only zeros.
    """
    squares = (sigma / sigma.max().clamp_min(torch.finfo(sigma.dtype).tiny)).square()
    joint = squares.reshape(-1, squares.shape[-1]).sum(0)
    return (joint / joint.sum().clamp_min(torch.finfo(joint.dtype).tiny)).cpu().double()


def first_reaching(kept: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share of the energy, from what each further one keeps."""
    total = kept.cumsum(0)
    return 1 + int((total < energy * total[-1]).sum())
