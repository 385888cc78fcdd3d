"""What is known and checked about an optimizer before it is wrapped; nothing is changed here."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from frobdecay.algebra.precision import Coefficient, check_coefficient
from frobdecay.optim.conventions import (
    convention,
    refusal,
    refusal_of_bound,
    refusal_of_decoupled,
)
from frobdecay.optim.division import Division, plan_division
from frobdecay.optim.proxy import OptimizerProxy, decayed_before
from frobdecay.optim.rates import DECAY, Group, check_bound, has_weight_decay, is_zero, known_value
from frobdecay.product.find import products as products_of
from frobdecay.product.holding import VERSION
from frobdecay.product.names import factor_name
from frobdecay.product.partitions import refusal_of_division, refusal_of_optimizer
from frobdecay.product.product import Product, as_products


def check_arguments(optimizer: Any, decay: Any, mode: Any, bound: Any = None) -> None:
    """Refuse what no optimizer could be wrapped with.

    Raises:
        TypeError, ValueError: see ``FrobeniusDecay``.
    """
    if reason := refusal_of_optimizer(optimizer):
        raise ValueError(
            f"expected an optimizer of whole parameters, got a {type(optimizer).__name__}: {reason}"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; build one over "
            "the factorized model's parameters first"
        )
    if _is_wrapped(optimizer):
        raise ValueError(
            f"expected an optimizer that is not wrapped, got a {type(optimizer).__name__}: the "
            "factors would decay twice; pass the optimizer behind, or use it as it is"
        )
    reason = refusal(optimizer)
    if reason is not None:
        raise ValueError(
            f"expected an optimizer that decay can be added to, got a {type(optimizer).__name__}: "
            f"{reason}"
        )
    if mode not in ("coupled", "decoupled", "auto"):
        raise ValueError(f"expected mode to be 'coupled', 'decoupled' or 'auto', got {mode!r}")
    if decay is not None:
        check_coefficient(known_value(decay), "decay")
    if bound is not None:
        check_bound(bound, "bound")
    if bound is not None and (reason := refusal_of_bound(optimizer)):
        raise ValueError(
            f"expected bound=None for {type(optimizer).__name__}, got {bound}: {reason}"
        )


def _is_wrapped(optimizer: Optimizer) -> bool:
    """Whether a FrobeniusDecay is this optimizer or one inside it, as in a Lookahead or a list."""
    if isinstance(optimizer, OptimizerProxy):
        return True
    inside = (value for value in tree_leaves(vars(optimizer)) if isinstance(value, Optimizer))
    return any(_is_wrapped(value) for value in inside if value is not optimizer)


class Found:
    """Products, and the model that they were found in, which may have others by now.

    Args:
        products: those of now.
        model: where they were found, unless they were given. Copies do not carry it along.

    Attributes:
        products: as they were when last looked for; always the same list.
    """

    def __init__(self, products: list[Product], model: nn.Module | None = None) -> None:
        self.products = products
        self._model = None if model is None else weakref.ref(model)
        self._version = VERSION.value

    def __reduce__(self) -> tuple[Any, ...]:
        return Found, (self.products,)

    @property
    def model(self) -> nn.Module | None:
        """The model, while it lives."""
        return None if self._model is None else self._model()

    @property
    def is_current(self) -> bool:
        """Whether nothing was factorized, merged or unrolled since the last time."""
        return self._version == VERSION.value

    def now(self) -> list[Product]:
        """The products that are there now: the known ones, unless others are."""
        model = self.model
        if model is None or self.is_current:
            return self.products
        products = products_of(model)
        return self.products if _places(products) == _places(self.products) else products

    def checked(self, groups: Sequence[Group]) -> list[Product]:
        """As ``now``, refusing products that came or went after the optimizer was built.

        Raises:
            ValueError: names a factor that the optimizer does not hold, or a product that is gone.
        """
        products = self.now()
        check_membership(products, groups, self.model)
        lost = {product.name for product in self.products} - {product.name for product in products}
        if lost:
            raise ValueError(
                f"expected {min(lost)!r} to be a product, as when the optimizer was wrapped, but "
                "it was merged or unrolled: nothing would decay it; build a new optimizer"
            )
        return products

    def settle(self, products: Sequence[Product]) -> None:
        """Take these for those that are there now."""
        self.products[:] = products
        self._version = VERSION.value


def _places(products: Sequence[Product]) -> list[tuple[int, str]]:
    return [(id(f.owner), f.attribute) for product in products for f in product.factors]


def find_products(model_or_products: nn.Module | Product | Iterable[Product]) -> Found:
    """The products of a model, or the given ones.

    Raises:
        ValueError: there are none.
    """
    if isinstance(model_or_products, nn.Module):
        found = products_of(model_or_products)
        if not found:
            raise ValueError(
                f"expected a model with products, got a {type(model_or_products).__name__} "
                "without any: call frobdecay.factorize(model) before building the optimizer; "
                "layers that are products as they are, such as a bottleneck of two Linear, are "
                "made known by frobdecay.register_products, or given as Product.of(U, V)"
            )
        return Found(found, model_or_products)
    found = as_products(model_or_products)
    if not found:
        raise ValueError("expected at least one product, got an empty list")
    return Found(found)


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
                raise ValueError(missing(product, j, groups, model))


def missing(product: Product, j: int, groups: Sequence[Group], model: nn.Module | None) -> str:
    """What is said where an optimizer does not hold a factor that it should."""
    message = (
        f"expected {factor_name(product, j)} in a param group, but the optimizer does not hold "
        "it: build the optimizer after factorize(), add the factors with add_param_group, or "
        "freeze them; if another optimizer trains it, pass the list of the products that this one "
        "trains"
    )
    stale = [] if model is None else _stale(groups, model)
    if not stale:
        return message
    shown = ", ".join(name for name, _ in stale[:3]) + (f", … ({len(stale)})" if stale[3:] else "")
    if all(param.ndim == 1 and param.numel() > 1 for _, param in stale):
        return (
            f"{message}. The optimizer holds {shown}, flat, as ZeRO and FSDP1 make them: shard "
            "with fully_shard, or call frobdecay.add_penalty_grad_ before their step"
        )
    return f"{message}. The optimizer was built too early: it holds {shown}, not in the model now"


def _stale(groups: Sequence[Group], model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters that the optimizer holds and the model does not, with what messages call them."""
    alive = {id(param) for param in model.parameters()}
    unnamed = repeat("a parameter")
    return [
        (f"{name} {tuple(param.shape)}", param)
        for group in groups
        for name, param in zip(group.get("param_names", unnamed), group["params"], strict=False)
        if id(param) not in alive
    ]


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
    check_membership(products, groups, model)
    layout = plan_groups(optimizer, groups, products, decay, mode)
    if any("initial_lr" in group for group in groups) and any(one.split for one in layout):
        raise ValueError(
            "expected an optimizer without a learning-rate scheduler, got 'initial_lr' in a param "
            "group: wrapping divides groups, of which the scheduler would not know; wrap the "
            "optimizer first, then build the scheduler on the wrapper, or give factors a group of "
            "their own when building the optimizer: frobdecay.split_param_groups. In the middle of "
            "a training remove 'initial_lr' from the groups, wrap, and build the scheduler anew"
        )
    pairs = [*zip(groups, layout, strict=True)]
    if decay is None and not any(
        any(one.flags) and {"weight_decay", DECAY} & group.keys() for group, one in pairs
    ):
        raise ValueError(
            f"expected decay=λ for {type(optimizer).__name__}, got None: it has no weight_decay "
            "that could be taken over"
        )
    lost = decayed_before(optimizer) - _ids(products)
    if any(id(param) in lost for group in groups for param in group["params"]):
        warnings.warn(
            f"factors of other products, for which this {type(optimizer).__name__} was wrapped "
            "before, do not decay from now on: wrap it for all products together",
            stacklevel=3,
        )
    held = [one for one in layout if any(one.flags)]
    if held and all(one.taken and is_zero(one.coef) for one in held):
        warnings.warn(
            "no product will decay: λ is taken over from the factors' weight_decay, which in this "
            f"{type(optimizer).__name__} is 0; build it with weight_decay=λ, or pass decay=λ to "
            "FrobeniusDecay (decay=0, if that is meant)",
            stacklevel=3,
        )
    return layout


def _ids(products: Sequence[Product]) -> set[int]:
    return {id(param) for product in products for param in product.params}


def plan_groups(
    optimizer: Optimizer,
    groups: Sequence[Group],
    products: Sequence[Product],
    decay: Coefficient | None,
    mode: str,
    first: int = 0,
) -> list[Division]:
    """Plan the division of groups, the first of which has the index ``first``."""
    factors, layout = _ids(products), []
    again = bool(decayed_before(optimizer))
    for k, group in enumerate(groups, first):
        where = f"param group {k}"
        division = plan_division(group, lambda param: id(param) in factors, decay, where, again)
        if division.split and (reason := refusal_of_division(optimizer)):
            raise ValueError(
                f"expected only factors, or none, in {where} of {type(optimizer).__name__}, got "
                f"both: {reason}"
            )
        if any(division.flags):
            _check_group(optimizer, group, division, mode, where)
            _check_coverage(products, group)
        layout.append(division)
    return layout


def _check_coverage(products: Sequence[Product], group: Group) -> None:
    """Refuse to take the weight decay from a parameter that is a factor only in part."""
    parts: dict[tuple[int, object], tuple[str, Tensor, int]] = {}
    for product in products:
        for j, factor in enumerate(product.factors):
            param = factor.param
            name, size = factor_name(product, j), factor.outline().numel()
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
    if kind == "decoupled" and group.get("lr") is None:
        raise ValueError(
            f"expected an 'lr' in {where} of {type(optimizer).__name__} for mode='decoupled' "
            "(the decay is lr·λ·gradient), got none; use mode='coupled'"
        )
    reason = refusal_of_decoupled(optimizer) if kind == "decoupled" else None
    if reason is not None:
        raise ValueError(
            f"expected mode='coupled' for {type(optimizer).__name__}, got decoupled decay: {reason}"
        )
    if group.get("differentiable") and not is_zero(division.coef):
        raise ValueError(
            f"expected differentiable=False in {where}, got True: the decay is not recorded by "
            "autograd; add frobdecay.penalty(products, coef) to the loss, or pass decay=0"
        )
