"""Columns of text, as wide as the terminal allows: names first and whole, numbers never cut.

A name that is too long for its column has a line of its own, with its numbers below. A column
without content is left out; so are remarks beside the table where they do not fit: they are
numbered below it. Columns that do not fit are a table of their own below. Rows of repeated layers
are folded into one, with the range of each figure.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, Generic, TypeVar

from frobdecay.models.tables.fold import Group, fold, pattern, ranged, unfolded

Row = TypeVar("Row")

_FEW = 12
"""So many rows are read at a glance, and not folded."""

_REMARK = 40
"""Characters of a remark beside the table."""


@dataclass(frozen=True)
class Column(Generic[Row]):
    """What a table says of each row.

    Attributes:
        head: above the column.
        value: of a row: a text, a number, or None where there is nothing to say. Rows whose texts
            differ are not folded.
        form: a number -> how it is printed.
        adds: whether the numbers of folded rows are added up; else their range is shown.
    """

    head: str
    value: Callable[[Row], str | float | None]
    form: Callable[[Any], str] = str
    adds: bool = False

    def cell(self, rows: Sequence[Row]) -> str:
        """What is printed for one row, or for several that are folded."""
        values = [self.value(row) for row in rows]
        numbers = [value for value in values if not isinstance(value, str) and value is not None]
        if not numbers:
            return printable(values[0]) if isinstance(values[0], str) else ""
        known = [number for number in numbers if number == number]
        range_ = [min(known), max(known)] if known else []
        lost = [] if len(known) == len(numbers) else [nan]  # is said beside the range of the others
        ends = [sum(numbers)] if self.adds else range_ + lost
        return "–".join(dict.fromkeys(map(self.form, ends)))

    def common(self, row: Row) -> str | bool:
        """What folded rows have in common."""
        value = self.value(row)
        return value if isinstance(value, str) else value is None


def printable(text: str) -> str:
    """The text without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def figure(value: float) -> str:
    """A measured number to three digits, without an exponent where it can be read without."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(sizes: int | Sequence[int]) -> str:
    """A shape, or a rank, as it is printed."""
    return str(sizes) if isinstance(sizes, int) else "×".join(map(str, sizes))


def screen(errors: bool = False) -> int | None:
    """Columns of the terminal; None where other programs read on, for which no line is broken."""
    stream = sys.stderr if errors else sys.stdout
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None


def table(
    rows: Sequence[Row],
    name: Column[Row],
    columns: Sequence[Column[Row]],
    remark: Callable[[Row], str | None],
    *,
    folds: bool = True,
    width: int | None = None,
) -> str:
    """Print rows.

    Args:
        rows: what the table is of.
        name: the first column.
        columns: the others.
        remark: on a row, where there is one.
        folds: whether repeated layers are one line, if there are more than a dozen rows.
        width: of a line; None for no end.
    """
    names = [printable(str(name.value(row))) for row in rows]
    keys = [
        (*(column.common(row) for column in columns), pattern(remark(row) or "")) for row in rows
    ]
    groups = (fold if folds and len(rows) > _FEW else unfolded)(names, keys)
    lines = [_Line.of(group, rows, columns, remark) for group in groups]
    heads = ["", *(column.head for column in columns)]
    numeric = [True, *(any(column.common(row) is False for row in rows) for column in columns)]
    return _set(_Line(name.head, heads, "remarks"), lines, numeric, width)


@dataclass
class _Line:
    """A line of the table before it is set: a name, cells, a remark."""

    name: str
    cells: list[str]
    remark: str

    @classmethod
    def of(
        cls,
        group: Group,
        rows: Sequence[Row],
        columns: Sequence[Column[Row]],
        remark: Callable[[Row], str | None],
    ) -> _Line:
        several = [rows[i] for i in group.members]
        count = f"×{len(several)}" if len(several) > 1 else ""
        cells = [count, *(column.cell(several) for column in columns)]
        return cls(group.name, cells, printable(ranged([remark(row) or "" for row in several])))


def _set(head: _Line, lines: list[_Line], numeric: Sequence[bool], width: int | None) -> str:
    """Lines in columns, each as wide as it has to be; what does not fit in a block of its own."""
    every = [head, *lines]
    kept = [k for k in range(len(head.cells)) if any(line.cells[k] for line in lines)]
    widths = {k: max(len(line.cells[k]) for line in every) for k in kept}
    notes = dict.fromkeys(line.remark for line in lines if line.remark)
    whole, later = sys.maxsize if width is None else width, list[int]()
    longest, beside = max(len(line.name) for line in every), max(map(len, notes), default=-2)
    least = longest if longest <= whole // 3 else len(head.name)
    least += 5 if notes else 0  # a mark

    def over(gap: str) -> bool:
        return least + sum(w + len(gap) for w in widths.values()) > whole

    gap = " " if over("  ") and not over(" ") else "  "
    while over(gap) and len(widths) > 1:
        later.insert(0, widths.popitem()[0])
    room = whole - sum(w + len(gap) for w in widths.values())
    numbered = bool(notes) and (beside > _REMARK or longest + len(gap) + beside > room)
    marks = {note: f"[{i}]" if numbered else note for i, note in enumerate(notes, 1)}
    if numbered:
        room -= len(gap) + len(f"[{len(marks)}]")
    first = max((len(line.name) for line in every if len(line.name) <= room), default=0)
    first = max(first, len(head.name))
    printed = []
    for line in every:
        cells = [line.cells[k].rjust(w) if numeric[k] else line.cells[k].ljust(w)
                 for k, w in widths.items()]  # fmt: skip
        last = marks.get(line.remark, "" if numbered or not notes else line.remark)
        if len(line.name) > first:
            printed.append(line.name)
        name = line.name if len(line.name) <= first else ""
        printed.append(gap.join([name.ljust(first), *cells, last]).rstrip())
    if later:
        again = [_Line(line.name, [line.cells[k] for k in later], "") for line in every]
        rest = _set(again[0], again[1:], [numeric[k] for k in later], width)
        printed += ["", *rest.splitlines()]
    if numbered:
        for note, mark in marks.items():
            text = f"{mark} {note}"
            printed += _wrapped(text, width) if width else [text]
    return "\n".join(printed)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
