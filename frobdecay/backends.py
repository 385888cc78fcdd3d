"""Backends: executors that add the gradient of the penalty of many products at once.

All compute the same, coef · ∇½‖W‖² for every factor of every product from the factors as they are
before the call, and add it in place to given targets:

    reference     a plain loop over products with the formulas of ``chain.py``: the oracle
    bucketed      products of equal shapes stacked and multiplied together: many small products
    per_product   Grams and in-place ``addmm_`` product by product: large products, no copies

A backend says why it cannot run some products (``why_not``); ``select`` takes the one that costs
least for every bucket of equal products, which ``accumulate.explain`` prints. A new backend is one
more entry in ``BACKENDS``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from frobdecay.chain import Coefficient, accumulable, chain_gradients, chain_grams, plan_of
from frobdecay.product import Product

__all__ = ["BACKENDS", "Backend", "Bucket", "Work", "select"]

BUCKET_BYTES = 1 << 17
"""On a CPU, products whose factors take more bytes than this run one by one: copying them into a
bucket then costs more than the calls it saves."""


@dataclass
class Work:
    """Products of equal shapes in one call, each field indexed [product][factor].

    Attributes:
        views: the factors, (*batch, *summed, rows, columns).
        batch: number of leading batch axes.
        targets: tensors of the views' shapes to add to; None where nothing is to be added. A
            target may be the factor itself.
        coefs: numbers or tensors without dimensions.
    """

    views: Sequence[Sequence[Tensor]]
    batch: int
    targets: Sequence[Sequence[Tensor | None]]
    coefs: Sequence[Sequence[Coefficient]]


class Backend(Protocol):
    """An executor; ``run`` gets products of equal shapes, dtypes and devices."""

    name: str

    def why_not(self, products: Sequence[Product]) -> list[str]:
        """List the reasons why these products cannot run here; empty where they can."""

    def run(self, work: Work) -> None:
        """Add all gradients to their targets."""


def _why_not(products: Sequence[Product]) -> list[str]:
    """Reasons that hold for every backend of this file."""
    reasons = []
    for product in products:
        if any(hasattr(param, "device_mesh") for param in product.params):
            reasons.append(f"{product.name}: a factor is sharded over a device mesh (DTensor)")
        elif any(param.is_meta for param in product.params):
            reasons.append(f"{product.name}: a factor is on the meta device, without numbers")
    return reasons


def _add_formed(
    views: Sequence[Tensor],
    batch: int,
    targets: Sequence[Tensor | None],
    coefs: Sequence[Coefficient],
) -> None:
    """Form all gradients of one product, then add them: right for every kind of product."""
    wanted = [None if t is None else coef for t, coef in zip(targets, coefs, strict=True)]
    for target, gradient in zip(targets, chain_gradients(views, batch, wanted), strict=True):
        if target is not None and gradient is not None:
            target.add_(gradient)


class Reference:
    """A plain loop; every gradient is formed, then added."""

    name = "reference"

    def why_not(self, products: Sequence[Product]) -> list[str]:
        """Say why not: only what holds for every backend."""
        return _why_not(products)

    def run(self, work: Work) -> None:
        """Add product by product."""
        for views, targets, coefs in zip(work.views, work.targets, work.coefs, strict=True):
            _add_formed(views, work.batch, targets, coefs)


class PerProduct:
    """Grams, then ``target += coef · U (VᵀV)`` in one call a factor, without a temporary."""

    name = "per_product"

    def why_not(self, products: Sequence[Product]) -> list[str]:
        """Say why not: only what holds for every backend."""
        return _why_not(products)

    def run(self, work: Work) -> None:
        """Add product by product; pairs of matrices in place."""
        views, batch = work.views[0], work.batch
        in_place = (
            len(views) == 2
            and all(view.ndim == batch + 2 <= 3 for view in views)
            and plan_of(views, batch).gradient == "gram"
            and accumulable(views)[0] is views[0]
        )
        for views, targets, coefs in zip(work.views, work.targets, work.coefs, strict=True):
            # In place, a target that is the factor itself would be read while it is written.
            if in_place and not any(
                target is not None and target.data_ptr() == view.data_ptr()
                for target, view in zip(targets, views, strict=True)
            ):
                _add_in_place(views, batch, targets, coefs)
            else:
                _add_formed(views, batch, targets, coefs)


def _add_in_place(
    views: Sequence[Tensor],
    batch: int,
    targets: Sequence[Tensor | None],
    coefs: Sequence[Coefficient],
) -> None:
    (left,), (right,) = chain_grams(views, batch)
    for view, gram, target, coef in zip(views, (right, left), targets, coefs, strict=True):
        if target is None:
            continue
        if target.dtype != view.dtype:
            target.add_(view @ (gram * coef))
        elif batch:
            target.baddbmm_(view, gram * coef)
        elif isinstance(coef, Tensor):
            target.addmm_(view, gram * coef)
        else:
            target.addmm_(view, gram, alpha=coef)


class Bucketed:
    """Stack equal products along a new batch axis: the number of calls no longer grows."""

    name = "bucketed"

    def why_not(self, products: Sequence[Product]) -> list[str]:
        """Say why not: only what holds for every backend."""
        return _why_not(products)

    def run(self, work: Work) -> None:
        """Stack, multiply, and add everything in one call."""
        stacks = [torch.stack(views) for views in zip(*work.views, strict=True)]
        targets = list(zip(*work.targets, strict=True))
        coefs = [
            _together(coefs, stack, work.batch) if any(t is not None for t in wanted) else None
            for coefs, stack, wanted in zip(
                zip(*work.coefs, strict=True), stacks, targets, strict=True
            )
        ]
        into: list[Tensor] = []
        what: list[Tensor] = []
        gradients = chain_gradients(stacks, work.batch + 1, coefs)
        for wanted, gradient in zip(targets, gradients, strict=True):
            if gradient is not None:
                pairs = zip(wanted, gradient.unbind(), strict=True)
                kept = [(target, g) for target, g in pairs if target is not None]
                into += [target for target, _ in kept]
                what += [g for _, g in kept]
        if into:
            torch._foreach_add_(into, what)


def _together(coefs: Sequence[Coefficient], stack: Tensor, batch: int) -> Coefficient:
    """One coefficient for a stack: the number all share, or a tensor (products, 1, …, 1)."""
    first = coefs[0]
    if not isinstance(first, Tensor) and all(coef is first for coef in coefs):
        return first
    if any(isinstance(coef, Tensor) for coef in coefs):
        column = torch.stack(
            [torch.as_tensor(coef, device=stack.device).reshape(()) for coef in coefs]
        )
    else:
        column = torch.tensor(coefs, dtype=torch.float64)
    dtype = torch.promote_types(stack.dtype, torch.float32)
    return column.to(stack.device, dtype).reshape(-1, *(1 for _ in range(batch + 2)))


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {backend.name: backend for backend in (Bucketed(), PerProduct(), Reference())}
)


@dataclass(frozen=True)
class Bucket:
    """Products of equal shapes, dtype and device: where they run, and why there.

    Attributes:
        backend: the executor.
        members: positions in the list of products.
        reason: why this backend.
    """

    backend: Backend
    members: tuple[int, ...]
    reason: str


def select(products: Sequence[Product], backend: str | None = None) -> list[Bucket]:
    """Sort products into buckets and choose the cheapest backend for each.

    Args:
        products: the products.
        backend: a name in ``BACKENDS`` to take in any case.

    Raises:
        ValueError: an unknown name, or products that cannot run; lists the reasons.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"expected backend to be one of {sorted(BACKENDS)}, got {backend!r}")
    times = Counter(id(param) for product in products for param in product.params)
    alike: dict[object, list[int]] = defaultdict(list)
    for k, product in enumerate(products):
        about = tuple((tuple(v.shape), v.dtype, v.device) for v in product.views())
        shared = any(times[id(param)] > 1 for param in product.params)
        alike[about, product.batch, shared].append(k)
    buckets = []
    for key, members in alike.items():
        name, reason = backend, "asked for"
        if name is None:
            name, reason = _cheapest(products[members[0]], len(members), key[2])  # type: ignore[index]
        reasons = BACKENDS[name].why_not([products[k] for k in members])
        if reasons:
            raise ValueError(f"the backend {name!r} cannot run: " + "; ".join(reasons))
        buckets.append(Bucket(BACKENDS[name], tuple(members), reason))
    return buckets


def _cheapest(product: Product, count: int, shared: bool) -> tuple[str, str]:
    """The name of the cheapest backend for ``count`` such products, and the reason."""
    params = product.params
    size = sum(param.numel() * param.element_size() for param in params)
    if count == 1:
        return "per_product", "the only one of its shape"
    if shared:
        return "per_product", "a parameter is a factor more than once: added one after the other"
    if params[0].device.type == "cpu" and size > BUCKET_BYTES:
        return "per_product", f"{size / 2**10:.0f} KiB each: a copy costs more than a call"
    return "bucketed", f"{count} of one shape, {size / 2**10:.1f} KiB each"
