"""Parts: functions that check or time one thing on a device, each run in a process of its own.

So one that fails, hangs or corrupts the device's context leaves the others alone. What a part
prints is shown when it ends; what it reports is kept in one JSON file, written anew after each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Report

__all__ = ["PARTS", "Part", "part", "run_parts"]

Run = Callable[[Report], None]
"""Checks by raising, reports tables and targets."""

RUN = ["-m", "benchmarks.gpu"]
"""How Python runs this package."""
TAIL = 6_000
"""Characters of a failed part's output that are shown."""
PATIENCE = 10
"""How many times its seconds a part has on a CPU, whose cores others use: that is no result."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: in the table.
        mode: ``smoke``, ``measure`` or ``tune``.
        run: what it does, within the process that is its own.
        seconds: after which it is stopped on a device.
        alone: whether nothing may run beside it, because it times something.
        under: a program that runs it, with its arguments; left out where it is not installed.
    """

    name: str
    mode: str
    run: Run
    seconds: int
    alone: bool
    under: tuple[str, ...] = ()

    @property
    def claim(self) -> str:
        """The first line of its docstring."""
        return (self.run.__doc__ or "").partition("\n")[0]


PARTS: dict[str, Part] = {}


def part(
    mode: str, seconds: int, *, alone: bool = False, under: tuple[str, ...] = ()
) -> Callable[[Run], Run]:
    """Enter a function into the table of parts under its own name."""

    def enter(run: Run) -> Run:
        name = run.__name__.replace("_", " ")
        PARTS[name] = Part(name, mode, run, seconds, alone, under)
        return run

    return enter


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    output: Path
    report: Path
    start: float

    def over(self) -> bool:
        """Whether it has ended; it is stopped where its time is over."""
        if self.process.poll() is None and time.monotonic() - self.start > self.part.seconds:
            self.process.kill()
            self.process.wait()
        return self.process.poll() is not None


def _start(one: Part, device: str, folder: Path) -> _Running:
    stem = one.name.replace(" ", "-")
    output, report = folder / f"{stem}.txt", folder / f"{stem}.json"
    inner = [sys.executable, *RUN, "part", one.name]
    command = [*one.under, *inner, "--device", device, "--json", str(report)]
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        one = replace(one, seconds=one.seconds * PATIENCE)
    if one.under:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else most wrong addresses are ours
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    return _Running(one, process, output, report, time.monotonic())


def _end(running: _Running, keep: Callable[[str, dict[str, Any]], None]) -> str | None:
    """Show a part's output and keep its report; what went wrong, if anything did."""
    seconds, code = time.monotonic() - running.start, running.process.returncode
    text = running.output.read_text(errors="replace")
    verdict = "passed" if code == 0 else f"FAILED (exit status {code})"
    if code != 0 and seconds > running.part.seconds:
        verdict = f"STOPPED after {running.part.seconds} s"
    print(f"== {running.part.name}: {verdict}, {seconds:.0f} s")
    print(text[-TAIL:] if code else text, flush=True)
    record = {"seconds": round(seconds, 1), "outcome": verdict}
    if running.report.exists():
        record["report"] = json.loads(running.report.read_text())
    if code:
        record["output"] = text[-TAIL:]
    keep(running.part.name, record)
    return None if code == 0 else f"{running.part.name}: {verdict}\n{text[-TAIL:]}"


def run_parts(
    names: Sequence[str],
    device: str,
    budget: float,
    keep: Callable[[str, dict[str, Any]], None],
    logs: Path | None = None,
) -> dict[str, str]:
    """Run parts: those that time something alone, the others side by side before them.

    Args:
        names: of the parts.
        device: where they run.
        budget: seconds, after which none is started.
        keep: is handed the name and the record of every part as it ends.
        logs: a folder for the parts' whole output; nowhere unless given.

    Returns:
        name -> what went wrong.
    """
    begin, failed = time.monotonic(), {}
    chosen = [PARTS[name] for name in names]
    crowd, alone = ([p for p in chosen if p.alone is quiet] for quiet in (False, True))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) if logs is None else logs
        folder.mkdir(parents=True, exist_ok=True)
        groups = [crowd[k : k + _side_by_side()] for k in range(0, len(crowd), _side_by_side())]
        for group in [*groups, *([one] for one in alone)]:
            if time.monotonic() - begin > budget:
                failed |= {one.name: f"{one.name}: not begun, no time left" for one in group}
                continue
            running = [_start(one, device, folder) for one in group]
            while running:
                time.sleep(0.1)
                for one in [one for one in running if one.over()]:
                    running.remove(one)
                    if error := _end(one, keep):
                        failed[one.part.name] = error
    return failed


def _side_by_side() -> int:
    return max(2, (os.cpu_count() or 2) - 4)
