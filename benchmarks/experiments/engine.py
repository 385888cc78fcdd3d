"""Trials that can be interrupted: they run in processes and continue where they were.

A trial is one arm with one seed. It advances an epoch at a time, its state is written to a
checkpoint between epochs, and its result to a JSON file at the end; what is there already is not
run again. An interrupted trial ends in the same result as one that was not.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Job", "Trial", "run_all", "run_one", "share"]

SAVE_EVERY = 30.0
"""Seconds between two checkpoints, at least."""


class Trial(Protocol):
    """One arm with one seed, in the making."""

    epoch: int
    epochs: int

    def advance(self) -> None:
        """Train for one epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on: tensors, numbers, containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""

    def result(self) -> dict[str, Any]:
        """What the run gave, as JSON takes it; looks at the test set."""


@dataclass(frozen=True)
class Job:
    """A trial to be run.

    Attributes:
        key: unique, fit for a file name.
        make: makes the trial from the directory of all results; has to pickle.
        after: keys of jobs that have to be done before.
        about: what the JSON says beside the result, its protocol above all: a result or
            checkpoint that says otherwise is another job's, and refused.
    """

    key: str
    make: Callable[[Path], Trial]
    after: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def run_all(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    threads: int = 1,
    fresh: bool = True,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run what has no result yet.

    Args:
        jobs: in the order in which to begin them.
        out: directory of results and checkpoints.
        workers: processes side by side.
        threads: of each.
        fresh: a process for each trial, whose peak of memory is then its own; else each has one
            after the other, and a GPU is not begun with anew every time.
        progress: show bars on the terminal.

    Returns:
        The results of all jobs, in their order.

    Raises:
        RuntimeError: trials failed; raised when all others are done whose results are kept. Run
            again, those that failed begin at their last checkpoints.
        ValueError: there are results of another protocol.
    """
    out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        _check_same(job, out)
    todo = [job for job in jobs if not _result(out, job.key).exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    context = get_context("forkserver")  # which has imported what every trial needs
    context.set_forkserver_preload(["torch._dynamo", "benchmarks.experiments.catalogue"])
    queue = context.SimpleQueue()
    pool = partial(ProcessPoolExecutor, mp_context=context, initializer=_tell, initargs=(queue,))
    shared = None if fresh else pool(workers)
    with Progress(*columns, *times, disable=not progress) as bars:
        whole = bars.add_task("trials", total=len(todo))
        running: dict[Future[None], Job] = {}
        tasks: dict[str, TaskID] = {}
        passed: dict[str, float] = {}
        failed: dict[str, BaseException | str] = {}
        try:
            while todo or running:
                for job in list(todo):
                    if lost := failed.keys() & set(job.after):
                        todo.remove(job)
                        failed[job.key] = f"it needs {', '.join(sorted(lost))}"
                    elif len(running) < workers and all(
                        _result(out, k).exists() for k in job.after
                    ):
                        todo.remove(job)
                        # A pool for each trial: one that replaces its processes (by
                        # max_tasks_per_child) can wait for a spare one for ever.
                        one = shared or pool(1)
                        running[one.submit(run_one, job, out, threads)] = job
                        if one is not shared:
                            one.shutdown(wait=False)
                        tasks[job.key] = bars.add_task(job.key, total=None)
                if todo and not running:
                    raise RuntimeError(f"{todo[0].key} waits for {todo[0].after}, not to be run")
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    key, epoch, epochs = queue.get()
                    passed[key] = epoch / epochs
                    bars.update(whole, completed=sum(passed.values()))
                    bars.update(tasks[key], completed=epoch, total=epochs)
                for future in done:
                    job = running.pop(future)
                    bars.remove_task(tasks[job.key])
                    if error := future.exception():
                        failed[job.key] = error
        finally:
            if shared is not None:
                shared.shutdown(wait=False, cancel_futures=True)
    if failed:
        said = "; ".join(f"{key} failed: {error}" for key, error in failed.items())
        first = next(iter(failed.values()))
        raise RuntimeError(said) from (first if isinstance(first, BaseException) else None)
    return [json.loads(_result(out, job.key).read_text()) for job in jobs]


def share(jobs: Sequence[Job], out: Path, others: Iterable[Path]) -> list[str]:
    """Copy results of trials that another experiment has run: the same settings and seed.

    Trials that others come after are not copied: they leave more than a result.

    Args:
        jobs: what is to be run.
        out: directory of its results.
        others: directories of other experiments' results.

    Returns:
        The keys of what was copied.
    """
    needed = {key for job in jobs for key in job.after}
    missing = [job for job in jobs if "settings" in job.about and job.key not in needed]
    wanted = {_same(job.about): job for job in missing if not _result(out, job.key).exists()}
    shared = []
    for path in (path for other in others if other != out for path in other.glob("*.json")):
        if not wanted:
            break
        found = json.loads(path.read_text())
        if (job := wanted.pop(_same(found), None)) is not None:
            out.mkdir(parents=True, exist_ok=True)
            _keep({**found, **job.about}, _result(out, job.key))
            shared.append(job.key)
    return shared


def _same(about: Mapping[str, Any]) -> str:
    return json.dumps([about.get("settings"), about.get("seed")], sort_keys=True)


_told: Any = None  # in the process of a trial: the queue that hears of its epochs


def _tell(queue: Any) -> None:
    global _told
    _told = queue


def run_one(job: Job, out: Path, threads: int) -> None:
    """Run one trial to its end, from its checkpoint if there is one.

    Args:
        job: which.
        out: directory of results and checkpoints.
        threads: for torch.
    """
    torch.set_num_threads(threads)
    trial = job.make(out)
    checkpoint, seconds, peak = out / f"{job.key}.pt", 0.0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        _compare(job, json.loads(saved["about"]), checkpoint)
        trial.load_state_dict(saved["trial"])
        seconds, peak = saved["seconds"], saved["peak_mib"]
    _forget_peak()
    start = last = time.monotonic()
    while trial.epoch < trial.epochs:
        trial.advance()
        now = time.monotonic()
        if now - last > SAVE_EVERY and trial.epoch < trial.epochs:
            costs = {"seconds": seconds + now - start, "peak_mib": max(peak, _peak_mib())}
            about = json.dumps(job.about)
            _save({"trial": trial.state_dict(), "about": about, **costs}, checkpoint)
            last = now
        if _told is not None:
            _told.put((job.key, trial.epoch, trial.epochs))
    seconds += time.monotonic() - start
    costs = {"seconds": seconds, "peak_mib": max(peak, _peak_mib())}
    _keep({**job.about, **trial.result(), **costs}, _result(out, job.key))
    checkpoint.unlink(missing_ok=True)


def _result(out: Path, key: str) -> Path:
    return out / f"{key}.json"


def _check_same(job: Job, out: Path) -> None:
    if _result(out, job.key).exists():
        _compare(job, json.loads(_result(out, job.key).read_text()), _result(out, job.key))


def _compare(job: Job, found: Mapping[str, Any], path: Path) -> None:
    """Refuse what was made by another protocol."""
    wanted = json.loads(json.dumps(job.about))
    differ = [key for key, value in wanted.items() if found.get(key) != value]
    if differ:
        raise ValueError(
            f"{path} is of another protocol: expected {differ[0]} = {wanted[differ[0]]}, got "
            f"{found.get(differ[0])}; give another --out, or remove it"
        )


def _keep(result: Mapping[str, Any], path: Path) -> None:
    """Write a result; an interruption leaves none."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result) + "\n")
    os.replace(part, path)


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; an interruption leaves the one before."""
    part = path.with_name(f"{path.name}.part")
    torch.save(state, part)
    os.replace(part, path)


def _forget_peak() -> None:
    """Count from here: loading the data takes more than training, and the same for every arm."""
    peaks = Path("/proc/self/clear_refs")
    if os.access(peaks, os.W_OK):
        peaks.write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak_mib() -> float:
    """Of the device's memory where there is one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # there ru_maxrss begins at the peak of the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
