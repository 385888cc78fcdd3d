"""The penalty's gradient for those who add it themselves: plans are kept with the products."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from copy import copy
from functools import partial
from threading import RLock

from torch import Tensor, nn
from torch._compile import _disable_dynamo

from frobdecay.algebra.precision import Coefficient, check_coefficient
from frobdecay.gradient.accumulate import Accumulator, gradients_of, some
from frobdecay.product import find
from frobdecay.product.product import Product, listed

_MAX_PLANS = 8  # for lists that begin with one product: as many as backends to compare, twice


class _Kept:
    """The plan for one list of products, kept by the first of them while all are alive.

    It has records of its own, so that none of those that keep it is kept alive by it.
    """

    def __init__(self, products: Sequence[Product], backend: str | None) -> None:
        self.backend, self.lock = backend, RLock()
        self.plan: Accumulator | None = Accumulator(map(copy, products), backend)
        forget = partial(_forget, weakref.ref(self))
        self._ids = list(map(id, products))  # nobody else's while there is a plan
        self._others = [weakref.ref(product, forget) for product in products[1:]]
        self._coefs: list[Coefficient] = []

    def coefs(self, coef: Coefficient, params: Sequence[Tensor]) -> list[Coefficient]:
        """One coefficient for all parameters, on their devices; for equal numbers the same list."""
        if isinstance(coef, Tensor):
            number = coef.detach().reshape(())
            on = {d: number.to(d, non_blocking=True) for d in {param.device for param in params}}
            return [on[param.device] for param in params]
        if len(self._coefs) != len(params) or self._coefs[0] != coef:
            self._coefs = [coef] * len(params)
        return self._coefs

    def is_for(self, ids: Sequence[int], backend: str | None) -> bool:
        """Whether it is the plan for the very products with these ids."""
        return self.plan is not None and self.backend == backend and self._ids == ids


def _forget(kept: weakref.ref[_Kept], _: object) -> None:
    known = kept()
    if known is not None:
        known.plan = None


def _kept(products: Sequence[Product], backend: str | None) -> _Kept:
    """The plan for a list of products, made unless its first product has it."""
    plans: list[_Kept] = products[0].plans
    ids = list(map(id, products))
    for known in plans:
        if known.is_for(ids, backend):
            return known
    made = _Kept(products, backend)
    plans[:] = [made, *(known for known in plans if known.plan is not None)][:_MAX_PLANS]
    return made


@_disable_dynamo
def add_penalty_grad_(
    products: Product | Iterable[Product], coef: Coefficient, *, backend: str | None = None
) -> None:
    """Add the gradient of ½·coef·Σ‖W‖_F² to the ``.grad`` of every factor, in place.

    Examples:
        >>> import torch
        >>> U, V = torch.ones(2, 1, requires_grad=True), torch.ones(8, 1, requires_grad=True)
        >>> (U @ V.T).sum().backward()
        >>> add_penalty_grad_(Product.of(U, V), 0.5)
        >>> U.grad
        tensor([[12.],
                [12.]])

    The same as ``penalty(products, coef).backward()`` at a fraction of the cost, for training
    loops that clip the decay along with the gradient. As with weight decay in ``torch.optim``, a
    factor without a gradient is left alone: call it after ``backward()``. With sharded factors all
    processes of their mesh have to call it; see ``sharded.py``.

    List the products once, not at every step: what is planned for them is kept with them.

    Args:
        products: one product or several; one listed twice counts once.
        coef: λ, a number or a tensor without dimensions.
        backend: a name in ``backends.BACKENDS``; None chooses.

    Raises:
        ValueError: a negative or NaN λ, or products that cannot run.
        TypeError: a sparse gradient. No gradient has changed after an error.
    """
    check_coefficient(coef, "coef")
    found = listed(products)
    if not found:
        return
    kept = _kept(found, backend)
    with kept.lock:
        plan = kept.plan
        assert plan is not None  # all products are alive
        params = plan.refresh()
        plan.run(gradients_of(params, plan.trained), kept.coefs(coef, params))


def explain(
    products: Product | Iterable[Product] | nn.Module,
    backend: str | None = None,
    *,
    steps: bool = False,
) -> str:
    """Say what runs where and why; with ``steps``, their flops and what is kept, too.

    Examples:
        >>> import torch
        >>> pairs = [Product.of(torch.ones(6, 2), torch.ones(5, 2)) for _ in range(3)]
        >>> print(explain(pairs))
        bucketed     gram   6×2 · 5×2                product, product, … (3)
                     3 of one shape, 0.1 KiB each

    Of a model, its products, and behind them the attention in which none are found, with the
    reasons.
    """
    if not isinstance(products, nn.Module):
        return Accumulator(products, backend).explain(steps)
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in find.left_alone(products):
        names[reason].append(name)
    left = [f"left alone   {some(alike)}\n{'':<12} {why}" for why, alike in names.items()]
    there = Accumulator(find.products(products), backend).explain(steps)
    lines = [*([there] if there else []), *left]
    return "\n".join(lines) or "no products: no weight is factorized, and there is no attention"
