"""Adding the penalty's gradient, planned once: from products to the backends.

What does not change from step to step (views, buckets, the choice of backends, checks) is done
once. Parameters are looked up at every call, because training frameworks swap them; where they
are other tensors, or lie otherwise in memory than before, everything is planned anew.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from functools import partial
from textwrap import indent
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from frobdecay.algebra.precision import Coefficient, check_coefficient, full_precision
from frobdecay.gradient.backends import BACKENDS, Choice, select
from frobdecay.gradient.bucketed import Job
from frobdecay.gradient.likeness import Likeness, check_writable
from frobdecay.gradient.placement import check_targets, part_of
from frobdecay.gradient.sharded import Exchange, exchanges, localized
from frobdecay.product.factor import Factor, is_sharded
from frobdecay.product.product import (
    Product,
    as_products,
    check_product,
    listed,
    squared_norm,
)

_MAX_PLANS = 8  # for lists that begin with one product: as many as backends to compare, twice
_TABLE = "_parameters"  # in a module's attributes
_GRAD = operator.attrgetter("grad")


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

    @torch.inference_mode(False)  # buffers made there could not be written to elsewhere
    @torch.no_grad()
    def _plan(self) -> None:
        for product in self.products:
            check_product(product)  # factors may have been changed to what no longer fits
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
        factors = [factor for product in self.products for factor in product.factors]
        stops = list(itertools.accumulate(len(product.factors) for product in self.products))
        self._rows = [slice(a, b) for a, b in itertools.pairwise([0, *stops])]
        self._runners = [
            (self._share(members), BACKENDS[name].prepare([jobs[k] for k in sorted(members)]))
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
        self._devices = {factor.param.device.type for factor in factors}
        self._squared_scales = [p.scale**2 for p in self.products for _ in p.factors]
        self._plain = all(
            factor.pattern is None and factor.index is None and not is_sharded(factor.param)
            for factor in factors
        )
        self._unscaled = all(scale == 1 for scale in self._squared_scales)
        self._scaled: tuple[Sequence[Coefficient], list[Coefficient]] = (), []
        self._viewers = [
            None if part is None else factor
            for part, product in zip(self._parts, self.products, strict=True)
            for factor in (product if part is None else part).factors
        ]
        self._places = [_place_of(factor) for factor in factors]
        self._params = [factor.param for factor in factors]
        self._names = [(p.name, factor.attribute) for p in self.products for factor in p.factors]
        self._likeness = Likeness(self._params)
        self._addresses = list(map(Tensor.data_ptr, self._params))
        self._known: tuple[list[bool] | None, Likeness] | None = None  # of targets
        self._watched_parts = [  # a DTensor has no memory but that of this process' part
            (factor, part_of(factor.param).data_ptr())
            for factor in factors
            if is_sharded(factor.param)
        ]

    def refresh(self) -> list[Tensor]:
        """Plan anew if a parameter is not the tensor, or does not lie in memory, as it was.

        Returns:
            The parameters of all factors, product by product: the list of the last call, unless
            everything was planned anew.
        """
        params: list[Any] = [tables[_TABLE].get(name) for tables, name in self._places]
        same = (
            all(map(operator.is_, params, self._params))
            and self._likeness.of(params)
            and list(map(Tensor.data_ptr, params)) == self._addresses
        )
        if not same or any(part_of(f.param).data_ptr() != at for f, at in self._watched_parts):
            self._plan()
        return self._params

    @property
    def trained(self) -> list[bool]:
        """Of every parameter of ``refresh``, whether it requires a gradient."""
        return self._likeness.trained

    def _share(self, members: Sequence[int]) -> slice | list[int]:
        """Which factors are those of some products: all of them, or their numbers."""
        if len(members) == len(self.products):
            return slice(None)
        numbers = range(self._rows[-1].stop)
        return [j for k in sorted(members) for j in numbers[self._rows[k]]]

    def rows(self, flat: Sequence[Any]) -> list[Any]:
        """Nest what was listed for all factors, product by product."""
        return [flat[row] for row in self._rows]

    @_disable_dynamo
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
        self.run([t for one in targets for t in one], [coef for one in coefs for coef in one])

    @torch.no_grad()
    def run(self, targets: Sequence[Tensor | None], coefs: Sequence[Coefficient]) -> None:
        """As ``accumulate``, right after ``refresh``.

        Args:
            targets: of all factors, product by product.
            coefs: of all factors. Given the same list again, its entries are not looked at.
        """
        if self._watched_parts:
            for product, one in zip(self.products, self.rows(targets), strict=True):
                check_targets(product, one)
        form = self._checked(targets)
        if not self._plain:
            pairs = zip(self._viewers, targets, strict=True)
            targets = [t if t is None or f is None else f.view(part_of(t)) for f, t in pairs]
        if not self._unscaled:
            coefs = self._times_scales(coefs)
        with self._full_precision():
            for _, exchange in self._exchanges:
                exchange.start()
            for share, run in self._runners:  # while the others' Grams are on their way
                if isinstance(share, slice):
                    run(targets, coefs, form)
                else:
                    run([targets[i] for i in share], [coefs[i] for i in share], form)
            for members, exchange in self._exchanges:
                exchange.wait()
                into, by = self.rows(targets), self.rows(coefs)
                exchange.add([into[k] for k in members], [by[k] for k in members])

    def _checked(self, targets: Sequence[Tensor | None]) -> object:
        """Refuse what cannot be written to, before anything is.

        Returns:
            The object of the last call, where targets are like those, see ``Runner``.

        Raises:
            TypeError, ValueError: names the product and the factor.
        """
        wanted = [target for target in targets if target is not None]
        absent = None if len(wanted) == len(targets) else [target is None for target in targets]
        if self._known is None or self._known[0] != absent or not self._known[1].of(wanted):
            for where, target, param in zip(self._names, targets, self._params, strict=True):
                if target is not None:
                    check_writable(*where, target, param.shape)
            self._known = absent, Likeness(wanted)
        return self._known[1]

    def _times_scales(self, coefs: Sequence[Coefficient]) -> Sequence[Coefficient]:
        given, scaled = self._scaled
        if coefs is given:
            return scaled
        scaled = [coef * scale for coef, scale in zip(coefs, self._squared_scales, strict=True)]
        if not any(isinstance(coef, Tensor) for coef in coefs):  # which may change in place
            self._scaled = coefs, scaled
        return scaled

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

    def explain(self, steps: bool = False) -> str:
        """Say which products run on which backend, by which route and steps, and why."""
        lines = []
        for choice in self.choices:
            names = [self.products[k].name for k in choice.members]
            shown = ", ".join(names[:2]) + (f", … ({len(names)})" if len(names) > 2 else "")
            first = self.products[choice.members[0]]
            outlines = first.outlines()
            alone = choice.backend != Exchange.name  # together they never form W
            route = first.structure.route(outlines, first.batch) if alone else "gram"
            shape = " · ".join("×".join(map(str, view.shape)) for view in outlines)
            lines.append(f"{choice.backend:<12} {route:<6} {shape:<24} {shown}")
            lines.append(f"{'':<12} {choice.reason}")
            if steps:
                lines.append(indent(first.structure.describe(outlines, first.batch), " " * 13))
        return "\n".join(lines)


class _Attributes:
    """Any object's attributes, read like a dictionary."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def get(self, name: str) -> Any:
        return getattr(self.owner, name)


def _place_of(factor: Factor) -> tuple[Mapping[str, Mapping[str, Any] | _Attributes], str]:
    """Where the table is that a parameter is looked up in: that saves ``getattr`` at every step.

    Of a module, not the table itself, in the place of which code may put another one.
    """
    owner, name = factor.owner, factor.attribute
    if isinstance(owner, nn.Module) and name in owner._parameters:
        return vars(owner), name
    return {_TABLE: vars(owner) if name in vars(owner) else _Attributes(owner)}, name


class _Kept:
    """The plan for one list of products, kept by the first of them while all are alive.

    It has records of its own, so that none of those that keep it is kept alive by it.
    """

    def __init__(self, products: Sequence[Product], backend: str | None) -> None:
        self.backend, self.lock = backend, RLock()
        self.plan: Accumulator | None = Accumulator(map(copy, products), backend)
        forget = partial(_forget, weakref.ref(self))
        self.others = [weakref.ref(product, forget) for product in products[1:]]
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

    def is_for(self, products: Sequence[Product], backend: str | None) -> bool:
        """Whether it is the plan for these very products, whose first one keeps it."""
        if self.backend != backend or len(self.others) != len(products) - 1:
            return False
        return all(map(operator.is_, [ref() for ref in self.others], products[1:]))


def _forget(kept: weakref.ref[_Kept], _: object) -> None:
    known = kept()
    if known is not None:
        known.plan = None


def _kept(products: Sequence[Product], backend: str | None) -> _Kept:
    """The plan for a list of products, made unless its first product has it."""
    plans: list[_Kept] = products[0].plans
    for known in plans:
        if known.is_for(products, backend):
            return known
    made = _Kept(products, backend)
    plans[:] = [made, *(known for known in plans if known.plan is not None)][:_MAX_PLANS]
    return made


def gradients_of(params: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of those that are wanted."""
    if all(wanted):
        return list(map(_GRAD, params))
    return [param.grad if want else None for param, want in zip(params, wanted, strict=True)]


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
    products: Product | Iterable[Product], backend: str | None = None, *, steps: bool = False
) -> str:
    """Say what runs where and why; with ``steps``, their flops and what is kept, too.

    Examples:
        >>> import torch
        >>> pairs = [Product.of(torch.ones(6, 2), torch.ones(5, 2)) for _ in range(3)]
        >>> print(explain(pairs))
        bucketed     gram   6×2 · 5×2                product, product, … (3)
                     3 of one shape, 0.1 KiB each
    """
    return Accumulator(products, backend).explain(steps)
