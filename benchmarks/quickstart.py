"""Does a factorized model train as well as a dense one, and what do SI and FD do for it?

A small ResNet, factorized to a tenth of its parameters, in five arms that differ in nothing else:

    dense       the model as it is
    lowrank     factors drawn at random (He), weight decay on each factor
    si          spectral initialization, weight decay on each factor
    fd          factors drawn at random, Frobenius decay
    sifd        both

    python -m benchmarks.quickstart                                       # digits, minutes
    python -m benchmarks.quickstart --data cifar-10-python.tar.gz --depth 20 --epochs 100

Runs of one seed share the dense initialization, the data order, every hyperparameter. The test
set is looked at once, after the last epoch; nothing is selected by it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks import measure, report
from benchmarks.data import ImageData, load
from benchmarks.training import ARMS, Protocol, Run, make, train

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = measure.parser("quickstart", __doc__ or "")
    add = parser.add_argument
    add(
        "--data",
        default="digits",
        help="digits, a file, a directory or torchvision:NAME; README.md",
    )
    add("--limit", type=measure.count, help="train on so many images")
    measure.add_names(parser, "--arms", ARMS)
    add("--seeds", default=3, type=measure.count, help="runs of each arm; default: %(default)s")
    add("--epochs", default=15, type=measure.count, help="default: %(default)s")
    add("--batch", default=32, type=measure.count, help="images a step; default: %(default)s")
    add("--lr", default=0.1, type=float, help="at the start of a cosine; default: %(default)s")
    add("--decay", default=5e-3, type=float, help="λ of all arms; default: %(default)s")
    add("--ratio", default=0.1, type=float, help="of the dense parameters; default: %(default)s")
    add("--depth", default=8, type=int, help="of the ResNet, 6k + 2; default: %(default)s")
    add("--width", default=32, type=measure.count, help="of its first stage; default: %(default)s")
    add("--out", type=Path, default=Path("quickstart-out"), help="directory; default: %(default)s")
    return parser


def _train_all(
    options: argparse.Namespace,
    data: ImageData,
    protocol: Protocol,
    console: Console,
    write: Callable[[list[Run]], None],
) -> list[Run]:
    """Train seed by seed, and hand over all runs after each, in case the rest is interrupted."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    runs = []
    with Progress(*columns, console=console) as progress:
        epochs = options.seeds * len(options.arms) * protocol.epochs
        total = progress.add_task("all runs, epochs", total=epochs)
        current = progress.add_task("", total=protocol.epochs)
        for seed in range(options.seeds):
            for key in options.arms:
                progress.reset(current, description=f"seed {seed}, {ARMS[key].label}")

                def done(epoch: int) -> None:
                    progress.update(current, completed=epoch)
                    progress.advance(total)

                runs.append(train(key, seed, data, protocol, done))
            write(runs)
    return runs


def _describe(data: ImageData, protocol: Protocol, about: dict[str, Any]) -> dict[str, Any]:
    """What the JSON says about the runs."""
    title = (
        f"{data.name}, ResNet-{protocol.depth} factorized to {protocol.ratio:g} of its parameters"
    )
    sizes = {key: len(getattr(data, key)[1]) for key in ("train", "val", "test")}
    return {
        "title": title + (f"\n({data.note})" if data.note else ""),
        **about,
        "data": {"name": data.name, "note": data.note, "images": sizes},
        "protocol": asdict(protocol),
    }


def _caption(summaries: Sequence[report.Summary], described: dict[str, Any]) -> str:
    data, protocol = described["data"], described["protocol"]
    note = f" ({data['note']})" if data["note"] else ""
    seeds, threads = _many(summaries[0].seeds, "seed"), _many(described["threads"], "thread")
    return (
        f"Test accuracy in percent, mean ± standard deviation of {seeds}, and "
        f"its difference to the plain low-rank run of the same seed. {data['name']}{note}, "
        f"{data['images']['train']:,} training and {data['images']['test']:,} test images; "
        f"ResNet-{protocol['depth']}, width {protocol['width']}; {protocol['epochs']} epochs, "
        f"batch {protocol['batch']}, lr {protocol['lr']}, λ {protocol['decay']}; "
        f"{threads} of {described['device']}, torch {described['torch']}. "
        f"`{described['command']}`"
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the benchmark, print its table, write its files.

    Args:
        arguments: of the command line; the program's own unless given.

    Returns:
        All runs.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    chosen = {key: getattr(options, key) for key in Protocol.__dataclass_fields__}
    protocol = Protocol(**chosen)
    try:
        device = measure.setup(options)
        data = load(options.data, limit=options.limit).to(device)
        for key in options.arms:  # what cannot be is refused before anything has run
            make(ARMS[key], 0, data, protocol)
    except (FileNotFoundError, ImportError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    about = measure.environment(device)
    if data.note:
        console.print(f"note: {data.name}: {data.note}", style="yellow")
    stem = str(options.out / f"quickstart-{data.name}")
    described = _describe(data, protocol, about)

    def write(runs: list[Run]) -> None:
        summaries = report.summarize(runs)
        report.figure(runs, described["title"]).savefig(f"{stem}.png", dpi=150)
        table = report.markdown(summaries, _caption(summaries, described))
        (options.markdown or Path(f"{stem}.md")).write_text(table, encoding="utf-8")
        report.write_json(options.json or Path(f"{stem}.json"), runs, described)

    runs = _train_all(options, data, protocol, console, write)
    summaries = report.summarize(runs)
    caption = _caption(summaries, described)
    console.print(report.rich_table(summaries, described["title"], caption))
    files = (options.markdown or f"{stem}.md", options.json or f"{stem}.json")
    console.print(f"wrote {stem}.png, {files[0]} and {files[1]}")
    return runs


if __name__ == "__main__":
    main()
