"""What a set of trials says: means, standard errors, differences paired by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from math import isnan
from statistics import fmean, median, stdev
from typing import Any

from rich.table import Table

from benchmarks import measure
from benchmarks.experiments import transfer
from benchmarks.experiments.experiment import Experiment

__all__ = ["Row", "by_variant", "figure", "markdown", "rich_table", "summarize", "tightness"]

Record = dict[str, Any]
Spread = tuple[float, float | None]


@dataclass(frozen=True)
class Row:
    """One arm of one variant over its seeds.

    Attributes:
        variant, label: which.
        score: mean and standard error.
        gain: the same of the difference to the baseline with the same seed; None for that.
        parameters, ratio: of the trained model; ratio to the dense one.
        shrinkage: D, see ``Training``; None in results from before it was recorded.
        minutes, peak_mib: median over the seeds, of a whole trial.
        tightness: the bound ÷ the nuclear norm, at the end of training; None without products.
        norm: ‖W‖_F over all products, at the end of training; None without.
        seeds: how many.
    """

    variant: str
    label: str
    score: Spread
    gain: Spread | None
    parameters: int
    ratio: float
    shrinkage: float | None
    minutes: float
    peak_mib: float
    tightness: float | None
    norm: float | None
    seeds: int


def _spread(values: Sequence[float]) -> Spread:
    """Mean and standard error of the mean."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return fmean(values), error


def by_variant(records: Sequence[Record]) -> list[Record]:
    """Each trial once for each variant that it belongs to, as "variant"; variants in order."""
    variants = dict.fromkeys(name for record in records for name in record["variants"])
    return [{**r, "variant": name} for name in variants for r in records if name in r["variants"]]


def summarize(records: Sequence[Record], baseline: str) -> list[Row]:
    """Summarize trials by variant and arm, in the order of the records.

    Args:
        records: results of trials.
        baseline: the arm to compare with.
    """
    rows = []
    records = by_variant(records)
    for variant, arm in dict.fromkeys((r["variant"], r["arm"]) for r in records):
        mine = [r for r in records if (r["variant"], r["arm"]) == (variant, arm)]
        theirs = {r["seed"]: r for r in records if (r["variant"], r["arm"]) == (variant, baseline)}
        gains = [r["score"] - theirs[r["seed"]]["score"] for r in mine if r["seed"] in theirs]
        rows.append(
            Row(
                variant=variant,
                label=mine[0]["label"],
                score=_spread([r["score"] for r in mine]),
                gain=_spread(gains) if gains and arm != baseline else None,
                parameters=mine[0]["parameters"],
                ratio=mine[0]["ratio"],
                shrinkage=mine[0].get("shrinkage"),
                minutes=median(r["seconds"] for r in mine) / 60,
                peak_mib=median(r["peak_mib"] for r in mine),
                tightness=_mean_of(tightness, mine),
                norm=_mean_of(lambda norms: norms["norm"][-1], mine),
                seeds=len(mine),
            )
        )
    return rows


def tightness(norms: Any) -> float:
    """The bound of the nuclear norm, half the sum of squares of factors, ÷ it after training."""
    return float(norms["bound"][-1] / norms["nuclear"][-1])


def _mean_of(what: Callable[[Any], float], records: Sequence[Record]) -> float | None:
    """The mean of something about the norms; None where there are none, as of Tucker's spectrum."""
    found = [what(record["norms"]) for record in records if record["norms"]]
    return fmean(found) if found and not any(map(isnan, found)) else None


def _plus_minus(value: Spread | None, digits: int, sign: str = "") -> str:
    if value is None:
        return ""
    mean, error = value
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _cells(row: Row, digits: int) -> tuple[str, ...]:
    return (
        row.variant,
        row.label,
        _plus_minus(row.score, digits),
        _plus_minus(row.gain, digits, "+"),
        f"{row.parameters:,}",
        f"{row.ratio:.3f}",
        "" if row.tightness is None else f"{row.tightness:.3f}",
        "" if row.norm is None else f"{row.norm:.3g}",
        "" if row.shrinkage is None else f"{row.shrinkage:.2g}",
        f"{row.minutes:.1f}",
        f"{row.peak_mib:,.0f}",
    )


def _header(experiment: Experiment) -> tuple[str, ...]:
    against = experiment.arms[experiment.baseline].label
    return (
        "",
        "arm",
        experiment.score,
        f"vs {against}",
        "parameters",
        "of dense",
        "bound ÷ nuclear",
        "‖W‖",
        "D",
        "minutes",
        "peak MiB",
    )


def _filled(rows: Sequence[Row], experiment: Experiment) -> list[tuple[str, ...]]:
    """Header and rows, without the columns that are empty in all rows."""
    cells = [_cells(row, experiment.digits) for row in rows]
    kept = [k < 2 or any(column) for k, column in enumerate(zip(*cells, strict=True))]
    return [tuple(compress(line, kept)) for line in (_header(experiment), *cells)]


def rich_table(rows: Sequence[Row], experiment: Experiment, caption: str) -> Table:
    """Make the table for a terminal."""
    header, *cells = _filled(rows, experiment)
    return measure.drawn(header, cells, header[:2], experiment.title, caption=caption)


def markdown(rows: Sequence[Row], experiment: Experiment, caption: str) -> str:
    """Make the table, headed by the claim, for the page of results."""
    header, *cells = _filled(rows, experiment)
    table = measure.grid(header, cells, header[:2])
    return f"# {experiment.title}\n\nThe paper: {experiment.claim}\n\n{table}\n\n{caption}\n"


def figure(records: Sequence[Record], experiment: Experiment) -> Any:
    """Draw validation over epochs, and norms where they were recorded: means over the seeds.

    Args:
        records: results of trials; each variant has a row of panels.
        experiment: gives titles and the order of arms.

    Returns:
        The ``matplotlib.figure.Figure``.
    """
    if experiment.along:
        axis = {
            variant: getattr(protocol, experiment.along)
            for preset in experiment.presets.values()
            for variant, protocol in preset.items()
        }
        return transfer.figure(records, experiment, axis)
    from matplotlib.figure import Figure

    arms = transfer.coloured(records, experiment)
    records = by_variant(records)
    variants = list(dict.fromkeys(record["variant"] for record in records))
    drawn = Figure(figsize=(13, 3.8 * len(variants)), layout="constrained")
    for variant, row in zip(variants, drawn.subplots(len(variants), 3, squeeze=False), strict=True):
        for key, (arm, colour) in arms.items():
            mine = [r for r in records if (r["arm"], r["variant"]) == (key, variant)]
            if mine:
                _draw(row, mine, arm.label, colour)
        for axes, title in zip(row, _PANELS, strict=True):
            axes.set(title=title, xlabel="epoch", yscale="linear" if axes is row[0] else "log")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(variant)
        row[0].legend(fontsize="small" if len(arms) <= 10 else "xx-small")
    drawn.suptitle(experiment.title)
    return drawn


_PANELS = ("validation", "effective step size lr / ‖W‖²", "nuclear norm (dotted: bound)")


def _draw(row: Sequence[Any], records: Sequence[Record], label: str, colour: Any) -> None:
    validation = _mean([r["validation"] for r in records])  # after epochs; norms also before
    row[0].plot(range(1, len(validation) + 1), validation, color=colour, label=label)
    norms = [r["norms"] for r in records if r["norms"]]
    if norms:
        panels = ((1, "effective_step", "-"), (2, "nuclear", "-"), (2, "bound", ":"))
        for panel, quantity, line in panels:
            curve = _mean([each[quantity] for each in norms])
            row[panel].plot(curve, line, color=colour)


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(values) for values in zip(*curves, strict=True)]
