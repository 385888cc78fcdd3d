"""What the scripts that time things share: interleaved medians, peak memory, targets, files.

Variants are compared within one process and in turns, so that whatever else the machine does
meets all of them alike; of each the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import takewhile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import frobdecay

__all__ = [
    "Report",
    "Target",
    "Timing",
    "WARM_UPS",
    "add_names",
    "captured",
    "count",
    "counts",
    "described",
    "drawn",
    "environment",
    "grid",
    "interleave",
    "markdown",
    "memory",
    "names",
    "no_waiting",
    "numbers",
    "parser",
    "precision",
    "profiled",
    "script",
    "setup",
    "synchronize",
    "words",
]

WARM_UPS = 3
"""Calls before a capture: they allocate, plan and compile."""
SAMPLE = 2e-3
"""Seconds that one sample lasts at least; shorter calls are repeated within it."""


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        ms: median over the samples.
        low, high: quartiles.
        samples: how many.
    """

    ms: float
    low: float
    high: float
    samples: int

    def quartiles(self, share: float = 1.0) -> str:
        """As printed; of the whole, where but a share was timed."""
        part = f", {share:.0%} measured" if share < 1 else ""
        return f"{self.low / share:.3g}–{self.high / share:.3g}{part}"


@dataclass(frozen=True)
class Target:
    """A number that was promised, beside the one that was measured.

    Attributes:
        what: the quantity, its case first.
        value: measured; None where it could not be.
        limit: promised.
        above: whether the value has to be at least the limit, not at most.
        unit: of both, as printed.
    """

    what: str
    value: float | None
    limit: float
    above: bool = False
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        """Whether the promise holds; None where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.above else self.value <= self.limit


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / calls


def interleave(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 2.0,
    rounds: int = 5,
) -> dict[str, Timing]:
    """Time functions in turns.

    Args:
        variants: name -> function without arguments.
        device: to wait for.
        seconds: after so long no new round begins.
        rounds: there are at least so many, but for functions whose first call takes longer than
            ``seconds``: they are timed once.

    Returns:
        name -> its timing.
    """
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {}
    for name, run in variants.items():
        first = _sample(run, 1, device)  # plans, compiles, allocates
        if first > 1e3 * seconds:  # out of proportion: once more, and no more
            samples[name] = [_sample(run, 1, device)]
            continue
        once = min(_sample(run, 1, device) for _ in range(2))
        calls[name], samples[name] = max(1, round(SAMPLE / (1e-3 * once))), []
    names, start, done = list(calls), time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < seconds:
        for name in names if done % 2 else reversed(names):
            samples[name].append(_sample(variants[name], calls[name], device))
        done += 1
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: Sequence[float]) -> Timing:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(median(values), low, high, len(values))


@contextmanager
def precision(setting: str) -> Iterator[None]:
    """Within it torch multiplies float32 matrices so: "highest" (IEEE), "high" (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within it, whatever waits for a CUDA device raises; a CPU is never waited for."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def captured(
    run: Callable[[], object], device: torch.device, optimizer: object = None
) -> Callable[[], object]:
    """Make a function a CUDA graph, after warming it up; what replays it.

    On a CPU it stays what it is. An optimizer that draws random numbers draws others each time.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in getattr(optimizer, "generators", ()):
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def profiled(**options: Any) -> torch.profiler.profile:
    """A profile of the CPU that keeps its events, or torch 2.11 warns of losing them."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    return torch.profiler.profile(activities=cpu, acc_events=True, **options)


def memory(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes that a call allocates at once, and those of its largest single allocation.

    On a CUDA device, where the allocator has no list of single allocations, both are the peak.

    Args:
        run: is called once, after the caller has warmed it up.
        device: where it allocates.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return peak, peak
    with profiled(profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found = [event for event in events if event.get("name") == "[memory]"]
    held = peak = largest = 0
    for event in sorted(found, key=lambda event: event["ts"]):
        size = event["args"]["Bytes"]
        held += size
        peak, largest = max(peak, held), max(largest, size)
    return peak, largest


def described(module: str, doc: str) -> argparse.ArgumentParser:
    """Make a parser without options that shows a script's docstring.

    Args:
        module: the script's name.
        doc: its docstring: the claim, then an explanation.
    """
    about, _, rest = doc.partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def words(text: str) -> list[str]:
    """An argument that is some words, comma-separated."""
    return text.split(",")


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argument that is some of the known names, comma-separated; none where it is empty.

    Raises:
        argparse.ArgumentTypeError: a name that is not known.
    """

    def read(text: str) -> list[str]:
        found = words(text) if text else []
        if unknown := [name for name in found if name not in known]:
            expected = f"expected some of {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"{expected}, got {', '.join(unknown)}")
        return found

    return read


def add_names(
    made: argparse.ArgumentParser, option: str, known: Iterable[str], default: str | None = None
) -> None:
    """Add an option that is some of the known names; all of them unless another default is given.

    Args:
        made: the parser.
        option: such as "--case".
        known: the names.
        default: some, comma-separated.
    """
    every = ",".join(known)
    made.add_argument(
        option,
        type=names(known),
        default=every if default is None else default,
        help=f"some of {every}; default: %(default)s",
    )


def numbers(text: str) -> list[float]:
    """An argument that is numbers, comma-separated."""
    return [float(word) for word in words(text)]


def counts(text: str) -> list[int]:
    """An argument that counts several things, comma-separated."""
    return [count(word) for word in words(text)]


def parser(
    module: str, doc: str, *, device: bool = True, seconds: float | None = None
) -> argparse.ArgumentParser:
    """Make a parser with the options that scripts have.

    Args:
        module: the script's name.
        doc: its docstring: the claim, then an explanation.
        device: whether it runs on others than the CPU.
        seconds: of a row of its tables, by default; None where it counts rounds.
    """
    made = described(module, doc)
    made.add_argument("--threads", type=count, help="for torch; as it chooses unless given")
    made.add_argument("--json", type=Path, help="write everything to this file")
    made.add_argument("--markdown", type=Path, help="write the tables to this file")
    if device:
        made.add_argument("--device", default="cpu", help="default: %(default)s")
    if seconds is not None:
        shown = "of a row; default: %(default)s"
        made.add_argument("--seconds", type=float, default=seconds, help=shown)
    return made


Fill = Callable[["Report", argparse.Namespace], None]
Main = Callable[..., dict[str, Any]]


def script(parser: Callable[[], argparse.ArgumentParser]) -> Callable[[Fill], Main]:
    """Make a function that fills a report, from the options of a parser, a script's ``main``."""

    def decorate(fill: Fill) -> Main:
        claim = (sys.modules[fill.__module__].__doc__ or "").partition("\n")[0]

        def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
            """Run the benchmark and print its tables.

            Args:
                arguments: of the command line; the program's own unless given.

            Returns:
                What ``--json`` writes.
            """
            options = parser().parse_args(arguments)
            report = Report(claim, setup(options))
            fill(report, options)
            return report.close(options)

        return main

    return decorate


def count(text: str) -> int:
    """An argument that counts something.

    Raises:
        argparse.ArgumentTypeError: not a whole number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def setup(options: argparse.Namespace) -> torch.device:
    """Set the threads, seed the generator, and return the device."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return torch.device(getattr(options, "device", "cpu"))


@dataclass
class Report:
    """What a script prints, and what it writes.

    Attributes:
        claim: printed first.
        device: where it runs.
        tables: title -> rows, each column -> what to print.
        targets: what was promised.
        data: whatever else the JSON keeps.
        console: where to print.
    """

    claim: str
    device: torch.device
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(width=_width()))

    def __post_init__(self) -> None:
        """Say what is claimed and where."""
        self.about = environment(self.device)
        self.console.print(self.claim, style="bold")
        shown = ("device", "threads", "torch", "commit", "load")
        self.console.print(", ".join(f"{key} {self.about[key]}" for key in shown), style="dim")

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Print a table and keep it."""
        self.tables[title] = rows
        header, *cells = _cells(rows)
        texts = [name for name in header if any(isinstance(row.get(name), str) for row in rows)]
        left = [*header[:1], *texts]
        self.console.print(drawn(header, cells, left, title, title_justify="left"))

    def worst(
        self, what: str, key: str, rows: list[dict[str, Any]], limit: float, unit: str = "×"
    ) -> None:
        """Hold the worst of some rows, if there are any, to a promise; it is named.

        Args:
            what: the quantity.
            key: its column; before the first number that was measured stands what a row is of.
            rows: of a table.
            limit: the most that was promised.
            unit: of the quantity.
        """
        if rows:
            row = max(rows, key=lambda row: row[key])
            about = takewhile(lambda value: not isinstance(value, float), row.values())
            name = f"{what}, worst ({', '.join(map(str, about))})"
            self.targets.append(Target(name, row[key], limit, unit=unit))

    def note(self, name: str, lines: list[str]) -> None:
        """Print remarks below a table and keep them."""
        self.data.setdefault("notes", {})[name] = lines
        for line in lines:
            self.console.print(line, style="dim", highlight=False)

    def close(self, options: argparse.Namespace) -> dict[str, Any]:
        """Print the targets and the sentence that they decide; write the files.

        Returns:
            What the JSON holds.
        """
        for target in self.targets:
            self.console.print(_line(target), style=_STYLE[target.met], highlight=False)
        judged = [target.met for target in self.targets if target.met is not None]
        missed = [target.what for target in self.targets if target.met is False]
        verdict = f"{sum(judged)} of {len(judged)} targets met"
        verdict += f"; missed: {', '.join(missed)}." if missed else "."
        self.console.print(verdict, style="bold")
        record = {
            "version": 1,
            **self.about,
            "claim": self.claim,
            "verdict": verdict,
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
            "tables": self.tables,
            **self.data,
        }
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
            self.console.print(f"wrote {options.json}")
        if path := getattr(options, "markdown", None):
            text = f"{markdown(record)}\n\n`{record['command']}`\n"
            path.write_text(text, encoding="utf-8")
            self.console.print(f"wrote {path}")
        return record


def markdown(record: dict[str, Any]) -> str:
    """What a report's JSON holds, as tables in Markdown.

    Args:
        record: what ``Report.close`` returned.
    """
    about = ", ".join(f"{key} {record[key]}" for key in ("device", "torch", "commit", "date"))
    lines = [record["claim"], "", about, ""]
    for title, rows in record["tables"].items():
        header, *cells = _cells(rows)
        lines += [f"**{title}**", "", grid(header, cells, header), ""]
    for remarks in record.get("notes", {}).values():
        lines += [f"- {remark}" for remark in remarks]
    lines += [f"- {_line(Target(**_fields(target))).strip()}" for target in record["targets"]]
    return "\n".join([*lines, "", record["verdict"]])


def _fields(target: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in target.items() if name != "met"}


def _width() -> int:
    """Of the terminal; wide enough for the tables where the output is a file."""
    return shutil.get_terminal_size((150, 24)).columns


_STYLE = {True: "green", False: "red", None: "dim"}


def _line(target: Target) -> str:
    bound = "at least" if target.above else "at most"
    promise = f"target {bound} {target.limit:g} {target.unit}"
    if target.value is None:
        return f"  {target.what}: not measured; {promise}"
    verdict = "met" if target.met else "MISSED"
    return f"  {target.what}: {target.value:.3g} {target.unit}; {promise}: {verdict}"


def drawn(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Collection[str],
    title: str,
    **options: Any,
) -> Table:
    """A table for a terminal.

    Args:
        header: what the columns are called.
        rows: their cells.
        left: columns of text; the others are numbers, at the right.
        title: above it.
        options: of ``rich.table.Table``.
    """
    table = Table(title=title, **options)
    for name in header:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str]) -> str:
    """A table in Markdown, of the same."""
    rule = ["---" if name in left else "---:" for name in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of all columns, then what is printed of each row."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    return [header, *([_cell(row.get(name)) for name in header] for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else (f"{value:,.0f}" if isinstance(value, int | float) else str(value))
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What ran on what, by which command, and how busy the machine is, which disturbs timing."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {module.name.removesuffix('.__main__')}" if module else sys.argv[0]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python {name} {shlex.join(sys.argv[1:])}".strip(),
        "frobdecay": frobdecay.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return found.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
