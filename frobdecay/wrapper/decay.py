"""One step of Frobenius decay: which tensor gets which multiple of ∇½‖W‖².

    coupled      p.grad += λ·∇            before the base optimizer's update (− for ``maximize``)
    decoupled    p      −= lr·λ·∇         beside it; λ and lr are the options of p's param group

All gradients of one step are computed from the factors as they are before it, in one call of the
accumulator: the order of products never matters. What cannot be written in place at once goes
through increments: parameters that are a factor more than once, half-precision parameters (they
are rounded stochastically), and decay that has to wait for a closure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from frobdecay.accumulate import Accumulator, place_of
from frobdecay.chain import HALF, Coefficient
from frobdecay.product import Product
from frobdecay.wrapper.rates import DECAY, Group, Rate
from frobdecay.wrapper.rounding import StochasticRounder

__all__ = ["Decay", "Increments", "PenalizedClosure", "factor_name"]

Targets = list[list[Tensor | None]]
Coefs = list[list[Coefficient]]


class Increments:
    """Buffers for what is added to parameters later, one a parameter, float32 or better."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, param: Tensor) -> Tensor:
        """The parameter's buffer, zero at first."""
        if id(param) not in self._of:
            dtype = torch.float32 if param.dtype in HALF else param.dtype
            self._of[id(param)] = param, torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return self._of[id(param)][1]

    @torch.no_grad()
    def apply(self, rounder: StochasticRounder) -> None:
        """Add the buffers to those parameters that have a gradient, torch's rule for decay."""
        due = [(param, buffer) for param, buffer in self._of.values() if param.grad is not None]
        for param, buffer in due:
            if param.dtype not in HALF:
                param.add_(buffer)
        half = [(param, buffer) for param, buffer in due if param.dtype in HALF]
        rounder.add_([param for param, _ in half], [buffer for _, buffer in half])


class Decay:
    """Products, their accumulator, and where in an optimizer's groups their factors are.

    Parameters are never kept: the accumulator resolves them at every step, and the places in the
    groups are verified by identity, because Accelerate and FSDP2 swap ``Parameter`` objects.
    """

    def __init__(self, products: Iterable[Product], backend: str | None) -> None:
        self.accumulator = Accumulator(products, backend)
        self.products: Sequence[Product] = self.accumulator.products
        self._groups_of: list[list[int | None]] = []  # [product][factor]
        self._params: list[list[Tensor]] = []
        self._watched: list[tuple[Any, str, Tensor, int, int]] = []
        self._unheld: list[tuple[Product, int]] = []
        self._repeated: set[int] = set()
        self._holding: set[int] = set()

    def find(self, groups: Sequence[Group]) -> set[int]:
        """Find the factors in an optimizer's param groups; once before the other methods.

        Returns:
            The indices of the groups that hold factors.

        Raises:
            RuntimeError: a trainable factor is in no group.
        """
        if self._missing() or not self._is_current(groups):
            self._locate(groups)
        for product, j in self._missing():
            raise RuntimeError(
                f"expected {factor_name(product, j)} in a param group, but the optimizer does not "
                "hold it; add it with add_param_group, or freeze it"
            )
        return self._holding

    def _missing(self) -> list[tuple[Product, int]]:
        """Factors that no group holds, though they are trained now."""
        return [(p, j) for p, j in self._unheld if p.factors[j].param.requires_grad]

    def _is_current(self, groups: Sequence[Group]) -> bool:
        """Whether all parameters are the same as before, in their modules and in the groups."""
        held = [group["params"] for group in groups]
        try:
            for attributes, name, param, g, k in self._watched:
                if attributes.get(name) is not param or held[g][k] is not param:
                    return False
        except IndexError:
            return False
        return bool(self._watched)

    def _locate(self, groups: Sequence[Group]) -> None:
        """Find every factor's place in the groups."""
        where = {
            id(p): (g, k) for g, group in enumerate(groups) for k, p in enumerate(group["params"])
        }
        self._params = [list(product.params) for product in self.products]
        self._groups_of, self._watched, self._unheld = [], [], []
        for product, params in zip(self.products, self._params, strict=True):
            row: list[int | None] = []
            for j, (factor, param) in enumerate(zip(product.factors, params, strict=True)):
                place = where.get(id(param))
                if place is None:
                    self._unheld.append((product, j))
                    row.append(None)
                else:
                    self._watched.append((*place_of(factor), param, *place))
                    row.append(place[0])
            self._groups_of.append(row)
        times = Counter(id(param) for row in self._params for param in row)
        self._repeated = {key for key, count in times.items() if count > 1}
        self._holding = {g for row in self._groups_of for g in row if g is not None}

    def _sheet(
        self,
        rates: Sequence[Rate | None],
        target_of: Callable[[str, Tensor, Rate], Tensor | None],
    ) -> tuple[Targets, Coefs]:
        """Targets and coefficients for the accumulator; raises before anything is changed."""
        targets: Targets = []
        coefs: Coefs = []
        for product, params, row in zip(self.products, self._params, self._groups_of, strict=True):
            target_row: list[Tensor | None] = []
            coef_row: list[Coefficient] = []
            for param, g in zip(params, row, strict=True):
                rate = None if g is None else rates[g]
                if rate is None or not param.requires_grad:
                    target_row.append(None)
                    coef_row.append(0.0)
                else:
                    target_row.append(target_of(product.name, param, rate))
                    coef_row.append(_beside(param, rate.coef))
            targets.append(target_row)
            coefs.append(coef_row)
        return targets, coefs

    def add(self, rates: Sequence[Rate | None], rounder: StochasticRounder) -> None:
        """Decay every factor that has a gradient: coupled into it, decoupled beside it."""
        increments = Increments()

        def target(name: str, param: Tensor, rate: Rate) -> Tensor | None:
            grad = _dense_grad(name, param, rate)
            if grad is None or not rate.decoupled:
                return grad
            in_place = param.dtype not in HALF and id(param) not in self._repeated
            return param if in_place else increments.of(param)

        self.accumulator.accumulate(*self._sheet(rates, target))
        increments.apply(rounder)

    def increments(self, rates: Sequence[Rate | None]) -> Increments:
        """Compute the decoupled decay of the factors as they are now, to be applied later."""
        increments = Increments()

        def target(name: str, param: Tensor, rate: Rate) -> Tensor | None:
            return increments.of(param) if rate.decoupled else None

        self.accumulator.accumulate(*self._sheet(rates, target))
        return increments

    @torch.no_grad()
    def add_coupled(self, rates: Sequence[Rate | None], *, value: bool) -> Tensor | None:
        """Add the coupled decay to the gradients, and return the penalty's value if asked."""

        def target(name: str, param: Tensor, rate: Rate) -> Tensor | None:
            return None if rate.decoupled else _dense_grad(name, param, rate)

        targets, coefs = self._sheet(rates, target)
        total = self._value(targets, coefs) if value else None
        self.accumulator.accumulate(targets, coefs)
        return total

    def _value(self, targets: Targets, coefs: Coefs) -> Tensor | None:
        total: Tensor | None = None
        # Of all products: sharded ones are measured together, whatever gradients are here.
        norms = self.accumulator.squared_norms()
        for product, norm, params, target_row, coef_row in zip(
            self.products, norms, self._params, targets, coefs, strict=True
        ):
            if all(target is None for target in target_row):
                continue
            moving = [
                coef
                for param, coef in zip(params, coef_row, strict=True)
                if param.requires_grad and param.grad is not None
            ]
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


def factor_name(product: Product, j: int) -> str:
    """What messages call factor ``j`` of a product."""
    return f"factor {j} ({product.factors[j].attribute}) of {product.name!r}"


def _beside(param: Tensor, coef: Coefficient) -> Coefficient:
    """The coefficient on the parameter's device: a loss scale lives on one of several."""
    return coef.to(param.device, non_blocking=True) if isinstance(coef, Tensor) else coef


def _dense_grad(name: str, param: Tensor, rate: Rate) -> Tensor | None:
    """The gradient that decides whether and where a factor decays, refusing what cannot be."""
    grad = param.grad
    if grad is None:
        return None
    if grad.layout != torch.strided:
        raise TypeError(
            f"{name}: expected dense gradients, got {grad.layout}; Frobenius decay moves every "
            "row of a factor: make the layer's gradients dense (sparse=False) or its λ zero"
        )
    if rate.scaled and not rate.decoupled and grad.dtype == torch.float16:
        raise ValueError(
            f"{name}: expected float32 parameters under a GradScaler with a fused optimizer, got "
            "float16: the scaled decay overflows unseen; keep the parameters in float32"
        )
    return grad
