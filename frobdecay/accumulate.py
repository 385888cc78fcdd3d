"""Adding the penalty's gradient, planned once: from products to the backends.

What does not change from step to step (views, buckets, the choice of backends, checks) is done
once. Parameters are looked up at every call, because training frameworks swap them; where they
are other tensors, or live in other memory than before, everything is planned anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.backends import BACKENDS, Choice, select
from frobdecay.bucketed import Job
from frobdecay.chain import Coefficient, full_precision
from frobdecay.distributed import Exchange, exchanges, localized
from frobdecay.placement import check_targets, part_of
from frobdecay.product import (
    Factor,
    Product,
    as_products,
    check_coefficient,
    is_sharded,
    squared_norm,
)
from frobdecay.structures import CHAIN

__all__ = ["Accumulator", "add_penalty_grad_", "check_dense_gradients", "explain", "place_of"]


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
        self._parts = [localized(product) for product in self.products]
        here = {k: part for k, part in enumerate(self._parts) if part is not None}
        apart = [k for k, part in enumerate(self._parts) if part is None]
        places = list(here)
        self.choices = [
            Choice(choice.backend, tuple(places[i] for i in choice.members), choice.reason)
            for choice in select(list(here.values()), self.backend)
        ]
        jobs = {k: Job(part.views(), part.batch, part.structure) for k, part in here.items()}
        together: dict[tuple[str, torch.device], list[int]] = defaultdict(list)
        for choice in self.choices:
            for k in choice.members:
                together[choice.backend, jobs[k].views[0].device].append(k)
        self._runners = [
            (members, BACKENDS[name].prepare([jobs[k] for k in members]))
            for (name, _), members in together.items()
        ]
        self._exchanges = [
            ([apart[i] for i in members], exchange)
            for members, exchange in exchanges([self.products[k] for k in apart])
        ]
        self.choices += [
            Choice(Exchange.name, tuple(members), exchange.reason)
            for members, exchange in self._exchanges
        ]
        factors = [factor for product in self.products for factor in product.factors]
        self._devices = {factor.param.device.type for factor in factors}
        self._squared_scales = [product.scale**2 for product in self.products]
        self._plain = all(
            factor.pattern is None and factor.index is None and not is_sharded(factor.param)
            for factor in factors
        )
        self._unscaled = all(scale == 1 for scale in self._squared_scales)
        self._watched = [
            (*place_of(factor), factor.param, factor.param.data_ptr()) for factor in factors
        ]
        self._watched_parts = [  # a DTensor has no memory but that of this process' part
            (factor, part_of(factor.param).data_ptr())
            for factor in factors
            if is_sharded(factor.param)
        ]

    def refresh(self) -> None:
        """Plan anew if a parameter is not the tensor, or not in the memory, that it was."""
        for attributes, name, param, address in self._watched:
            if attributes.get(name) is not param or param.data_ptr() != address:
                self._plan()
                return
        for factor, address in self._watched_parts:
            if part_of(factor.param).data_ptr() != address:
                self._plan()
                return

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
        if self._watched_parts:
            for product, one in zip(self.products, targets, strict=True):
                check_targets(product, one)
        if not self._plain:
            targets = [self._seen(k, one) for k, one in enumerate(targets)]
        if not self._unscaled:
            pairs = zip(coefs, self._squared_scales, strict=True)
            coefs = [[coef * scale for coef in one] for one, scale in pairs]
        with self._full_precision():
            for _, exchange in self._exchanges:
                exchange.start()
            for members, run in self._runners:  # while the others' Grams are on their way
                run([targets[k] for k in members], [coefs[k] for k in members])
            for members, exchange in self._exchanges:
                exchange.wait()
                exchange.add([targets[k] for k in members], [coefs[k] for k in members])

    @torch.no_grad()
    def squared_norms(self) -> list[Tensor]:
        """‖W‖_F² of every product, on all processes the same; one all-reduce for each mesh."""
        self.refresh()
        found: dict[int, Tensor] = {}
        with self._full_precision():
            for _, exchange in self._exchanges:
                exchange.start()
            for members, exchange in self._exchanges:
                exchange.wait()
                found.update(zip(members, exchange.squared_norms(), strict=True))
        return [
            found[k] if k in found else squared_norm(product)
            for k, product in enumerate(self.products)
        ]

    def _full_precision(self) -> AbstractContextManager[object]:
        """Switch autocast off on all devices that products are on."""
        stack = ExitStack()
        for device in self._devices:
            stack.enter_context(full_precision(device))
        return stack

    def _seen(self, k: int, targets: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The targets of a product that runs here alone, seen as its factors."""
        part = self._parts[k]
        if part is None:
            return targets
        return [
            None if target is None else factor.view(part_of(target))
            for factor, target in zip(part.factors, targets, strict=True)
        ]

    def explain(self) -> str:
        """Say which products run on which backend, by which route, and why."""
        lines = []
        for choice in self.choices:
            names = [self.products[k].name for k in choice.members]
            shown = ", ".join(names[:2]) + (f", … ({len(names)})" if len(names) > 2 else "")
            first = self.products[choice.members[0]]
            outlines = first.outlines()
            route = first.structure.route(outlines, first.batch)
            if choice.backend == Exchange.name and first.structure == CHAIN:
                route = "gram"  # also where a process alone would form W
            shape = " · ".join("×".join(map(str, view.shape)) for view in outlines)
            lines.append(f"{choice.backend:<12} {route:<6} {shape:<24} {shown}")
            lines.append(f"{'':<12} {choice.reason}")
        return "\n".join(lines)


class _Attributes:
    """Any object's attributes, read like a dictionary."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def get(self, name: str) -> Any:
        return getattr(self.owner, name)


def place_of(factor: Factor) -> tuple[Mapping[str, Any] | _Attributes, str]:
    """Where a parameter is looked up: the dictionary itself saves ``getattr`` at every step."""
    owner, name = factor.owner, factor.attribute
    if isinstance(owner, nn.Module) and name in owner._parameters:
        return owner._parameters, name
    return (vars(owner), name) if name in vars(owner) else (_Attributes(owner), name)


def add_penalty_grad_(
    products: Product | Iterable[Product], coef: Coefficient, *, backend: str | None = None
) -> None:
    """Add the gradient of ½·coef·Σ‖W‖_F² to the ``.grad`` of every factor, in place.

    The same as ``penalty(products, coef).backward()`` at a fraction of the cost, for training
    loops that clip the decay along with the gradient. As with weight decay in ``torch.optim``, a
    factor without a gradient is left alone: call it after ``backward()``. With sharded factors all
    processes of their mesh have to call it; see ``distributed.py``.

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
