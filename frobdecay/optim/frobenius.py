"""FrobeniusDecay: any ``torch.optim`` optimizer, decaying products instead of factors.

coupled      p.grad += λ · ∇_p ½‖W‖_F²        SGD, Adam, RMSprop, …   (Khodak et al., 2021)
decoupled    p −= lr · λ · ∇_p ½‖W‖_F²        AdamW, Muon, Adafactor, …
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from frobdecay.algebra.precision import Coefficient
from frobdecay.optim.checks import (
    check_arguments,
    find_products,
    plan_groups,
    plan_wrapping,
)
from frobdecay.optim.conventions import (
    convention,
    ignores_the_loss,
    is_plain_descent,
    reads_the_parameter,
)
from frobdecay.optim.decaying import Decay, PenalizedClosure
from frobdecay.optim.division import Halves, adapt_plain, is_plain, keep_bounds, tensors_of
from frobdecay.optim.proxy import OptimizerProxy
from frobdecay.optim.rates import BOUND, DECAY, Group, Rate, asked, is_dummy_step, known_value
from frobdecay.optim.stability import Watch
from frobdecay.product.product import Product

Mode = Literal["coupled", "decoupled", "auto"]

_Closure = Callable[[], Any] | None
_KEY = "frobdecay"  # ours in the state dict


class FrobeniusDecay(OptimizerProxy):
    r"""Wrap an optimizer so that it decays the products of factors instead of each factor.

    Examples:
        >>> import torch, frobdecay
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> plan = frobdecay.factorize(model, rank=4)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> optimizer = FrobeniusDecay(base, model)
        >>> [(g["weight_decay"], g["frobenius_decay"]) for g in optimizer.param_groups]
        [(0.0001, 0.0), (0.0, 0.0001)]
        >>> model(torch.randn(8, 32)).square().mean().backward()
        >>> optimizer.step()

    Adds λ·∇½‖W‖_F² for every product W where the base optimizer would add its weight decay:
    after accumulation, unscaling and clipping, to those factors that have a gradient. With λ = 0
    it is the base optimizer, bit for bit.

    **The coefficient** is the one you had: with ``decay=None`` the factors' ``weight_decay`` is
    taken over. They get param groups of their own, with ``weight_decay=0`` and the value under
    the key ``"frobenius_decay"``, where it can be scheduled like any option. Wrap first, build
    the learning-rate scheduler on the wrapper. A group that has a weight decay and holds factors
    beside others becomes two, the factors second: give schedulers as many values, and write
    options to both, not to ``param_groups[-1]``; or divide them yourself, ``split_param_groups``.

    **Precision**: Grams of half-precision factors are accumulated in float32 (TF32 follows
    torch's own global setting). Decoupled decay of half-precision parameters is computed in
    float32 and rounded stochastically, so that it acts in expectation although single steps are
    far below the parameters' resolution; from generators of the wrapper's own, whose state is in
    ``state_dict()`` under ``"frobdecay"``.

    **Closures** are evaluated as the base pleases; the penalty's gradient is added after every
    evaluation, and a base that reads the loss (a line search) reads loss + penalty. The caller
    gets his own loss. **Hooks** of the wrapper run before the decay is added (clip there); those
    of the base optimizer and the global ones run after it, inside the base's step.

    **A bounded step**: with ``bound=β`` no step moves a product by more than β·lr in the spectral
    norm, ‖ΔW‖₂ ≤ β·lr, whatever the base proposes: of what it has done, with the decoupled decay,
    all factors of a product keep the same share, found from their norms; see
    ``optim/spectral/bound.py`` for the inequality. β is the option ``"step_bound"`` of the factors'
    groups. For chains of matrices, for each head by itself; costs a copy of the factors during
    the step, at its end as much for what they moved by, and nothing is kept from one step to the
    next. A step too large to be measured, of about 10¹⁹ in float32, is left out. Of half-precision
    parameters the bound holds before they are rounded.

    Args:
        optimizer: any ``torch.optim.Optimizer``, built after the model was factorized.
        model_or_products: the factorized model, or the products that this optimizer trains.
        decay: λ for all factors, a number or a tensor without dimensions; None takes over their
            weight decay, with a warning if that is 0.
        mode: ``"coupled"``, ``"decoupled"``, or ``"auto"`` for what the base does itself.
        bound: β, the largest ‖ΔW‖₂ of a step in units of lr; None for none.
        backend: a name in ``frobdecay.gradient.backends.BACKENDS``; None chooses by cost.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or λ or β no number.
        ValueError: λ negative or not finite, β not positive; a wrapper inside; a scheduler attached
            already; a model without products; a trainable factor in no param group or in two; no
            weight decay to take over, or a convention that cannot be known; a step that cannot be
            bounded. Nothing was changed then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model_or_products: nn.Module | Product | Iterable[Product],
        *,
        decay: Coefficient | None = None,
        mode: Mode = "auto",
        bound: Coefficient | None = None,
        backend: str | None = None,
    ) -> None:
        check_arguments(optimizer, decay, mode, bound)
        found = find_products(model_or_products)
        engine = Decay(found, backend)
        layout = plan_wrapping(optimizer, found.products, found.model, decay, mode)
        if bound is not None:
            engine.check_bound(optimizer.param_groups)
        pairs = zip(layout, optimizer.param_groups, strict=True)
        parts = [division.commit(whole, bound) for division, whole in pairs]
        optimizer.param_groups[:] = [group for part in parts for group in part]
        super().__init__(optimizer)
        self._engine, self._bypass.products = engine, engine.products
        self._mode: Mode = mode
        self._decay, self._bound = decay, bound
        self._layout = layout
        self._watch = Watch()
        self._halves = Halves((part[0], part[1]) for part in parts if len(part) == 2)

    @property
    def products(self) -> list[Product]:
        """The products that decay."""
        return list(self._engine.products)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of stochastic rounding, one a device that has rounded.

        A CUDA graph that captures a step has to know them, after a step that warms up:
        ``graph.register_generator_state(generator)`` for each, before the capture.
        """
        return self._engine.rounder.generators

    def __repr__(self) -> str:
        factors = {id(param) for product in self._engine.products for param in product.params}
        kinds = {
            "decoupled" if self._is_decoupled(group) else "coupled"
            for group in self.param_groups
            if any(id(param) in factors for param in group["params"])
        }
        mode = f"auto ({', '.join(sorted(kinds))})" if self._mode == "auto" else self._mode
        count = len(self._engine.products)
        return f"{type(self).__name__} (\nmode: {mode}\nproducts: {count}\n{self._base!r}\n)"

    # --- the step -------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Decay the products and perform a step of the base optimizer.

        Args:
            closure: reevaluates the model and returns the loss; the base decides how often.

        Returns:
            What the base optimizer returns; of a closure, the caller's own loss.

        Raises:
            RuntimeError: factors that the optimizer does not hold, or that also have a weight
                decay.
            ValueError: λ negative or NaN; weights factorized or merged after wrapping.
            TypeError: sparse gradients.
        """
        return super().step(closure)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        given, late = self._before(closure)
        return self._after(given, late, self._step_behind(given))

    @_disable_dynamo  # torch.compile compiles the base's step, not this bookkeeping
    def _before(self, closure: _Closure) -> tuple[_Closure, list[Any]]:
        """The closure for the base's update, and what is to be applied after it."""
        self._engine.notice(self.param_groups)
        rates, limits = self._asked()
        engine, late = self._engine, list[Any]()
        bound = engine.bound(limits) if any(limit is not None for limit in limits) else None
        if any(rate is not None for rate in rates):
            self._watch.look(engine.products, lambda: engine.of_products(self._sizes(rates)))
            closure, late = self._add_decay(closure, rates, bound)
        if bound is not None:
            bound.measure()
            late.append(bound)
        return closure, late

    @torch.no_grad()
    def _add_decay(
        self, closure: _Closure, rates: list[Rate | None], bound: Any
    ) -> tuple[_Closure, list[Any]]:
        engine, late = self._engine, list[Any]()
        if closure is not None or reads_the_parameter(self._base):
            late.append(engine.increments(rates))
            rates = [None if rate is None or rate.decoupled else rate for rate in rates]
        if closure is None:
            engine.add(rates, bound)
            return None, late
        is_read = not ignores_the_loss(self._base)

        def add() -> Tensor | None:
            engine.find(self.param_groups)  # the closure may have changed what it liked
            value = engine.value(rates) if is_read else None
            engine.add(rates)
            return value

        return PenalizedClosure(closure, add), late

    @_disable_dynamo
    def _after(self, closure: _Closure, late: list[Any], result: Any) -> Any:
        for one in late:
            one.apply(self._engine.rounder)
        return closure.users_loss(result) if isinstance(closure, PenalizedClosure) else result

    def _asked(self) -> tuple[list[Rate | None], list[Coefficient | None]]:
        """What every group's options ask for in this step, and how far it may go; None: nothing."""
        groups = self.param_groups
        if is_dummy_step(self):
            return [None] * len(groups), [None] * len(groups)
        holding = self._engine.find(groups)
        self._halves.check(groups, holding)
        amp = [getattr(self._base, name, None) for name in ("grad_scale", "found_inf")]
        return asked(groups, holding, self._is_decoupled, *amp)

    def _sizes(self, rates: list[Rate | None]) -> list[Coefficient | None]:
        """lr·λ of every group, where that is what a step of decay multiplies gradients by."""
        plain = is_plain_descent(self._base)
        return [
            known_value(group["lr"]) * known_value(group[DECAY])
            if rate is not None and (rate.decoupled or plain)
            else None
            for group, rate in zip(self.param_groups, rates, strict=True)
        ]

    def _is_decoupled(self, group: Group) -> bool:
        kind = convention(self._base, group) if self._mode == "auto" else self._mode
        return kind == "decoupled"

    # --- groups, checkpoints, copies ------------------------------------------------------------

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, or two: factors get their own where there is a weight decay.

        Args:
            param_group: as for the base optimizer. λ of its factors is its
                ``"frobenius_decay"``, else the ``decay`` given at construction, else its weight
                decay.

        Raises:
            ValueError: λ negative or not finite, or what the base refuses.
        """
        products, index = self._engine.found.now(), len(self.param_groups)
        probe = {**self.defaults, **param_group, "params": tensors_of(param_group)}
        decay = probe.get(DECAY, self._decay)
        (division,) = plan_groups(self._base, [probe], products, decay, self._mode, index)
        self._base.add_param_group(param_group)
        whole = self.param_groups[index]
        self.param_groups[index:] = division.commit(whole, whole.get(BOUND, self._bound))
        self._layout.append(division)
        self._engine.adopt(products)

    def _state_dict(self) -> dict[str, Any]:
        return {**self._base.state_dict(), _KEY: self._engine.state_dict()}

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapper, or of the base optimizer before it was wrapped.

        Of a plain base checkpoint, the groups are divided as the base's were, and a weight decay
        that was taken over becomes λ again.

        Args:
            state_dict: what ``state_dict()`` returned; is not changed.

        Raises:
            ValueError: of another model, or of another version of frobdecay, or of products that
                decay toward something else. Nothing was changed.
        """
        super().load_state_dict(state_dict)

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ours, saved = state_dict.pop(_KEY, None), state_dict.get("param_groups")
        load_ours = self._engine.loading(ours)
        if saved is None and ours is None:
            raise ValueError(
                f"expected 'param_groups' in the checkpoint, got {sorted(map(str, state_dict))}: "
                f"it is of a {type(self._base).__name__} that was not wrapped, laid out its own way"
            )
        if saved is not None and is_plain(saved):
            saved = adapt_plain(saved, self._layout, self.param_groups)
        if saved is not None:
            state_dict["param_groups"] = keep_bounds(saved, self.param_groups)
        self._base.load_state_dict(state_dict)
        load_ours()

    def __getstate__(self) -> dict[str, Any]:
        # As with torch's optimizers, hooks and what a scheduler attached here stay behind.
        names = ("_base", "_engine", "_mode", "_decay", "_bound", "_layout")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__(state["_base"])
        self.__dict__.update(state)
        self._bypass.products = self._engine.products
        self._watch, self._halves = Watch(), Halves()
