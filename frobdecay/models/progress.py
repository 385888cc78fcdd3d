"""A progress bar for work that takes long, where ``rich`` is installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any

PATIENCE = 1.0
"""Seconds of work before a bar is shown unasked."""


class Progress:
    """Show how much of the work is done, on stderr.

    Args:
        total: the work, in any unit.
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
        self._allowed = installed and (_terminal() if wanted is None else wanted)
        self._start = time.monotonic() - (PATIENCE if wanted else 0)
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self.advance(0)
        return self

    def advance(self, work: float) -> None:
        """Note that some work was done."""
        self._done += work
        late = time.monotonic() - self._start >= PATIENCE
        if self._bar is None and self._allowed and late and self._done < self._total:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True))
            self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
