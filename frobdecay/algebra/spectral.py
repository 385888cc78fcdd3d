"""Initialization: a dense matrix in, balanced factors out.

Spectral initialization takes the truncated singular value decomposition of the dense weight and
splits the singular values evenly,

    W ≈ P S Qᵀ,    U = P √S,    V = Q √S,    M = I,

so that ‖W − UVᵀ‖_F is the smallest possible at that rank (Eckart–Young) and UᵀU = VᵀV (balanced).
(Khodak et al., ICLR 2021, arXiv:2105.01029.) With more columns than there are singular values,
U = P √S R and V = Q √S R, where R has orthonormal rows: still exact and balanced, and no column is
zero, as padding with zeros would leave columns that never receive a gradient.

Tensors in, tensors out: nothing here knows modules. What already is factored is balanced in
``product/balance.py``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.precision import full_precision
from frobdecay.algebra.scaling import BLOCK, Unit, check_weight, root_mean_square
from frobdecay.algebra.svd import Triples, resolution, sketched_svd, truncated_svd

Rank = int | float
Init = Callable[..., tuple[Tensor, ...]]
"""``init(weight, rank, *, depth)`` -> (U, M₁ … M_depth, V) for weight (*batch, m, n)."""


def plain_rank(rank: Any) -> int | float:
    """A rank as a plain number: an int for all that counts, a float for other real numbers.

    So numpy's integers and tensors of no dimensions are taken as what they hold.

    Raises:
        TypeError: neither, or a bool.
        ValueError: zero, negative, NaN, or larger than any tensor.
    """
    value = rank.item() if getattr(rank, "ndim", None) == 0 else rank
    counts = hasattr(type(value), "__index__")
    number = (counts or isinstance(value, Real)) and not hasattr(value, "ndim")
    if not number or isinstance(value, bool):
        raise TypeError(f"expected a rank as int or as float fraction of min(m, n), got {rank!r}")
    plain = operator.index(value) if counts else float(value)
    if not 0 < plain < 2**31:
        more = ", and no tensor is as large" * (plain > 0)
        raise ValueError(f"expected a rank above 0, got {rank}{more}")
    return plain


def resolve_rank(rank: Any, m: int, n: int) -> int:
    """Turn a rank, an int or a fraction of min(m, n), into a number of columns.

    Args:
        rank: an int, or a float that is multiplied by min(m, n) and rounded, but at least to 1.
            Both may exceed min(m, n): the factorization is then overcomplete (wide). Numbers of
            numpy's and 0-d tensors are taken as what they hold.
        m: rows.
        n: columns.

    Raises:
        TypeError: neither int nor float.
        ValueError: zero, negative, NaN or infinite.

    Examples:
        >>> resolve_rank(4, 16, 32), resolve_rank(0.111, 96, 48), resolve_rank(3.0, 8, 16)
        (4, 5, 24)
    """
    plain = plain_rank(rank)
    return plain if isinstance(plain, int) else max(1, round(plain * min(m, n)))


@torch.no_grad()
def spectral_init(weight: Tensor, rank: Rank, *, depth: int = 0) -> tuple[Tensor, ...]:
    """Factorize a matrix by its truncated singular value decomposition, √S on both sides.

    Examples:
        >>> import torch
        >>> U, V = spectral_init(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1)
        >>> U @ V.T
        tensor([[3., 0.],
                [0., 0.]])

    Exact (never randomized): the error is the smallest there is to a relative 1e-5 and usually
    to 1e-7, whatever the dtype and the magnitude. The same weight gives the same product, to
    rounding, and where its singular values are apart the same factors, too: the largest entry of
    each column of V is positive. Not the same bits, where libraries round otherwise: on another
    processor, with another number of threads, or in a batch with others. And in a cluster of
    singular values that are equal to rounding, U and V are known only up to a common rotation of
    the cluster's columns. Nothing else depends on that: files and replicas hold the factors
    themselves.

    Args:
        weight: W, (*batch, m, n); every matrix of a batch is factorized for itself. One that is
            zero gets factors that are zero.
        rank: r, an int or a fraction of min(m, n); more than min(m, n) is overcomplete.
        depth: number of inner factors M = I (r×r) between U and V.

    Returns:
        (U, M₁ … M_depth, V): U (*batch, m, r) and V (*batch, n, r), contiguous, with the weight's
        dtype and device. UᵀU = VᵀV, and ‖W − UVᵀ‖_F is the smallest there is.

    Raises:
        TypeError, ValueError: a weight that cannot be factorized, or a rank that is none.
    """
    return _decomposed(weight, rank, depth, truncated_svd)


def _decomposed(
    weight: Tensor, rank: Rank, depth: int, decompose: Callable[[Unit, int], Triples]
) -> tuple[Tensor, ...]:
    """Factors from singular triples, a few matrices of a batch at a time."""
    check_weight(weight)
    *batch, m, n = weight.shape
    r = resolve_rank(rank, m, n)
    matrices = weight.detach().reshape(-1, m, n)
    count = max(1, BLOCK // (m * n))
    parts = [matrices[start : start + count] for start in range(0, len(matrices), count)]
    with full_precision(weight.device.type):
        if not batch:
            return with_inner(*_ends(weight.detach(), r, decompose), depth)
        U, V = weight.new_empty(len(matrices), m, r), weight.new_empty(len(matrices), n, r)
        places = zip(torch.split(U, count), torch.split(V, count), strict=True)
        for part, place in zip(parts, places, strict=True):
            for whole, end in zip(place, _ends(part, r, decompose), strict=True):
                whole.copy_(end)
    return with_inner(U.view(*batch, m, r), V.view(*batch, n, r), depth)


def _ends(
    weight: Tensor, r: int, decompose: Callable[[Unit, int], Triples]
) -> tuple[Tensor, Tensor]:
    """U and V of a matrix or of a few."""
    unit = Unit(weight)
    left, right = split_evenly(*decompose(unit, r), r, resolution(weight.dtype))
    return unit.shared_(left).to(weight.dtype), unit.shared_(right).to(weight.dtype)


def split_evenly(p: Tensor, s: Tensor, q: Tensor, r: int, least: float) -> tuple[Tensor, Tensor]:
    """U = P √S R and V = Q √S R from k ≤ r singular triples, signs fixed; P and Q are lost."""
    largest = q.abs().argmax(-2, keepdim=True)
    sign = q.gather(-2, largest).sign()
    root = s.sqrt().unsqueeze(-2)
    left, right = p.mul_(sign * root), q.mul_(sign * root)
    alive = s > least * s[..., :1]
    if s.shape[-1] == r and bool(alive.all()):
        return left, right
    # Fewer triples than columns: spread those there are over all columns. Each matrix of a batch
    # as if it were alone: one with as many triples as columns stays as it is.
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (left, right)]
    counts = alive.sum(-1).reshape(-1).tolist()
    spread = [
        torch.stack(
            [
                x[i] if k == r else x[i, :, :k].to(s.dtype) @ orthonormal_rows(k, r, s)
                for i, k in enumerate(counts)
            ]
        )
        for x in flat
    ]
    return (spread[0].reshape(*left.shape[:-1], r), spread[1].reshape(*right.shape[:-1], r))


def orthonormal_rows(k: int, r: int, like: Tensor) -> Tensor:
    """The first k rows of the r×r orthonormal cosine transform: none of its columns is zero."""
    rows = torch.arange(k, device=like.device, dtype=like.dtype).unsqueeze(-1)
    columns = torch.arange(r, device=like.device, dtype=like.dtype) + 0.5
    basis = torch.cos(math.pi / r * rows * columns) * math.sqrt(2 / r)
    basis[:1] *= math.sqrt(0.5)
    return basis


def check_depth(depth: int) -> None:
    """Refuse what counts no inner factors."""
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"expected depth to be a number of inner factors, got {depth!r}")
    if depth < 0:
        raise ValueError(f"expected depth to be at least 0, got {depth}")


def with_inner(left: Tensor, right: Tensor, depth: int) -> tuple[Tensor, ...]:
    """(U, M … M, V), all contiguous, with M = I."""
    check_depth(depth)
    r = left.shape[-1]
    eye = torch.eye(r, dtype=left.dtype, device=left.device).expand(*left.shape[:-2], r, r)
    inner = (eye.clone(memory_format=torch.contiguous_format) for _ in range(depth))
    return (left.contiguous(), *inner, right.contiguous())


@torch.no_grad()
def randomized_init(weight: Tensor, rank: Rank, *, depth: int = 0) -> tuple[Tensor, ...]:
    """Factorize a matrix by a randomized singular value decomposition, √S on both sides.

    For very large weights at small ranks, where the Gram of ``spectral_init`` is too dear: the
    weight is multiplied with r + 10 random vectors, back and forth (Halko, Martinsson, Tropp, 2011,
    arXiv:0909.4061). Close to the best error where singular values fall off, a few percent above
    it where they do not, as in random weights: look at the error in the plan that ``factorize``
    returns. Draws from a generator of its own: the same weight gives the same factors, in the
    sense of ``spectral_init``. Arguments and returns as there.

    Examples:
        >>> import torch
        >>> W = torch.outer(torch.arange(4.0), torch.arange(3.0))
        >>> U, V = randomized_init(W, rank=1)
        >>> torch.allclose(U @ V.T, W, atol=1e-5)
        True
    """
    return _decomposed(weight, rank, depth, sketched_svd)


def _normal_init(
    weight: Tensor, rank: Rank, depth: int, std: Callable[[int, int], tuple[float, float]]
) -> tuple[Tensor, ...]:
    """Normal factors; ``std(n, r)`` gives the standard deviations of U and V."""
    check_weight(weight)
    (m, n), batch = weight.shape[-2:], weight.shape[:-2]
    r = resolve_rank(rank, m, n)
    std_u, std_v = std(n, r)
    left, right = weight.new_empty(*batch, m, r), weight.new_empty(*batch, n, r)
    left.normal_(0, std_u)
    right.normal_(0, std_v)
    return with_inner(left, right, depth)


@torch.no_grad()
def kaiming_init(weight: Tensor, rank: Rank, *, depth: int = 0) -> tuple[Tensor, ...]:
    """Draw each factor as if it were a dense matrix (He et al.): the usual, poor default.

    U ~ N(0, 2/r) and V ~ N(0, 2/n): the product's entries then have variance 4/n, where the
    dense He initialization of the same matrix has 2/n. That is what the paper's code draws for its
    residual networks, of kernels too: read (o kh)×(i kw), with 2/r where a layer of kh rows would
    have 2/(r kh), their products have 2 kh times the variance of the dense kernel. Draws from
    torch's global generator, as ``torch.nn.init`` does. Arguments and returns as for
    ``spectral_init``.

    Examples:
        >>> import torch
        >>> [factor.shape for factor in kaiming_init(torch.ones(6, 5), 2)]
        [torch.Size([6, 2]), torch.Size([5, 2])]
    """
    return _normal_init(weight, rank, depth, lambda n, r: (math.sqrt(2 / r), math.sqrt(2 / n)))


@torch.no_grad()
def matched_init(weight: Tensor, rank: Rank, *, depth: int = 0) -> tuple[Tensor, ...]:
    """Draw Gaussian factors whose product's entries have the weight's mean square.

    Each entry ~ N(0, √(v/r)) with v the mean square of W, so that the product's entries have
    variance v. Draws from torch's global generator. Arguments and returns as for
    ``spectral_init``.

    Examples:
        >>> import torch
        >>> U, V = matched_init(torch.full((400, 300), 0.5), 50)
        >>> bool(abs((U @ V.T).square().mean().sqrt() - 0.5) < 0.05)
        True
    """

    def std(n: int, r: int) -> tuple[float, float]:
        each = (root_mean_square(weight) / r**0.5) ** 0.5
        return each, each

    return _normal_init(weight, rank, depth, std)


INITS: Mapping[str, Init] = MappingProxyType(
    {
        "spectral": spectral_init,
        "randomized": randomized_init,
        "kaiming": kaiming_init,
        "matched": matched_init,
    }
)


def resolve_init(init: str | Init) -> Init:
    """Look an initialization up by name; a callable is taken as it is.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if callable(init):
        return init
    if not isinstance(init, str) or init not in INITS:
        raise ValueError(f"expected init to be one of {sorted(INITS)} or a callable, got {init!r}")
    return INITS[init]
