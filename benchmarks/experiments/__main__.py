"""Re-measure the paper's experiments, one table a command.

    python -m benchmarks.experiments compression --preset cpu --workers 2
    python -m benchmarks.experiments compression --preset paper --data cifar-10-python.tar.gz
    python -m benchmarks.experiments report benchmarks/results/paper

Trials that are done are not run again, nor those that another experiment with the same ``--out``
has done; an interrupted one continues at its last checkpoint: give the same command. ``report``
makes tables and pictures anew from a JSON file, or from all of a directory and then the page of
claims, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.experiments import tables, verdicts
from benchmarks.experiments.catalogue import EXPERIMENTS, jobs
from benchmarks.experiments.engine import run_all, share
from benchmarks.experiments.verdicts import Judged, judge
from benchmarks.measure import count, described, environment, words

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    made = described("experiments", __doc__ or "")
    add = made.add_argument
    add("what", choices=[*EXPERIMENTS, "report"], help="an experiment, or report PATH")
    add("path", nargs="?", type=Path, help="of a report: a JSON file, or a directory of them")
    add(
        "--preset",
        default="cpu",
        choices=sorted({name for one in EXPERIMENTS.values() for name in one.presets}),
        help="default: %(default)s",
    )
    add("--seeds", type=count, default=3, help="default: %(default)s")
    add("--arms", type=words, help="some of them")
    add("--variants", type=words, help="some of the preset's, such as 'resnet8x2 0.1'")
    add("--data", help="where the data is, in place of the preset's; benchmarks/README.md")
    add("--limit", type=count, help="training examples, in place of the preset's")
    add("--epochs", type=count, help="in place of the preset's")
    add("--device", help="in place of the preset's")
    add("--precision", choices=["float32", "bfloat16"], help="in place of the preset's")
    add("--compile", action="store_true", default=None, help="train compiled models")
    add("--graph", action="store_true", default=None, help="replay steps from a CUDA graph")
    add("--workers", type=count, default=1, help="trials side by side; default: %(default)s")
    add("--threads", type=count, default=1, help="of each trial; default: %(default)s")
    add("--out", type=Path, default=Path("experiments-out"), help="default: %(default)s")
    return made


def _write(path: Path, record: dict[str, Any], console: Console) -> None:
    """Table and picture beside the JSON that they come from."""
    experiment = EXPERIMENTS[record["experiment"]]
    rows = tables.summarize(record["trials"], experiment.baseline)
    console.print(tables.rich_table(rows, experiment, record["caption"]))
    path.with_suffix(".md").write_text(
        tables.markdown(rows, experiment, record["caption"]), encoding="utf-8"
    )
    tables.figure(record["trials"], experiment).savefig(path.with_suffix(".png"), dpi=130)
    console.print(f"wrote {path}, and .md and .png beside it")


def _report(path: Path, console: Console) -> dict[str, Any]:
    """Tables and pictures anew from JSON; of a directory also the page of claims."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    records = {file: _read(file) for file in files}
    if not records:
        raise ValueError(f"expected a JSON file, or a directory with some, got {path}")
    judged = []
    for file, record in records.items():
        _write(file, record, console)
        experiment = EXPERIMENTS[record["experiment"]]
        judged.append(Judged(file.stem, experiment, judge(record["trials"], experiment)))
    if path.is_dir():
        (path / "claims.md").write_text(verdicts.markdown(judged), encoding="utf-8")
        console.print(f"wrote {path / 'claims.md'}")
    return {file.stem: record for file, record in records.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
        EXPERIMENTS[record["experiment"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: expected what an experiment wrote, got something else") from None
    return record  # type: ignore[no-any-return]


def _caption(record: dict[str, Any], options: argparse.Namespace) -> str:
    experiment = EXPERIMENTS[options.what]
    changes = experiment.changes.get(options.preset, "none")
    return (
        f"Mean ± standard error of {options.seeds} seeds, differences paired by seed; minutes of "
        f"one trial, {options.workers} side by side with {options.threads} threads each. Changes "
        f"to the paper's protocol: {changes}. {record['device']}, torch {record['torch']}, "
        f"{record['date'][:10]}. `{record['command']}`"
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run an experiment, or draw its report.

    Args:
        arguments: of the command line; the program's own unless given.

    Returns:
        What the JSON holds; of a report the name of each file -> what it holds.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    if (options.what == "report") != (options.path is not None):
        parser.error("expected a PATH with report, and with nothing else")
    if options.what == "report":
        try:
            return _report(options.path, console)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    fields = ("data", "limit", "epochs", "device", "precision", "compile", "graph")
    given = {key: getattr(options, key) for key in fields}
    changes = {key: value for key, value in given.items() if value is not None}
    stem = f"{options.what}-{options.preset}"
    try:
        chosen = jobs(
            options.what, options.preset, options.seeds, options.arms, options.variants, **changes
        )
        for job in {job.about["arm"]: job for job in chosen if not job.after}.values():
            job.make(options.out / stem)  # what cannot be is refused before anything has run
    except (FileNotFoundError, ImportError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    console.print(EXPERIMENTS[options.what].claim, style="bold")
    device = torch.device(chosen[0].make.keywords["protocol"].device)  # type: ignore[attr-defined]
    about = environment(device)
    side = {"workers": options.workers, "threads": options.threads}
    if shared := share(chosen, options.out / stem, options.out.glob("*/")):
        console.print(f"run by another experiment already: {', '.join(shared)}")
    try:
        trials = run_all(chosen, options.out / stem, **side, fresh=device.type == "cpu")
    except ValueError as error:
        parser.error(str(error))
    record = {
        "version": 1,
        **about,
        "experiment": options.what,
        "preset": options.preset,
        "protocols": {
            variant: {**asdict(protocol), **changes}
            for variant, protocol in EXPERIMENTS[options.what].presets[options.preset].items()
            if options.variants is None or variant in options.variants
        },
        "trials": [{k: v for k, v in trial.items() if k != "settings"} for trial in trials],
    }
    record["caption"] = _caption(record, options)
    path = options.out / f"{stem}.json"
    path.write_text(json.dumps(record) + "\n")
    _write(path, record, console)
    return record


if __name__ == "__main__":
    main()
