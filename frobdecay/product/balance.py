"""Balancing: spectral initialization of products that already are factored, W unchanged.

The product has rank r at most, so the decomposition needs two QR factorizations and one of an
r×r matrix, U = Q_U R_U, V = Q_V R_V, R_U M R_Vᵀ = P S Qᵀ; never an m×n matrix:

    U ← Q_U P √S,    M ← I,    V ← Q_V Q √S.

A bias that is added between U and V is mixed as their columns are, or the model would compute
something else: with A = R_Vᵀ Q S^(-1/2) and A⁻ᵀ = R_Uᵀ P S^(-1/2), so without an inverse,

    U ← U A,    b_U ← b_U A,    V ← V A⁻ᵀ,    b_V ← b_V A⁻ᵀ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from frobdecay.algebra.scaling import is_finite, why_dead, work_dtype
from frobdecay.algebra.spectral import split_evenly, with_inner
from frobdecay.algebra.svd import resolution
from frobdecay.product.factor import Factor, Seen, is_sharded, other_use
from frobdecay.product.holding import lists_of
from frobdecay.product.product import Product, as_products


@torch.no_grad()
def balance_(products: Product | Iterable[Product]) -> None:
    """Spectrally initialize products that already are factored, in place, W unchanged.

    Examples:
        >>> import torch
        >>> U, V = torch.randn(6, 2) * 100, torch.randn(5, 2)
        >>> before = U @ V.T
        >>> balance_(Product.of(U, V))
        >>> torch.allclose(U.T @ U, V.T @ V, atol=1e-3), torch.allclose(U @ V.T, before, atol=1e-3)
        (True, True)

    Biases between the factors (``Product.biases``) go along, so that the model computes what it
    did before. The decomposition is of r×r matrices; see ``balance.py`` for the formulas.

    Args:
        products: one product or several. For attention this is the spectral initialization of
            the query–key and output–value products; grouped queries share their key head's A.

    Raises:
        ValueError: a product that is ``fixed``; a frozen factor, a parameter that is a factor
            twice, inner factors that are not square, factors that are not finite, a product that
            is zero, or one of so low a rank that biases cannot go along; nothing was changed then.
    """
    found = as_products(products)
    _check_balanceable(found)
    balanced = [_balanced(product) for product in found]  # all before any is written
    for product, tensors in zip(found, balanced, strict=True):
        for factor, tensor in zip(_moving(product), tensors, strict=True):
            view = factor.view(factor.param)
            view.copy_(tensor.reshape(view.shape))


def _moving(product: Product) -> list[Factor]:
    """The factors, then their biases: all that balancing writes to."""
    return [*product.factors, *(bias for bias in product.biases if bias is not None)]


def _check_balanceable(products: list[Product]) -> None:
    for product in products:
        if product.fixed is not None:
            raise ValueError(
                f"{product.name}: {product.fixed}, so that balanced factors would compute "
                "something else; leave it out: products(model, exclude=...)"
            )
        if not product.structure.is_chain:
            raise ValueError(
                f"{product.name}: expected a chain of factors, U M.. Vᵀ, got "
                f"{product.structure.name}, whose balance is not defined"
            )
    check_writable([(product, _moving(product)) for product in products], "balancing")
    for product in products:
        for factor in _moving(product):
            if not is_finite(factor.view(factor.param)):
                raise ValueError(
                    f"{product.name} ({factor.attribute}) is not finite; initialize it first"
                )
        for view in product.views()[1:-1]:
            if view.ndim > product.batch + 2 or view.shape[-1] != view.shape[-2]:
                raise ValueError(
                    f"{product.name}: expected square inner factors to become the identity, got "
                    f"{tuple(view.shape)}"
                )


def check_writable(moving: Iterable[tuple[Product, Sequence[Factor]]], act: str) -> None:
    """Refuse factors that cannot be written to, or not without changing another product.

    Args:
        moving: products, and the factors of each that are to be written to.
        act: what would write to them, for the message.

    Raises:
        ValueError: a factor that is frozen, computed, sharded, or also a factor elsewhere.
    """
    seen: Seen = {}
    for product, factors in moving:
        for factor in factors:
            where, param = f"{product.name} ({factor.attribute})", factor.param
            if isinstance(param, torch.nn.Parameter) and not param.requires_grad:
                raise ValueError(f"{where} is frozen; {act} would move it: unfreeze it first")
            if _is_computed(factor):
                raise ValueError(f"{where} is computed and cannot be written to; merge it first")
            if is_sharded(param):
                raise ValueError(f"{where} is sharded (DTensor); {act} comes before sharding")
            if (name := other_use(seen, product.name, factor)) is not None:
                raise ValueError(
                    f"{where} is also a factor of {name}; {act} one product would change the "
                    "other: take only one of them"
                )


def _is_computed(factor: Factor) -> bool:
    """Whether a parametrization makes the tensor anew at every look."""
    owner, name = factor.owner, factor.attribute
    return isinstance(owner, torch.nn.Module) and name in lists_of(owner)


def _balanced(product: Product) -> tuple[Tensor, ...]:
    """The balanced factors of one product and their biases, in float64."""
    views = [view.to(work_dtype(view)) for view in product.views()]
    q_left, core = torch.linalg.qr(views[0].flatten(product.batch, -2))
    for view in views[1:-1]:
        core = core @ view
    q_right, r_right = torch.linalg.qr(views[-1].flatten(product.batch, -2))
    p, s, qh = torch.linalg.svd(core @ r_right.mT, full_matrices=False)
    if reason := why_dead(s, product.batch):
        raise ValueError(f"{product.name}: the product is {reason}, or leave it as it is")
    r = views[0].shape[-1]
    left, right = split_evenly(q_left @ p, s, q_right @ qh.mT, r, resolution(torch.float64))
    made = with_inner(left, right, len(views) - 2)
    return (*made, *_mixed_biases(product, views, (left, right), s))


def _mixed_biases(
    product: Product, views: Sequence[Tensor], ends: Sequence[Tensor], s: Tensor
) -> list[Tensor]:
    """b_U A and b_V A⁻ᵀ, where A = VᵀV'S⁻¹ and A⁻ᵀ = UᵀU'S⁻¹ with U', V' balanced."""
    batch = product.batch
    flat = [view.flatten(batch, -2) for view in views]
    rows = [b if b is None else b.view(b.param).flatten(batch, -2) for b in product.biases]
    there = [row.to(s.dtype) for row in rows if row is not None]
    if not any(bool(row.any()) for row in there):
        return there  # zeros stay zeros, whatever the rank
    r, rank = flat[0].shape[-1], int((s > resolution(s.dtype) * s[..., :1]).sum(-1).min())
    if rank < r:
        raise ValueError(
            f"{product.name}: expected rank {r} for its biases to move along, got {rank}; "
            "leave it out: products(model, exclude=...)"
        )
    return [
        row.to(s.dtype) @ (other.mT @ end / s.unsqueeze(-2))
        for row, other, end in zip(rows, flat[::-1], ends[::-1], strict=True)
        if row is not None
    ]
