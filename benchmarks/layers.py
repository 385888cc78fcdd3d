"""What is done once for every layer takes no longer for each of many layers than for each of few.

    python -m benchmarks.layers --threads 2
    python -m benchmarks.layers --sizes 100,1000,10000 --only inspect,merge

Models of tiny linear layers, ten to a block, so that arithmetic hardly counts ("shapes apart": no
two layers alike). Each row is one
function or command; its columns are microseconds a layer, the median of a few runs, by the number
of layers; what it works on is made anew for every run and not timed. ``load_state_dict`` is torch's
own, on the dense model: it looks through all keys for every child of a module, and
``load_dense_`` cannot be better than that.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.measure import Report, Target
from frobdecay import diagnostics
from frobdecay.cli.main import main as command
from frobdecay.models.checkpoints.dense import load_dense_
from frobdecay.models.checkpoints.factorized import load_factorized, save_factorized
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge, unroll
from frobdecay.models.ranks import plan_ranks
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.find import products
from frobdecay.product.product import penalty, product_norm

__all__ = ["main"]

ALLOWED = 2.0
"""Times that a layer of the largest model may take longer than one of the smallest."""
WIDTH, BLOCK = 4, 10


def _dense(size: int) -> nn.Module:
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(size)]
    return nn.Sequential(*(nn.Sequential(*layers[k : k + BLOCK]) for k in range(0, size, BLOCK)))


def _apart(size: int) -> nn.Module:
    """No two weights of one shape."""
    sides = (divmod(k, 64) for k in range(size))
    return nn.Sequential(*(nn.Linear(WIDTH + n, WIDTH + m) for m, n in sides))


def _factorized(size: int) -> nn.Module:
    model = _dense(size)
    factorize(model, rank=1)
    return model


def _wrap(model: nn.Module) -> None:
    FrobeniusDecay(torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1), model)


def _run(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        if command(arguments):
            raise RuntimeError(f"{arguments} failed")


def _files(size: int, folder: Path) -> dict[str, str]:
    names = {name: str(folder / f"{name}.safetensors") for name in ("factors", "out")}
    save_factorized(_factorized(size), names["factors"])
    names["dense"] = str(folder / "dense.pt")
    torch.save(_dense(size).state_dict(), names["dense"])
    return names


Run = tuple[Callable[[], Any], Callable[[Any], object]]


def _runs(size: int, files: dict[str, str]) -> dict[str, Run]:
    """What is timed: how its argument is made, and the call."""
    state = _dense(size).state_dict()
    names = {name: 1 for name in state if name.endswith("weight")}
    return {
        "factorize": (lambda: _dense(size), lambda model: factorize(model, rank=1)),
        "plan_ranks(rank=)": (lambda: _dense(size), lambda model: plan_ranks(model, rank=1)),
        "plan_ranks(ratio=)": (lambda: _dense(size), lambda model: plan_ranks(model, ratio=0.8)),
        "plan_ranks(ratio=), shapes apart": (
            lambda: _apart(size),
            lambda model: plan_ranks(model, ratio=0.8),
        ),
        "plan_ranks(rank={})": (
            lambda: _dense(size),
            lambda model: plan_ranks(model, rank=names),
        ),
        "products": (lambda: _factorized(size), products),
        "penalty": (lambda: products(_factorized(size)), lambda found: penalty(found, 0.1)),
        "product_norm of each": (
            lambda: products(_factorized(size)),
            lambda found: [product_norm(product) for product in found],
        ),
        "diagnostics.measure": (lambda: products(_factorized(size)), diagnostics.measure),
        "FrobeniusDecay": (lambda: _factorized(size), _wrap),
        "merge": (lambda: _factorized(size), merge),
        "unroll": (lambda: _factorized(size), unroll),
        "save_factorized": (
            lambda: _factorized(size),
            lambda model: save_factorized(model, files["out"]),
        ),
        "load_factorized": (
            lambda: _dense(size),
            lambda model: load_factorized(model, files["factors"]),
        ),
        "load_dense_": (lambda: _factorized(size), lambda model: load_dense_(model, state)),
        "load_state_dict": (lambda: _dense(size), lambda model: model.load_state_dict(state)),
        "inspect": (lambda: None, lambda _: _run("inspect", files["dense"])),
        "inspect factors": (lambda: None, lambda _: _run("inspect", files["factors"], "--json")),
        "merge factors": (
            lambda: None,
            lambda _: _run("merge", files["factors"], files["out"], "--force"),
        ),
    }


def _median(run: Run, rounds: int) -> float:
    """Seconds of one call, of this process alone: a busy machine hardly counts.

    As in ``timeit``, Python's garbage collector waits: it looks at all objects that there are.
    """
    times = []
    for _ in range(rounds):
        made = run[0]()
        gc.collect()
        gc.disable()
        try:
            start = time.process_time()
            run[1](made)
            times.append(time.process_time() - start)
        finally:
            gc.enable()
    return statistics.median(times)


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("layers", __doc__ or "", device=False)
    sizes = {"type": measure.counts, "default": "100,1000,4000"}
    made.add_argument("--sizes", **sizes, help="numbers of layers")
    rows = measure.names(_runs(1, {}))
    made.add_argument("--only", type=rows, help="some of the rows, such as 'inspect,merge'")
    made.add_argument("--rounds", type=measure.count, default=3, help="default: %(default)s")
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Measure the functions."""
    rows: dict[str, dict[str, Any]] = {}
    options.sizes.sort()
    with tempfile.TemporaryDirectory() as folder:  # first calls import what they need
        runs = _runs(BLOCK, _files(BLOCK, Path(folder)))
        for make, call in (runs[name] for name in options.only or runs):
            call(make())
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            runs = _runs(size, _files(size, Path(folder)))
            for name in options.only or runs:
                micro = _median(runs[name], options.rounds) / size * 1e6
                rows.setdefault(name, {"": name})[f"{size} layers"] = micro
    report.table("microseconds a layer", list(rows.values()))
    first, last = (f"{options.sizes[k]} layers" for k in (0, -1))
    report.targets += [
        Target(f"{name}, a layer of {last} ÷ of {first}", row[last] / row[first], ALLOWED)
        for name, row in rows.items()
        if name != "load_state_dict"  # torch's own
    ]


if __name__ == "__main__":
    main()
