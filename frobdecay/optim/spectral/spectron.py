r"""Spectron: orthogonalized momentum of factors, with a rate that bounds the step of the product.

The rule of Janson, Oyallon & Belilovsky, "Stabilizing Native Low-Rank LLM Pretraining" (2026,
arXiv:2602.12429). Of W = U Vᵀ, with momentum M of each factor's gradient,

    U ← U − ρ NS(M_U),   V ← V − ρ NS(M_V),   ρ = η / (‖U‖₂ + ‖V‖₂ + 1),

where NS takes the singular values of M to about 1, as Muon does (Jordan et al. 2024; its Newton–
Schulz polynomial, whose values are between 0.7 and 1.2). Were they 1, ‖ΔW‖₂ would be at most
ρ(‖U‖ + ‖V‖ + ρ) ≤ η for ρ ≤ 1. Of longer chains the divisor is Π(‖C_k‖ + 1) − Π‖C_k‖, by the same
inequality, which for a pair is ‖U‖ + ‖V‖ + 1.

What is done otherwise than elsewhere does not change the rule: ‖·‖₂ comes from the Gram, from
above (``norms_above``), where others keep a vector for a power iteration; and NS(M) = M p(MᵀM) is
found as a polynomial of the Gram, r×r, so that it reads M twice and not ten times, runs over all
factors of one rank at once, and of sharded factors sends their Grams alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frobdecay.algebra.precision import HALF, Coefficient, check_coefficient, full_precision
from frobdecay.gradient.accumulate import Accumulator
from frobdecay.gradient.flat import stacked
from frobdecay.gradient.movement import norms_of
from frobdecay.gradient.placement import part_of
from frobdecay.optim.checks import find_products
from frobdecay.optim.rates import Group, is_zero, known_value
from frobdecay.optim.spectral.bound import check_bounded, reach
from frobdecay.product.product import Product

_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024, those of torch.optim.Muon


def orthogonalizers(grams: Tensor, steps: int = 5) -> Tensor:
    """p(G) of matrices M with these Grams, so that the singular values of M p(G) are about 1.

    Args:
        grams: (..., r, r), float32 or better.
        steps: of the iteration X ← X (a + b XᵀX + c (XᵀX)²), which begins with M / ‖M‖_F.

    Returns:
        (..., r, r); of zeros finite, and 0 where the Gram of a finite M overflowed.

    Examples:
        >>> import torch
        >>> M = torch.linalg.qr(torch.randn(9, 3))[0] * torch.tensor([3.0, 2.0, 0.5])
        >>> sizes = torch.linalg.svdvals(M @ orthogonalizers(M.T @ M))
        >>> bool(sizes.min() > 0.6), bool(sizes.max() < 1.3)
        (True, True)
    """
    a, b, c = _COEFFICIENTS
    eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    square = grams.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]  # ‖M‖_F²
    square = square.clamp_min(torch.finfo(grams.dtype).tiny ** 0.5)
    # Infinite are squares of more than about 10¹⁹: such a step is left out, as 1/∞ is 0.
    gram = torch.where(square.isinf(), 0.0, grams / square)
    found = square.rsqrt() * eye
    for _ in range(steps):
        step = a * eye + b * gram + c * (gram @ gram)
        found = found @ step
        gram = step @ gram @ step
        gram = (gram + gram.mT) / 2
    return found


class Spectron(Optimizer):
    r"""Train the factors of products by Spectron's rule; see ``frobdecay.optim.spectral.spectron``.

    Examples:
        >>> import torch, frobdecay
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 10))
        >>> plan = frobdecay.factorize(model, rank=4)
        >>> optimizer = Spectron(model, lr=0.1)
        >>> factors = {param for group in optimizer.param_groups for param in group["params"]}
        >>> others = torch.optim.AdamW([p for p in model.parameters() if p not in factors])
        >>> model(torch.randn(8, 32)).square().mean().backward()
        >>> optimizer.step(), others.step()
        (None, None)

    Everything that is no factor (biases, norms, embeddings) is for another optimizer. It is one
    that ``FrobeniusDecay`` wraps, for decay of the product and, with ``bound=1``, for a bound that
    also holds where the orthogonalization is not exact.

    Args:
        model_or_products: the factorized model, or products: chains of matrices, head by head.
        lr: η, about the largest ‖ΔW‖₂ of a step; a number or a tensor.
        momentum: of the gradients' running mean.
        nesterov: whether a step looks ahead, as Muon's.
        weight_decay: of every factor, decoupled: lr·weight_decay of it is taken away.
        ns_steps: steps of the orthogonalization.
        backend: a name in ``frobdecay.gradient.backends.BACKENDS``; None chooses by cost.

    Raises:
        ValueError: an option out of its range; a model without products; a product that is no
            chain of matrices; a parameter that is a factor more than once.
        TypeError: factors in half precision, which steps are too small for.
    """

    why_undivided = "it steps in one: wrap it for all of its products, or with weight_decay=0"

    def __init__(
        self,
        model_or_products: nn.Module | Product | Iterable[Product],
        *,
        lr: Coefficient = 0.1,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: Coefficient = 0.0,
        ns_steps: int = 5,
        backend: str | None = None,
    ) -> None:
        found = find_products(model_or_products).products
        check_bounded(found, "leave it to another optimizer, give Spectron the other products")
        self._engine = Accumulator(found, backend)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "decoupled_weight_decay": True,
        }
        _check(defaults)
        _check_dtypes(found)
        # Frozen ones too: they train once they have gradients.
        params = {id(p): p for product in found for p in product.params}
        super().__init__(params.values(), defaults)

    @property
    def products(self) -> list[Product]:
        """The products whose factors are trained."""
        return list(self._engine.products)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse any group but that of the factors.

        Raises:
            ValueError: there is one already.
        """
        if self.param_groups:
            raise ValueError(
                "expected the factors of the products given at construction alone, got another "
                "param group: make a Spectron for other products, another optimizer for the rest"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: an option out of its range. Nothing was changed then.
            TypeError: factors that are in half precision by now. Nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        _check(group)
        engine = self._engine
        params = engine.refresh()
        if any(param.dtype in HALF for param in params):
            _check_dtypes(engine.products)
        momenta = self._momenta(group)
        like = [momenta.get(id(param), param) for param in params]
        held, seen = engine.held(), engine.seen(like)
        moves = [id(param) in momenta for param in params]
        moving = [k for k, has in enumerate(moves) if has]
        norms = norms_of(engine.grams(dict(enumerate(held))), range(len(params)))
        rates = self._rates(norms, moves, group)
        grams = engine.grams({k: seen[k] for k in moving})
        with full_precision(params[0].device.type):
            polynomials = stacked(
                partial(orthogonalizers, steps=group["ns_steps"]), {k: grams[k] for k in moving}
            )
            updates = {k: engine.times(k, like[k], polynomials[k]) for k in moving}
        keep = 1 - known_value(group["lr"]) * known_value(group["weight_decay"])
        for k, update in updates.items():
            if not is_zero(group["weight_decay"]):  # of this factor, not of what lies beside it
                held[k].mul_(engine.spread(k, torch.ones_like(rates[k]) * keep, update))
            held[k].sub_(update.mul_(engine.spread(k, rates[k], update)))
        return loss

    def _momenta(self, group: Group) -> dict[int, Tensor]:
        """Take the gradients in, and return what is to be orthogonalized, by parameter."""
        found = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param, requires_grad=False)
            buffer, grad = state["momentum_buffer"], param.grad
            part_of(buffer).lerp_(part_of(grad), 1 - group["momentum"])
            ahead = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
            found[id(param)] = ahead
        return found

    def _rates(self, norms: dict[int, Tensor], moving: list[bool], group: Group) -> list[Tensor]:
        """ρ of every factor, (*batch): those of one product have the same."""
        engine, each = self._engine, [norms[k] for k in range(len(moving))]
        rows = zip(engine.products, engine.rows(each), engine.rows(moving), strict=True)
        found: list[Tensor] = []
        for product, sizes, moves in rows:
            one = torch.ones_like(sizes[0])
            linear, rest = reach([sizes], [[one if moved else None for moved in moves]])
            lr = known_value(group["lr"]) / abs(product.scale)
            found += [lr / (linear + rest)[0]] * len(sizes)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engine": self._engine}


def _check(group: Group) -> None:
    """Refuse options that a user, a checkpoint or a schedule may have brought."""
    for name in ("lr", "weight_decay"):
        check_coefficient(known_value(group[name]), f"{name} of Spectron")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"expected momentum in [0, 1), got {group['momentum']!r}")
    if not isinstance(group["ns_steps"], int) or group["ns_steps"] < 1:
        raise ValueError(f"expected ns_steps to be 1 or more, got {group['ns_steps']!r}")


def _check_dtypes(products: Iterable[Product]) -> None:
    """Refuse factors in half precision, by the name of the product."""
    for product in products:
        if half := [param.dtype for param in product.params if param.dtype in HALF]:
            raise TypeError(
                f"{product.name}: expected factors in float32 or float64, got {half[0]}: a step is "
                "near the resolution of half precision; keep the parameters in float32 and compute "
                "under autocast"
            )
