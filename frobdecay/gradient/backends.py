"""Backends: executors that add the gradient of the penalty of many products at once.

All compute the same, coef · ∇½‖W‖² for every factor of every product from the factors as they are
before the call, and add it in place to given targets:

    reference     a plain loop over products of any kind: the oracle
    bucketed      products of equal shapes stacked and multiplied together: many small products
    per_product   Grams and in-place ``addmm_`` product by product: large products, no copies
    triton        all pairs of a model in two launches of kernels: CUDA, see ``triton/kernels.py``

A backend says why it cannot run some products (``why_not``), and plans (``prepare``) what is then
run at every step. ``select`` takes for every product the backend that costs least. A new backend
is one more entry in ``BACKENDS``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from frobdecay.algebra.lowering import matrix_gram
from frobdecay.algebra.precision import common_dtype
from frobdecay.gradient.bucketed import (
    Coefs,
    Grams,
    Job,
    Runner,
    Targets,
    prepare_bucketed,
)
from frobdecay.gradient.flat import stacked
from frobdecay.gradient.triton.executor import Grouped
from frobdecay.gradient.triton.refusals import refusals
from frobdecay.product.product import BUCKET_BYTES, Product

TALL, NARROW = 3072, (16, 192)
"""Rows from which, and ranks for which, a Gram is summed from stacks of rows; see ``gram_of``."""


class Backend(NamedTuple):
    """An executor for products on one device.

    Attributes:
        why_not: lists the reasons why it cannot run products; empty where it can.
        prepare: plans the execution of jobs as long as their memory stays where it is.
    """

    why_not: Callable[[Sequence[Product]], list[str]]
    prepare: Callable[[Sequence[Job]], Sequence[Runner]]


def _why_not(products: Sequence[Product]) -> list[str]:
    """Reasons that hold for every backend of this file."""
    return [
        f"{product.name}: a factor is on the meta device, without numbers"
        for product in products
        if any(param.is_meta for param in product.params)
    ]


def _add_formed(
    job: Job, targets: Targets, coefs: Coefs, form: object = None, grams: Grams | None = None
) -> None:
    """Form all gradients of one product, then add them: right for every kind of product."""
    into = targets[job.row]
    wanted = [None if t is None else coef for t, coef in zip(into, coefs[job.row], strict=True)]
    if all(coef is None for coef in wanted):
        return  # a frozen or undecayed layer
    found = job.structure.gradients(job.views, job.batch, wanted)
    for target, gradient in zip(into, found, strict=True):
        if target is not None and gradient is not None:
            target.add_(gradient)


def _add_in_place(
    job: Job, targets: Targets, coefs: Coefs, form: object = None, grams: Grams | None = None
) -> None:
    """Add the gradients of a pair, of which each factor takes the other's Gram."""
    into = targets[job.row]
    if all(target is None for target in into):
        return
    pair = [gram_of(view, job.batch) for view in job.views]
    # What is read of the factors has to be read before one of them is written.
    are_read = {v.data_ptr() for v in job.views} & {t.data_ptr() for t in into if t is not None}
    found: list[tuple[Tensor, Tensor]] = []
    for view, gram, target, coef in zip(job.views, pair[::-1], into, coefs[job.row], strict=True):
        if target is None:
            continue
        if are_read or target.dtype != view.dtype:
            found.append((target, view @ (gram * coef)))
        elif job.batch:
            target.baddbmm_(view, gram * coef)
        elif isinstance(coef, Tensor):
            target.addmm_(view, gram * coef)
        else:
            target.addmm_(view, gram, alpha=coef)
    for target, gradient in found:
        target.add_(gradient)
    if grams is not None:
        grams.update(enumerate(pair, job.row.start))


def _per_product(job: Job) -> Runner:
    """Tell the pairs that can be added in place."""
    alike = all(view.dtype == job.dtype for view in job.views)
    in_place = job.is_gram_pair and job.batch <= 1 and alike
    return partial(_add_in_place if in_place else _add_formed, job)


def gram_of(view: Tensor, batch: int = 0) -> Tensor:
    """VᵀV of a factor, at least float32; the tall ones' rows are split between threads.

    A matrix product is split between threads along its result, which is too small here: the
    Grams of a few stacks of rows are formed side by side, and added up.
    """
    stacks, view = 2 * torch.get_num_threads(), view.to(common_dtype([view]))
    tall = view.device.type == "cpu" and view.ndim == 2 and view.shape[0] >= TALL and stacks > 2
    if not tall or view.shape[0] % stacks or not NARROW[0] <= view.shape[1] <= NARROW[1]:
        return matrix_gram(view, batch)
    rows = view.view(stacks, -1, view.shape[1])
    return (rows.mT @ rows).sum(0)


def grams_of(views: Mapping[int, tuple[Tensor, int]]) -> Grams:
    """The Grams of factors, by any number, with their numbers of batch axes: (*batch, r, r) each.

    Small ones of one shape are multiplied together, on an accelerator large ones, too.
    """
    found: Grams = {}
    small: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)
    for k, (view, batch) in views.items():
        if view.device.type == "cpu" and view.numel() * view.element_size() > BUCKET_BYTES:
            found[k] = gram_of(view, batch)
        else:
            small[batch][k] = view
    for batch, alike in small.items():
        found.update(stacked(partial(gram_of, batch=batch + 1), alike))
    return found


def _why_not_triton(products: Sequence[Product]) -> list[str]:
    """Without triton or CUDA; longer chains, large ranks, float64."""
    general = _why_not(products) + [
        f"{product.name}: {product.structure.name}, not a chain"
        for product in products
        if not product.structure.is_chain
    ]
    return general or [r for product in products for r in refusals(product)]


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "bucketed": Backend(_why_not, prepare_bucketed),
        "per_product": Backend(_why_not, lambda jobs: list(map(_per_product, jobs))),
        "reference": Backend(_why_not, lambda jobs: [partial(_add_formed, job) for job in jobs]),
        "triton": Backend(_why_not_triton, lambda jobs: [Grouped(jobs)]),
    }
)


@dataclass(frozen=True)
class Choice:
    """Products of equal shapes, dtype and device: where they run, and why there.

    Attributes:
        backend: name of the executor.
        members: positions in the list of products.
        reason: why this backend.
    """

    backend: str
    members: tuple[int, ...]
    reason: str


def select(products: Mapping[int, Product], backend: str | None = None) -> list[Choice]:
    """Choose the cheapest backend for every kind of product.

    Args:
        products: the products, by their positions.
        backend: a name in ``BACKENDS`` to take in any case.

    Raises:
        ValueError: an unknown name, or products that cannot run; lists the reasons.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"expected backend to be one of {sorted(BACKENDS)}, got {backend!r}")
    times = Counter(id(param) for product in products.values() for param in product.params)
    alike: dict[tuple[object, object, int, bool], list[int]] = defaultdict(list)
    for k, product in products.items():
        about = tuple((tuple(v.shape), v.dtype, v.device) for v in product.outlines())
        shared = any(times[id(param)] > 1 for param in product.params)
        alike[about, product.structure, product.batch, shared].append(k)
    choices = []
    for (_, _, _, shared), members in alike.items():
        name, reason = (
            (backend, "asked for")
            if backend is not None
            else _cheapest([products[k] for k in members], shared)
        )
        reasons = BACKENDS[name].why_not([products[k] for k in members])
        if reasons:
            raise ValueError(f"the backend {name!r} cannot run: " + "; ".join(reasons))
        choices.append(Choice(name, tuple(members), reason))
    return choices


def _cheapest(products: Sequence[Product], shared: bool) -> tuple[str, str]:
    """The name of the cheapest backend for products of one shape, and the reason."""
    params, views = products[0].params, products[0].views()
    size = sum(param.numel() * param.element_size() for param in params)
    device, refused = params[0].device.type, ""
    structure = products[0].structure
    if device == "cuda":
        gram = structure.route(views, products[0].batch) == "gram"
        reasons = BACKENDS["triton"].why_not(products) if gram else ["nearly full rank"]
        if not reasons:
            return "triton", f"{len(products)} of one shape, in the two launches of all pairs"
        refused = f"; not triton: {reasons[0]}"
    if not structure.is_chain:
        alone = shared or size > BUCKET_BYTES or len(products) == 1
        name = "per_product" if alone else "bucketed"
        return name, f"{len(products)} of {structure.name}{refused}"
    if shared:
        reason = "a parameter is a factor more than once: added one after the other"
        return "per_product", reason + refused
    if device == "cpu" and size > BUCKET_BYTES:
        return "per_product", f"{size / 2**10:.0f} KiB each: a copy costs more than a call"
    return "bucketed", f"{len(products)} of one shape, {size / 2**10:.1f} KiB each{refused}"
