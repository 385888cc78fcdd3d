"""Is the best λ of one arm that of another? Experiments whose variants differ in one number.

The best variant of an arm is chosen on validation: the highest mean over its seeds of the epoch
that was tested. Test scores are looked at afterwards only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.experiments.experiment import Claim, Experiment

__all__ = ["best", "coloured", "differences", "figure"]

Record = Mapping[str, Any]


def _by_variant(records: Sequence[Record], arm: str) -> dict[str, dict[int, Record]]:
    """Variant -> seed -> trial of one arm, in the records' order."""
    found: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        for variant in record["variants"] if record["arm"] == arm else ():
            found[variant][record["seed"]] = record
    return found


def _validated(record: Record, larger: bool) -> float:
    return float(max(record["validation"]) if larger else min(record["validation"]))


def _validates_upwards(experiment: Experiment) -> bool:
    return bool(getattr(experiment.trial, "larger_is_better", False))


def best(records: Sequence[Record], arm: str, larger_is_better: bool = True) -> str | None:
    """The variant in which an arm validates best; None where it has no trials.

    Only variants with all of the arm's seeds are candidates: unfinished ones are not compared.

    Args:
        records: results of trials.
        arm: which.
        larger_is_better: of validation.
    """
    variants = _by_variant(records, arm)
    seeds = max(map(len, variants.values()), default=0)
    whole = {
        name: fmean(_validated(record, larger_is_better) for record in trials.values())
        for name, trials in variants.items()
        if len(trials) == seeds
    }
    choose = max if larger_is_better else min
    return choose(whole, key=whole.__getitem__, default=None)


def differences(records: Sequence[Record], claim: Claim, experiment: Experiment) -> list[float]:
    """One number a seed, positive where it is in the claim's favour; see ``Claim.tuned``."""
    larger = _validates_upwards(experiment)
    arms = [claim.arm, *([claim.against] if claim.against else [])]
    reference = best(records, experiment.reference, larger)
    chosen = {arm: best(records, arm, larger) for arm in arms}
    if reference is None or None in chosen.values():
        return []

    def score(arm: str, variant: str | None) -> dict[int, float]:
        sign = 1 if experiment.larger_is_better else -1
        trials = _by_variant(records, arm).get(variant or "", {})
        return {seed: sign * record["score"] for seed, record in trials.items()}

    def value(arm: str) -> dict[int, float]:
        if claim.tuned == "own":
            return score(arm, chosen[arm])
        there = score(arm, reference)
        if claim.tuned == "reference":
            return there
        own = score(arm, chosen[arm])
        return {seed: there[seed] - own[seed] for seed in there.keys() & own.keys()}

    first, second = value(arms[0]), value(arms[1]) if claim.against else None
    if second is None:
        return [first[seed] for seed in sorted(first)]
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def coloured(records: Sequence[Record], experiment: Experiment) -> dict[str, tuple[Any, Any]]:
    """The arms that have trials, each with its colour in a figure."""
    from matplotlib import colormaps

    run = {record["arm"] for record in records}
    arms = {key: arm for key, arm in experiment.arms.items() if key in run}
    colours = colormaps["tab10" if len(arms) <= 10 else "tab20"].colors
    return {key: (arm, colour) for (key, arm), colour in zip(arms.items(), colours, strict=False)}


def figure(records: Sequence[Record], experiment: Experiment, axis: Mapping[str, float]) -> Any:
    """Draw the score against the number that varies: a line an arm, its best variant marked.

    Args:
        records: results of trials.
        experiment: gives titles and the order of arms.
        axis: variant -> the number.

    Returns:
        The ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    looks = any(record.get("looks") for record in records)
    run = {variant for record in records for variant in record["variants"]}
    axis = {variant: place for variant, place in axis.items() if variant in run}
    drawn = Figure(figsize=(11, 4.6 * (1 + looks)), layout="constrained")
    panels, *below = drawn.subplots(1 + looks, 2, squeeze=False)
    larger = _validates_upwards(experiment)
    for key, (arm, colour) in coloured(records, experiment).items():
        variants = {v: t for v, t in _by_variant(records, key).items() if v in axis}
        names = sorted(variants, key=axis.__getitem__)
        marked = best(records, key, larger)
        for panel, what in zip(panels, ("score", "validation"), strict=True):
            values = [
                [
                    record["score"] if what == "score" else _validated(record, larger)
                    for record in variants[name].values()
                ]
                for name in names
            ]
            means = [fmean(each) for each in values]
            errors = [stdev(e) / len(e) ** 0.5 if len(e) > 1 else 0.0 for e in values]
            places = [axis[name] for name in names]
            panel.errorbar(places, means, errors, color=colour, label=arm.label, marker="o", ms=3)
            if marked in names:
                at = names.index(marked)
                panel.plot(places[at], means[at], "*", color=colour, ms=14)
        for row in below:
            _draw_looks(row, list(variants.get(marked or "", {}).values()), colour)
    reference = best(records, experiment.reference, larger)
    titles, upwards = (experiment.score, "validation"), (experiment.larger_is_better, larger)
    for panel, title, up in zip(panels, titles, upwards, strict=True):
        if reference in axis:
            panel.axvline(axis[reference], color="0.6", ls=":", zorder=0)
        scale = "log" if min(axis.values()) > 0 else "linear"
        low, high = panel.dataLim.intervaly
        wide = "log" if not up and 0 < 20 * low < high else "linear"  # as of perplexities
        panel.set(title=title, xlabel=experiment.along, xscale=scale, yscale=wide)
        panel.set_xticks(
            list(axis.values()), [f"{place:g}" for place in axis.values()], minor=False
        )
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel, title in zip(*below, _LOOKS.values(), strict=True) if below else ():
        panel.set(title=f"{title}, each at its ★", xlabel="step", yscale="log")
        panel.grid(alpha=0.3)
    handles = panels[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside lower center", ncols=3, fontsize="small")
    drawn.suptitle(f"{experiment.title}; ★ best on validation, dotted: that of the dense network")
    return drawn


_LOOKS = {"size": "largest ‖W‖₂", "moved": "largest ‖ΔW‖₂ of a step"}


def _draw_looks(panels: Sequence[Any], records: Sequence[Record], colour: str) -> None:
    """What was measured between steps, the mean over the seeds."""
    looks = [record["looks"] for record in records if record.get("looks")]
    for panel, key in zip(panels, _LOOKS, strict=True):
        if looks:
            curve = [fmean(values) for values in zip(*(one[key] for one in looks), strict=True)]
            panel.plot(looks[0]["steps"], curve, color=colour)
