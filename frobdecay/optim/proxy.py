"""OptimizerProxy: an ``Optimizer`` in front of another, without groups or state of its own.

``param_groups``, ``state`` and ``defaults`` are the other optimizer's own objects, looked up at
every access because ``load_state_dict`` replaces them. Hooks registered on the proxy run once
around its methods and are given the proxy; those of the other optimizer, and the global ones, run
once inside that optimizer's methods.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from frobdecay.optim.rates import DECAY, is_zero
from frobdecay.product.product import Product

_HOOKS = [name for name in Optimizer.__annotations__ if name.endswith("_hooks")]


class _Bypass:
    """A hook of the step behind, which warns where that is called past the proxy.

    Attributes:
        expected: whether the proxy is calling.
        products: those that the last proxy decays, in the list that it keeps current. Parameters
            themselves are not referred to: torch can swap none that has a weak reference.
    """

    def __init__(self) -> None:
        self.expected, self._warned = False, False
        self.products: Sequence[Product] = []

    @classmethod
    def of(cls, optimizer: Optimizer) -> _Bypass:
        """The one of an optimizer, which several proxies may have had."""
        hooks = optimizer.__dict__.setdefault("_optimizer_step_pre_hooks", OrderedDict())
        found = next((hook for hook in hooks.values() if isinstance(hook, cls)), None)
        if found is None:
            found = cls()
            hooks[id(found)] = found  # not by torch's method: Lookahead's is a plain dict
        return found

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Warn, once, unless nothing would have decayed."""
        if self.expected or torch.compiler.is_compiling() or self._warned:
            return
        for group in optimizer.param_groups:
            if not is_zero(group.get(DECAY, 0.0)) and not is_zero(group.get("lr", 1.0)):
                self._warned = True
                warnings.warn(
                    f"a {type(optimizer).__name__} was stepped that a FrobeniusDecay was put "
                    "around: its products do not decay so, and have no other weight decay; call "
                    "step() of the FrobeniusDecay, and give that to schedulers and trainers",
                    stacklevel=3,
                )
                return


def decayed_before(optimizer: Optimizer) -> set[int]:
    """Ids of the parameters that a proxy around an optimizer has decayed; none without a proxy."""
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks", {}).values()
    held = (one for hook in hooks if isinstance(hook, _Bypass) for one in hook.products)
    factors = (factor for product in held for factor in product.factors)
    return {id(getattr(factor.owner, factor.attribute, None)) for factor in factors}


def _behind(name: str) -> Any:
    """An attribute that is the other optimizer's own."""

    def write(proxy: OptimizerProxy, value: Any) -> None:
        setattr(proxy._base, name, value)

    def delete(proxy: OptimizerProxy) -> None:
        delattr(proxy._base, name)

    return property(attrgetter(f"_base.{name}"), write, delete, f"{name} of the optimizer behind.")


class OptimizerProxy(Optimizer):
    """Stand in front of an optimizer.

    A subclass says what it does by ``_step``, ``_state_dict`` and ``_load_state_dict``.

    Args:
        optimizer: the optimizer behind.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ is not called: it would make groups and state of its own, and patch a
        # second chain of hooks around the one in the other optimizer's step.
        self._base = optimizer
        for name in _HOOKS:
            setattr(self, name, OrderedDict())
        self._bypass = _Bypass.of(optimizer)

    def _step_behind(self, closure: Callable[[], Any] | None) -> Any:
        """Perform a step of the optimizer behind."""
        self._bypass.expected = True
        try:
            return self._base.step() if closure is None else self._base.step(closure)
        finally:
            self._bypass.expected = False

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        raise NotImplementedError

    def _state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        # Who looks behind, at .optimizer, as Lightning's LearningRateMonitor does, has to see that
        # it is not another optimizer.
        return self is other or (other is not None and other is self.__dict__.get("_base"))

    def __hash__(self) -> int:
        return hash(self.__dict__.get("_base"))

    # --- the other optimizer's own objects ------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer behind."""
        return self._base

    param_groups: list[dict[str, Any]] = _behind("param_groups")
    state: defaultdict[Tensor, Any] = _behind("state")
    defaults: dict[str, Any] = _behind("defaults")
    grad_scale: Tensor | None = _behind("grad_scale")  # of GradScaler, for steps that unscale
    found_inf: Tensor | None = _behind("found_inf")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``GradScaler`` leaves unscaling to the step, as for torch's fused optimizers."""
        return bool(getattr(self._base, "_step_supports_amp_scaling", False))

    def __getattr__(self, name: str) -> Any:
        # Schedule-free optimizers have train() and eval(); callers ask with hasattr.
        base = self.__dict__.get("_base")
        if name in ("train", "eval") and base is not None:
            return getattr(base, name)
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        if base is not None and not name.startswith("_") and hasattr(base, name):
            message += (
                f"; the {type(base).__name__} behind has it, as .optimizer.{name}, but what is "
                f"done there goes past this {type(self).__name__}"
            )
        raise AttributeError(message)

    def _patch_step_function(self) -> None:
        """Do nothing: the step behind has torch's chain of hooks, a second would double it."""

    # --- hooks ----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the optimizer behind returns.
        """
        if not (self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks):
            return self._step(closure)
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for pre_hook in self._optimizer_step_pre_hooks.values():
            changed = pre_hook(self, args, kwargs)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(
                        f"expected a step pre-hook to return None or (args, kwargs), got {changed}"
                    )
                args, kwargs = changed
        result = self._step(*args[1:], **kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return result

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of plain containers, numbers and tensors."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Args:
            state_dict: is not changed.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else dict(changed)
        self._load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters.

        Args:
            set_to_none: drop them instead of filling them with zeros.
        """
        self._base.zero_grad(set_to_none)
