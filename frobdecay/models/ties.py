"""Weights that several modules share: a copy of its own for each that is factorized.

Models of transformers tie weights again whenever ``tie_weights`` is called, as in resizing, by a
table that each model has. It is told which are tied no more. The configuration stays as it is: it
speaks of all ties of a model at once, and of other things. A dense model with copies that differ
is saved with all of them, and loaded so by transformers 5, which says so in a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from inspect import getattr_static
from typing import Any

from frobdecay.models.select import Walk, Weight

Ties = dict[str, str]


def other_ties(walk: Walk, untied: Iterable[Weight]) -> list[tuple[Any, Ties, Ties]]:
    """Look up, while all weights are dense, what stays tied in transformers' models.

    Returns:
        The models that lose a tie, with their own ties that stay, and with those below too. Where
        the weight that others are tied to is untied, the first of them takes its place.
    """
    names = {name for weight in untied for name in weight.names}
    others: list[tuple[Any, Ties, Ties]] = []
    for path, module in walk.modules.items() if names else ():
        prefix = f"{path}." if path else ""
        every = getattr_static(module, "all_tied_weights_keys", None)  # not of one inside
        if isinstance(every, dict):
            # Its own are patterns, which it expands to names.
            tables = (module.get_expanded_tied_weights_keys(), every)  # type: ignore[operator]
            own, rest = (
                _staying(table, {n.removeprefix(prefix) for n in names}) for table in tables
            )
            if rest != every:
                others.append((module, own, rest))
    return others


def _staying(table: Ties, untied: Set[str]) -> Ties:
    """The ties among the other weights."""
    heirs: Ties = {}
    found: Ties = {}
    for to, by in table.items():
        heir = heirs.setdefault(by, to) if by in untied and to not in untied else by
        if to not in untied and to != heir:
            found[to] = heir
    return found


def forget_ties(others: Iterable[tuple[Any, Ties, Ties]]) -> None:
    """Have models tie again what stays tied, and nothing else."""
    for module, own, rest in others:
        module._tied_weights_keys, module.all_tied_weights_keys = own, rest
