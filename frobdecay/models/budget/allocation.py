"""What decides the ranks, and how a budget is divided among weights: a table of allocators.

    fraction      one fraction of min(m, n) as every weight's rank
    uniform       one share of every weight's parameters
    energy        most of the weights' relative ‖W‖² for the parameters
    sensitivity   as energy, at the price that the user's loss was measured to pay for each weight

An allocator looks at the weights once and returns a function of a weight and a level, a number
above 0, which gives the weight's rank: never less at a higher level, full at level 1 or above. The
level at which the parameters meet the budget is then found by ``search``, alike for all. A further
allocator is a function and its entry in the table.

Energy is counted in the metric of the initialization (``Entry.energies``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import nn

from frobdecay.algebra.tensorize import Rank, Tensorization
from frobdecay.models.budget.entry import Entry
from frobdecay.models.budget.loss import Evaluate, Loss
from frobdecay.models.plan import RankPlan
from frobdecay.models.progress import Progress

ALLOCATION = "fraction"
"""The allocator that is taken unless another is named."""

RankOf = Callable[[Entry, float], Rank]
Make = Callable[[Sequence[Entry], Loss | None], RankOf]

PROBED = (0.25, 0.5, 0.75)
"""Shares of a weight's parameters at which its sensitivity is measured."""


@dataclass(frozen=True)
class Allocator:
    """An entry of the table.

    Attributes:
        make: weights -> (weight, level) -> rank.
        alike: whether weights that are read alike get one rank, so that one of them is asked.
        measures: whether it needs the user's loss.
    """

    make: Make
    alike: bool = False
    measures: bool = False


def fraction(entries: Sequence[Entry], measured: Loss | None) -> RankOf:
    """R = round(level · min(m, n))."""
    return lambda entry, level: level


def uniform(entries: Sequence[Entry], measured: Loss | None) -> RankOf:
    """The largest rank whose factors have at most level · mn parameters, or rank 1."""
    return lambda entry, level: within(entry, level * entry.dense)


def within(entry: Entry, parameters: float) -> Rank:
    """The largest rank whose factors have so many parameters at most; the smallest, if none has."""
    view = entry.view
    assert view is not None
    tensor = isinstance(view, Tensorization)
    # A tensor's ranks are fractions of its modes, which may exceed 1 as a matrix's may min(m, n).
    scale = 1 / 1024 if tensor else 1
    top = 4096 if tensor else 2 * min(view.matrix_shape[-2:])
    steps = range(1, top + 1)
    found = bisect_left(steps, True, key=lambda k: entry.size(k * scale) > parameters)
    return max(1, found) * scale


def energy(entries: Sequence[Entry], measured: Loss | None) -> RankOf:
    """Ranks in order of the share of their weight's energy, by its price, for each parameter.

    The level is the share of them that is taken.
    """
    prices = [1.0 if entry.price is None else entry.price for entry in entries]
    # One that does not matter, or whose truncation helps, is still cut in the order of its energy.
    least = 1e-3 * max([*prices, torch.finfo(torch.float32).tiny])
    gains = []
    for entry, price in zip(entries, prices, strict=True):
        # Of U M₁ … M_d Vᵀ each further rank costs more than the one before: a r + d r².
        first, second = entry.size(1), entry.size(2)
        further = torch.arange(len(entry.energies), dtype=torch.float64, device="cpu")
        costs = first + (second - 2 * first) * further
        gains.append(max(price, least) * entry.energies / costs)
    if not gains:
        return lambda entry, level: 1
    order = torch.argsort(torch.cat(gains), descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), dtype=order.dtype, device="cpu")
    parts = torch.split(places, [len(gain) for gain in gains])
    turns = {id(entry): part.sort()[0].tolist() for entry, part in zip(entries, parts, strict=True)}
    return lambda entry, level: max(1, bisect_left(turns[id(entry)], level * len(order)))


def sensitivity(entries: Sequence[Entry], measured: Loss | None) -> RankOf:
    """The same, where a weight's energy is worth what the loss rose when it alone was truncated."""
    assert measured is not None
    kept = [entry.energies for entry in entries]  # refuses tensors before it measures
    count = 1 + len(PROBED) * len(entries)
    with Progress(count, measured.progress, "measuring how much each weight matters") as bar:
        base = measured.of()
        bar.advance(1)
        for entry, shares_of in zip(entries, kept, strict=True):
            rises, losses = [], []
            for share in PROBED:
                rank = within(entry, share * entry.dense)
                assert isinstance(rank, int)
                rises.append(measured.of([entry.truncated(rank)]) - base)
                losses.append(float(shares_of[rank:].sum()))
                bar.advance(1)
            # Least squares of rise = price · loss: the rise is quadratic in the error, near a
            # minimum, and so linear in the energy that is lost.
            squares = sum(loss * loss for loss in losses)
            product = sum(rise * loss for rise, loss in zip(rises, losses, strict=True))
            entry.price = product / squares if squares else 0.0
    return energy(entries, measured)


def repeated(plan: RankPlan, entries: Sequence[Entry], measured: Loss | None) -> RankOf:
    """The same at the prices that were measured for another plan of these weights."""
    known = {(row.name, row.shape): row for row in plan.rows if row.price is not None}
    for entry in entries:
        places = [(name, entry.shape) for name in entry.weight.names]
        row = next((known[place] for place in places if place in known), None)
        calibrated = entry.metric is not None
        if row is None or row.calibrated != calibrated:
            whose = ("the energy of ‖W‖²", "the energy of its outputs, as of calibrated init=")
            got = "without" if row is None else f"with one for {whose[not calibrated]}"
            raise ValueError(
                f"{entry.weight.name}: expected allocate= to be a plan by 'sensitivity' in which, "
                f"of shape {tuple(entry.shape)}, it has a price for {whose[calibrated]}, got one "
                f"{got}; measure it with the init= that is asked for now, or exclude= it"
            )
        entry.price = row.price
    return energy(entries, measured)


ALLOCATORS = {
    "fraction": Allocator(fraction, alike=True),
    "uniform": Allocator(uniform, alike=True),
    "energy": Allocator(energy),
    "sensitivity": Allocator(sensitivity, measures=True),
}


@dataclass(frozen=True)
class Goal:
    """What decides the ranks; see ``plan_ranks``.

    Raises:
        TypeError, ValueError: not exactly one rule, or one that cannot be.
    """

    rank: Any = None
    ratio: float | None = None
    energy: float | None = None
    tolerance: float | None = None
    allocate: str | RankPlan | None = None
    evaluate: Evaluate | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        rules = ("ratio", "rank", "energy", "tolerance")
        names = [f"{name}=" for name in rules if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(
                "expected exactly one of rank=, ratio=, tolerance= and, of plan_ranks alone, "
                f"energy=, got {' and '.join(names) or 'none'}; factorize(model, rank=plan) "
                "executes a plan"
            )
        _check_share("ratio", self.ratio, below=True)
        _check_share("energy", self.energy, below=False)
        _check_share("tolerance", self.tolerance, below=False)
        if not isinstance(self.allocate, RankPlan) and self.allocate not in (None, *ALLOCATORS):
            raise ValueError(
                f"expected allocate to be one of {sorted(ALLOCATORS)} or a plan by 'sensitivity', "
                f"got {self.allocate!r}"
            )
        budget = self.ratio is not None or self.tolerance is not None
        if self.allocate is not None and not budget:
            raise ValueError(
                f"allocate= divides a budget: give ratio= or tolerance=, not {names[0]}"
            )
        needed = self.tolerance is not None or self.allocator.measures
        if needed and not callable(self.evaluate):
            why = "tolerance=" if self.tolerance is not None else f"allocate={self.allocate!r}"
            raise TypeError(
                f"{why} needs evaluate=, a function that takes the model and returns its loss, "
                f"got {self.evaluate!r}"
            )
        if self.evaluate is not None and not needed:
            raise ValueError(
                "evaluate= is for tolerance= or allocate='sensitivity'; give one of them"
            )

    @property
    def allocator(self) -> Allocator:
        """How the budget is divided."""
        if isinstance(self.allocate, RankPlan):
            return Allocator(partial(repeated, self.allocate))
        return ALLOCATORS[self.allocate or ALLOCATION]

    def loss(self, model: nn.Module) -> Loss | None:
        """The user's loss of a model, if one is given."""
        return None if self.evaluate is None else Loss(model, self.evaluate, self.progress)


def _check_share(name: str, value: float | None, below: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected {name} as a float, got {value!r}")
    if not isfinite(value) or not 0 < value <= 1 or (below and value == 1):
        hint = "; rank= makes a model wider or leaves its size" if below else ""
        bound = "below 1" if below else "at most 1"
        raise ValueError(f"expected {name} above 0 and {bound}, got {value}{hint}")
