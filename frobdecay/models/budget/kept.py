"""What stays dense under a budget, by a rule that needs the model's structure only.

Of all weights that a budget could shrink, these are not worth it:

    the ends     the first and the last weight in module order, the smaller one first, while
                 together they take no more than a third of the budget
    the small    the smallest others, those of one size together, while they take no more than a
                 twentieth
    the narrow   whose factors would not be smaller at rank ``FLOOR``; no other gets a lower rank

At a classifier's rank 1 of 10 nothing trains, and dense it costs a few hundred numbers. Shares are
of the budget, not of the model, so that the rule is the same for a network of six layers and of a
hundred. Module order is the order of registration, which a forward pass need not follow: a head
that is registered first, or the second of two heads, is an end only as far as it is small. What
``include=`` names is not subject to it, nor is a rank that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from frobdecay.algebra.matricize import Matricization
from frobdecay.models.budget.entry import Entry

ENDS, SMALL = 1 / 3, 1 / 20
"""Shares of the budget that the ends, and that small weights, may take dense."""

FLOOR = 2
"""The lowest rank under a budget."""


def ends(found: Sequence[Entry]) -> dict[int, str]:
    """Position in ``found``, the weights in module order, of the ends -> what they are."""
    known = [k for k, entry in enumerate(found) if not entry.weight.met]
    return dict.fromkeys(known[-1:], "the last layer") | dict.fromkeys(known[:1], "the first layer")


def keep(found: Sequence[Entry], budget: float) -> None:
    """Decide which open weights stay dense under a budget, and give the others the floor."""
    at = ends(found)
    pays = [k for k, one in enumerate(found) if one.open and one.size_at(1) < one.dense]
    for k in _affordable(found, [[k] for k in at if k in pays], ENDS * budget):
        found[k].reason = f"kept dense: {at[k]}"
    rest = sorted((k for k in pays if found[k].open), key=lambda k: found[k].dense)
    alike = [list(same) for _, same in groupby(rest, key=lambda k: found[k].dense)]
    for k in _affordable(found, alike, SMALL * budget):
        found[k].reason = "kept dense: among the smallest"
    for entry in found:
        if entry.open and isinstance(entry.view, Matricization):
            entry.floor = min(FLOOR, *entry.view.matrix_shape[-2:])


def release(found: Sequence[Entry]) -> None:
    """Take all of that back."""
    for entry in found:
        entry.floor = 1
        if entry.reason is not None and entry.reason.startswith("kept dense"):
            entry.reason = None


def _affordable(found: Sequence[Entry], groups: Iterable[Sequence[int]], most: float) -> list[int]:
    """The smallest groups that together have so many parameters at most."""
    taken: list[int] = []
    for group in sorted(groups, key=lambda group: found[group[0]].dense):
        most -= sum(found[k].dense for k in group)
        if most < 0:
            break
        taken += group
    return taken
