"""What a set of runs shows: a table on the terminal and in Markdown, a picture, a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import measure
from benchmarks.training import ARMS, Run

__all__ = ["Summary", "figure", "markdown", "rich_table", "summarize", "write_json"]

# Okabe and Ito's colours, told apart by all readers
_STYLE = {
    "dense": ("#000000", "--"),
    "lowrank": ("#999999", "-"),
    "si": ("#56B4E9", "-"),
    "fd": ("#E69F00", "-"),
    "sifd": ("#D55E00", "-"),
}

_HEADER = ("arm", "test accuracy", "vs low-rank", "parameters", "of dense", "ms/step")


@dataclass(frozen=True)
class Summary:
    """One arm over its seeds.

    Attributes:
        arm: key in ``ARMS``.
        accuracy: mean and standard deviation of the test accuracy, percent.
        gain: the same of its difference to the plain low-rank run of the same seed, in points;
            None without those runs.
        parameters: of the model.
        ratio: to the dense arm's; None without that arm.
        ms_per_step: median over the seeds.
        seeds: how many.
    """

    arm: str
    accuracy: tuple[float, float | None]
    gain: tuple[float, float | None] | None
    parameters: int
    ratio: float | None
    ms_per_step: float
    seeds: int

    def cells(self) -> tuple[str, ...]:
        """The row of a table, as in ``_HEADER``."""
        return (
            ARMS[self.arm].label,
            _plus_minus(self.accuracy),
            _plus_minus(self.gain, sign="+") if self.gain else "",
            f"{self.parameters:,}",
            f"{self.ratio:.3f}" if self.ratio else "",
            f"{self.ms_per_step:.1f}",
        )


def _plus_minus(value: tuple[float, float | None], sign: str = "") -> str:
    mean, deviation = value
    return f"{mean:{sign}.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Summarize runs by arm, in the order of ``ARMS``.

    Args:
        runs: of any arms and seeds.
    """
    by_arm = {key: {run.seed: run for run in runs if run.arm == key} for key in ARMS}
    plain = by_arm["lowrank"]
    dense = next((run.parameters for run in by_arm["dense"].values()), None)
    out = []
    for key, of_seed in by_arm.items():
        if not of_seed:
            continue
        pairs = [(run, plain[seed]) for seed, run in of_seed.items() if seed in plain]
        gains = [100 * (run.test_accuracy - other.test_accuracy) for run, other in pairs]
        parameters = next(iter(of_seed.values())).parameters
        out.append(
            Summary(
                arm=key,
                accuracy=_spread([100 * run.test_accuracy for run in of_seed.values()]),
                gain=_spread(gains) if gains and key not in ("lowrank", "dense") else None,
                parameters=parameters,
                ratio=parameters / dense if dense else None,
                ms_per_step=median(run.ms_per_step for run in of_seed.values()),
                seeds=len(of_seed),
            )
        )
    return out


def rich_table(summaries: Sequence[Summary], title: str, caption: str) -> Table:
    """Make the table for a terminal."""
    rows = (summary.cells() for summary in summaries)
    table = measure.drawn(_HEADER, rows, _HEADER[:1], title, caption=caption)
    table.columns[0].no_wrap = True
    return table


def markdown(summaries: Sequence[Summary], caption: str) -> str:
    """Make the table for a README."""
    table = measure.grid(_HEADER, (summary.cells() for summary in summaries), _HEADER[:1])
    return f"{table}\n\n{caption}\n"


def figure(runs: Sequence[Run], title: str) -> Any:
    """Draw validation accuracy and product norm over epochs: mean and range over the seeds.

    Args:
        runs: of any arms and seeds, all of the same number of epochs.
        title: above both panels.

    Returns:
        The ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    drawn = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for key, arm in ARMS.items():
        mine = [run for run in runs if run.arm == key]
        if not mine:
            continue
        colour, line = _STYLE[key]
        for axes, curves, first in (
            (left, [[100 * value for value in run.accuracy] for run in mine], 1),
            (right, [run.norms["norm"] for run in mine], 0),
        ):
            values = np.array(curves)
            epochs = first + np.arange(values.shape[1])
            axes.plot(epochs, values.mean(0), line, color=colour, label=arm.label, lw=1.8)
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
    final = [100 * value for run in runs for value in run.accuracy[len(run.accuracy) // 3 :]]
    left.set(xlabel="epoch", ylabel="validation accuracy, %")
    left.set_ylim(bottom=max(min(final) - 5, 0))
    right.set(xlabel="epoch", ylabel="product norm, $(\\Sigma\\,\\|W\\|_F^2)^{1/2}$", yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(ScalarFormatter())
    right.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="lower right", framealpha=0.9)
    drawn.suptitle(title, fontsize="medium")
    return drawn


def write_json(path: Path, runs: Sequence[Run], about: dict[str, Any]) -> None:
    """Write everything: the environment, the options, the summary and every run.

    Args:
        path: of the file.
        runs: all of them.
        about: what else to keep, as JSON takes it.
    """
    summary = [asdict(each) for each in summarize(runs)]
    record = {"version": 1, **about, "summary": summary, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
