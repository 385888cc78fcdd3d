r"""Flambe: LAMB whose decay term is that of the product where a parameter is a factor.

LAMB (You et al., ICLR 2020, arXiv:1904.00962, algorithm 2, φ(z) = z) scales every tensor's step
to the tensor's own norm. For each parameter w with gradient g, at step t,

    m = β₁ m + (1 − β₁) g              m̂ = m / (1 − β₁ᵗ)
    v = β₂ v + (1 − β₂) g²             v̂ = v / (1 − β₂ᵗ)
    u = m̂ / (√v̂ + ε) + λ d             w ← w − lr · ‖w‖/‖u‖ · u

where d = w in LAMB, and in Flambe d = ∇_w ½‖W‖_F² if w is a factor of the product W. Where ‖w‖ or
‖u‖ is zero the ratio is 1. Khodak et al. (ICLR 2021, arXiv:2105.01029) name an optimizer FLAMBe,
LAMB with Frobenius decay, but the code was not released, and this equation is frobdecay's reading:
λ and the place of the decay, inside of the trust ratio, are LAMB's, only the direction is the
product's. ``FrobeniusDecay`` around a LAMB of another package decays outside of the ratio.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frobdecay.algebra.precision import HALF, Coefficient, check_coefficient
from frobdecay.algebra.scaling import shortened
from frobdecay.optim.checks import Found, check_membership, find_products, plan_groups
from frobdecay.optim.conventions import refuse
from frobdecay.optim.decaying import Decay
from frobdecay.optim.rates import DECAY, Group, Rate, is_zero, known_value
from frobdecay.optim.rounding import Increments
from frobdecay.product.factor import is_sharded
from frobdecay.product.product import Product

_KEY = "frobdecay"  # ours in the state dict
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Flambe(Optimizer):
    r"""LAMB with Frobenius decay inside of the trust ratio; see the module's docstring.

    Examples:
        >>> import torch, frobdecay
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 10))
        >>> plan = frobdecay.factorize(model, rank=4)
        >>> optimizer = Flambe(model.parameters(), model, lr=1e-2, weight_decay=0.01)
        >>> model(torch.randn(8, 32)).square().mean().backward()
        >>> optimizer.step()

    λ is ``weight_decay``, for factors and all others alike, or of a param group's factors its
    ``"frobenius_decay"`` where it has that key. Without products it is plain LAMB. There is no
    clipping by the global norm before the moments and no bound on the ratio, which other LAMBs
    have. Parameters in half precision have moments in float32, and are rounded stochastically:
    single steps are below their resolution.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        model_or_products: the factorized model, or the products that this optimizer trains; None
            for plain LAMB.
        lr: learning rate, the relative size of each tensor's step; a number or a tensor.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        bias_correction: m̂ and v̂ as above; without it m and v, as in the paper's version 3.
        maximize: climb instead of descend; decay still shrinks.
        backend: a name in ``frobdecay.gradient.backends.BACKENDS``; None chooses by cost.

    Raises:
        ValueError: an option out of its range; a model without products; a trainable factor in no
            param group or in two.
    """

    def __init__(
        self,
        params: Any,
        model_or_products: nn.Module | Product | Iterable[Product] | None = None,
        *,
        lr: Coefficient = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: Coefficient = 0.01,
        bias_correction: bool = True,
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        found = Found([]) if model_or_products is None else find_products(model_or_products)
        self._engine = Decay(found, backend)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        check_membership(found.products, self.param_groups, found.model)

    @property
    def products(self) -> list[Product]:
        """The products that decay."""
        return list(self._engine.products)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group.

        Args:
            param_group: as for any torch optimizer; ``"frobenius_decay"`` is λ of its factors in
                place of ``"weight_decay"``.

        Raises:
            ValueError: an option out of its range.
        """
        where = f"param group {len(self.param_groups)}"
        _check_options({**self.defaults, **param_group}, where)
        super().add_param_group(param_group)
        try:
            index, added = len(self.param_groups) - 1, self.param_groups[-1:]
            plan_groups(self, added, self.products, None, "decoupled", index)
        except Exception:
            del self.param_groups[-1]
            raise

    # --- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: factors that the optimizer does not hold.
            ValueError: λ negative or NaN; weights factorized or merged since construction.
            TypeError: sparse, complex or sharded parameters or gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._engine.notice(self.param_groups)
        for k, group in enumerate(self.param_groups):
            _check_options(group, f"param group {k}")
            for param in group["params"]:
                _check_supported(param, f"param group {k}")
        decays = self._decays()
        for group in self.param_groups:
            alike: dict[object, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    alike[param.device, param.dtype].append(param)
            for params in alike.values():
                self._update(group, params, decays)
        return loss

    def _decays(self) -> dict[int, Tensor]:
        """λ·∇½‖W‖² of the factors as they are now, by the id of the parameter."""
        engine = self._engine
        if not engine.products:
            return {}
        holding = engine.find(self.param_groups)
        rates: list[Rate | None] = []
        for k, group in enumerate(self.param_groups):
            coef = known_value(group.get(DECAY, group["weight_decay"]))
            idle = k not in holding or is_zero(coef)
            rates.append(None if idle else Rate(decoupled=True, coef=coef))
        increments: Increments = engine.increments(rates)
        factors = [param for product in engine.products for param in product.params]
        return dict(zip(map(id, factors), increments.of(factors), strict=True))

    def _update(self, group: Group, params: Sequence[Tensor], decays: dict[int, Tensor]) -> None:
        """One step of parameters of one device and dtype."""
        half = params[0].dtype in HALF
        work = torch.float32 if half else params[0].dtype
        states = [self._state_of(param, work) for param in params]
        for state in states:
            state["step"] += 1
        weights = [param.to(work) for param in params]
        updates = _adam(
            [param.grad.to(work) for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [float(state["step"]) for state in states],
            group,
        )
        own = [k for k, param in enumerate(params) if id(param) in decays]
        others = [k for k, param in enumerate(params) if id(param) not in decays]
        coef = known_value(group["weight_decay"])
        if own:
            torch._foreach_add_([updates[k] for k in own], [decays[id(params[k])] for k in own])
        if others and not is_zero(coef):
            scaled = torch._foreach_mul([weights[k] for k in others], coef)
            torch._foreach_add_([updates[k] for k in others], scaled)
        ratios = -known_value(group["lr"]) * _trust_ratios(weights, updates)
        torch._foreach_mul_(updates, list(ratios.unbind()))
        if half:
            self._engine.rounder.add_(params, updates)
        else:
            torch._foreach_add_(list(params), updates)

    def _state_of(self, param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return state

    # --- checkpoints, copies --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's, and under ``"frobdecay"`` rounding and what products decay toward."""
        return {**super().state_dict(), _KEY: self._engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or the state of a LAMB with the same keys.

        Args:
            state_dict: is not changed.

        Raises:
            ValueError: of another model, or of another version of frobdecay, or of products that
                decay toward something else. Nothing was changed.
        """
        load_ours = self._engine.loading(state_dict.get(_KEY))
        super().load_state_dict({k: v for k, v in state_dict.items() if k != _KEY})
        load_ours()
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved, params, strict=True):
            if param.dtype in HALF and key in state_dict["state"]:  # torch has cast them to half
                for moment in _MOMENTS:
                    exact = state_dict["state"][key][moment]
                    self.state[param][moment] = exact.to(param.device, torch.float32, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engine": self._engine}


def _adam(
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: Sequence[float],
    group: Group,
) -> list[Tensor]:
    """Update the moments in place and return m̂ / (√v̂ + ε)."""
    beta1, beta2 = group["betas"]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    corrected = group["bias_correction"]
    roots = list(torch._foreach_sqrt(squares))
    if corrected:
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(roots, group["eps"])
    updates = list(torch._foreach_div(means, roots))
    if corrected:
        torch._foreach_div_(updates, [1 - beta1**step for step in steps])
    return updates


def _trust_ratios(weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    """‖w‖/‖u‖ for each tensor, 1 where one of them is zero."""
    own, new = (
        torch.stack(list(torch._foreach_norm([shortened(tensor) for tensor in tensors])))
        for tensors in (weights, updates)
    )
    return torch.where((own > 0) & (new > 0), own / new, 1.0)


def _check_options(group: Group, where: str) -> None:
    """Refuse options that a user, a checkpoint or a schedule may have brought."""
    for name in ("lr", "eps", "weight_decay", DECAY):
        if name in group:
            check_coefficient(known_value(group[name]), f"{name} of {where}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"expected betas of {where} in [0, 1), got {group['betas']}")


def _check_supported(param: Tensor, where: str) -> None:
    grad = param.grad
    if param.is_complex() or is_sharded(param):
        what = "sharded" if is_sharded(param) else "complex"
        raise TypeError(
            f"{where}: expected whole real parameters, got a {what} one {tuple(param.shape)}: the "
            "trust ratio is not defined for it here; use FrobeniusDecay around another optimizer"
        )
    if grad is not None and grad.layout != torch.strided:
        raise TypeError(
            f"{where}: expected dense gradients, got {grad.layout} for a parameter "
            f"{tuple(param.shape)}; make the layer's gradients dense (sparse=False)"
        )


refuse(Flambe, "it decays products itself: give them to it, and use it as it is")
