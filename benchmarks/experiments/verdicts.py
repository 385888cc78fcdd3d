"""What the tables say of the paper's claims, by a rule that was there before them.

A claim compares two arms. Their trials are paired by seed; a seed's difference is its mean over the
variants that have both arms. With the 95 % interval of the mean of these (Student's t, as many
degrees of freedom as there are seeds, less one) the claim

    holds           if all of the interval is above -margin,
    fails           if all of it is below,
    is undecided    otherwise: these trials cannot tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

from benchmarks.experiments import transfer
from benchmarks.experiments.experiment import Claim, Experiment
from benchmarks.experiments.tables import Record, by_variant, tightness
from benchmarks.measure import grid

__all__ = ["Judged", "Verdict", "judge", "markdown"]


@dataclass(frozen=True)
class Verdict:
    """A claim beside what was measured.

    Attributes:
        claim: which.
        difference: mean over the seeds, positive where it is in the claim's favour.
        interval: lower and upper end.
        seeds: how many.
    """

    claim: Claim
    difference: float
    interval: tuple[float, float]
    seeds: int

    @property
    def word(self) -> str:
        """By the rule above."""
        low, high = self.interval
        if low > -self.claim.margin:
            return "holds"
        return "fails" if high < -self.claim.margin else "undecided"


def judge(records: Sequence[Record], experiment: Experiment) -> list[Verdict]:
    """Judge all claims that the trials say something about.

    Args:
        records: results of trials.
        experiment: whose claims.

    Returns:
        A verdict for each claim of which there are two seeds at least.
    """
    found = []
    for claim in experiment.claims:
        if claim.tuned:
            values = transfer.differences(records, claim, experiment)
        else:
            values = _differences(records, claim, 1 if experiment.larger_is_better else -1)
        if len(values) > 1:
            middle, error = fmean(values), stdev(values) / len(values) ** 0.5
            half = float(student.ppf(0.975, len(values) - 1)) * error
            found.append(Verdict(claim, middle, (middle - half, middle + half), len(values)))
    return found


def _differences(records: Sequence[Record], claim: Claim, sign: int) -> list[float]:
    """One number a seed, positive where it is in the claim's favour."""
    trials: dict[tuple[int, str], dict[str, Record]] = defaultdict(dict)
    for record in by_variant(records):
        trials[record["seed"], record["variant"]][record["arm"]] = record
    seeds: dict[int, list[float]] = defaultdict(list)
    for (seed, _), arms in trials.items():
        if claim.against is None and claim.arm in arms:
            seeds[seed].append(1 - tightness(arms[claim.arm]["norms"]))
        elif {claim.arm, claim.against} <= arms.keys():
            gain = arms[claim.arm]["score"] - arms[claim.against]["score"]
            seeds[seed].append(sign * gain)
    return [fmean(values) for values in seeds.values()]


@dataclass(frozen=True)
class Judged:
    """A table and what it says.

    Attributes:
        stem: of the table's file.
        experiment: whose table.
        verdicts: on its claims.
    """

    stem: str
    experiment: Experiment
    verdicts: Sequence[Verdict]


_TEXTS = ("claim", "compared", "verdict", "table")
_HEADER = (*_TEXTS[:2], "difference", "95 % interval", "needed", "seeds", *_TEXTS[2:])


def markdown(reports: Sequence[Judged]) -> str:
    """Make the page of all claims.

    Args:
        reports: of all tables.
    """
    rows = [_row(each, report) for report in reports for each in report.verdicts]
    return f"# The paper's claims, judged\n\n{grid(_HEADER, rows, _TEXTS)}\n\n{_RULE}\n"


def _row(verdict: Verdict, report: Judged) -> tuple[str, ...]:
    claim, (low, high) = verdict.claim, verdict.interval
    label = report.experiment.arms[claim.arm].label
    if claim.tuned:
        labels = [label, *([report.experiment.arms[claim.against].label] if claim.against else [])]
        compared = f"{' − '.join(labels)}, {_TUNED[claim.tuned]}"
    elif claim.against is None:
        compared = f"1 − bound ÷ nuclear norm, {label}"
    else:
        both = (label, report.experiment.arms[claim.against].label)
        compared = " − ".join(both if report.experiment.larger_is_better else both[::-1])
    return (
        claim.text,
        compared,
        f"{verdict.difference:+.3g}",
        f"{low:+.3g} … {high:+.3g}",
        f"> {0 - claim.margin:g}",
        f"{verdict.seeds}",
        f"**{verdict.word}**",
        f"[{report.stem}]({report.stem}.md)",
    )


_TUNED = {
    "reference": "at the dense network's best",
    "own": "each at its own best",
    "regret": "at the dense network's best, less at its own",
}

_RULE = (
    "Differences are paired by seed, averaged over the variants of a table, positive where they "
    "are in the claim's favour; intervals are Student's. A claim *holds* where all of the "
    "interval is above what is needed, *fails* where all of it is below, and is *undecided* "
    "otherwise. The best variant of an arm is that of the highest mean validation. The claims and "
    "what they need were written down before the last of the trials that they compare were run."
)
