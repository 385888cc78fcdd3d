"""What an experiment is: one table of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.experiments.engine import Trial

__all__ = ["Claim", "Experiment", "carried_over"]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as a comparison: ``arm`` is better than ``against``.

    Attributes:
        text: what is claimed, in our words.
        arm, against: keys of the arms; without the second, the bound of the first arm's nuclear
            norm is met: 1 - bound / nuclear norm, which is 0 at best.
        tuned: for an experiment whose variants differ in one number (``Experiment.along``), where
            the arms are compared: "reference", at the variant that is best for the reference arm;
            "own", each at its own best; "regret", what an arm loses by the reference's best
            against its own best, which is 0 or less where nothing is lost. Otherwise in each
            variant, see ``transfer.py``.
        margin: by how much it may fall short and the claim still hold, in the score's unit.
    """

    text: str
    arm: str
    against: str | None
    margin: float = 0.0
    tuned: str = ""


def carried_over(margin: float, said: str) -> list[Claim]:
    """What is asked where variants differ in λ beside AdamW: does the dense network's carry over?

    Args:
        margin: what SI & FD may lose by it, in the score's unit.
        said: the same in words.
    """
    return [
        Claim(
            f"the dense network's λ costs SI & FD at most {said} against its own best",
            "sifd",
            None,
            margin,
            tuned="regret",
        ),
        Claim("and costs low-rank + SI more than that", "sifd", "si", tuned="regret"),
        Claim("at that λ SI & FD is better than SI", "sifd", "si", tuned="reference"),
        Claim("so it is where each has its own best λ", "sifd", "si", tuned="own"),
        Claim("SI is better than plain low-rank there", "si", "lowrank", tuned="own"),
    ]


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
        some: (preset, variant) -> its arms, where it does not have all of them.
        claims: what the table is held against, see ``verdicts.py``.
        along: the number in which its variants differ, a field of the protocol; the picture is
            then of the score against it.
        reference: the arm whose best variant the others are given.
        larger_is_better: of the score.
        digits: of the score, behind the point.
    """

    title: str
    claim: str
    arms: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]]
    changes: Mapping[str, str]
    trial: Callable[..., Trial]
    score: str
    baseline: str = "lowrank"
    some: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    along: str = ""
    reference: str = "dense"
    larger_is_better: bool = True
    digits: int = 2
