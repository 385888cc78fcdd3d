"""One step of Frobenius decay: which tensor gets which multiple of ∇½‖W‖².

    coupled      p.grad += λ·∇            before the base optimizer's update (− for ``maximize``)
    decoupled    p      −= lr·λ·∇         beside it; λ and lr are the options of p's param group

All gradients of one step are computed from the factors as they are before it, in one call of the
accumulator: the order of products never matters. What cannot be written in place at once goes
through increments: parameters that are a factor more than once, half-precision parameters (they
are rounded stochastically), and decay that has to wait for a closure.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frobdecay.algebra.precision import HALF, Coefficient
from frobdecay.gradient.accumulate import Accumulator, gradients_of
from frobdecay.gradient.flat import Batched
from frobdecay.gradient.likeness import check_writable
from frobdecay.optim.checks import Found, missing
from frobdecay.optim.rates import BOUND, DECAY, Group, Rate
from frobdecay.optim.rounding import Increments, StochasticRounder
from frobdecay.optim.spectral.bound import StepBound, check_bounded, smallest
from frobdecay.product.product import Product
from frobdecay.product.toward import fitting_initial, saved_initial


class _Asked(NamedTuple):
    """What a step asks of the factors: of groups' rates, of trained factors in their groups."""

    of: tuple[Sequence[Rate | None], list[bool], list[int | None]]
    due: list[Rate | None]
    wanted: list[bool]  # for which there is one
    coefs: list[Coefficient]


class Decay:
    """Products, their accumulator, and where in an optimizer's groups their factors are.

    Parameters are never kept: the accumulator resolves them at every step, and the places in the
    groups are verified by identity, because Accelerate and FSDP2 swap ``Parameter`` objects.

    Args:
        found: what decays.
        backend: of the accumulator.
        rounder: of half-precision parameters.
    """

    def __init__(
        self, found: Found, backend: str | None, rounder: StochasticRounder | None = None
    ) -> None:
        self.found, self.products = found, found.products
        self.rounder = StochasticRounder() if rounder is None else rounder
        self._use(found.products, backend)

    def _use(self, products: Iterable[Product], backend: str | None) -> None:
        self.accumulator = Accumulator(products, backend)
        self._params: list[Tensor] = []  # of all factors, product by product
        self._groups_of: list[int | None] = []  # of each of the parameters
        self._lists: dict[int, list[Tensor]] = {}  # of the groups that hold some
        self._last: _Asked | None = None  # where it asks for numbers
        self._unheld: list[int] = []
        self._repeated: set[int] = set()
        self._holding: set[int] = set()
        self._batched, self._moved = Batched(), Batched()  # parameters with increments; bounded
        self._checked: object = None  # of products, whether their steps are found to be boundable

    def __reduce__(self) -> tuple[Any, ...]:
        return Decay, (self.found, self.accumulator.backend, self.rounder)

    def state_dict(self) -> dict[str, Any]:
        """The rounder's, and what products decay toward that were given initial factors."""
        return self.rounder.state_dict() | saved_initial(self.products)

    def loading(self, saved: Mapping[str, Any] | None) -> Callable[[], None]:
        """What loads a state dict, or one without ours, after it was found to fit.

        Raises:
            ValueError: it is of another version of frobdecay, or of products that decay toward
                something else.
        """
        initial = fitting_initial(self.products, saved)
        rounder = self.rounder if saved is None else StochasticRounder()
        if saved is not None:
            rounder.load_state_dict(saved)

        def load() -> None:
            self.rounder = rounder
            for factor, own in initial:
                factor.copy_(own)

        return load

    def notice(self, groups: Sequence[Group]) -> None:
        """Look at the model again if anything was factorized since the last time.

        Raises:
            ValueError: see ``Found.checked``.
        """
        if not self.found.is_current:
            self.adopt(self.found.checked(groups))

    def adopt(self, products: Sequence[Product]) -> None:
        """Go on with the products that are there now."""
        if products is not self.products:
            self._use(products, self.accumulator.backend)
        self.found.settle(products)

    def find(self, groups: Sequence[Group]) -> set[int]:
        """Find the factors in an optimizer's param groups; once before the other methods.

        Returns:
            The indices of the groups that hold factors.

        Raises:
            RuntimeError: a trainable factor is in no group.
        """
        params = self.accumulator.refresh()
        if params is not self._params or self._missing() or not self._is_current(groups):
            self._locate(params, groups)
        for k in self._missing():
            raise RuntimeError(missing(*self._factor(k), groups, self.found.model))
        return self._holding

    def _factor(self, k: int) -> tuple[Product, int]:
        """The product of the k-th of all factors, and its number there."""
        return [(p, j) for p in self.products for j in range(len(p.factors))][k]

    def _missing(self) -> list[int]:
        """Factors that no group holds, though they are trained now."""
        return [k for k in self._unheld if self._params[k].requires_grad]

    def _is_current(self, groups: Sequence[Group]) -> bool:
        """Whether the groups that held parameters hold what they did."""
        if not self._lists or max(self._lists) >= len(groups):
            return False
        pairs = [(groups[g]["params"], known) for g, known in self._lists.items()]
        return all(len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in pairs)

    def _locate(self, params: list[Tensor], groups: Sequence[Group]) -> None:
        """Find every factor's place in the groups."""
        where = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
        self._params, self._checked = params, None
        self._groups_of = [where.get(id(param)) for param in params]
        self._unheld = [k for k, g in enumerate(self._groups_of) if g is None]
        times = Counter(map(id, params))
        self._repeated = {key for key, count in times.items() if count > 1}
        self._holding = {g for g in self._groups_of if g is not None}
        self._lists = {g: list(groups[g]["params"]) for g in self._holding}

    def of_products(self, sizes: Sequence[Coefficient | None]) -> list[Coefficient | None]:
        """Of numbers that groups have, the one for each product; the largest, if they are known."""
        found: list[Coefficient | None] = []
        for groups in self.accumulator.rows(self._groups_of):
            own = [sizes[g] for g in groups if g is not None and sizes[g] is not None]
            numbers = [size for size in own if not isinstance(size, Tensor)]
            found.append(max(numbers) if numbers else own[0] if own else None)
        return found

    def _asked(self, rates: Sequence[Rate | None]) -> _Asked:
        """What is asked of each factor; of the same numbers the same lists as at the last step."""
        trained, known = self.accumulator.trained, self._last
        numbers = not any(rate is not None and isinstance(rate.coef, Tensor) for rate in rates)
        if numbers and known is not None and known.of == (rates, trained, self._groups_of):
            return known
        due = [
            rates[g] if g is not None and trains else None
            for g, trains in zip(self._groups_of, trained, strict=True)
        ]
        coefs = [0.0 if rate is None else rate.coef for rate in due]
        wanted = [rate is not None for rate in due]
        asked = _Asked((rates, trained, self._groups_of), due, wanted, coefs)
        if numbers:
            self._last = asked
            return asked
        found: dict[tuple[int, torch.device], Coefficient] = {}  # maybe on one of several devices
        for k, (param, coef) in enumerate(zip(self._params, coefs, strict=True)):
            if isinstance(coef, Tensor):
                key = id(coef), param.device
                if key not in found:
                    found[key] = coef.to(param.device, non_blocking=True)
                coefs[k] = found[key]
        return asked

    def _gradients(self, asked: _Asked) -> list[Tensor | None]:
        """The gradients, which decide whether and where factors decay; refuse what cannot be."""
        rates, due = asked.of[0], asked.due
        grads = gradients_of(self._params, asked.wanted)
        if not any(rate is not None and (rate.decoupled or rate.scaled) for rate in rates):
            return grads  # what is written to is checked by the accumulator
        for k, (rate, grad) in enumerate(zip(due, grads, strict=True)):
            if rate is None or grad is None:
                continue
            if rate.decoupled and grad.layout is not torch.strided:
                product, j = self._factor(k)
                check_writable(product.name, product.factors[j].attribute, grad, grad.shape)
            if rate.scaled and not rate.decoupled and grad.dtype == torch.float16:
                raise ValueError(
                    f"{self._factor(k)[0].name}: expected float32 parameters under a GradScaler "
                    "with a fused optimizer, got float16: the scaled decay overflows unseen; keep "
                    "the parameters in float32"
                )
        return grads

    def bound(self, limits: Sequence[Coefficient | None]) -> StepBound | None:
        """Hold the factors as they are, to bound the step that follows; right after ``find``.

        Args:
            limits: of every group; a product has the smallest of its factors'.

        Returns:
            None where no product has a limit.
        """
        every = zip(self._groups_of, self.accumulator.trained, self._params, strict=True)
        # Optimizers go by gradients: one that was left when a factor was frozen moves it still.
        moving = [g is not None and (t or p.grad is not None) for g, t, p in every]
        pairs = zip(self._groups_of, moving, strict=True)
        own = [limits[g] if g is not None and moves else None for g, moves in pairs]
        each = [smallest(row) for row in self.accumulator.rows(own)]
        bounded = [limit is not None for limit in each]
        if not any(bounded):
            return None
        if self._checked != bounded:
            check_bounded([*compress(self.products, bounded)])
            self._checked = bounded
        return StepBound(self.accumulator, moving, each, self._moved)

    def check_bound(self, groups: Sequence[Group]) -> None:
        """Refuse to bound the steps of factors in groups that do not say they have no bound.

        Raises:
            ValueError: names the product.
        """
        free = {id(p) for g in groups if BOUND in g and g[BOUND] is None for p in g["params"]}
        check_bounded([p for p in self.products if any(id(q) not in free for q in p.params)])

    def add(self, rates: Sequence[Rate | None], bound: StepBound | None = None) -> None:
        """Decay every factor that has a gradient: coupled into it, decoupled beside it.

        The bound is given the Grams.
        """
        increments, asked = Increments(self._batched), self._asked(rates)
        targets = self._gradients(asked)
        if any(rate is not None and rate.decoupled for rate in rates):
            beside: list[int] = []
            for k, (param, rate) in enumerate(zip(self._params, asked.due, strict=True)):
                if rate is not None and rate.decoupled and targets[k] is not None:
                    targets[k] = param
                    if param.dtype in HALF or id(param) in self._repeated:
                        beside.append(k)
            buffers = increments.of([self._params[k] for k in beside])
            for k, buffer in zip(beside, buffers, strict=True):
                targets[k] = buffer
        self.accumulator.run(targets, asked.coefs, None if bound is None else bound.grams)
        increments.apply(self.rounder)

    def increments(self, rates: Sequence[Rate | None]) -> Increments:
        """Compute the decoupled decay of the factors as they are now, to be applied later."""
        increments, asked = Increments(self._batched), self._asked(rates)
        due = [rate is not None and rate.decoupled for rate in asked.due]
        buffers = iter(increments.of([*compress(self._params, due)]))
        targets = [next(buffers) if wanted else None for wanted in due]
        self.accumulator.run(targets, asked.coefs)
        return increments

    @torch.no_grad()
    def value(self, rates: Sequence[Rate | None]) -> Tensor | None:
        """The penalty whose gradient ``add`` adds to the gradients by coupled rates."""
        asked, total = self._asked(rates), None
        targets = self._gradients(asked)
        # Of all products: sharded ones are measured together, whatever gradients are here.
        norms = self.accumulator.squared_norms()
        numbers = self.accumulator.rows(range(len(targets)))
        for product, norm, own in zip(self.products, norms, numbers, strict=True):
            if all(targets[k] is None for k in own):
                continue
            params = [(self._params[k], asked.coefs[k]) for k in own]
            moving = [c for param, c in params if param.requires_grad and param.grad is not None]
            if any(coef is not moving[0] and bool(coef != moving[0]) for coef in moving):
                raise ValueError(
                    f"expected one {DECAY} for all factors of {product.name}, got "
                    f"{[float(coef) for coef in moving]}: the optimizer reads the loss, and no "
                    "one penalty has these gradients; put its factors into one param group"
                )
            term = 0.5 * moving[0] * norm
            total = term if total is None else total + term.to(total.device)
        return total


class PenalizedClosure:
    """A closure whose every evaluation ends with the penalty in the gradients.

    A hook before the step is not enough: the closure's own ``zero_grad`` would wipe it out.

    Args:
        closure: the user's.
        add: adds the penalty's gradient and returns its value, or None where nobody reads it.
    """

    def __init__(self, closure: Callable[[], Any], add: Callable[[], Tensor | None]) -> None:
        self._closure = closure
        self._add = add
        self._returned: list[tuple[Any, Any]] = []

    def __call__(self) -> Any:
        """Evaluate, and return the loss with the penalty."""
        loss = self._closure()
        value = self._add()
        if loss is None or value is None:
            return loss
        with torch.no_grad():
            total = loss + (value.to(loss) if isinstance(loss, Tensor) else float(value))
        self._returned.append((total, loss))
        return total

    def users_loss(self, result: Any) -> Any:
        """The user's own loss for what the base optimizer returned."""
        return next((loss for total, loss in self._returned if total is result), result)
