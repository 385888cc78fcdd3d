"""Adding the penalty's gradient, planned once: from products to the backends.

What does not change from step to step (views, buckets, the choice of backends, checks) is done
once. Parameters are looked up at every call, because training frameworks swap them; where they
are other tensors, or lie otherwise in memory than before, everything is planned anew.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from textwrap import indent
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from frobdecay.algebra.precision import Coefficient, beside, full_precision, in_front
from frobdecay.gradient.backends import BACKENDS, Choice, grams_of, select
from frobdecay.gradient.bucketed import Grams, Job
from frobdecay.gradient.graphs import is_capturing
from frobdecay.gradient.likeness import Likeness, check_writable
from frobdecay.gradient.placement import check_targets, part_of
from frobdecay.gradient.sharded import Exchange, exchanges, localized
from frobdecay.product.factor import TABLE, Factor, is_sharded, place_of
from frobdecay.product.product import Product, as_products, check_product, squared_norm

_GRAD = operator.attrgetter("grad")
_TABLE = operator.itemgetter(TABLE)


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
        self._captured: dict[int, object] = {}  # buffers that CUDA graphs read, of any plan
        self._plan()

    def __reduce__(self) -> tuple[Any, ...]:
        return Accumulator, (self.products, self.backend)

    @torch.inference_mode(False)  # buffers made there could not be written to elsewhere
    @torch.no_grad()
    def _plan(self) -> None:
        for product in self.products:
            check_product(product)  # factors may have been changed to what no longer fits
        parts = {k: localized(product) for k, product in enumerate(self.products)}
        here = {k: part for k, part in parts.items() if part is not None}
        self.choices = select(here, self.backend)
        self._factors = [(p, factor) for p in self.products for factor in p.factors]
        factors = [factor for _, factor in self._factors]
        stops = list(itertools.accumulate(len(product.factors) for product in self.products))
        self._rows = [slice(a, b) for a, b in itertools.pairwise([0, *stops])]
        jobs = {}
        self._viewers: list[Factor | None] = [None] * len(factors)
        for k, part in here.items():
            self._viewers[self._rows[k]] = part.factors
            # Detached, for torch swaps no parameter that has views which autograd knows.
            views = tuple(v.detach() if v._is_view() else v for v in part.views())
            jobs[k] = Job(views, part.batch, part.structure, self._rows[k])
        together: dict[tuple[str, torch.device], list[int]] = defaultdict(list)
        for choice in self.choices:
            for k in choice.members:
                together[choice.backend, jobs[k].views[0].device].append(k)
        self._runners = [
            runner
            for (name, _), members in together.items()
            for runner in BACKENDS[name].prepare([jobs[k] for k in sorted(members)])
        ]
        apart = {k: product for k, product in enumerate(self.products) if k not in here}
        self._exchanges = exchanges(apart, self._rows)
        sent = [one for exchange in self._exchanges for one in exchange.sent]
        self._sent = {k: one for one in sent for k in range(one.row.start, one.row.stop)}
        self.choices += [
            Choice(exchange.name, tuple(one.number for one in exchange.sent), exchange.reason)
            for exchange in self._exchanges
        ]
        self._devices = {factor.param.device.type for factor in factors}
        self._squared_scales = [product.scale**2 for product, _ in self._factors]
        self._unscaled = all(scale == 1 for scale in self._squared_scales)
        self._scaled: tuple[Sequence[Coefficient], list[Coefficient]] = (), []
        places = [place_of(factor) for factor in factors]
        self._owners, self._keys = [one for one, _ in places], [name for _, name in places]
        self._params = [factor.param for factor in factors]
        self._likeness = Likeness(self._params)
        self._addresses = list(map(Tensor.data_ptr, self._params))
        self._known: tuple[list[bool] | None, Likeness] | None = None  # of targets
        self._watched_parts = [  # a DTensor has no memory but that of this process' part
            (factor, part_of(factor.param).data_ptr())
            for factor in factors
            if is_sharded(factor.param)
        ]
        plain = all(factor.pattern is None and factor.index is None for factor in factors)
        self._plain = plain and not self._watched_parts

    def refresh(self) -> list[Tensor]:
        """Plan anew if a parameter is not the tensor, or does not lie in memory, as it was.

        Returns:
            The parameters of all factors, product by product: the list of the last call, unless
            everything was planned anew.
        """
        try:
            params = list(map(operator.getitem, map(_TABLE, self._owners), self._keys))
        except KeyError:  # it is in that table no more
            params = []
        same = (
            all(map(operator.is_, params, self._params))
            and self._likeness.of(params)
            and list(map(Tensor.data_ptr, params)) == self._addresses
        )
        if not same or any(part_of(f.param).data_ptr() != at for f, at in self._watched_parts):
            self._plan()
        if is_capturing(self._devices):
            self._captured[id(self._runners)] = self._runners, self._exchanges
        return self._params

    @property
    def trained(self) -> list[bool]:
        """Of every parameter of ``refresh``, whether it requires a gradient."""
        return self._likeness.trained

    def rows(self, flat: Sequence[Any]) -> list[Any]:
        """Nest what was listed for all factors, product by product."""
        return [flat[row] for row in self._rows]

    @_disable_dynamo
    def accumulate(
        self, targets: Sequence[Sequence[Tensor | None]], coefs: Sequence[Sequence[Coefficient]]
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
    def run(
        self,
        targets: Sequence[Tensor | None],
        coefs: Sequence[Coefficient],
        grams: Grams | None = None,
    ) -> None:
        """As ``accumulate``, right after ``refresh``.

        Args:
            targets: of all factors, product by product.
            coefs: of all factors. Given the same list again, its entries are not looked at.
            grams: by the number of a factor, receives those that were formed on the way.
        """
        if self._watched_parts:
            check_targets(self._factors, targets)
        form = self._checked(targets)
        if not self._plain:
            pairs = zip(self._viewers, targets, strict=True)
            targets = [t if t is None or f is None else f.view(part_of(t)) for f, t in pairs]
        if not self._unscaled:
            coefs = self._times_scales(coefs)
        with self._full_precision():
            for exchange in self._exchanges:
                exchange.start(self._params)
            for run in self._runners:  # while the others' Grams are on their way
                run(targets, coefs, form, grams)
            for exchange in self._exchanges:
                exchange.wait()
                exchange.add(targets, coefs)
                if grams is not None:
                    grams.update(exchange.grams())

    def _checked(self, targets: Sequence[Tensor | None]) -> object:
        """Refuse what cannot be written to, before anything is.

        Returns:
            The object of the last call, where targets are like those, see ``Runner``.

        Raises:
            TypeError, ValueError: names the product and the factor.
        """
        known = self._known
        if known is not None and known[0] is None and known[1].of(targets):
            return known[1]
        wanted = [target for target in targets if target is not None]
        absent = None if len(wanted) == len(targets) else [target is None for target in targets]
        if self._known is None or self._known[0] != absent or not self._known[1].of(wanted):
            for (product, factor), target in zip(self._factors, targets, strict=True):
                if target is not None:
                    check_writable(product.name, factor.attribute, target, factor.param.shape)
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

    def held(self) -> list[Tensor]:
        """What this process has of every factor: seen as it, or as its parameter where exchanged.

        Of the parameters as they were at the last ``refresh``.
        """
        return self.seen(self._params)

    def seen(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same of tensors that are like the parameters of all factors."""
        pairs = zip(self._viewers, tensors, strict=True)
        return [part_of(p) if viewer is None else viewer.view(part_of(p)) for viewer, p in pairs]

    @torch.no_grad()
    def grams(self, parts: Mapping[int, Tensor], known: Grams | None = None) -> Grams:
        """The Grams of the factors of chains, or of what has their shapes.

        Of what is exchanged the sums over all processes, which all of them have to call for.

        Args:
            parts: by the number of a factor, as ``held`` gives them, or other numbers in the
                same places.
            known: those that are there already.
        """
        found = {} if known is None else known
        with self._full_precision():
            if not self._sent.keys() <= found.keys():
                for exchange in self._exchanges:
                    exchange.start([parts.get(k) for k in range(len(self._params))])
                for exchange in self._exchanges:
                    exchange.wait()
                    found.update(exchange.grams())
            left = {k: (parts[k], self._factors[k][0].batch) for k in parts if k not in found}
            found.update(grams_of(left))
        return found

    def spread(self, k: int, numbers: Tensor, like: Tensor) -> Tensor:
        """A number for each entry of the batch, to be multiplied with what ``held`` has of k."""
        sent = self._sent.get(k)
        return in_front(numbers if sent is None else sent.spread(k, numbers), like)

    def times(self, k: int, tensor: Tensor, matrix: Tensor) -> Tensor:
        """What ``held`` would have of a tensor like factor k, times (*batch, r, r)."""
        viewer = self._viewers[k]
        if viewer is None:
            return self._sent[k].times(k, tensor, matrix)
        view = viewer.view(part_of(tensor))
        return view @ beside(matrix, view)

    @torch.no_grad()
    def squared_norms(self) -> list[Tensor]:
        """‖W‖_F² of every product, on all processes the same; one all-reduce for each mesh."""
        self.refresh()
        found: dict[int, Tensor] = {}
        with self._full_precision():
            for exchange in self._exchanges:
                exchange.start(self._params)
            for exchange in self._exchanges:
                exchange.wait()
                found.update(exchange.squared_norms())
        return [
            found[k] if k in found else squared_norm(product)
            for k, product in enumerate(self.products)
        ]

    def _full_precision(self) -> AbstractContextManager[object]:
        """Switch autocast off on all devices that products are on."""
        if len(self._devices) == 1:
            return full_precision(*self._devices)
        stack = ExitStack()
        for device in self._devices:
            stack.enter_context(full_precision(device))
        return stack

    def explain(self, steps: bool = False) -> str:
        """Say which products run on which backend, by which route and steps, and why."""
        lines = []
        for choice in self.choices:
            shown = some([self.products[k].name for k in choice.members])
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


def some(names: Sequence[str]) -> str:
    """The first names, and how many there are."""
    return ", ".join(names[:2]) + (f", … ({len(names)})" if len(names) > 2 else "")


def gradients_of(params: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of those that are wanted."""
    if all(wanted):
        return list(map(_GRAD, params))
    return [param.grad if want else None for param, want in zip(params, wanted, strict=True)]
