"""Backends: executors that add the gradient of the penalty of many products at once.

All compute the same, coef · ∇½‖W‖² for every factor of every product from the factors as they are
before the call, and add it in place to given targets:

    reference     a plain loop over products with the formulas of ``chain.py``: the oracle
    bucketed      products of equal shapes stacked and multiplied together: many small products
    per_product   Grams and in-place ``addmm_`` product by product: large products, no copies

A backend says why it cannot run a product (``why_not``); ``select`` takes the one that costs least
for every bucket of equal products; ``explain`` prints what runs where. A new backend is one more
entry in ``BACKENDS``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from frobdecay.chain import Coefficient, accumulable, chain_gradients, chain_grams, plan_of
from frobdecay.product import Factor, Product, as_products, check_coefficient

__all__ = ["BACKENDS", "Accumulator", "Backend", "Job", "add_penalty_grad_", "explain", "select"]

BUCKET_BYTES = 1 << 17
"""On a CPU, products whose factors take more bytes than this run one by one: copying them into a
bucket then costs more than the calls it saves (measured: benchmarks/penalty.py)."""


@dataclass
class Job:
    """One product in one call: what to read, where to add, how much of it.

    Attributes:
        views: the factors, (*batch, *summed, rows, columns).
        batch: number of leading batch axes.
        targets: tensors of the views' shapes; None where nothing is to be added.
        coefs: one a factor, numbers or tensors without dimensions.
        aliased: whether a target is the factor itself.
    """

    views: Sequence[Tensor]
    batch: int
    targets: Sequence[Tensor | None]
    coefs: Sequence[Coefficient]
    aliased: bool = False

    def gradients(self) -> list[Tensor | None]:
        """Each wanted gradient times its coefficient, by the plan's route."""
        wanted = [
            None if target is None else coef
            for target, coef in zip(self.targets, self.coefs, strict=True)
        ]
        return chain_gradients(self.views, self.batch, wanted)

    def add(self) -> None:
        """Form the gradients, then add them: correct for every kind of product."""
        for target, gradient in zip(self.targets, self.gradients(), strict=True):
            if target is not None and gradient is not None:
                target.add_(gradient)


class Backend(Protocol):
    """An executor. ``run`` gets jobs with equal view shapes, dtypes and devices."""

    name: str

    def why_not(self, views: Sequence[Tensor], batch: int) -> list[str]:
        """List the reasons why products of these views cannot run here; empty where they can."""

    def run(self, jobs: Sequence[Job]) -> None:
        """Add the gradients of all jobs to their targets."""


def _why_not_here(views: Sequence[Tensor]) -> list[str]:
    """Reasons that hold for every backend of this file."""
    if any(hasattr(view, "device_mesh") for view in views):
        return ["a factor is sharded over a device mesh (DTensor)"]
    if any(view.is_meta for view in views):
        return ["a factor is on the meta device and holds no numbers"]
    return []


class Reference:
    """A plain loop; every gradient is formed, then added."""

    name = "reference"

    def why_not(self, views: Sequence[Tensor], batch: int) -> list[str]:
        """Say why not: only what holds for every backend."""
        return _why_not_here(views)

    def run(self, jobs: Sequence[Job]) -> None:
        """Add job by job."""
        for job in jobs:
            job.add()


class PerProduct:
    """Grams, then ``target += U (coef · VᵀV)`` in one call a factor, without a temporary."""

    name = "per_product"

    def why_not(self, views: Sequence[Tensor], batch: int) -> list[str]:
        """Say why not: only what holds for every backend."""
        return _why_not_here(views)

    def run(self, jobs: Sequence[Job]) -> None:
        """Add job by job."""
        views, batch = jobs[0].views, jobs[0].batch
        simple = (
            len(views) == 2
            and all(view.ndim == batch + 2 <= 3 for view in views)
            and plan_of(views, batch).gradient == "gram"
            and accumulable(views)[0] is views[0]
        )
        for job in jobs:
            # In place, a product would read the factor that it overwrites.
            if simple and not job.aliased:
                self._add_in_place(job)
            else:
                job.add()

    @staticmethod
    def _add_in_place(job: Job) -> None:
        (left,), (right,) = chain_grams(job.views, job.batch)
        for view, gram, target, coef in zip(
            job.views, (right, left), job.targets, job.coefs, strict=True
        ):
            if target is None:
                continue
            if target.dtype != view.dtype:
                target.add_(view @ (gram * coef))
            elif job.batch:
                target.baddbmm_(view, gram * coef)
            elif isinstance(coef, Tensor):
                target.addmm_(view, gram * coef)
            else:
                target.addmm_(view, gram, alpha=coef)


class Bucketed:
    """Stack equal products along a new batch axis: the number of calls no longer grows."""

    name = "bucketed"

    def why_not(self, views: Sequence[Tensor], batch: int) -> list[str]:
        """Say why not: only what holds for every backend."""
        return _why_not_here(views)

    def run(self, jobs: Sequence[Job]) -> None:
        """Stack, multiply, and add everything in one call."""
        batch, count = jobs[0].batch, len(jobs[0].views)
        stacked = [torch.stack([job.views[k] for job in jobs]) for k in range(count)]
        targets = [[job.targets[k] for job in jobs] for k in range(count)]
        coefs = [
            None
            if all(target is None for target in targets[k])
            else _together([job.coefs[k] for job in jobs], stacked[k], batch)
            for k in range(count)
        ]
        into: list[Tensor] = []
        what: list[Tensor] = []
        for k, gradient in enumerate(chain_gradients(stacked, batch + 1, coefs)):
            if gradient is not None:
                pairs = zip(targets[k], gradient.unbind(), strict=True)
                wanted = [(target, g) for target, g in pairs if target is not None]
                into += [target for target, _ in wanted]
                what += [g for _, g in wanted]
        torch._foreach_add_(into, what)


def _together(coefs: Sequence[Coefficient], stacked: Tensor, batch: int) -> Coefficient:
    """One coefficient for a stack: the number they share, or a tensor (products, 1, …, 1)."""
    if not any(isinstance(coef, Tensor) for coef in coefs):
        if len(set(coefs)) == 1:
            return coefs[0]
        column = torch.tensor(coefs, dtype=torch.float64)
    else:
        column = torch.stack([torch.as_tensor(coef).reshape(()) for coef in coefs])
    dtype = torch.promote_types(stacked.dtype, torch.float32)
    return column.to(stacked.device, dtype).reshape(-1, *(1 for _ in range(batch + 2)))


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {backend.name: backend for backend in (Bucketed(), PerProduct(), Reference())}
)


# --- which products run where --------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """Products of equal view shapes, dtype and device, the backend they run on, and why."""

    backend: Backend
    members: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    reason: str


def select(
    views: Sequence[Tensor], batch: int, count: int, shared: bool = False
) -> tuple[str, str]:
    """Choose the cheapest backend for ``count`` products of these views.

    Args:
        views: the factors of one of them.
        batch: number of leading batch axes.
        count: how many products have these shapes.
        shared: whether some parameter is a factor of several products.

    Returns:
        The backend's name and the reason.
    """
    size = sum(view.numel() * view.element_size() for view in views)
    if count == 1:
        return "per_product", "the only one of its shape"
    if shared:
        return "per_product", "a parameter is a factor more than once: added one after the other"
    if views[0].device.type == "cpu" and size > BUCKET_BYTES:
        return "per_product", f"{size / 2**10:.0f} KiB each: a copy costs more than a call"
    return "bucketed", f"{count} of one shape, {size / 2**10:.1f} KiB each"


class Accumulator:
    """Adds the gradients of the penalty of a fixed list of products, planned once.

    Parameters are looked up at every call. Where they are the same tensors as before, views and
    buckets are used again; where a framework swapped or moved them, they are planned anew.

    Args:
        products: the products.
        backend: a name in ``BACKENDS``, or None for the cheapest for each bucket.

    Raises:
        ValueError: an unknown backend, or products that no (or not the named) backend can run;
            names the product and the reasons.
    """

    def __init__(self, products: Product | Iterable[Product], backend: str | None = None) -> None:
        self.products = as_products(products)
        self.backend = backend
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"expected backend to be one of {sorted(BACKENDS)}, got {backend!r}")
        self._plan()

    def _plan(self) -> None:
        self._params = [product.params for product in self.products]
        self._memory = [tuple(_memory(p) for p in params) for params in self._params]
        self._views = [product.views() for product in self.products]
        self._squared_scales = [product.scale**2 for product in self.products]
        times = Counter(id(p) for params in self._params for p in params)
        self._shared = [any(times[id(p)] > 1 for p in params) for params in self._params]
        alike = defaultdict(list)
        for k, views in enumerate(self._views):
            about = tuple((tuple(v.shape), v.dtype, v.device) for v in views)
            alike[about, self.products[k].batch, self._shared[k]].append(k)
        self.buckets = [self._bucket(members) for members in alike.values()]

    def _bucket(self, members: list[int]) -> Bucket:
        k = members[0]
        views, batch = self._views[k], self.products[k].batch
        name, reason = self.backend, "asked for"
        if name is None:
            name, reason = select(views, batch, len(members), self._shared[k])
        reasons = BACKENDS[name].why_not(views, batch)
        if reasons:
            raise ValueError(
                f"{self.products[k].name}: the backend {name!r} cannot run it: "
                + "; ".join(reasons)
            )
        shapes = tuple(tuple(view.shape) for view in views)
        return Bucket(BACKENDS[name], tuple(members), shapes, reason)

    def refresh(self) -> Sequence[tuple[Tensor, ...]]:
        """Resolve all parameters anew, plan again if they changed, and return them."""
        for product, params, memory in zip(self.products, self._params, self._memory, strict=True):
            for factor, param, at in zip(product.factors, params, memory, strict=True):
                if factor.param is not param or _memory(param) != at:
                    self._plan()
                    return self._params
        return self._params

    @torch.no_grad()
    def accumulate(
        self,
        targets: Sequence[Sequence[Tensor | None]],
        coefs: Sequence[Sequence[Coefficient]],
    ) -> None:
        """Add coefs[k][j] · ∇½‖W_k‖² to targets[k][j], for product k and factor j, in place.

        Args:
            targets: tensors of the parameters' shapes: their gradients, buffers, or the
                parameters themselves (not where one is a factor more than once). None: skip.
            coefs: numbers or tensors without dimensions, of the same nesting.
        """
        self.refresh()
        with _full_precision(self._views):
            for bucket in self.buckets:
                found = (self._job(k, targets[k], coefs[k]) for k in bucket.members)
                jobs = [job for job in found if job is not None]
                if jobs:
                    bucket.backend.run(jobs)

    def _job(
        self, k: int, targets: Sequence[Tensor | None], coefs: Sequence[Coefficient]
    ) -> Job | None:
        if all(target is None for target in targets):
            return None
        product, scale = self.products[k], self._squared_scales[k]
        seen = [
            target if target is None or _plain(factor) else factor.view(target)
            for factor, target in zip(product.factors, targets, strict=True)
        ]
        aliased = any(t is p for t, p in zip(targets, self._params[k], strict=True))
        scaled = coefs if scale == 1 else [coef * scale for coef in coefs]
        return Job(self._views[k], product.batch, seen, scaled, aliased)

    def explain(self) -> str:
        """Say which products run on which backend, by which route, and why."""
        lines = []
        for bucket in self.buckets:
            names = [self.products[k].name for k in bucket.members]
            shown = ", ".join(names[:2]) + (f", … ({len(names)})" if len(names) > 2 else "")
            k = bucket.members[0]
            route = plan_of(self._views[k], self.products[k].batch).gradient
            shape = " · ".join("×".join(map(str, s)) for s in bucket.shapes)
            lines.append(f"{bucket.backend.name:<12} {route:<6} {shape:<24} {shown}")
            lines.append(f"{'':<12} {bucket.reason}")
        return "\n".join(lines)


def _plain(factor: Factor) -> bool:
    return factor.pattern is None and factor.index is None


def _memory(param: Tensor) -> tuple[int, torch.dtype]:
    """What changes when a parameter's storage is replaced under the same object."""
    return (0 if hasattr(param, "device_mesh") else param.data_ptr()), param.dtype


def _full_precision(views: Sequence[Sequence[Tensor]]) -> AbstractContextManager[object]:
    """Autocast off: it would compute the Grams in half precision."""
    device = views[0][0].device.type if views else "cpu"
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def add_penalty_grad_(
    products: Product | Iterable[Product], coef: Coefficient, *, backend: str | None = None
) -> None:
    """Add the gradient of ½·coef·Σ‖W‖_F² to the ``.grad`` of every factor, in place.

    The same as ``penalty(products, coef).backward()`` at a fraction of the cost, for training
    loops that clip the decay along with the gradient. As with weight decay in ``torch.optim``, a
    factor without a gradient is left alone: call it after ``backward()``.

    Args:
        products: one product or several.
        coef: λ, a number or a tensor without dimensions.
        backend: a name in ``BACKENDS``; None chooses.

    Raises:
        ValueError: a negative or NaN λ, or products that cannot run.

    Example:
        >>> import torch
        >>> U, V = torch.ones(2, 1, requires_grad=True), torch.ones(8, 1, requires_grad=True)
        >>> (U @ V.T).sum().backward()
        >>> add_penalty_grad_(Product.of(U, V), 0.5)
        >>> U.grad
        tensor([[12.],
                [12.]])
    """
    check_coefficient(coef, "coef")
    accumulator = Accumulator(products, backend)
    for product in accumulator.products:
        check_dense_gradients(product)
    targets = [
        [param.grad if param.requires_grad else None for param in product.params]
        for product in accumulator.products
    ]
    accumulator.accumulate(targets, [[coef] * len(found) for found in targets])


def check_dense_gradients(product: Product) -> None:
    """Refuse sparse gradients, which cannot hold the penalty's dense gradient.

    Raises:
        TypeError: names the product and the factor.
    """
    for factor in product.factors:
        grad = factor.param.grad
        if grad is not None and grad.layout != torch.strided:
            raise TypeError(
                f"{product.name}: expected a dense gradient for {factor.attribute}, got "
                f"{grad.layout}; the penalty's gradient is dense: use sparse=False"
            )


def explain(products: Product | Iterable[Product], backend: str | None = None) -> str:
    """Say what runs where and why.

    Example:
        >>> import torch
        >>> pairs = [Product.of(torch.ones(6, 2), torch.ones(5, 2)) for _ in range(3)]
        >>> print(explain(pairs))
        bucketed     gram   6×2 · 5×2                product, product, … (3)
                     3 of one shape, 0.1 KiB each
    """
    return Accumulator(products, backend).explain()
