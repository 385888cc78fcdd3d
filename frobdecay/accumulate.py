"""Adding the penalty's gradient, planned once: from products to the backends.

What does not change from step to step (views, buckets, the choice of backends, checks) is done
once. Parameters are looked up at every call, because training frameworks swap them; where they
are other tensors, or live in other memory than before, everything is planned anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.backends import Work, select
from frobdecay.chain import Coefficient, plan_of
from frobdecay.product import Factor, Product, as_products, check_coefficient

__all__ = ["Accumulator", "add_penalty_grad_", "check_dense_gradients", "explain"]


class Accumulator:
    """Adds coef · ∇½‖W‖² for the factors of a fixed list of products.

    Args:
        products: the products.
        backend: a name in ``backends.BACKENDS``, or None for the cheapest for each bucket.

    Raises:
        ValueError: an unknown backend, or products that it cannot run, with the reasons.
    """

    def __init__(self, products: Product | Iterable[Product], backend: str | None = None) -> None:
        self.products = as_products(products)
        self.backend = backend
        self._plan()

    def _plan(self) -> None:
        products = self.products
        self.buckets = select(products, self.backend)
        self._views = [product.views() for product in products]
        self._squared_scales = [product.scale**2 for product in products]
        factors = [factor for product in products for factor in product.factors]
        self._patterned = [any(map(_patterned, product.factors)) for product in products]
        self._watched = [
            (*_place(factor), param, _address(param))
            for factor, param in ((factor, factor.param) for factor in factors)
        ]

    def refresh(self) -> None:
        """Plan anew if a parameter is not the tensor, or not in the memory, that it was."""
        for attributes, name, param, address in self._watched:
            if attributes.get(name) is not param or _address(param) != address:
                return self._plan()
        return None

    @torch.no_grad()
    def accumulate(
        self,
        targets: Sequence[Sequence[Tensor | None]],
        coefs: Sequence[Sequence[Coefficient]],
    ) -> None:
        """Add coefs[k][j] · ∇½‖W_k‖² to targets[k][j], for product k and factor j, in place.

        All gradients are those of the factors before the call.

        Args:
            targets: tensors of the parameters' shapes: gradients, buffers, or the parameters
                themselves (not those that are a factor more than once); None to skip one.
            coefs: numbers or tensors without dimensions, nested like the targets.
        """
        self.refresh()
        with _full_precision(self._views):
            for bucket in self.buckets:
                members = [k for k in bucket.members if any(t is not None for t in targets[k])]
                if members:
                    work = Work(
                        [self._views[k] for k in members],
                        self.products[members[0]].batch,
                        [self._seen(k, targets[k]) for k in members],
                        [self._scaled(k, coefs[k]) for k in members],
                    )
                    bucket.backend.run(work)

    def _seen(self, k: int, targets: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The targets, seen as their factors."""
        if not self._patterned[k]:
            return targets
        return [
            None if target is None else factor.view(target)
            for factor, target in zip(self.products[k].factors, targets, strict=True)
        ]

    def _scaled(self, k: int, coefs: Sequence[Coefficient]) -> Sequence[Coefficient]:
        scale = self._squared_scales[k]
        return coefs if scale == 1 else [coef * scale for coef in coefs]

    def explain(self) -> str:
        """Say which products run on which backend, by which route, and why."""
        lines = []
        for bucket in self.buckets:
            names = [self.products[k].name for k in bucket.members]
            shown = ", ".join(names[:2]) + (f", … ({len(names)})" if len(names) > 2 else "")
            views = self._views[bucket.members[0]]
            route = plan_of(views, self.products[bucket.members[0]].batch).gradient
            shape = " · ".join("×".join(map(str, view.shape)) for view in views)
            lines.append(f"{bucket.backend.name:<12} {route:<6} {shape:<24} {shown}")
            lines.append(f"{'':<12} {bucket.reason}")
        return "\n".join(lines)


class _Attributes:
    """Any object's attributes, read like a dictionary."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def get(self, name: str) -> Any:
        return getattr(self.owner, name)


def _place(factor: Factor) -> tuple[Mapping[str, Any] | _Attributes, str]:
    """Where a parameter is looked up: the dictionary itself saves ``getattr`` at every step."""
    owner, name = factor.owner, factor.attribute
    if isinstance(owner, nn.Module) and name in owner._parameters:
        return owner._parameters, name
    return (vars(owner), name) if name in vars(owner) else (_Attributes(owner), name)


def _patterned(factor: Factor) -> bool:
    return factor.pattern is not None or factor.index is not None


def _address(param: Tensor) -> int:
    return param.data_ptr()


def _full_precision(views: Sequence[Sequence[Tensor]]) -> AbstractContextManager[object]:
    """Autocast off: it would compute the Grams in half precision."""
    device = views[0][0].device.type if views else "cpu"
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def add_penalty_grad_(
    products: Product | Iterable[Product], coef: Coefficient, *, backend: str | None = None
) -> None:
    """Add the gradient of ½·coef·Σ‖W‖_F² to the ``.grad`` of every factor, in place.

    The same as ``penalty(products, coef).backward()`` at a fraction of the cost, for training
    loops that clip the decay along with the gradient. As with weight decay in ``torch.optim``, a
    factor without a gradient is left alone: call it after ``backward()``.

    Args:
        products: one product or several.
        coef: λ, a number or a tensor without dimensions.
        backend: a name in ``backends.BACKENDS``; None chooses.

    Raises:
        ValueError: a negative or NaN λ, or products that cannot run.
        TypeError: a sparse gradient.

    Example:
        >>> import torch
        >>> U, V = torch.ones(2, 1, requires_grad=True), torch.ones(8, 1, requires_grad=True)
        >>> (U @ V.T).sum().backward()
        >>> add_penalty_grad_(Product.of(U, V), 0.5)
        >>> U.grad
        tensor([[12.],
                [12.]])
    """
    check_coefficient(coef, "coef")
    accumulator = Accumulator(products, backend)
    for product in accumulator.products:
        check_dense_gradients(product)
    targets = [
        [param.grad if param.requires_grad else None for param in product.params]
        for product in accumulator.products
    ]
    accumulator.accumulate(targets, [[coef] * len(found) for found in targets])


def check_dense_gradients(product: Product) -> None:
    """Refuse sparse gradients, which cannot hold the penalty's dense gradient.

    Raises:
        TypeError: names the product and the factor.
    """
    for factor in product.factors:
        grad = factor.param.grad
        if grad is not None and grad.layout != torch.strided:
            raise TypeError(
                f"{product.name}: expected a dense gradient for {factor.attribute}, got "
                f"{grad.layout}; the penalty's gradient is dense: use sparse=False"
            )


def explain(products: Product | Iterable[Product], backend: str | None = None) -> str:
    """Say what runs where and why.

    Example:
        >>> import torch
        >>> pairs = [Product.of(torch.ones(6, 2), torch.ones(5, 2)) for _ in range(3)]
        >>> print(explain(pairs))
        bucketed     gram   6×2 · 5×2                product, product, … (3)
                     3 of one shape, 0.1 KiB each
    """
    return Accumulator(products, backend).explain()
