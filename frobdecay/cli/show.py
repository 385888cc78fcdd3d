"""What ``inspect`` shows: a table, and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from frobdecay.models.checkpoints.files import new_figure, write_figure
from frobdecay.models.plan import RankPlan
from frobdecay.models.tables.fold import fold, numbers, pattern
from frobdecay.models.tables.table import Column, figure, printable, screen, table, times


@dataclass
class Row:
    """What is known of one weight.

    Attributes:
        name, shape: of the dense weight.
        kind: "dense", or the parametrization's name.
        parameters: numbers in the file.
        matrix: how it is read, (*batch, m, n).
        rank: that it has, where it is factorized; several, if it is a tensor's.
        product: whether it is a chain of factors, whose spectrum needs no dense weight.
        norm, stable_rank: ‖W‖_F and ‖W‖_F² / σ₁².
        energy_rank: the rank that keeps the share --energy of ‖W‖_F².
        planned_rank, planned_parameters: under --ratio; None where it stays as it is.
        planned_energy: the share of ‖W‖_F² that the planned rank keeps.
        remark: why numbers are missing.
        singular_values: largest first, of all matrices of a batch.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    parameters: int
    matrix: tuple[int, ...] = ()
    rank: int | list[int] | None = None
    product: bool = False
    norm: float | None = None
    stable_rank: float | None = None
    energy_rank: int | None = None
    planned_rank: int | None = None
    planned_parameters: int | None = None
    planned_energy: float | None = None
    remark: str = ""
    singular_values: tuple[float, ...] = ()


def report(
    path: str, rows: Sequence[Row], plan: RankPlan | None, energy: float, whole: int, folds: bool
) -> str:
    """A table of the weights that are read, as wide as the terminal; below it, what is not read.

    Args:
        path: of the checkpoint.
        rows: its weights.
        plan: what is planned for them.
        energy: the share that the column of ranks is for.
        whole: how many numbers there are in the file.
        folds: False for a row for every weight.
    """
    columns: list[Column[Row]] = [
        Column("shape", lambda row: times(row.shape)),
        Column("kind", lambda row: None if row.rank is None else f"{row.kind} {times(row.rank)}"),
        Column("matrix", lambda row: None if row.matrix == row.shape else times(row.matrix)),
        Column("share", lambda row: row.parameters / whole, "{:.1%}".format, adds=True),
        Column("norm", lambda row: row.norm, figure),
        Column("stable", lambda row: row.stable_rank, figure),
        Column(f"rank@{energy:g}", lambda row: row.energy_rank),
    ]
    if plan:
        columns += [
            Column(
                "planned",
                lambda row: row.planned_rank or ("dense" if row.rank is None else "as is"),
            ),
            Column("kept", lambda row: row.planned_energy, "{:.3f}".format),
        ]
    read = [row for row in rows if row.matrix]
    lines = [printable(path)]
    if read:
        name = Column[Row]("weight", lambda row: row.name)
        text = table(read, name, columns, lambda row: row.remark, folds=folds, width=screen())
        lines += [text]
    unread = [row for row in rows if not row.matrix]
    for group in fold([row.name for row in unread], [row.remark for row in unread]):
        lines.append(printable(f"{group.name}: {group.key}"))
    lines.append(f"{whole:,} parameters")
    if plan:
        lines[-1] += f"; planned {plan.after:,} of {plan.before:,}, ratio {plan.ratio:.3g}"
    return "\n".join(lines)


# --- the picture --------------------------------------------------------------------------------

_BRIGHTEST = 0.9  # of the colours of depth, which end in yellow on white
_LINES = 6  # of single weights in one panel: as many as a legend can name


def plot(rows: Sequence[Row], path: str, energy: float, title: str) -> None:
    """The energy that the largest singular values keep, a panel for each role, coloured by depth.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a suffix that matplotlib does not know.
    """
    panels = _panels([row for row in rows if row.norm])
    across = min(max(len(panels), 1), 3 if len(panels) < 10 else 4)
    down = max(1, -(-len(panels) // across))
    figure = new_figure("--plot", 3.2 * across + 1.2, 2.3 * down + 1.4)
    every = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for i, axes in enumerate(every.flat):
        axes.tick_params(labelsize="x-small", labelbottom=i + across >= len(panels))
        axes.set_visible(i < len(panels))
    for axes, (name, some) in zip(every.flat, panels.items(), strict=False):
        _panel(axes, name, some, energy)
    every[0, 0].set(xlim=(0, 1), ylim=(0, 1.02))
    figure.supxlabel("share of the singular values, largest first", fontsize="medium")
    figure.supylabel("share of ‖W‖² kept", fontsize="medium")
    figure.suptitle(_text(title))
    _explain(figure, every, panels, energy)
    write_figure(path, figure)


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Weights of one role in all layers, by depth; those that are alone share panels."""
    roles: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        roles[pattern(row.name)].append(row)
    single = [same[0] for same in roles.values() if len(same) == 1]
    found = {
        _text(role.removesuffix(".weight")): sorted(same, key=lambda row: numbers(row.name))
        for role, same in roles.items()
        if len(same) > 1
    }
    for start in range(0, len(single), _LINES):
        found[f"single weights{f', {start // _LINES + 1}' if start else ''}"] = single[
            start : start + _LINES
        ]
    return found


def _panel(axes: Any, name: str, rows: Sequence[Row], energy: float) -> None:
    from matplotlib import colormaps

    alone = name.startswith("single weights")
    colours = colormaps["tab10" if alone else "viridis"]
    for i, row in enumerate(rows):
        count = len(row.singular_values)
        colour = colours(i if alone else _BRIGHTEST * i / max(1, len(rows) - 1))
        squares = [(value / row.singular_values[0]) ** 2 for value in row.singular_values]
        kept = [0.0, *accumulate(squares)]
        axes.plot(
            [k / count for k in range(count + 1)],
            [value / kept[-1] for value in kept],
            color=colour,
            linewidth=1,
            label=_text(row.name.removesuffix(".weight")) if alone else None,
        )
        if row.planned_rank is not None:
            at = min(1.0, row.planned_rank / min(row.matrix[-2:]))
            axes.plot([at], [row.planned_energy], "o", color=colour, markersize=4, mec="black")
    axes.axhline(energy, color="0.4", linestyle="--", linewidth=0.8)
    axes.set_title(name, fontsize="x-small")
    if alone:
        axes.legend(fontsize="xx-small", loc="lower right")


def _explain(figure: Any, every: Any, panels: dict[str, list[Row]], energy: float) -> None:
    """What lines, dots and colours mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color="0.4", linestyle="--", label=f"{energy:g} of ‖W‖²")]
    if any(row.planned_rank is not None for rows in panels.values() for row in rows):
        dot: dict[str, Any] = {"marker": "o", "color": "0.7", "mec": "black", "linestyle": ""}
        marks.append(Line2D([], [], label="planned rank", **dot))
    figure.legend(handles=marks, loc="outside lower right", ncols=2, fontsize="small")
    if any(not name.startswith("single weights") for name in panels):
        depths = ScalarMappable(Normalize(0, 1 / _BRIGHTEST), "viridis")
        bar = figure.colorbar(depths, ax=every, shrink=0.6)
        bar.ax.set_ylim(0, 1)
        bar.set_ticks([0, 1], labels=["first", "last"])
        bar.set_label("depth")


def _text(name: str) -> str:
    """A name that matplotlib does not read as mathematics."""
    return printable(name).replace("$", r"\$")
