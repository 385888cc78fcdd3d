"""The level of an allocation at which the weights have the parameters that were asked for.

The count of parameters is a rising step function of the level. Bisection down to neighbouring
floats finds the step that crosses the target, and the nearer of its two sides is taken. No search
decomposes anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from math import inf
from typing import Any

from frobdecay.algebra.reading import Matricization
from frobdecay.algebra.tensorize import Rank
from frobdecay.models.budget.entry import Entry
from frobdecay.models.budget.kept import floor, kept
from frobdecay.models.budget.loss import Loss
from frobdecay.models.progress import Progress

STEPS = 8
"""Halvings of the range of ratios in which a tolerance is searched: to 1/256 of it."""


@dataclass
class Search:
    """How the open weights of a model share what a budget leaves to them.

    Attributes:
        found: all weights that were looked at, in module order.
        total: the parameters that a ratio is of.
        rank_of: (weight, level) -> rank, see ``allocation``.
        alike: whether weights that are read alike get one rank, so that one of them is asked.
        rule: whether some stay dense by the rule of ``kept``.
        whole: what ``total`` counts, in words.
    """

    found: Sequence[Entry]
    total: int
    rank_of: Callable[[Entry, float], Rank]
    alike: bool
    rule: bool
    whole: str

    def settle(self, ratio: float) -> None:
        """Decide all open weights, for a share of the parameters.

        Raises:
            ValueError: it cannot be attained; says what can.
        """
        target = ratio * self.total
        if self.rule:
            ruled = self._keep(target)
            if self._least() > target:  # what was asked for goes before the rule
                for entry in ruled:
                    entry.floor = 1
            if self._least() > target:
                for entry in ruled:
                    entry.reopen()
        if (least := self._least()) > target:
            raise ValueError(self._unattainable(ratio, least))
        groups = self._alike()
        level = self._level(groups, target)
        for same in groups:
            rank = same[0].rank_at(self.rank_of(same[0], level))
            for entry in same:
                entry.settle(rank)

    def settle_within(self, tolerance: float, measured: Loss) -> None:
        """Decide all open weights, by the smallest share at which the loss is within a tolerance.

        Raises:
            ValueError: it is at no share that was tried, or no share is smaller than the model.
        """
        undecided = [entry for entry in self.found if entry.open]
        low, high, worse = self._least() / self.total, 1.0, inf
        if low >= 1:
            raise ValueError("factors make no weight smaller; include= larger ones, or give rank=")
        with Progress(STEPS + 1, measured.progress, "searching the smallest model") as bar:
            dense = measured.of()
            bar.advance(1)
            limit = dense + tolerance * abs(dense)
            for _ in range(STEPS):
                middle = (low + high) / 2
                self.settle(middle)
                loss = measured.of(
                    entry.truncated(entry.made.resolve(entry.shape))
                    for entry in undecided
                    if entry.made is not None
                )
                for entry in undecided:
                    entry.reopen()
                bar.advance(1)
                if loss <= limit:
                    high = middle
                else:
                    low, worse = middle, loss
        if high < 1:
            self.settle(high)
        if not any(entry.made is not None for entry in undecided):
            raise ValueError(
                f"tolerance={tolerance} cannot be met: evaluate gives {dense:.6g} for the dense "
                f"model and {worse:.6g} at ratio {low:.4g}, above {limit:.6g}; allow more "
                "(of 0, no share is), try another allocate=, or exclude= what matters most"
            )

    def _keep(self, budget: float) -> list[Entry]:
        """Leave some weights dense, and give the others the floor."""
        known = [k for k, entry in enumerate(self.found) if not entry.weight.met]
        ruled = [entry for entry in self.found if entry.open]
        pays = {
            k: entry.dense
            for k, entry in enumerate(self.found)
            if entry.open and entry.size_at(1) < entry.dense
        }
        for k, reason in kept(known, pays, budget).items():
            self.found[k].reason = f"kept dense: {reason}"
        for entry in ruled:
            if entry.open and isinstance(entry.view, Matricization):
                entry.floor = floor(min(entry.view.matrix_shape[-2:]))
        return ruled

    def _least(self) -> int:
        """Parameters with all open weights at their smallest ranks."""
        return self.total + sum(
            len(same) * (same[0].size_at(1) - same[0].dense) for same in self._alike(True)
        )

    def _alike(self, always: bool = False) -> list[list[Entry]]:
        """The open weights, those together that get one rank."""
        groups: defaultdict[Any, list[Entry]] = defaultdict(list)
        for entry in self.found:
            if entry.open:
                groups[_reading(entry) if self.alike or always else id(entry)].append(entry)
        return list(groups.values())

    def _level(self, groups: Sequence[list[Entry]], target: float) -> float:
        """The level whose parameter count comes nearest to the target."""
        fixed = self.total - sum(len(same) * same[0].dense for same in groups)

        def sizes(level: float, some: Iterable[list[Entry]]) -> list[int]:
            return [len(same) * same[0].size_at(self.rank_of(same[0], level)) for same in some]

        low, high = 5e-324, 1.0  # all ranks the smallest; and, of a matrix, the full one: all dense
        moving = list(groups)
        below, above = sizes(low, moving), sizes(high, moving)
        while fixed + sum(above) < target and high < 2**30:  # a tensor's ranks may exceed its modes
            high *= 2
            above = sizes(high, moving)
        while low < (middle := (low + high) / 2) < high:
            # What is the same at both ends stays so in between, and is not asked again.
            fixed += sum(a for a, b in zip(below, above, strict=True) if a == b)
            apart = [a != b for a, b in zip(below, above, strict=True)]
            moving = list(compress(moving, apart))
            below, above = list(compress(below, apart)), list(compress(above, apart))
            between = sizes(middle, moving)
            if fixed + sum(between) <= target:
                low, below = middle, between
            else:
                high, above = middle, between
        ends = {low: sum(below), high: sum(above)}
        return min(ends, key=lambda level: abs(fixed + ends[level] - target))

    def _unattainable(self, ratio: float, least: int) -> str:
        """Why a ratio cannot be attained, and what can."""
        fixed = [entry for entry in self.found if not entry.open and entry.reason and entry.dense]
        largest = max(fixed, key=lambda entry: entry.dense, default=None)
        also = ""
        if largest is not None:
            also = (
                f"; the largest that is left as it is: {largest.weight.name} ({largest.dense:,}: "
                f"{largest.reason})"
            )
        return (
            f"ratio={ratio} cannot be attained: it is of the {self.total:,} parameters of "
            f"{self.whole}, of which {least:,} remain with every rank 1; attainable are "
            f"{least / self.total:.4g} to 1{also}. Take a larger ratio, or factorize more weights"
        )


def _reading(entry: Entry) -> Any:
    """What its parameter counts depend on, of weights with one parametrization."""
    view = entry.view
    assert view is not None
    return view.shape, view, entry.floor  # views of one pattern all have one hash
