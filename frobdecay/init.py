"""Initialization: a dense matrix in, balanced factors out.

Spectral initialization takes the truncated singular value decomposition of the dense weight and
splits the singular values evenly,

    W ≈ P S Qᵀ,    U = P √S,    V = Q √S,    M = I,

so that ‖W − UVᵀ‖_F is the smallest possible at that rank (Eckart–Young) and UᵀU = VᵀV (balanced).
(Khodak et al., ICLR 2021, arXiv:2105.01029.) With more columns than there are singular values,
U = P √S R and V = Q √S R, where R has orthonormal rows: still exact and balanced, and no column is
zero, as padding with zeros would leave columns that never receive a gradient.

Tensors in, tensors out: nothing here knows modules, except ``balance_``, which writes to the
parameters of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from frobdecay.chain import full_precision
from frobdecay.product import Product, as_products
from frobdecay.structures import CHAIN
from frobdecay.svd import resolution, sketched_svd, truncated_svd, work_dtype

__all__ = [
    "INITS",
    "Init",
    "balance_",
    "check_weight",
    "kaiming_init",
    "matched_init",
    "randomized_init",
    "resolve_init",
    "resolve_rank",
    "spectral_init",
]

Rank = int | float
Init = Callable[..., tuple[Tensor, ...]]
"""``init(weight, rank, *, depth)`` -> (U, M₁ … M_depth, V) for weight (*batch, m, n)."""


def resolve_rank(rank: Rank, m: int, n: int) -> int:
    """Turn a rank, an int or a fraction of min(m, n), into a number of columns.

    Args:
        rank: an int, or a float that is multiplied by min(m, n) and rounded, but at least to 1.
            Both may exceed min(m, n): the factorization is then overcomplete (wide).
        m: rows.
        n: columns.

    Raises:
        TypeError: neither int nor float.
        ValueError: zero, negative, NaN or infinite.

    Example:
        >>> resolve_rank(4, 16, 32), resolve_rank(0.111, 96, 48), resolve_rank(3.0, 8, 16)
        (4, 5, 24)
    """
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(f"expected a rank as int or as float fraction of min(m, n), got {rank!r}")
    if not 0 < rank < math.inf:
        raise ValueError(f"expected a rank above 0, got {rank}")
    return rank if isinstance(rank, int) else max(1, round(rank * min(m, n)))


def check_weight(weight: Tensor, what: str = "the weight") -> None:
    """Refuse what cannot be factorized.

    Raises:
        TypeError: not a dense, real, floating-point tensor with storage.
        ValueError: fewer than two dimensions, an empty one, or entries that are not finite.
    """
    if weight.layout != torch.strided or weight.is_quantized or not weight.is_floating_point():
        raise TypeError(
            f"expected {what} to be a dense real floating-point tensor, got {weight.dtype}, "
            f"{weight.layout}; convert it first"
        )
    if weight.is_meta:
        raise TypeError(
            f"expected {what} to hold numbers, got a tensor on the meta device; "
            "materialize and initialize the module before factorizing it"
        )
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(
            f"expected {what} to be a matrix without empty dimensions, got {tuple(weight.shape)}"
        )
    if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():  # one pass, no copies
        raise ValueError(f"expected {what} to be finite, got NaN or infinity; initialize it first")


@torch.no_grad()
def spectral_init(weight: Tensor, rank: Rank, *, depth: int = 0) -> tuple[Tensor, ...]:
    """Factorize a matrix by its truncated singular value decomposition, √S on both sides.

    Exact (never randomized): the error is the smallest there is to a relative 1e-5 and usually
    to 1e-7, whatever the dtype. The same weight gives the same factors: the largest entry of each
    column of V is positive.

    Args:
        weight: W, (*batch, m, n); batches are factorized one by one.
        rank: r, an int or a fraction of min(m, n); more than min(m, n) is overcomplete.
        depth: number of inner factors M = I (r×r) between U and V.

    Returns:
        (U, M₁ … M_depth, V): U (*batch, m, r) and V (*batch, n, r), contiguous, with the weight's
        dtype and device. UᵀU = VᵀV, and ‖W − UVᵀ‖_F is the smallest there is.

    Raises:
        TypeError, ValueError: a weight that cannot be factorized, or a rank that is none.

    Example:
        >>> import torch
        >>> U, V = spectral_init(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1)
        >>> U @ V.T
        tensor([[3., 0.],
                [0., 0.]])
    """
    check_weight(weight)
    r = resolve_rank(rank, weight.shape[-2], weight.shape[-1])
    with full_precision(weight.device.type):
        left, right = _split(*truncated_svd(weight, r), r, resolution(weight.dtype))
    return _with_inner(left.to(weight.dtype), right.to(weight.dtype), depth)


def _split(p: Tensor, s: Tensor, q: Tensor, r: int, least: float) -> tuple[Tensor, Tensor]:
    """U = P √S R and V = Q √S R from k ≤ r singular triples, signs fixed."""
    largest = q.abs().argmax(-2, keepdim=True)
    sign = q.gather(-2, largest).sign()
    root = s.sqrt().unsqueeze(-2)
    left, right = p * (sign * root), q * (sign * root)
    alive = s > least * s[..., :1]
    if s.shape[-1] == r and bool(alive.all()):
        return left, right
    # Fewer triples than columns: spread those there are over all columns.
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (left, right)]
    counts = alive.sum(-1).reshape(-1).tolist()
    spread = [
        torch.stack([x[i, :, :k] @ _orthonormal_rows(k, r, x) for i, k in enumerate(counts)])
        for x in flat
    ]
    return (
        spread[0].reshape(*left.shape[:-1], r),
        spread[1].reshape(*right.shape[:-1], r),
    )


def _orthonormal_rows(k: int, r: int, like: Tensor) -> Tensor:
    """The first k rows of the r×r orthonormal cosine transform: none of its columns is zero."""
    rows = torch.arange(k, device=like.device, dtype=like.dtype).unsqueeze(-1)
    columns = torch.arange(r, device=like.device, dtype=like.dtype) + 0.5
    basis = torch.cos(math.pi / r * rows * columns) * math.sqrt(2 / r)
    basis[:1] *= math.sqrt(0.5)
    return basis


def _with_inner(left: Tensor, right: Tensor, depth: int) -> tuple[Tensor, ...]:
    """(U, M … M, V), all contiguous, with M = I."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise ValueError(f"expected depth to be a number of inner factors, got {depth!r}")
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
    returns. Draws from a generator of its own: the same weight gives the same factors. Arguments
    and returns as for ``spectral_init``.

    Example:
        >>> import torch
        >>> W = torch.outer(torch.arange(4.0), torch.arange(3.0))
        >>> U, V = randomized_init(W, rank=1)
        >>> torch.allclose(U @ V.T, W, atol=1e-5)
        True
    """
    check_weight(weight)
    r = resolve_rank(rank, weight.shape[-2], weight.shape[-1])
    with full_precision(weight.device.type):
        triples = sketched_svd(weight, r)
        left, right = _split(*triples, r, resolution(weight.dtype))
    return _with_inner(left.to(weight.dtype), right.to(weight.dtype), depth)


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
    return _with_inner(left, right, depth)


@torch.no_grad()
def kaiming_init(weight: Tensor, rank: Rank, *, depth: int = 0) -> tuple[Tensor, ...]:
    """Draw each factor as if it were a dense layer (He et al.): the usual, poor default.

    U ~ N(0, 2/r) and V ~ N(0, 2/n): the product's entries then have variance 4/n, where the
    dense He initialization of the same matrix has 2/n. Draws from torch's global generator, as
    ``torch.nn.init`` does. Arguments and returns as for ``spectral_init``.

    Example:
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

    Example:
        >>> import torch
        >>> U, V = matched_init(torch.full((400, 300), 0.5), 50)
        >>> bool(abs((U @ V.T).square().mean().sqrt() - 0.5) < 0.05)
        True
    """
    std = float(weight.double().square().mean() ** 0.25) if weight.numel() else 0.0
    return _normal_init(weight, rank, depth, lambda n, r: (std / r**0.25, std / r**0.25))


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
    if init not in INITS:
        raise ValueError(f"expected init to be one of {sorted(INITS)} or a callable, got {init!r}")
    return INITS[init]


@torch.no_grad()
def balance_(products: Product | Iterable[Product]) -> None:
    """Spectrally initialize products that already are factored, in place, W unchanged.

    The product has rank r at most, so the decomposition needs two QR factorizations and one of
    an r×r matrix, U = Q_U R_U, V = Q_V R_V, R_U M R_Vᵀ = P S Qᵀ; never an m×n matrix:

        U ← Q_U P √S,    M ← I,    V ← Q_V Q √S.

    Args:
        products: one product or several. For attention this is the spectral initialization of
            the query–key and output–value products.

    Raises:
        ValueError: a frozen factor, a parameter that is a factor twice, inner factors that are
            not square, factors that are not finite, or a product that is zero; nothing was
            changed then.

    Example:
        >>> import torch
        >>> U, V = torch.randn(6, 2) * 100, torch.randn(5, 2)
        >>> before = U @ V.T
        >>> balance_(Product.of(U, V))
        >>> torch.allclose(U.T @ U, V.T @ V, atol=1e-3), torch.allclose(U @ V.T, before, atol=1e-3)
        (True, True)
    """
    found = as_products(products)
    _check_balanceable(found)
    balanced = [_balanced(product) for product in found]  # all before any is written
    for product, tensors in zip(found, balanced, strict=True):
        for factor, tensor in zip(product.factors, tensors, strict=True):
            view = factor.view(factor.param)
            view.copy_(tensor.reshape(view.shape))


def _check_balanceable(products: list[Product]) -> None:
    seen: dict[tuple[int, str | None, int | None], str] = {}
    for product in products:
        if product.structure != CHAIN:
            raise ValueError(
                f"{product.name}: expected a chain of factors, got structure "
                f"{product.structure.name}, whose balance is not defined"
            )
        for factor, view in zip(product.factors, product.views(), strict=True):
            where = f"{product.name} ({factor.attribute})"
            if isinstance(factor.param, torch.nn.Parameter) and not factor.param.requires_grad:
                raise ValueError(f"{where} is frozen; balancing would move it: unfreeze it first")
            key = (id(factor.param), factor.pattern, factor.index)
            if key in seen:
                raise ValueError(
                    f"{where} is also a factor of {seen[key]}; balancing one product would "
                    "change the other: balance only one of them"
                )
            seen[key] = product.name
            if not view.isfinite().all():
                raise ValueError(f"{where} is not finite; initialize it first")
        for view in product.views()[1:-1]:
            if view.ndim > product.batch + 2 or view.shape[-1] != view.shape[-2]:
                raise ValueError(
                    f"{product.name}: expected square inner factors to become the identity, got "
                    f"{tuple(view.shape)}"
                )


def _balanced(product: Product) -> tuple[Tensor, ...]:
    """The balanced factors of one product, in float64."""
    views = [view.to(work_dtype(view)) for view in product.views()]
    q_left, core = torch.linalg.qr(views[0].flatten(product.batch, -2))
    for view in views[1:-1]:
        core = core @ view
    q_right, r_right = torch.linalg.qr(views[-1].flatten(product.batch, -2))
    p, s, qh = torch.linalg.svd(core @ r_right.mT, full_matrices=False)
    if not bool((s[..., 0] > 0).all()):
        raise ValueError(
            f"{product.name}: the product is zero, and so would be its balanced factors, which "
            "then never train; leave it as it is, or initialize it first"
        )
    r = views[0].shape[-1]
    left, right = _split(q_left @ p, s, q_right @ qh.mT, r, resolution(torch.float64))
    return _with_inner(left, right, len(views) - 2)
