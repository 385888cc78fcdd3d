r"""Calibrated spectral initialization: the truncation that is best on the data a layer sees.

Spectral initialization minimizes ‖W − UVᵀ‖_F, the error on inputs that are all alike, C = I. For
inputs x with second moment C = E[xxᵀ] it is the outputs that should be kept,

    E‖(W − UVᵀ)x‖² = tr (W − UVᵀ) C (W − UVᵀ)ᵀ,    least for    UVᵀ = P Pᵀ W,

where the columns of P are the r leading eigenvectors of the outputs' second moment S = W C Wᵀ: the
principal components of what the layer puts out. (With C = LLᵀ and the truncated decomposition
W L ≈ P Σ Qᵀ that is P Σ Qᵀ L⁻¹, but nothing is inverted, and C may have any rank.) A tall W is
turned onto its columns first, W = Q R, and R decomposed, so that no matrix is larger than
min(m, n) or the moment that is given. With a bias it is enough to keep what varies: C and S are
taken about the mean μ, and b + (W − UVᵀ)μ restores the outputs' mean.

Of what few inputs do not show, S knows nothing. It is therefore shrunk towards the plain metric,

    S_λ = (1 − λ) S + λ τ W Wᵀ,    τ = tr S / ‖W‖²_F,

as if a share λ of the outputs' energy came from inputs that are all alike. λ = 1 is spectral
initialization. For any λ the error on the data is at most the plain truncation's, which is the
best there is at the term that is added and so cannot be better at the other.

The factors are balanced by one decomposition of an r×r matrix. Tensors in, tensors out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from frobdecay.algebra.precision import full_precision
from frobdecay.algebra.scaling import Unit, check_weight, times_power, work_dtype
from frobdecay.algebra.spectral import Rank, resolve_rank, split_evenly, with_inner
from frobdecay.algebra.svd import leading, resolution, svd_by_gram, truncated_svd

LEAST = 1e-12
"""λ at least: what the moment leaves undecided is decided by the weight itself."""

ROUNDING = 1e-8
"""How far from orthonormal the columns may be on which a float32 weight is turned."""


class Calibrated(NamedTuple):
    """What calibrated initialization makes of a weight.

    Attributes:
        factors: (U, M₁ … M_depth, V).
        error: √(E‖(W − UVᵀ)x‖² / E‖Wx‖²), both about the mean where the bias is moved.
        shift: what to add to the bias, (*batch, m); None where there is none.
        plain: which matrices of a batch the data says nothing of, so that they are truncated by
            their own spectrum.
    """

    factors: tuple[Tensor, ...]
    error: float
    shift: Tensor | None
    plain: list[int]


@dataclass(frozen=True)
class Metric:
    """What is known of the inputs or outputs of a weight (*batch, m, n) read as matrices.

    Attributes:
        second: of inputs (*batch, n, n), of outputs (*batch, m, m), or, of rows that are looked
            up, how often each is (*batch, m). About the mean where the bias is moved. Matrices of
            a batch keep the sizes that they have among each other; one may stand for all.
        of: which of these.
        mean: of the inputs (*batch, n) or of the outputs Wx (*batch, m), if the bias is moved.
        shrink: λ.
    """

    second: Tensor
    of: Literal["inputs", "outputs", "rows"]
    mean: Tensor | None = None
    shrink: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shrink <= 1:
            raise ValueError(f"expected shrink between 0 and 1, got {self.shrink!r}")

    @torch.no_grad()
    def spectrum(self, weight: Tensor) -> Tensor:
        """Singular values of W L, largest first: the outputs' error at rank r is √Σ of the rest².

        Args:
            weight: W, (*batch, m, n).

        Returns:
            (*batch, min(m, n)).
        """
        with full_precision(weight.device.type):
            outputs = self._outputs(weight)
            values = torch.linalg.eigvalsh(outputs.shrunk(self.shrink)).flip(-1).clamp_min(0)
            found = (values * outputs.energy.unsqueeze(-1)).sqrt()
        return found if self.of == "outputs" else times_power(found, outputs.exponent.squeeze(-1))

    @torch.no_grad()
    def factors(self, weight: Tensor, rank: Rank, *, depth: int = 0) -> Calibrated:
        """Factorize W; see the module's docstring.

        Args:
            weight: W, (*batch, m, n).
            rank: as for ``spectral_init``.
            depth: as for ``spectral_init``.

        Raises:
            TypeError, ValueError: as ``spectral_init``.
        """
        check_weight(weight)
        r = resolve_rank(rank, *weight.shape[-2:])
        with full_precision(weight.device.type):
            outputs = self._outputs(weight)
            _, P = leading(outputs.shrunk(self.shrink), r)
            V = outputs.weight.mT @ P
            lost = outputs.energy - _inner(outputs.second @ P, P)
            decompose = truncated_svd if weight.dtype == torch.float64 else svd_by_gram
            q, s, turn = decompose(Unit(V, torch.zeros_like(outputs.exponent)), r)
            p = P @ turn if outputs.basis is None else outputs.basis @ (P @ turn)
            shift = self._shift(weight, p)
            ends = (q, p) if self.of == "rows" else (p, q)
            ends = split_evenly(ends[0], s, ends[1], r, resolution(weight.dtype))
            unit = Unit(weight, outputs.exponent)
            left, right = (unit.shared_(end).to(weight.dtype) for end in ends)
        total = float(outputs.energy.sum())
        error = (max(float(lost.sum()), 0) / total) ** 0.5 if total else 0.0
        plain = (outputs.energy.reshape(-1) <= 0).nonzero().flatten().tolist()
        return Calibrated(with_inner(left, right, depth), error, shift, plain)

    def _outputs(self, weight: Tensor) -> _Outputs:
        """What the weight puts out, in as few numbers as its rank."""
        unit = Unit(weight)
        W, basis = unit.whole(work_dtype(weight)), None
        known = second = self.second.to(W)
        if self.of == "rows":
            W = W.mT
        if W.shape[-2] > W.shape[-1]:
            basis, W = _orthonormalized(W, weight.dtype)
        if self.of != "outputs":
            second = (W @ known if self.of == "inputs" else W * known.unsqueeze(-2)) @ W.mT
        elif basis is not None:
            second = basis.mT @ known @ basis
        energy = second.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0).expand(W.shape[:-2])
        return _Outputs(W, basis, second, energy, unit.exponent)

    def _shift(self, weight: Tensor, p: Tensor) -> Tensor | None:
        """(W − UVᵀ)μ = (1 − P Pᵀ)Wμ, (*batch, m)."""
        if self.mean is None:
            return None
        mean = self.mean.to(p).unsqueeze(-1)
        if self.of == "inputs":
            mean = weight.detach().to(p.dtype) @ mean
        shift: Tensor = mean - p @ (p.mT @ mean)
        return shift.squeeze(-1)


class _Outputs(NamedTuple):
    """W = Q R at unit size, and the second moment S of R x.

    Attributes:
        weight: R, (*batch, k, n) with k = min(m, n), or W itself where it is not tall.
        basis: Q (*batch, m, k); None for the identity.
        second: S, (*batch, k, k).
        energy: tr S, (*batch).
        exponent: of the unit.
    """

    weight: Tensor
    basis: Tensor | None
    second: Tensor
    energy: Tensor
    exponent: Tensor

    def shrunk(self, shrink: float) -> Tensor:
        """S_λ ÷ tr S; plain where the data says nothing."""
        W, energy = self.weight, self.energy
        share = torch.where(energy > 0, max(shrink, LEAST), 1.0)
        kept = ((1 - share) / torch.where(energy > 0, energy, 1.0))[..., None, None]
        plain = (share / _inner(W, W))[..., None, None]
        return self.second * kept + (W @ W.mT) * plain


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Trace of aᵀb, (*batch)."""
    return (a * b).sum((-2, -1))


def _orthonormalized(W: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Q (*batch, m, k) and R (*batch, k, n) of a tall W.

    Cholesky's WᵀW = RᵀR and Q = W R⁻¹ take half of the time of reflections. Q is then orthonormal
    to eps₆₄·κ²; where that is not far below what a float32 weight is known to, reflections it is.
    """
    if dtype != torch.float64:
        R, failed = torch.linalg.cholesky_ex(W.mT @ W, upper=True)
        eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
        inverse = torch.linalg.solve_triangular(R, eye, upper=True)
        square = _inner(R, R) * _inner(inverse, inverse)  # κ², from above
        if bool(((failed == 0) & (square * torch.finfo(R.dtype).eps < ROUNDING)).all()):
            return W @ inverse, R
    Q, R = torch.linalg.qr(W)
    return Q, R
