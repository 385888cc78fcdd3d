"""Which rank where: explicit, for a share of the parameters, or for a share of the energy.

A plan is made without touching the model and without copies; a search over parameter counts needs
no decomposition either. For ``ratio=`` one scale s sets every rank, r = round(s · min(m, n)), at
least 1, and a layer stays dense where its factors would not be smaller. The parameter count is a
rising step function of s; bisection down to neighbouring floats finds the step that crosses the
target, and the nearer of its two sides is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import compress
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.algebra.scaling import Unit, times_power, work_dtype
from frobdecay.algebra.svd import gram
from frobdecay.algebra.tensorize import Rank, Tensorization, plain_ranks
from frobdecay.models.budget.entry import Entry
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
    include: Selector | None = None,
    exclude: Selector | None = None,
    parametrization: Callable[..., nn.Module] = LowRank,
    on_tied: OnTied = "skip",
) -> RankPlan:
    """Plan a factorization: a dry run of ``factorize`` that changes nothing.

    Examples:
        >>> import torch
        >>> plan_ranks(torch.nn.Linear(100, 50), ratio=0.3).ranks
        {'weight': 10}

    Give one of ``ratio``, ``rank`` and ``energy``. Works on the meta device, except for ``energy``.

    Args:
        model: any module.
        ratio: parameters to keep ÷ all parameters of the model, between 0 and 1; the nearest that
            ranks r = round(s · min(m, n)) of one common scale s attain. Where factors would not be
            smaller than the weight, it stays dense.
        rank: as for ``factorize``; obeyed also where it does not pay.
        energy: the smallest rank that keeps this share of each ‖W‖_F², above 0 and at most 1.
            Where that does not pay, the weight stays dense.
        include: what to factorize, see ``factorize``.
        exclude: what not to.
        parametrization: as for ``factorize``.
        on_tied: as for ``factorize``. The copies of "untie" count as the model's, before and after.

    Returns:
        The plan; print it. ``factorize(model, rank=plan)`` executes it.

    Raises:
        TypeError, ValueError: selectors that match nothing, weights that were named and cannot be
            factorized, a ratio that cannot be attained (says what can), ranks that are none.
    """
    walk = Walk(model)
    return planned(
        *plan_entries(walk, ratio, rank, energy, include, exclude, parametrization, {}, on_tied)
    )


def planned(found: list[Entry], before: int) -> RankPlan:
    """The plan of decided entries, of a model with ``before`` parameters."""
    rows = tuple(entry.row() for entry in found)
    return RankPlan(rows, before, before + sum(row.after - row.before for row in rows))


def plan_entries(
    walk: Walk,
    ratio: float | None,
    rank: RankRule | None,
    energy: float | None,
    include: Selector | None,
    exclude: Selector | None,
    parametrization: Callable[..., nn.Module],
    options: Mapping[str, Any],
    on_tied: OnTied,
) -> tuple[list[Entry], int]:
    """The work of ``plan_ranks`` and the first half of ``factorize``.

    Returns:
        The weights looked at, in module order, each with a rank or a reason; and how many
        parameters the model has, with the copies of those that are to be untied.
    """
    given = {"ratio": ratio, "rank": rank, "energy": energy}
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            "expected exactly one of rank=, ratio= and, of plan_ranks alone, energy=, got "
            f"{' and '.join(names) or 'none'}; factorize(model, rank=plan) executes a plan"
        )
    _check_share("ratio", ratio, below=True)
    _check_share("energy", energy, below=False)
    rule = rank.ranks if isinstance(rank, RankPlan) else rank
    before = counted(walk.model)
    if isinstance(rule, Mapping):
        rule = _checked(walk, rule)
        include = list(rule) if include is None else include
    found = candidates(walk, include, exclude, parametrization, options, on_tied)
    before += sum(entry.copied for entry in found)
    if rule is not None:
        _explicit(walk, found, rule)
    elif ratio is not None:
        _by_ratio(found, before, ratio)
    else:
        assert energy is not None
        _by_energy(found, energy)
    return found, before


def _check_share(name: str, value: float | None, below: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected {name} as a float, got {value!r}")
    if not isfinite(value) or not 0 < value <= 1 or (below and value == 1):
        hint = "; rank= makes a model wider or leaves its size" if below else ""
        bound = "below 1" if below else "at most 1"
        raise ValueError(f"expected {name} above 0 and {bound}, got {value}{hint}")


def _checked(walk: Walk, rule: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dict of ranks by selectors that match something; names without wrappers' segments."""
    rule = dict(zip(each(list(rule), "the keys of rank"), rule.values(), strict=True))
    for key, value in rule.items():
        walk.choice.met(key, "rank")
        with naming(f"rank[{key!r}]"):
            plain_ranks(value)
    return rule


def _explicit(walk: Walk, found: list[Entry], rule: Any) -> None:
    """The ranks that were asked for."""
    if not isinstance(rule, Mapping):
        plain_ranks(rule)  # refuses what is none
        rule = {nn.Module: rule}
    keys = _keys(walk.modules, [entry.weight for entry in found], rule)
    for i, entry in enumerate(found):
        if entry.open and i in keys:
            entry.take(entry.rank_at(rule[keys[i]]))
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


def _by_ratio(found: list[Entry], total: int, ratio: float) -> None:
    """The common scale whose parameter count comes nearest to the target."""
    target = ratio * total
    candidates = [entry for entry in found if entry.open]
    fixed = total - sum(entry.dense for entry in candidates)
    # Weights that are read alike get one rank: each shape is asked once, however many there are.
    alike: defaultdict[Any, list[Entry]] = defaultdict(list)
    for entry in candidates:
        alike[_reading(entry)].append(entry)

    def sizes(scale: float, some: Iterable[list[Entry]]) -> list[int]:
        return [len(same) * one.size_at(scale) for same in some for one in same[:1]]

    low, high = 5e-324, 1.0  # all ranks 1; and all dense, since r (m + n) ≥ mn at r = min(m, n)
    moving = list(alike.values())
    below, above = sizes(low, moving), sizes(high, moving)
    while fixed + sum(above) < target and high < 2**30:  # a tensor's ranks may exceed its modes
        high *= 2
        above = sizes(high, moving)
    if (least := fixed + sum(below)) > target:
        raise ValueError(
            f"ratio={ratio} cannot be attained: with every rank 1, {least:,} of "
            f"{total:,} parameters remain; attainable are {least / total:.4g} to 1. Take a "
            "larger ratio, or include more weights"
        )
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
    nearest = min(ends, key=lambda scale: abs(fixed + ends[scale] - target))
    for same in alike.values():
        rank = same[0].rank_at(nearest)
        for entry in same:
            entry.settle(rank)


def _reading(entry: Entry) -> Any:
    """What its parameter counts depend on, of weights with one parametrization."""
    view = entry.view
    assert view is not None
    return view.pattern, view.shape, tuple(view.sizes.items()), view.matrix_shape


def _by_energy(found: list[Entry], energy: float) -> None:
    """The smallest rank that keeps a share of each weight's squared norm."""
    for entry in (entry for entry in found if entry.open):
        assert entry.weight.tensor is not None
        assert entry.view is not None
        if isinstance(entry.view, Tensorization):
            raise ValueError(
                f"{entry.weight.name} is read as a tensor, whose energy is no sum over ranks; plan "
                "with rank= or ratio="
            )
        check_values(entry.weight)
        sigma = singular_values(entry.view.matrix(entry.weight.tensor.detach()))
        entry.settle(energy_rank(sigma, energy))


def energy_rank(sigma: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share of Σσ², from σ (*batch, k), largest first."""
    squares = (sigma / sigma.max().clamp_min(torch.finfo(sigma.dtype).tiny)).square()
    kept = squares.reshape(-1, squares.shape[-1]).sum(0).cumsum(0)
    return 1 + int((kept < energy * kept[-1]).sum())


def singular_values(matrix: Tensor) -> Tensor:
    """σ (*batch, k), largest first, from the smaller Gram; in float64 where there is one."""
    unit = Unit(matrix)
    tall = unit if matrix.shape[-2] >= matrix.shape[-1] else unit.mT
    squares = torch.linalg.eigvalsh(gram(tall, work_dtype(matrix))).flip(-1).clamp_min(0)
    return times_power(squares.sqrt(), unit.exponent.squeeze(-1))
