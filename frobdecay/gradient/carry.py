"""Carry what an optimizer remembers of a dense weight over to its factors.

A weight W = f(p₁, …, p_d) whose gradient is G gives its factors the gradients Jₖᵀ·G, with Jₖ the
derivative of f at factor k. What an optimizer keeps is therefore mapped by what it is:

    linear      a sum of gradients, as momentum: Jₖᵀ·m, exactly; of a pair m·V and mᵀ·U
    square      a mean of squared gradients: (Jₖ∘Jₖ)ᵀ·v, as if the entries of the gradient were
                uncorrelated; of a pair v·(V∘V) and vᵀ·(U∘U)
    copy        a number that does not depend on the gradients, as the count of steps
    forget      zeros of the factor's shape: an average of updates, which are no gradients; the mean
                that a centered RMSprop subtracts, which the square above need not be beyond

so that momentum is that of an optimizer that has had these factors from the beginning. Where the
entries were correlated, a square would be too small, and the next step too long: that of Adam's
kin is never below the square of the mean. A copy of a weight that was shared remembers the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frobdecay.product.holding import lists_of
from frobdecay.product.names import naming

Optimizers = Optimizer | Iterable[Optimizer] | None
Place = tuple[str, nn.Module, str]
Made = Callable[..., Tensor]
"""Factors -> the weight: a parametrization."""
Rule = Callable[[Any, Made, Sequence[Tensor]], Iterator[Any]]
"""What is kept of the weight, factors -> what is kept of each of them."""


class Carried:
    """Weights on their way from dense to factored, and the optimizers that train them.

    Args:
        optimizers: one, several or none.
        places: of the weights that are about to be factorized: name, module, attribute.

    Raises:
        TypeError: something that is no optimizer.
        ValueError: a wrapper, or an optimizer of which it is not known what it keeps.
    """

    def __init__(self, optimizers: Optimizers, places: Iterable[Place]) -> None:
        several = () if optimizers is None else optimizers
        self._optimizers = [several] if isinstance(several, Optimizer) else list(several)
        self._moves: list[tuple[Optimizer, Tensor, list[Tensor], list[dict[str, Any]]]] = []
        self._pending: list[tuple[Tensor, Tensor]] = []
        for optimizer in self._optimizers:
            _check_optimizer(optimizer)
        held = [(one, _held(one)) for one in self._optimizers]
        # The parameters as they were: modules hold the factors by the time that these are mapped.
        self._before: list[tuple[Place, Tensor, list[Optimizer]]] = []
        for place in places if self._optimizers else ():
            name, dense = place[0], getattr(place[1], place[2])
            holders = [one for one, params in held if id(dense) in params]
            self._before.append((place, dense, holders))
            for optimizer in self._optimizers:
                _check_state(optimizer, name, dense, optimizer in holders)
            if not holders and dense.requires_grad:
                raise ValueError(
                    f"{name}: expected the optimizer that trains it, got one that does not hold "
                    f"its parameter {tuple(dense.shape)}: hand over all optimizers of the model, "
                    "in a list, or freeze what none of them trains"
                )

    def map(self) -> None:
        """Compute the state of all factors, which are in the weights' places now.

        Raises:
            RuntimeError: it cannot be computed; no optimizer was changed.
        """
        for (name, module, attribute), dense, holders in self._before:
            held = lists_of(module).get(attribute)
            made = _same if held is None else held[0]  # a copy of a weight that was shared
            factors = [getattr(module, attribute)] if held is None else list(held.parameters())
            with naming(name):
                for optimizer in holders:
                    _check_factors(optimizer, factors)
                    states = _mapped(optimizer, dense, made, factors)
                    self._moves.append((optimizer, dense, factors, states))
                if dense.grad is not None:  # of a backward pass whose step is still to come
                    waiting = _linear(dense.grad, made, factors)
                    self._pending += zip(factors, waiting, strict=True)

    def commit(self, model: nn.Module) -> None:
        """Give the factors the weights' places in the param groups; nothing of this can fail.

        Args:
            model: factorized; a dense weight that it still holds keeps its place, too.
        """
        if not self._moves:
            return
        kept = {id(param) for param in model.parameters()}
        names = {id(param): name for name, param in model.named_parameters()}
        for optimizer in self._optimizers:
            new: dict[int, list[Tensor]] = {}
            for one, dense, factors, _ in self._moves:
                if one is optimizer:  # of a weight that was shared, in all its places
                    new.setdefault(id(dense), []).extend(factors)
            for group in optimizer.param_groups:
                _replace(group, new, names, kept)
        for optimizer, dense, factors, states in self._moves:
            if id(dense) not in kept:
                optimizer.state.pop(dense, None)
            for factor, state in zip(factors, states, strict=True):
                if state:
                    optimizer.state[factor] = state
        for factor, gradient in self._pending:
            factor.grad = gradient


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if hasattr(optimizer, "products"):
        raise ValueError(
            f"expected the optimizer that is to be wrapped, got a {type(optimizer).__name__}, "
            "whose groups are divided already: factorize with the optimizer behind it, "
            "then wrap that"
        )


def _check_state(optimizer: Optimizer, name: str, dense: Tensor, holds: bool) -> None:
    """Refuse an optimizer that keeps of this weight what is not known."""
    if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
        raise ValueError(
            f"{name}: expected an optimizer that keeps something for each weight, got an LBFGS "
            "that has stepped: its history is of all weights at once; build a new one afterwards"
        )
    rules = _rules(optimizer)
    unknown = sorted(map(str, optimizer.state.get(dense, {}).keys() - rules.keys()))
    if unknown and holds:
        raise ValueError(
            f"{name}: expected an optimizer whose state can be carried over to factors "
            f"({', '.join(RULES)}), got a {type(optimizer).__name__} that keeps "
            f"{', '.join(unknown)}: let it forget this weight, "
            "optimizer.state.pop(weight), or factorize first and build a new one"
        )


def _check_factors(optimizer: Optimizer, factors: Sequence[Tensor]) -> None:
    """Refuse factors that the optimizer's next step would fail on."""
    worst = max(factors, key=lambda factor: factor.ndim)
    if isinstance(optimizer, torch.optim.Muon) and worst.ndim != 2:
        raise ValueError(
            f"expected matrices, which alone a Muon takes, got factors of shape "
            f"{tuple(worst.shape)}: give this weight to another optimizer, or leave it out"
        )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _rules(optimizer: Optimizer) -> Mapping[str, Rule]:
    """Of torch's own classes: others may keep something else by the same name."""
    kind = type(optimizer)
    own = getattr(torch.optim, kind.__name__, None) is kind
    return RULES.get(kind.__name__, {}) if own else {}


def _held(optimizer: Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _mapped(
    optimizer: Optimizer, dense: Tensor, made: Made, factors: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """The state of every factor, from that of the dense weight."""
    states: list[dict[str, Any]] = [{} for _ in factors]
    for key, value in optimizer.state.get(dense, {}).items():
        parts = _rules(optimizer)[key](value, made, factors)
        for state, part in zip(states, parts, strict=True):
            state[key] = part
    for state in states:
        for key in state.keys() & {"exp_avg_sq", "max_exp_avg_sq"}:
            state[key] = torch.maximum(state[key], state["exp_avg"].square().to(state[key].dtype))
    return states


def _linear(value: Tensor | None, made: Made, factors: Sequence[Tensor]) -> Iterator[Any]:
    if value is None:  # a momentum before its first step
        yield from (None for _ in factors)
        return
    wide = torch.promote_types(torch.float32, value.dtype)
    inputs = [factor.detach().to(wide).requires_grad_() for factor in factors]
    with torch.enable_grad():
        dense = torch.clone(made(*inputs))  # numbers, also of a weight that is formed late
        parts = torch.autograd.grad(dense, inputs, value.to(wide))
    for part, factor in zip(parts, factors, strict=True):
        yield torch.empty_like(factor, dtype=value.dtype, requires_grad=False).copy_(part)


def _square(value: Tensor, made: Made, factors: Sequence[Tensor]) -> Iterator[Any]:
    return _linear(value, made, [factor.detach().square() for factor in factors])


def _copy(value: Any, made: Made, factors: Sequence[Tensor]) -> Iterator[Any]:
    yield from (value.clone() if isinstance(value, Tensor) else value for _ in factors)


def _forget(value: Any, made: Made, factors: Sequence[Tensor]) -> Iterator[Any]:
    yield from (torch.zeros_like(factor, requires_grad=False) for factor in factors)


_ADAM = {"step": _copy, "exp_avg": _linear, "exp_avg_sq": _square, "max_exp_avg_sq": _square}
RULES: Mapping[str, Mapping[str, Rule]] = {
    "SGD": {"momentum_buffer": _linear},
    "Muon": {"momentum_buffer": _linear},
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "RAdam": _ADAM,
    "NAdam": {**_ADAM, "mu_product": _copy},
    "Adagrad": {"step": _copy, "sum": _square},
    "RMSprop": {
        "step": _copy,
        "square_avg": _square,
        "grad_avg": _forget,
        "momentum_buffer": _forget,
    },
}
"""Optimizer of ``torch.optim`` -> key in its state -> what it is, as above."""


def _replace(
    group: dict[str, Any],
    new: Mapping[int, Sequence[Tensor]],
    names: Mapping[int, str],
    kept: Collection[int],
) -> None:
    """Put factors where their weights are in a group, behind those that stay."""
    if new.keys().isdisjoint(map(id, group["params"])):
        return
    if not group.get("frobenius_decay", 1.0):
        # What a wrapper gave a group that held no factors: these decay as their weight did.
        del group["frobenius_decay"]
    named = group.get("param_names", [None] * len(group["params"]))
    found: list[tuple[Tensor, str | None]] = []
    for param, name in zip(group["params"], named, strict=True):
        factors = new.get(id(param), ())
        if not factors or id(param) in kept:
            found.append((param, name))
        found += [(factor, names[id(factor)]) for factor in factors]
    group["params"][:] = [param for param, _ in found]
    if "param_names" in group:
        group["param_names"][:] = [name for _, name in found]
