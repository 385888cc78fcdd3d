"""A progress bar for work that takes long, where ``rich`` is installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from math import prod
from typing import Any

from frobdecay.models.tables.table import screen

PATIENCE = 1.0
"""Seconds of work before a bar is shown unasked."""


class Progress:
    """Show how much of the work is done, on stderr, and how long the rest will take.

    Args:
        total: the work, in any unit that is in proportion to time.
        wanted: True for a bar at once, False for none; None for one after a second, if there is
            a terminal and ``rich``.
        label: what is being done.

    Raises:
        ImportError: a bar was asked for, but ``rich`` is not installed.
    """

    def __init__(self, total: float, wanted: bool | None, label: str) -> None:
        installed = importlib.util.find_spec("rich") is not None
        if wanted and not installed:
            raise ImportError("progress=True shows a bar with rich: pip install rich")
        self._total, self._label, self._done = total, label, 0.0
        self._allowed = installed and (
            screen(errors=True) is not None if wanted is None else wanted
        )
        self._began = time.monotonic()
        self._start = self._began - (PATIENCE if wanted else 0)
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self.advance(0)
        return self

    def advance(self, work: float) -> None:
        """Note that some work was done."""
        self._done += work
        late = time.monotonic() - self._start >= PATIENCE
        if self._bar is None and self._allowed and late and self._done < self._total:
            from rich import progress as bars
            from rich.console import Console

            columns = (
                *bars.Progress.get_default_columns()[:3],
                bars.TextColumn("{task.fields[left]}"),
            )
            self._bar = bars.Progress(*columns, console=Console(stderr=True))
            self._bar.add_task(self._label, total=self._total, left="")
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, left=self._left())

    def _left(self) -> str:
        """The time that is left, by the rate since the start; rich's own begins with its bar."""
        elapsed = time.monotonic() - self._began
        if self._done < self._total / 50:
            return ""
        return f"{elapsed * (self._total - self._done) / self._done:.0f} s left"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def decomposition(shape: Sequence[int], batch: int = 0) -> float:
    """What the singular values of matrices cost, in proportion to time: Gram, and its spectrum.

    Measured from 384×384 to 30522×384 and to 4608×1536 on one core: right within a factor of two.

    Args:
        shape: (*batch, m, n), or the modes of a tensor, whose first is taken for m.
        batch: number of leading axes.
    """
    count, rows, columns = prod(shape[:batch]), shape[batch], prod(shape[batch + 1 :])
    small = min(rows, columns)
    return float(count * small * (rows * columns + 3 * small * small))
