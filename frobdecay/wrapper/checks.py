"""What is known and checked about an optimizer before it is wrapped; nothing is changed here."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn, optim
from torch.optim import Optimizer

from frobdecay.chain import Coefficient
from frobdecay.product import Product, as_products, check_coefficient
from frobdecay.registry import products as products_of
from frobdecay.wrapper.decay import factor_name
from frobdecay.wrapper.param_groups import Division, plan_division
from frobdecay.wrapper.proxy import OptimizerProxy
from frobdecay.wrapper.rates import Group, has_weight_decay, is_zero, known_value

__all__ = [
    "check_arguments",
    "check_membership",
    "convention",
    "find_products",
    "ignores_the_loss",
    "plan_groups",
    "plan_wrapping",
    "reads_the_parameter",
]

Convention = Literal["coupled", "decoupled"]

# What torch's optimizers do with weight_decay where no option of a group says otherwise.
_COUPLED = "Adadelta Adagrad Adam Adamax ASGD LBFGS NAdam RAdam RMSprop Rprop SGD SparseAdam"
_DECOUPLED = "Adafactor AdamW Muon"
_CONVENTIONS: dict[type[Optimizer], Convention] = {
    **{getattr(optim, name): "coupled" for name in _COUPLED.split()},
    **{getattr(optim, name): "decoupled" for name in _DECOUPLED.split() if hasattr(optim, name)},
}


def _known_class(cls: type[Optimizer]) -> type[Optimizer] | None:
    """The class of torch whose step this class runs."""
    step = inspect.unwrap(cls.step)  # torch wraps hooks around the steps of classes
    for base in cls.__mro__:
        if base in _CONVENTIONS and inspect.unwrap(base.step) is step:
            return base
    return None


def ignores_the_loss(optimizer: Optimizer) -> bool:
    """Whether it is known that a closure's return value is only handed through."""
    known = _known_class(type(optimizer))
    return known is not None and known is not optim.LBFGS


def reads_the_parameter(optimizer: Optimizer) -> bool:
    """Whether the update depends on the parameter, so that decay has to come after it."""
    return _known_class(type(optimizer)) is getattr(optim, "Adafactor", optim.Optimizer)


def convention(optimizer: Optimizer, group: Mapping[str, Any]) -> Convention:
    """Tell how an optimizer applies the weight decay of a group.

    Raises:
        ValueError: the optimizer is not one of torch's, nor runs the step of one.
    """
    if group.get("decoupled_weight_decay"):
        return "decoupled"
    known = _known_class(type(optimizer))
    if known is None:
        raise ValueError(
            f"expected mode='coupled' or mode='decoupled' for {type(optimizer).__name__}, got "
            "'auto': how it applies weight decay cannot be known; 'coupled' adds the decay to "
            "the gradient (as SGD does), 'decoupled' subtracts it from the parameter (as AdamW)"
        )
    return _CONVENTIONS[known]


def check_arguments(optimizer: Any, decay: Any, mode: Any) -> None:
    """Refuse what no optimizer could be wrapped with.

    Raises:
        TypeError, ValueError: see ``FrobeniusDecay``.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; build one over "
            "the factorized model's parameters first"
        )
    if isinstance(optimizer, OptimizerProxy):
        raise ValueError(
            f"expected an optimizer that is not wrapped, got a {type(optimizer).__name__}: the "
            "factors would decay twice; pass its .optimizer, or use it as it is"
        )
    if mode not in ("coupled", "decoupled", "auto"):
        raise ValueError(f"expected mode to be 'coupled', 'decoupled' or 'auto', got {mode!r}")
    if decay is not None:
        check_coefficient(decay, "decay")
        check_coefficient(known_value(decay), "decay")


def find_products(model_or_products: nn.Module | Product | Iterable[Product]) -> list[Product]:
    """The products of a model, or the given ones.

    Raises:
        ValueError: there are none.
    """
    if isinstance(model_or_products, nn.Module):
        found = products_of(model_or_products)
        if not found:
            raise ValueError(
                f"expected a model with products, got a {type(model_or_products).__name__} "
                "without any: call frobdecay.factorize(model) before building the optimizer"
            )
        return found
    found = as_products(model_or_products)
    if not found:
        raise ValueError("expected at least one product, got an empty list")
    return found


def check_membership(
    products: Sequence[Product], groups: Sequence[Group], model: nn.Module | None
) -> None:
    """Refuse factors that the optimizer should hold but does not, or holds twice.

    Raises:
        ValueError: names the factor.
    """
    held = Counter(id(param) for group in groups for param in group["params"])
    for product in products:
        for j, param in enumerate(product.params):
            if held[id(param)] > 1:
                raise ValueError(
                    f"expected {factor_name(product, j)} once in the optimizer, got it "
                    f"{held[id(param)]} times; every parameter belongs to one param group"
                )
            if not held[id(param)] and param.requires_grad:
                raise ValueError(_missing(product, j, groups, model))


def _missing(product: Product, j: int, groups: Sequence[Group], model: nn.Module | None) -> str:
    message = (
        f"expected {factor_name(product, j)} in a param group, but the optimizer does not hold "
        "it: build the optimizer after factorize(), or add the factors with add_param_group; if "
        "another optimizer trains it, pass the list of the products that this one trains"
    )
    stale = [] if model is None else _stale(groups, model)
    if not stale:
        return message
    shown = ", ".join(stale[:3]) + (f", … ({len(stale)})" if len(stale) > 3 else "")
    return f"{message}. The optimizer was built too early: it holds {shown}, not in the model now"


def _stale(groups: Sequence[Group], model: nn.Module) -> list[str]:
    """Parameters that the optimizer holds and the model does not."""
    alive = {id(param) for param in model.parameters()}
    return [
        f"{name} {tuple(param.shape)}"
        for group in groups
        for name, param in _named(group)
        if id(param) not in alive
    ]


def _named(group: Group) -> list[tuple[str, Tensor]]:
    names = group.get("param_names") or ["a parameter"] * len(group["params"])
    return list(zip(names, group["params"], strict=True))


def plan_wrapping(
    optimizer: Optimizer,
    products: Sequence[Product],
    model: nn.Module | None,
    decay: Coefficient | None,
    mode: str,
) -> list[Division]:
    """Say what becomes of every param group, or why the optimizer cannot be wrapped.

    Raises:
        TypeError, ValueError: see ``FrobeniusDecay``.
    """
    groups = optimizer.param_groups
    if any("initial_lr" in group for group in groups):
        raise ValueError(
            "expected an optimizer without a learning-rate scheduler, got 'initial_lr' in a param "
            "group: wrapping may divide groups, of which the scheduler would not know; wrap the "
            "optimizer first, then build the scheduler on the wrapper"
        )
    check_membership(products, groups, model)
    layout = plan_groups(optimizer, groups, products, decay, mode)
    if decay is None and not any(
        key in group
        for group, division in zip(groups, layout, strict=True)
        for key in ("weight_decay", "frobenius_decay")
        if any(division.flags)
    ):
        raise ValueError(
            f"expected decay=λ for {type(optimizer).__name__}, got None: it has no weight_decay "
            "that could be taken over"
        )
    return layout


def plan_groups(
    optimizer: Optimizer,
    groups: Sequence[Group],
    products: Sequence[Product],
    decay: Coefficient | None,
    mode: str,
    *,
    first: int = 0,
    own_first: bool = False,
) -> list[Division]:
    """Plan the division of groups, the first of which has the index ``first``."""
    factors = {id(param) for product in products for param in product.params}
    layout = []
    for k, group in enumerate(groups, first):
        where = f"param group {k}"
        division = plan_division(
            group, lambda param: id(param) in factors, decay, where, own_first=own_first
        )
        if any(division.flags):
            _check_group(optimizer, group, division, mode, where)
            _check_coverage(products, group)
        layout.append(division)
    return layout


def _check_coverage(products: Sequence[Product], group: Group) -> None:
    """Refuse to take the weight decay from a parameter that is a factor only in part."""
    parts: dict[tuple[int, int | None], tuple[str, Tensor, int]] = {}
    for product in products:
        for j, factor in enumerate(product.factors):
            param = factor.param
            name, size = factor_name(product, j), factor.view(param).numel()
            parts[id(param), factor.index] = name, param, size
    held = {id(param) for param in group["params"]} if has_weight_decay(group) else set()
    covered = Counter[int]()
    for (key, _), (_, _, size) in parts.items():
        covered[key] += size
    for (key, _), (name, param, _) in parts.items():
        if key in held and covered[key] < param.numel():
            raise ValueError(
                f"{name}: expected all of the parameter {tuple(param.shape)} to be factors, got "
                f"{covered[key]} of {param.numel()} entries: the others would lose their weight "
                "decay; pass products that cover it, or set its weight_decay=0 and pass decay="
            )


def _check_group(
    optimizer: Optimizer, group: Group, division: Division, mode: str, where: str
) -> None:
    kind = convention(optimizer, group) if mode == "auto" else mode
    if kind == "decoupled" and "lr" not in group:
        raise ValueError(
            f"expected an 'lr' in {where} of {type(optimizer).__name__} for mode='decoupled' "
            "(the decay is lr·λ·gradient), got none; use mode='coupled'"
        )
    if group.get("differentiable") and not is_zero(division.coef):
        raise ValueError(
            f"expected differentiable=False in {where}, got True: the decay is not recorded by "
            "autograd; add frobdecay.penalty(products, coef) to the loss, or pass decay=0"
        )
