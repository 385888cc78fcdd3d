"""What a param group's options ask for in one step: a multiple of ∇½‖W‖².

    coupled      +λ, or −λ for ``maximize``; times the loss scale while gradients carry one
    decoupled    −lr·λ; zero in a step that ``GradScaler`` has skipped

Numbers that live on an accelerator are computed with but never read: reading would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from frobdecay.algebra.precision import Coefficient, check_coefficient

DECAY = "frobenius_decay"
"""The option of a param group that holds λ."""

BOUND = "step_bound"
"""The option of a param group that holds the largest ‖ΔW‖₂ of a step, in units of lr."""

Group = dict[str, Any]


@dataclass(frozen=True)
class Rate:
    """What a param group's options make of ∇½‖W‖² in one step.

    Attributes:
        decoupled: whether it goes to the parameter instead of its gradient.
        coef: the multiple that is added there; never known to be zero.
        scaled: whether the gradients carry a loss scale, and ``coef`` with them.
    """

    decoupled: bool
    coef: Coefficient
    scaled: bool = False


def rate_of(
    group: Group,
    where: str,
    *,
    decoupled: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Rate | None:
    """Read λ, lr and ``maximize`` of a group of factors; None where nothing has to be done.

    Args:
        group: a param group that holds factors.
        where: what messages call it.
        decoupled: the kind of decay.
        grad_scale: what ``GradScaler`` multiplied the gradients with, if they still are.
        found_inf: not zero if ``GradScaler`` makes the base optimizer skip this step.

    Raises:
        RuntimeError: the group decays its factors otherwise, too, or has lost its λ.
        ValueError: λ is negative or NaN, or the group is differentiable.
    """
    _check_options(group, where)
    coef = known_value(group[DECAY])
    if is_zero(coef):
        return None
    if group.get("differentiable"):
        raise ValueError(
            f"expected differentiable=False in {where} with {DECAY}={coef}: the decay is not "
            "recorded by autograd; add frobdecay.penalty(products, coef) to the loss instead"
        )
    if decoupled:
        coef = -known_value(group["lr"]) * coef
        if found_inf is not None:
            keep = known_value(found_inf) == 0
            coef = coef * keep
    else:
        coef = -coef if group.get("maximize") else coef
        if grad_scale is not None:
            coef = coef * known_value(grad_scale)
    return None if is_zero(coef) else Rate(decoupled, coef, grad_scale is not None)


def asked(
    groups: Sequence[Group],
    holding: Collection[int],
    decoupled: Callable[[Group], bool],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[list[Rate | None], list[Coefficient | None]]:
    """The rates and the limits of all groups; None of those that do not hold factors."""
    rates: list[Rate | None] = [None] * len(groups)
    limits: list[Coefficient | None] = [None] * len(groups)
    for k in sorted(holding):
        where, kind = f"param group {k}", decoupled(groups[k])
        rates[k] = rate_of(
            groups[k], where, decoupled=kind, grad_scale=grad_scale, found_inf=found_inf
        )
        limits[k] = limit_of(groups[k], where)
    return rates, limits


def limit_of(group: Group, where: str) -> Coefficient | None:
    """The largest ‖ΔW‖₂ that a group of factors allows in this step; None where it has no bound.

    Raises:
        TypeError, ValueError: the bound is no positive finite number, or lr none of at least 0.
    """
    bound = group.get(BOUND)
    if bound is None:
        return None
    check_bound(bound, f"{BOUND} of {where}")
    if group.get("lr") is None or group.get("differentiable"):
        raise ValueError(
            f"expected an 'lr' and differentiable=False in {where} with {BOUND}={bound}, got "
            f"{sorted(group)}: the bound is a multiple of lr, and not recorded by autograd"
        )
    lr = known_value(group["lr"])
    check_coefficient(lr if isinstance(lr, Tensor) else float(lr), f"lr of {where} with {BOUND}")
    return lr * known_value(bound)


def check_bound(bound: Any, what: str) -> None:
    """Refuse what is no positive finite number; tensors on an accelerator are trusted."""
    check_coefficient(known_value(bound), what)
    if is_zero(bound):
        raise ValueError(
            f"expected {what} to be positive, got {bound}: nothing would move; None is no bound"
        )


def _check_options(group: Group, where: str) -> None:
    """Refuse options that a checkpoint or a schedule may have brought."""
    if DECAY not in group:
        raise RuntimeError(
            f"expected a {DECAY!r} in {where}, got {sorted(group)}; load checkpoints and add "
            "groups through FrobeniusDecay, not through the optimizer that it wraps"
        )
    if has_weight_decay(group):
        raise RuntimeError(
            f"expected weight_decay=0 in {where}, which holds factors, got "
            f"{group['weight_decay']}: they would decay twice; schedule {DECAY!r} instead"
        )
    check_coefficient(known_value(group[DECAY]), f"{DECAY} of {where}")


def known_value(number: Coefficient) -> Coefficient:
    """A Python number where it can be had without waiting for an accelerator."""
    if not isinstance(number, Tensor) or number.numel() != 1:
        return number  # of the latter, ``check_coefficient`` says that it is no one number
    return float(number) if number.device.type == "cpu" else number.reshape(())


def has_weight_decay(group: Mapping[str, Any]) -> bool:
    """Whether a group has a non-zero weight decay, as far as can be told without waiting."""
    value = known_value(group.get("weight_decay", 0.0))
    return not isinstance(value, Tensor) and value != 0


def is_zero(number: Coefficient) -> bool:
    """Whether a coefficient is known to be zero."""
    number = known_value(number)
    return not isinstance(number, Tensor) and number == 0


def is_dummy_step(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint only wants the state to be initialized.

    It steps with zero gradients and lr 0, and expects the moments to stay zero.
    """
    groups = optimizer.param_groups
    if optimizer.state or any(not is_zero(group.get("lr", 1.0)) for group in groups):
        return False
    params = [param for group in groups for param in group["params"]]
    return not any(p.grad is not None and bool(p.grad.any()) for p in params)
