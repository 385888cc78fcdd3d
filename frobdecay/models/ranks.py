"""Which rank where: explicit, for a share of the parameters, of the energy, or within a tolerance.

A plan is made without touching the model and without copies. What a budget leaves dense and how it
is divided is in ``budget/``; for the allocations "fraction" and "uniform" nothing is decomposed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from frobdecay.algebra.tensorize import Rank, plain_ranks
from frobdecay.models.budget.allocation import Goal
from frobdecay.models.budget.entry import Entry, Initialization
from frobdecay.models.budget.search import Search
from frobdecay.models.candidates import OnTied, candidates, check_any
from frobdecay.models.fitness import check_values, counted
from frobdecay.models.plan import RankPlan
from frobdecay.models.select import Walk, Weight, asked, choice_of, names_exactly
from frobdecay.product.names import One, Selector, each, naming
from frobdecay.weights.lowrank import LowRank

RankRule = Rank | Mapping[Any, Rank] | RankPlan


def plan_ranks(
    model: nn.Module,
    *,
    ratio: float | None = None,
    rank: RankRule | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
    allocate: str | RankPlan | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    parametrization: Callable[..., nn.Module] = LowRank,
    init: Initialization = "spectral",
    on_tied: OnTied = "skip",
    progress: bool | None = None,
) -> RankPlan:
    """Plan a factorization: a dry run of ``factorize`` that changes nothing.

    Examples:
        >>> import torch
        >>> plan_ranks(torch.nn.Linear(100, 50), ratio=0.3, include="weight").ranks
        {'weight': 10}

    Give one of ``ratio``, ``rank``, ``energy`` and ``tolerance``. Works on the meta device, where
    it needs no numbers.

    Args:
        model: any module.
        ratio: parameters to keep, between 0 and 1: of all of the model's, or, with ``include``, of
            those of the weights that it selects. The nearest that can be attained is. Without
            ``include`` some weights stay dense, see ``budget/kept.py``: the first and the last,
            where they are a small part of what is kept, and the smallest others.
        rank: as for ``factorize``; obeyed also where it does not pay.
        energy: the smallest rank that keeps this share of each ‖W‖_F², above 0 and at most 1.
        tolerance: instead of ``ratio``, the smallest that raises the loss of the dense model by
            this share of it at most.
        allocate: how a budget is divided: "fraction" (of min(m, n), one for all ranks), "uniform"
            (one share of each weight's parameters), "energy", "sensitivity" or, for its prices, a
            plan by "sensitivity" with the same ``init``; see ``budget/allocation.py``.
        evaluate: model -> loss, the lower the better; "sensitivity" and ``tolerance`` call it,
            with weights that are truncated, and restored afterwards, as are the model's mode and
            its buffers. It may change no parameter.
        include: what to factorize, see ``factorize``.
        exclude: what not to.
        parametrization: as for ``factorize``.
        init: as for ``factorize``.
        on_tied: as for ``factorize``. The copies of "untie" count as the model's, before and after.
        progress: as for ``factorize``.

    Returns:
        The plan; print it. ``factorize(model, rank=plan)`` executes it.

    Raises:
        TypeError, ValueError: selectors that match nothing, weights that were named and cannot be
            factorized, a budget that cannot be met (says what can), ranks that are none.
    """
    walk = Walk(model)
    goal = Goal(rank, ratio, energy, tolerance, allocate, evaluate, progress)
    return planned(*plan_entries(walk, goal, include, exclude, parametrization, init, on_tied))


def planned(found: list[Entry], before: int) -> RankPlan:
    """The plan of decided entries, of a model with ``before`` parameters."""
    rows = tuple(entry.row() for entry in found)
    return RankPlan(rows, before, before + sum(row.after - row.before for row in rows))


def plan_entries(
    walk: Walk,
    goal: Goal,
    include: Selector | None,
    exclude: Selector | None,
    parametrization: Callable[..., nn.Module],
    init: Initialization,
    on_tied: OnTied,
) -> tuple[list[Entry], int]:
    """The work of ``plan_ranks`` and the first half of ``factorize``.

    Returns:
        The weights looked at, in module order, each with a rank or a reason; and how many
        parameters the model has, with the copies of those that are to be untied.
    """
    rule = goal.rank.ranks if isinstance(goal.rank, RankPlan) else goal.rank
    count = counted(walk.model)
    chosen = include
    if isinstance(rule, Mapping):
        rule = _checked(walk, rule)
        chosen = list(rule) if include is None else include
    left: dict[str, str] = {}
    while True:
        found = candidates(walk, chosen, exclude, parametrization, init, on_tied, left)
        before = count + sum(entry.copied for entry in found)
        if isinstance(goal.rank, RankPlan):
            _check_plan(found, goal.rank)
        if rule is not None:
            _explicit(walk, found, rule)
        elif goal.energy is not None:
            for entry in [entry for entry in found if entry.open]:
                check_values(entry.weight)
                entry.settle(entry.energy_rank(goal.energy))
        else:
            _within_budget(walk, found, goal, before, include is not None)
        idle = [entry for entry in found if entry.untied and entry.made is None]
        if not idle:
            return found, before
        # A weight that is untied to stay dense costs its copy, for nothing: once more without.
        left |= {e.weight.name: f"{e.reason}; stays tied to {', '.join(e.untied)}" for e in idle}
        if any(entry.price is not None for entry in found):  # which took long to measure
            priced = RankPlan(tuple([entry.row() for entry in found]), before, before)
            loss = None if goal.tolerance is None else goal.evaluate
            goal = replace(goal, allocate=priced, evaluate=loss)


def _within_budget(walk: Walk, found: list[Entry], goal: Goal, before: int, included: bool) -> None:
    """The ranks that a share of the parameters, or a tolerance of the loss, leaves."""
    kind, loss = goal.allocator, goal.loss(walk.model)
    entries = [entry for entry in found if entry.open]
    if not kind.alike or loss is not None:
        for entry in entries:
            check_values(entry.weight)
    rank_of = kind.make(entries, loss)
    total, whole = before, "the model (with include=, it is of what that selects)"
    if included:
        total, whole = _selected(found), "the weights that include= selects, not of the model"
    search = Search(found, total, rank_of, kind.alike, not included, whole)
    if goal.ratio is not None:
        search.settle(goal.ratio)
    else:
        assert goal.tolerance is not None
        assert loss is not None
        search.settle_within(goal.tolerance, loss)


def _selected(found: list[Entry]) -> int:
    """Parameters of the weights that a selection took, once each; the copies of untied ones too."""
    taken = [entry for entry in found if not entry.weight.met and not entry.weight.excluded]
    fixed = {
        id(entry.weight.tensor if entry.there is None else entry.there): entry.dense
        for entry in taken
        if not entry.open
    }
    return sum(fixed.values()) + sum(entry.dense for entry in taken if entry.open)


def _checked(walk: Walk, rule: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dict of ranks by selectors that match something; names without wrappers' segments."""
    rule = dict(zip(each(list(rule), "the keys of rank"), rule.values(), strict=True))
    for key, value in rule.items():
        walk.choice.met(key, "rank")
        with naming(f"rank[{key!r}]"):
            plain_ranks(value)
    return rule


def _check_plan(found: list[Entry], plan: RankPlan) -> None:
    """Refuse a plan of other parametrizations than those that the weights are to get."""
    rows = {row.name: row for row in plan.rows if row.made is not None}
    for entry in found:
        row = next((rows[name] for name in entry.weight.names if name in rows), None)
        if not entry.open or row is None:
            continue
        own = entry.made_at(1)
        same = type(own) is type(row.made) and row.shape == entry.shape
        same = same and row.made.matricize(row.shape) == entry.view
        if not same or entry.size(row.rank) != row.after:  # type: ignore[arg-type]
            raise ValueError(
                f"{entry.weight.name}: expected what the plan is of, a weight of shape {row.shape} "
                f"in {row.after:,} numbers of a {type(row.made).__name__}, got a "
                f"{type(own).__name__} of shape {entry.shape} that is read otherwise; give "
                "parametrization= as it was given to the plan"
            )


def _explicit(walk: Walk, found: list[Entry], rule: Any) -> None:
    """The ranks that were asked for."""
    if not isinstance(rule, Mapping):
        plain_ranks(rule)  # refuses what is none
        rule = {nn.Module: rule}
    keys = _keys(walk.modules, [entry.weight for entry in found], rule)
    for i, entry in enumerate(found):
        if entry.open and i in keys:
            entry.made = entry.made_at(entry.rank_at(rule[keys[i]]))
        elif entry.open:
            entry.reason = "no rank given for it"
    check_any(walk.model, found, [entry.made is not None for entry in found])


def _keys(
    tree: dict[str, nn.Module], found: list[Weight], rule: Mapping[Any, Any]
) -> dict[int, One]:
    """Each weight's key: its own name, then its module's, then the first that matches."""
    choice, known = choice_of(found, tree), [i for i, w in enumerate(found) if w.known]
    own: dict[int, One] = {}
    holders: dict[int, One] = {}
    first: dict[int, One] = {}
    for key in rule:
        for i in asked(found, key, choice.taking(key, known)):
            exact = own if key in found[i].names else holders
            (exact if names_exactly(found[i], key) else first).setdefault(i, key)
    return first | holders | own
