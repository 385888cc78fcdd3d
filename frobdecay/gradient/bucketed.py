"""The bucketed executor: products of equal shapes are multiplied together.

Many small products cost their calls, not their arithmetic. So factors are gathered by shape into
stacks, Grams and updates of a stack are one ``bmm`` each, and one ``_foreach_add_`` scatters the
result; targets that share memory, such as that of a parameter that is a factor twice, take turns.
In pairs U Vᵀ, the U and V of all products with as many rows and columns share a stack: each
factor's update takes the Gram of its partner, wherever that is,

    S = stack of all (rows×r),    G = SᵀS,    updates = S · G[partner],

so that the number of calls is that of different factor shapes. Buffers live as long as the plan.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, permutations
from typing import Protocol

import torch
from torch import Tensor

from frobdecay.algebra.lowering import is_long
from frobdecay.algebra.network import Network
from frobdecay.algebra.precision import Coefficient, common_dtype
from frobdecay.algebra.shifted import Shifted
from frobdecay.gradient.overlaps import overlapping, turns
from frobdecay.product.departure import Departure

Targets = Sequence[Tensor | None]
"""Of all factors, product by product."""

Updates = tuple[Tensor, ...] | list[Tensor]
"""What is added to the targets of some factors."""

Coefs = Sequence[Coefficient]
"""Of all factors, product by product."""


Grams = dict[int, Tensor]
"""By the number of a factor its Gram, (*batch, r, r); until the next call of what formed it."""


class Runner(Protocol):
    """What a backend has planned."""

    def __call__(
        self, targets: Targets, coefs: Coefs, form: object = None, grams: Grams | None = None
    ) -> None:
        """Add coef·∇ to each target that is not None. A target may be the factor itself.

        Args:
            targets: of all factors, of which it takes those of its jobs.
            coefs: of all factors.
            form: an object that is the last call's only if dtypes, shapes and strides of the
                targets are; None where that is not known.
            grams: receives the Grams that were formed on the way.
        """


@dataclass(frozen=True)
class Job:
    """One product to be planned.

    Attributes:
        views: its factors.
        batch: number of their leading batch axes.
        structure: how they combine.
        row: which of all factors they are.
    """

    views: tuple[Tensor, ...]
    batch: int
    structure: Network | Shifted | Departure
    row: slice

    @property
    def is_gram_pair(self) -> bool:
        """Whether it is U Vᵀ, of plain matrices, cheaper through its Grams."""
        return (
            self.structure.is_chain
            and len(self.views) == 2
            and all(view.ndim == self.batch + 2 for view in self.views)
            and self.structure.route(self.views, self.batch) == "gram"
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the factors are multiplied in."""
        return common_dtype(self.views)


def prepare_bucketed(jobs: Sequence[Job]) -> list[Runner]:
    """Plan the execution of jobs on one device."""
    pairs, others = defaultdict(list), defaultdict(list)
    for job in jobs:
        if job.is_gram_pair and not any(map(is_long, job.views)):
            pairs[job.dtype, job.views[0].shape[: job.batch], job.views[0].shape[-1]].append(job)
        else:
            shapes = tuple(view.shape for view in job.views)
            others[job.dtype, shapes, job.batch, job.structure].append(job)
    return [*map(_Pairs, pairs.values()), *map(_Alike, others.values())]


class _Stacks:
    """Factors that differ in the length of their first axis alone, gathered into one buffer.

    Those of one shape are a stack, behind each other in memory. They have more columns than the
    factors where that is faster: zeros, which multiply to zeros.

    Args:
        views: by the number of a factor what is seen of it.
        dtype: of the stacks.
        columns: of the stacks, where not those of the factors.

    Attributes:
        slots: the numbers of the factors, in the order of the stacks.
    """

    def __init__(
        self, views: Mapping[int, Tensor], dtype: torch.dtype, columns: int | None = None
    ) -> None:
        self.slots = sorted(views, key=lambda slot: views[slot].shape)
        self.views = [views[slot] for slot in self.slots]
        self.groups = overlapping(self.views)
        first = self.views[0]
        last = first.shape[-1:] if columns is None else (columns,)
        alike = Counter(view.shape for view in self.views)
        self.shapes = [(n, *shape[:-1], *last) for shape, n in alike.items()]
        self.rows, self.stacks, self.gathered = self.room(dtype)
        self.as_it_is = columns is None and first.ndim > 0 and first.dtype == dtype

    def room(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Room for all: whole, by stacks, and by factors."""
        first, counts = self.views[0], [math.prod(shape[:2]) for shape in self.shapes]
        rows = first.new_zeros((sum(counts), *self.shapes[0][2:]), dtype=dtype)
        apart = zip(torch.split(rows, counts), self.shapes, strict=True)
        stacks = [part.view(shape) for part, shape in apart]
        r = slice(first.shape[-1]) if first.ndim else slice(None)
        return rows, stacks, [part for stack in stacks for part in stack[..., r].unbind()]

    def gather(self) -> list[Tensor]:
        """Copy the factors as they are now."""
        if self.as_it_is:
            torch.cat(self.views, out=self.rows)
        else:
            torch._foreach_copy_(self.gathered, self.views)
        return self.stacks

    def scatter(self, updates: Updates, targets: Targets, coef: float = 1.0) -> None:
        """Add updates, one a factor, times a number to their targets.

        On a GPU one call is one kernel, in which two sums into the same number would be a race.
        """
        given, groups = [targets[slot] for slot in self.slots], self.groups
        into = [target for target in given if target is not None]
        if len(into) < len(given):
            there = [target is not None for target in given]
            updates, groups = [*compress(updates, there)], [*compress(groups, there)]
        order = turns(list(map(Tensor.data_ptr, into)), groups)
        for now in sorted({*order}):
            chosen = [turn == now for turn in order]
            torch._foreach_add_([*compress(into, chosen)], [*compress(updates, chosen)], alpha=coef)


class _Pairs:
    """Products U Vᵀ of one rank: a stack for each number of rows, one buffer of Grams."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        views: defaultdict[object, dict[int, Tensor]] = defaultdict(dict)
        for job in jobs:
            for slot, view in enumerate(job.views, job.row.start):
                views[view.shape[1:], view.dtype][slot] = view
        dtype, columns = jobs[0].dtype, _columns(jobs[0].views[0])
        self.buffers = [_Stacks(some, dtype, columns) for some in views.values()]
        rooms = [buffer.room(dtype) for buffer in self.buffers]
        self.updates = [stack for _, stacks, _ in rooms for stack in stacks]
        self.parts = [parts for _, _, parts in rooms]
        self.order = [slot for buffer in self.buffers for slot in buffer.slots]
        place = {slot: i for i, slot in enumerate(self.order)}
        pairs = [range(job.row.start, job.row.stop) for job in jobs]
        partner = {a: b for pair in pairs for a, b in permutations(pair)}
        first, r = self.updates[0], self.updates[0].shape[-1]
        # matmul would take longer to look at the shapes than bmm takes to multiply
        self.multiply = torch.bmm if first.ndim == 3 else torch.matmul
        self.grams = first.new_empty((len(self.order), *first.shape[1:-2], r, r))
        self.partners = torch.empty_like(self.grams)
        self.partner = torch.tensor(
            [place[partner[slot]] for slot in self.order], dtype=torch.int64, device=first.device
        )
        sizes = list(map(len, self.updates))
        self.gram_parts = torch.split(self.grams, sizes)
        self.partner_parts = torch.split(self.partners, sizes)

    def __call__(
        self, targets: Targets, coefs: Coefs, form: object = None, grams: Grams | None = None
    ) -> None:
        stacks = [stack for buffer in self.buffers for stack in buffer.gather()]
        for stack, gram in zip(stacks, self.gram_parts, strict=True):
            self.multiply(stack.mT, stack, out=gram)
        if grams is not None:
            r = self.buffers[0].views[0].shape[-1]
            grams.update(zip(self.order, self.grams[..., :r, :r].unbind(), strict=True))
        torch.index_select(self.grams, 0, self.partner, out=self.partners)
        coef = together([coefs[slot] for slot in self.order], self.partners)
        if isinstance(coef, Tensor):
            self.partners.mul_(coef)
            coef = 1.0
        for stack, gram, update in zip(stacks, self.partner_parts, self.updates, strict=True):
            self.multiply(stack, gram, out=update)
        for buffer, parts in zip(self.buffers, self.parts, strict=True):
            buffer.scatter(parts, targets, coef)


def _columns(view: Tensor) -> int | None:
    """How many columns to multiply with, if more: 16 on a CPU where there are almost as many.

    There a vector has 16 numbers, and what is left beside whole vectors costs more than it
    counts: at rank 11, 96 rows, Grams and updates take 62 µs instead of 178, copies 29 µs.
    """
    return 16 if view.is_cpu and 8 < view.shape[-1] < 16 else None


class _Alike:
    """Products of equal shapes of any other structure, computed as one, a batch axis more."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        first = jobs[0]
        self.structure, self.batch = first.structure, first.batch + 1
        self.buffers = [
            _Stacks({job.row.start + j: job.views[j] for job in jobs}, first.dtype)
            for j in range(len(first.views))
        ]

    def __call__(
        self, targets: Targets, coefs: Coefs, form: object = None, grams: Grams | None = None
    ) -> None:
        wanted: list[Coefficient | None] = [
            together([coefs[slot] for slot in buffer.slots], buffer.rows, 1)
            if any(targets[slot] is not None for slot in buffer.slots)
            else None
            for buffer in self.buffers
        ]
        gathered = [buffer.gather()[0] for buffer in self.buffers]
        found = self.structure.gradients(gathered, self.batch, wanted)
        for buffer, gradient in zip(self.buffers, found, strict=True):
            if gradient is not None:
                buffer.scatter(gradient.contiguous().unbind(), targets)


def together(coefs: Sequence[Coefficient], like: Tensor, ndim: int | None = None) -> Coefficient:
    """One coefficient for a stack: the number all share, or a tensor (products, 1, …, 1).

    Numbers are written by an accelerator itself: nothing is copied there, and a CUDA graph keeps
    them.
    """
    numbers = not any(issubclass(kind, Tensor) for kind in {*map(type, coefs)})
    if numbers and coefs.count(coefs[0]) == len(coefs):
        return coefs[0]
    if numbers and like.is_cpu:
        column = like.new_tensor(coefs)
    else:
        column = torch.stack(
            [
                coef.to(like.device, like.dtype, non_blocking=not like.is_cpu).reshape(())
                if isinstance(coef, Tensor)
                else like.new_full((), coef)
                for coef in coefs
            ]
        )
    ndim = like.ndim if ndim is None else ndim
    return column.reshape(-1, *(1 for _ in range(ndim - 1)))
