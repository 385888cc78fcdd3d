"""Run the parts that need a CUDA device, and write gpu.json and gpu.md.

    python -m benchmarks.gpu smoke                 # is it right: under 100 s
    python -m benchmarks.gpu measure               # how fast: under 240 s
    python -m benchmarks.gpu suite                 # all tests, on the device as far as they can be
    python -m benchmarks.gpu tune                  # what other tiles would do
    python -m benchmarks.gpu smoke --device cpu    # the same code in small; files go to out/
    python -m benchmarks.gpu smoke --only gradients,graph

Every part runs in a process of its own and may fail for itself. Files are written as each part
ends. The last line is a verdict; above it stands the first error whole.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu import features, kernels, models, steps, tiles, timing
from benchmarks.gpu.parts import PARTS, PATIENCE, Part, run_parts
from benchmarks.measure import Report

__all__ = ["main"]

MODES = {"smoke": 100, "measure": 240, "suite": 60, "tune": 120}
"""Seconds, after which no part is started."""

_ = (
    features,
    kernels,
    models,
    steps,
    timing,
    tiles,
)  # importing them entered their parts into the table


def _parser() -> argparse.ArgumentParser:
    made = measure.described("gpu", __doc__ or "")
    made.add_argument("mode", choices=[*MODES, "part"])
    names = measure.names(PARTS)
    made.add_argument("name", nargs="?", type=names, help="with part: which one, in this process")
    made.add_argument("--device", default="cuda", help="default: %(default)s")
    made.add_argument("--only", type=names, help="some parts, comma-separated")
    made.add_argument("--budget", type=float, help="seconds, after which no part is started")
    made.add_argument(
        "--out", type=Path, help="default: benchmarks/results; out, which git ignores, on a CPU"
    )
    made.add_argument("--logs", type=Path, help="keep the parts' whole output in this folder")
    made.add_argument("--json", type=Path, help="with part: write its report to this file")
    return made


def _part(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    (name,) = options.name
    one = PARTS[name]
    report = Report(one.claim, torch.device(options.device))
    try:
        one.run(report)
    finally:
        report.close(options)
    return 0


class _Kept:
    """gpu.json and gpu.md in a folder, with modes, or other parts, that were run earlier."""

    def __init__(self, folder: Path, mode: str, only: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown, self.mode = folder / "gpu.json", folder / "gpu.md", mode
        found = json.loads(self.json.read_text()) if self.json.exists() else {"version": 2}
        self.record: dict[str, Any] = {**found, mode: found.get(mode, {}) if only else {}}

    def keep(self, name: str, part: dict[str, Any]) -> None:
        """Write both files anew, with one more part."""
        self.record[self.mode][name] = part
        self.write()

    def write(self) -> None:
        """Write what is kept."""
        self.json.write_text(json.dumps(self.record, indent=1) + "\n")
        lines = []
        for mode in (mode for mode in MODES if mode in self.record):
            lines += [f"# {mode}", ""]
            for title, one in self.record[mode].items():
                lines += [f"## {title}: {one['outcome']}, {one['seconds']:.0f} s", ""]
                if "report" in one:
                    lines += [measure.markdown(one["report"]), ""]
        self.markdown.write_text("\n".join(lines))


def missing(one: Part) -> bool:
    """Whether the program is missing that a part is run by."""
    return bool(one.under) and shutil.which(one.under[0]) is None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a mode, or one part.

    Returns:
        0 where all parts passed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.mode == "part":
        return _part(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none; --device cpu runs everything in small")
    names = [name for name, one in PARTS.items() if one.mode == options.mode]
    names = options.only or names
    for name in names:
        if missing(PARTS[name]):
            print(f"== {name}: skipped, {PARTS[name].under[0]} is not installed")
    names = [name for name in names if not missing(PARTS[name])]
    small = options.device == "cpu"  # what that takes is no result
    folder = options.out or Path("out" if small else "benchmarks/results")
    begin, kept = time.monotonic(), _Kept(folder, options.mode, bool(options.only))
    budget = options.budget or MODES[options.mode] * (PATIENCE if small else 1)
    failed = run_parts(names, options.device, budget, kept.keep, options.logs)
    for error in list(failed.values())[:1]:
        print(f"== the first error\n{error}")
    shown = f"; failed: {', '.join(failed)}" if failed else ""
    print(
        f"{options.mode} on {options.device}: {len(names) - len(failed)} of {len(names)} parts "
        f"passed in {time.monotonic() - begin:.0f} s{shown}",
        flush=True,
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
