r"""A step bounded in the product: what any optimizer proposes, scaled until ‖ΔW‖₂ is small enough.

Of W = C₁ C₂ … with steps s·ΔC_k, every term of ΔW but W itself is a product of norms at most,

    ‖ΔW‖₂ ≤ Π(‖C_k‖ + s‖ΔC_k‖) − Π‖C_k‖,        of a pair s(‖ΔU‖‖V‖ + ‖U‖‖ΔV‖) + s²‖ΔU‖‖ΔV‖,

by the triangle inequality and ‖AB‖ ≤ ‖A‖‖B‖ for spectral norms. With a₁ what is linear in s and a₂
the rest at s = 1, it is at most a₁s + a₂s² for 0 ≤ s ≤ 1 (equal for a pair), so that

    s = min(1, 2b / (a₁ + √(a₁² + 4a₂b)))

keeps it within b. One s scales all factors of a product: the direction of the step stays as it
is, and a step that is small enough is not touched. Janson, Oyallon & Belilovsky (2026,
arXiv:2602.12429) bound a pair's step so where both updates are orthogonal and equally long; here
they are measured. The norms come from Grams and from above (``norms_above``), and b is in units
of the learning rate. What is written is C + sΔC, from the copy of C, however much longer ΔC is
than C. Where a finite ΔC is too large for its Gram, s is 0: the step is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from frobdecay.algebra.network import Network
from frobdecay.algebra.precision import HALF, Coefficient
from frobdecay.gradient.accumulate import Accumulator
from frobdecay.gradient.bucketed import Grams, together
from frobdecay.gradient.flat import Batched
from frobdecay.gradient.movement import Movement, norms_of
from frobdecay.optim.rates import BOUND
from frobdecay.optim.rounding import StochasticRounder
from frobdecay.product.factor import Seen, is_sharded, other_use
from frobdecay.product.product import Product


class StepBound:
    """The bound of one step: made before it, applied after it.

    It holds a copy of the factors, in float32 at least, as long as the step takes; and after it,
    as long as their Grams take, what they have moved by.

    Args:
        accumulator: of the products; refreshed.
        moving: of every factor, whether the step may move it.
        limits: b of every product, None where there is none.
        batched: kept from step to step, for the copies.

    Attributes:
        grams: receives those of the factors, if something else forms them before the step.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        moving: Sequence[bool],
        limits: Sequence[Coefficient | None],
        batched: Batched,
    ) -> None:
        self._accumulator, self._limits = accumulator, limits
        products = accumulator.products
        self._product = [k for k, product in enumerate(products) for _ in product.factors]
        self._held = accumulator.held()
        self._bounded = [k for k, p in enumerate(self._product) if limits[p] is not None]
        self._movement = Movement(self._held, [k for k in self._bounded if moving[k]], batched)
        self.grams: Grams = {}

    def measure(self) -> None:
        """Take the norms of the factors as they were when this was made."""
        parts = {k: self._movement.copies.get(k, self._held[k]) for k in self._bounded}
        self._norms = norms_of(self._accumulator.grams(parts, self.grams), self._bounded)

    @torch.no_grad()
    def apply(self, rounder: StochasticRounder) -> None:
        """Take back what of the step is beyond the bound."""
        accumulator = self._accumulator
        params = accumulator.refresh()  # the base may have put other memory in their place
        held = accumulator.held()
        copies = self._movement.copies
        moved = norms_of(accumulator.grams(self._movement.steps(held)), copies)
        norms, steps = (
            accumulator.rows([known.get(k) for k in range(len(held))])
            for known in (self._norms, moved)
        )
        found = shares(accumulator.products, norms, steps, self._limits)
        half: list[tuple[Tensor, Tensor]] = []
        for k, old in copies.items():
            share = found[self._product[k]]
            assert share is not None
            # Not where it is no number: what the base has made of it stays.
            share = torch.where(share < 1, share, 1.0)
            share = accumulator.spread(k, share, old).to(old.dtype)
            if old.dtype == held[k].dtype:
                torch.lerp(old, held[k], share, out=held[k])  # of 1 the latter, to the bit
            else:
                cut = share < 1
                part = torch.where(cut, (held[k] - old) * share, 0)
                held[k].copy_(torch.where(cut, old, held[k]))
                half.append((params[k] if is_sharded(params[k]) else held[k], part))
        rounder.add_([own for own, _ in half], [part for _, part in half])


def shares(
    products: Sequence[Product],
    norms: Sequence[Sequence[Tensor | None]],
    moved: Sequence[Sequence[Tensor | None]],
    limits: Sequence[Coefficient | None],
) -> list[Tensor | None]:
    """The largest s ≤ 1 with which the inequality holds a product's step within its limit.

    Args:
        products: chains.
        norms: ‖C_k‖ of every factor, (*batch); None where there is no limit.
        moved: ‖ΔC_k‖, None for a factor that does not move.
        limits: of ‖ΔW‖₂ with the scale in W.

    Returns:
        (*batch) for every product, None where there is no limit or no factor moves; NaN where a
        norm is, 0 where one is infinite.
    """
    alike: dict[object, list[int]] = defaultdict(list)
    for k, limit in enumerate(limits):
        first = norms[k][0]
        if limit is not None and first is not None and any(d is not None for d in moved[k]):
            alike[len(norms[k]), first.dtype, first.device, first.shape].append(k)
    found: list[Tensor | None] = [None] * len(products)
    for members in alike.values():
        linear, rest = reach([norms[k] for k in members], [moved[k] for k in members])
        within = _limits([products[k] for k in members], [limits[k] for k in members], linear)
        whole = linear + rest  # of no limit where a norm is no number: the share is none, too
        root = torch.hypot(linear, 2 * rest.sqrt() * within**0.5)  # squares would overflow
        part = 2 * within / (linear + root).clamp_min(torch.finfo(linear.dtype).tiny)
        part = torch.where(whole.isinf(), 0.0, part)
        each = torch.where(whole <= within, 1.0, part)
        for k, share in zip(members, each.unbind(), strict=True):
            found[k] = share
    return found


def reach(
    norms: Sequence[Sequence[Tensor | None]], moved: Sequence[Sequence[Tensor | None]]
) -> tuple[Tensor, Tensor]:
    """a₁ and a₂, (products, *batch), of products that all have the same number of factors."""
    first = norms[0][0]
    assert first is not None
    whole, linear, rest = first.new_ones(()), first.new_zeros(()), first.new_zeros(())
    for sizes, steps in zip(zip(*norms, strict=True), zip(*moved, strict=True), strict=True):
        c = torch.stack([size for size in sizes if size is not None])
        zero = torch.zeros_like(c[0])
        d = torch.stack([zero if step is None else step for step in steps])
        rest = _times(rest, c + d) + _times(linear, d)
        linear = _times(linear, c) + _times(whole, d)
        whole = _times(whole, c)
    return linear, rest


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a·b of numbers of at least 0, and 0 of zero and infinity: what is not there moves nothing."""
    found = a * b
    return torch.where(found.isnan(), torch.minimum(a, b), found)  # which is NaN where one is


def smallest(limits: Sequence[Coefficient | None]) -> Coefficient | None:
    """The smallest of a product's limits; None if there is none."""
    found: Coefficient | None = None
    for limit in limits:
        if found is None or limit is None or limit is found:
            found = limit if found is None else found
        elif isinstance(limit, Tensor):
            found = limit.clamp_max(found)
        else:
            found = found.clamp_max(limit) if isinstance(found, Tensor) else min(found, limit)
    return found


def _limits(
    products: Sequence[Product], limits: Sequence[Coefficient | None], like: Tensor
) -> Coefficient:
    """What the products of the factors alone may move by: one number, or (products, 1, …)."""
    pairs = zip(products, limits, strict=True)
    within = [b if p.scale == 1 else b / abs(p.scale) for p, b in pairs if b is not None]
    return together(within, like)


# --- what can be bounded --------------------------------------------------------------------------


UNBOUNDED = f"leave it out by a param group of its own with {BOUND!r}: None, or pass bound=None"


def check_bounded(products: Sequence[Product], instead: str = UNBOUNDED) -> None:
    """Refuse products whose step cannot be bounded, before anything is changed.

    Args:
        products: whose steps shall be.
        instead: what the message tells to do.

    Raises:
        ValueError: not a chain of matrices, or a parameter that is a factor more than once.
    """
    seen: Seen = {}
    for product in products:
        if reason := _why_not(product):
            raise ValueError(
                f"{product.name}: expected a chain of matrices U M.. Vᵀ, to bound its step, got "
                f"{product.structure.name}: {reason}; {instead}"
            )
        for factor in product.factors:
            if (other := other_use(seen, product.name, factor)) is not None:
                raise ValueError(
                    f"{product.name} ({factor.attribute}): expected a parameter that is a factor "
                    f"once, to bound its step, got one that is also a factor of {other!r}: one "
                    f"step cannot have two sizes; untie them, or {instead}"
                )


def _why_not(product: Product) -> str | None:
    structure, outlines = product.structure, product.outlines()
    if not isinstance(structure, Network):
        return "it has a weight beside its factors; list it without lora='full' or toward="
    if not structure.is_chain:
        return "the norms of its factors say nothing of the spectral norm of one matrix"
    if any(view.ndim != product.batch + 2 for view in outlines[1:-1]):
        return "an inner factor has rows of its own, so that the product is no matrix"
    if not product.scale:
        return "its scale is 0, so that no step of its factors moves it"
    halves = [is_sharded(f.param) and f.pattern and f.param.dtype in HALF for f in product.factors]
    if any(halves):
        return "a sharded factor in half precision that is seen through a pattern; use float32"
    return None
