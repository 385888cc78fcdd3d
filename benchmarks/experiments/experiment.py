"""What an experiment is: one table of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.experiments.engine import Trial

__all__ = ["Experiment"]


@dataclass(frozen=True)
class Experiment:
    """One table of the paper.

    Attributes:
        title: for the page of results.
        claim: what the paper says, to be held against the table.
        arms: key -> arm, in the table's order.
        presets: name -> variant -> protocol; a variant is a group of rows such as a ratio.
        changes: preset -> what differs from the paper.
        trial: made from (out, arm=…, seed=…, protocol=…, key=…, after=…).
        score: what the numbers are.
        baseline: the arm that others are compared with, seed by seed.
        some: variant -> its arms, where it does not have all of them.
    """

    title: str
    claim: str
    arms: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]]
    changes: Mapping[str, str]
    trial: Callable[..., Trial]
    score: str
    baseline: str = "lowrank"
    some: Mapping[str, Sequence[str]] = field(default_factory=dict)
