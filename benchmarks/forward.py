"""A factorized layer costs what a hand-written pair of thin layers costs, forward and backward.

    python -m benchmarks.forward --threads 2                 # the quick grid, about three minutes
    python -m benchmarks.forward --full --seconds 5          # all of it, an hour on two cores
    python -m benchmarks.forward --plot breakeven.png

Each row is one layer, one rank, one number of rows (images for convolutions): one forward and one
backward pass to the input and to all parameters. Compared, in turns, are

    automatic             a layer after frobdecay.factorize: factored or materialized, by its cost
    factored, formed      the same, with the choice forced
    pair                  two thin layers in an nn.Sequential, written by hand
    parametrize           torch's parametrize with U @ V.T: what it costs without FactoredTensor
    parametrized by …     the same with nothing in it, in the table of calls with one row
    dense                 the layer as it was
    tltorch               FactorizedLinear of tensorly-torch: a CP matrix, applied factor by factor
    geotorch              its low_rank, which forms W from matrix exponentials

The last two are measured where they are installed, in the first row only: they take seconds, and
at 512 rows tltorch asks for more memory than there is.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks import measure
from benchmarks.cases import CONVS, LINEARS, Conv
from benchmarks.measure import Report, Target, Timing
from frobdecay.models.factorize import factorize
from frobdecay.weights.forms.cost import force
from frobdecay.weights.lowrank import LowRank

__all__ = ["main"]

Run = Callable[[], object]
AUTO, FACTORED, FORMED, PAIR = "automatic", "factored", "formed", "pair"
PLAIN, DENSE, UNTOUCHED = "parametrize", "dense", "parametrized by nothing"

FULL_RANKS, FULL_ROWS = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2), (1, 32, 512, 4096)
QUICK_RANKS, QUICK_ROWS = (1 / 16, 1 / 4, 1 / 2), (1, 512)
MANY = 512
"""Rows from which a layer has to be as fast as the pair; below, calls are what costs."""


CALLED = (128, 256, 512, 1024)
"""Widths of layers that are called with one row."""


class _Product(nn.Module):
    """What one writes without FactoredTensor."""

    def __init__(self, factors: tuple[Tensor, Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.factors, self.back = factors, back

    def forward(self, U: Tensor, V: Tensor) -> Tensor:
        return self.back(U @ V.T)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.factors


def _pass(model: nn.Module, x: Tensor, cotangent: Tensor, forced: bool | None = None) -> Run:
    """A forward and a backward pass, gradients thrown away."""
    leaves = [x, *model.parameters()]

    def run() -> None:
        if forced is None:
            out = model(x)
        else:
            with force(forced):
                out = model(x)
        torch.autograd.grad(out, leaves, cotangent)

    return run


SLOW = {"geotorch", "tltorch"}


def _linear_models(
    n: int, m: int, r: int, slow: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every way to write the layer, and why some are missing."""
    dense = nn.Linear(n, m)
    factored = copy.deepcopy(dense)
    factorize(factored, rank=r, init="matched")
    U, V = (f.detach().clone() for f in factored.parametrizations.weight.parameters())
    pair = nn.Sequential(nn.Linear(n, r, bias=False), nn.Linear(r, m))
    plain = copy.deepcopy(dense)
    parametrize.register_parametrization(plain, "weight", _Product((U, V), lambda W: W))
    models = {AUTO: factored, PAIR: pair, PLAIN: plain, DENSE: dense}
    missing = {}
    for library, make in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            missing[library] = "not installed"
        elif slow or library not in SLOW:
            models[library] = make(n, m, r)
    return models, missing


def _tensorly(n: int, m: int, r: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tltorch import FactorizedLinear
    layer: nn.Module = FactorizedLinear(
        (n,), (m,), rank=r, factorization="cp", implementation="factorized"
    )
    return layer


def _geotorch(n: int, m: int, r: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import geotorch
    layer = nn.Linear(n, m)
    geotorch.low_rank(layer, "weight", r)
    return layer


LIBRARIES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "tltorch": _tensorly,
    "geotorch": _geotorch,
}


def _conv_models(conv: Conv, scheme: str, fraction: float) -> tuple[dict[str, nn.Module], int]:
    """Every way to write a 3×3 convolution in one scheme, and the rank."""
    c = conv.channels
    dense = nn.Conv2d(c, c, 3, padding=1)
    factored = copy.deepcopy(dense)
    plan = factorize(
        factored, rank=fraction, init="matched", parametrization=partial(LowRank, pattern=scheme)
    )
    (r,) = plan.ranks.values()
    if scheme == "spatial":
        pair = nn.Sequential(
            nn.Conv2d(c, r, (1, 3), padding=(0, 1), bias=False),
            nn.Conv2d(r, c, (3, 1), padding=(1, 0)),
        )
    else:
        pair = nn.Sequential(nn.Conv2d(c, r, 3, padding=1, bias=False), nn.Conv2d(r, c, 1))
    held = factored.parametrizations.weight
    U, V = (f.detach().clone() for f in held.parameters())
    plain = copy.deepcopy(dense)
    view = held[0].matricization
    parametrize.register_parametrization(plain, "weight", _Product((U, V), view.tensor))
    return {AUTO: factored, PAIR: pair, PLAIN: plain, DENSE: dense}, r


def _time(
    models: dict[str, nn.Module], x: Tensor, device: torch.device, seconds: float
) -> dict[str, Timing]:
    x = x.to(device).requires_grad_()
    models = {name: model.to(device) for name, model in models.items()}
    cotangent = torch.randn_like(models[DENSE](x))
    runs = {name: _pass(model, x, cotangent) for name, model in models.items()}
    runs[FACTORED] = _pass(models[AUTO], x, cotangent, True)
    runs[FORMED] = _pass(models[AUTO], x, cotangent, False)
    slow = {name: runs.pop(name) for name in SLOW & set(runs)}  # they leave no cache to the others
    timings = measure.interleave(runs, device, seconds=seconds)
    return {**timings, **measure.interleave(slow, device, seconds=0)}


def _row(about: dict[str, Any], timings: dict[str, Timing]) -> dict[str, Any]:
    ms = {name: timing.ms for name, timing in timings.items()}
    row = {**about, **ms}
    chosen = ms[FACTORED if _is_factored(row) else FORMED]
    best = min(ms[FACTORED], ms[FORMED])
    ratios = {
        "÷ pair": ms[AUTO] / ms[PAIR],
        "÷ best": chosen / best,
        "÷ dense": ms[AUTO] / ms[DENSE],
    }
    return {**row, **ratios, "added, µs": 1e3 * (ms[AUTO] - ms[PAIR])}


def _linears(options: Any, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    rows, notes = [], []
    for name in options.layers:
        n, m = LINEARS[name]
        for fraction in options.ranks:
            r = max(1, round(fraction * min(m, n)))
            models, missing = _linear_models(n, m, r, slow=not rows)
            notes = [f"{library}: {reason}" for library, reason in missing.items()]
            for count in options.rows:
                x = torch.randn(count, n)
                timings = _time(models, x, device, options.seconds)
                for library in SLOW:
                    models.pop(library, None)
                rows.append(_row({"layer": name, "r": r, "rows": count}, timings))
    return rows, notes


def _convolutions(options: Any, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for name in options.convs:
        conv = CONVS[name]
        for scheme in ("spatial", "channel"):
            for fraction in options.conv_ranks:
                models, r = _conv_models(conv, scheme, fraction)
                x = torch.randn(conv.batch, conv.channels, conv.size, conv.size)
                timings = _time(models, x, device, options.seconds)
                rows.append(_row({"layer": name, "scheme": scheme, "r": r}, timings))
    return rows


def _compiled(options: Any, device: torch.device) -> list[dict[str, Any]]:
    """One layer by inductor, factored and as the pair."""
    n, m = LINEARS[options.layers[0]]
    models, _ = _linear_models(n, m, min(n, m) // 8)
    x = torch.randn(MANY, n, device=device, requires_grad=True)
    cotangent = torch.randn(MANY, m, device=device)
    runs = {
        name: _pass(torch.compile(models[name].to(device), fullgraph=True), x, cotangent)
        for name in (AUTO, PAIR)
    }
    timings = measure.interleave(runs, device, seconds=options.seconds)
    ms = {f"{name}, ms": timing.ms for name, timing in timings.items()}
    ratio = timings[AUTO].ms / timings[PAIR].ms
    return [{"layer": f"{n}→{m}", "rows": MANY, **ms, "÷ pair": ratio}]


class _Whole(nn.Module):
    """A parametrization that does nothing: what torch's own way to a weight takes."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


def _calls(options: Any, device: torch.device) -> list[dict[str, Any]]:
    """One row of input, forward alone: what is called, more than what is computed."""
    rows = []
    for n in CALLED:
        dense = nn.Linear(n, n)
        factored, untouched = copy.deepcopy(dense), copy.deepcopy(dense)
        factorize(factored, rank=n // 8, init="matched")
        parametrize.register_parametrization(untouched, "weight", _Whole())
        pair = nn.Sequential(nn.Linear(n, n // 8, bias=False), nn.Linear(n // 8, n))
        models = {AUTO: factored, PAIR: pair, UNTOUCHED: untouched, DENSE: dense}
        x = torch.randn(1, n, device=device)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                runs = {name: partial(model.to(device), x) for name, model in models.items()}
                timings = measure.interleave(runs, device, seconds=options.seconds)
            us = {name: 1e3 * timing.ms for name, timing in timings.items()}
            about = {"layer": f"{n}→{n}", "r": n // 8, "gradients": "yes" if gradients else "no"}
            rows.append({**about, **us, "added, µs": us[AUTO] - us[DENSE]})
    return rows


def _memory(options: Any, device: torch.device) -> list[dict[str, Any]]:
    """What one pass allocates, next to the dense weight that it must not form."""
    rows = []
    for name in options.layers:
        n, m = LINEARS[name]
        models, _ = _linear_models(n, m, min(n, m) // 16)
        x = torch.randn(8, n, device=device, requires_grad=True)
        cotangent = torch.randn(8, m, device=device)
        for which in (AUTO, PAIR, PLAIN):
            run = _pass(models[which].to(device), x, cotangent)
            run()
            peak, largest = measure.memory(run, device)
            sizes = {"peak": peak, "largest": largest, "W": 4 * m * n}
            row = {f"{what}, KiB": size / 2**10 for what, size in sizes.items()}
            rows.append({"layer": f"{name}, r/n = 1/16, 8 rows", "": which, **row})
    return rows


def _break_even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rank at which a factored layer takes as long as the dense one."""
    out = []
    for key in dict.fromkeys((row["layer"], row["rows"]) for row in rows):
        curve = _curve(rows, *key)
        crossing = None
        for (r0, y0), (r1, y1) in pairwise(curve):
            if y0 < 1 <= y1:
                crossing = r0 + (r1 - r0) * (1 - y0) / (y1 - y0)
        edge = f"above {curve[-1][0]}" if curve[-1][1] < 1 else f"below {curve[0][0]}"
        out.append(
            {"layer": key[0], "rows": key[1], "rank": edge if crossing is None else crossing}
        )
    return out


def _curve(rows: list[dict[str, Any]], layer: str, count: int) -> list[tuple[int, float]]:
    """(r, factored ÷ dense) by rank."""
    mine = [row for row in rows if (row["layer"], row["rows"]) == (layer, count)]
    return sorted((row["r"], row[FACTORED] / row[DENSE]) for row in mine)


def _draw(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    drawn = Figure(figsize=(4 * len(layers), 3.6), layout="constrained")
    for axes, layer in zip(drawn.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        n, m = LINEARS[layer]
        for count in dict.fromkeys(row["rows"] for row in rows):
            curve = _curve(rows, layer, count)
            axes.loglog(*zip(*curve, strict=True), "o-", label=f"rows: {count}")
            axes.set_xticks([r for r, _ in curve], [str(r) for r, _ in curve])
        axes.minorticks_off()
        axes.axhline(1, color="black", lw=0.8)
        axes.axvline(m * n / (m + n), color="black", ls=":", lw=0.8)
        axes.set(title=layer, xlabel="rank (dotted: as many parameters)", ylabel="factored ÷ dense")
        axes.grid(alpha=0.3)
        axes.legend()
    return drawn


def _judge(
    report: Report,
    rows: list[dict[str, Any]],
    convs: list[dict[str, Any]],
    calls: list[dict[str, Any]],
    memory: list[dict[str, Any]],
) -> None:
    """Hold the worst row of each kind to what was promised."""
    # where the automatic choice is to form W, the pair is not what it competes with
    chosen = [row for row in rows if row["rows"] >= MANY and _is_factored(row)]
    report.worst("linear ÷ pair", "÷ pair", chosen, 1.08)
    chosen = [row for row in convs if _is_factored(row)]
    report.worst("convolution ÷ pair", "÷ pair", chosen, 1.08)
    # where the multiplications take least, what is left are the calls
    short = sorted((row for row in rows if row["rows"] == 1), key=lambda row: row[PAIR])[:1]
    report.worst("added per call at 1 row", "added, µs", short, 25, "µs")
    report.worst("forward at 1 row, added to dense", "added, µs", calls, 25, "µs")
    report.worst("linear, choice ÷ better of factored and formed", "÷ best", rows, 1.08)
    report.worst("convolution, choice ÷ better of factored and formed", "÷ best", convs, 1.08)
    for row in memory:
        row["share"] = row["largest, KiB"] / row["W, KiB"]
    ours = [row for row in memory if row[""] == AUTO]
    report.worst("largest allocation ÷ W", "share", ours, 0.99)


def _is_factored(row: dict[str, Any]) -> bool:
    """Whether the automatic choice was, by its time, the factors."""
    return bool(abs(row[AUTO] - row[FACTORED]) <= abs(row[AUTO] - row[FORMED]))


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("forward", __doc__ or "", seconds=0.7)
    made.add_argument("--full", action="store_true", help="the whole grid of ranks and rows")
    measure.add_names(made, "--layers", LINEARS)
    measure.add_names(made, "--convs", CONVS)
    made.add_argument("--plot", type=Path, help="draw to this file")
    made.add_argument("--ranks", type=measure.numbers, help="r/n, comma-separated")
    made.add_argument("--conv-ranks", type=measure.numbers, help="fractions of the smaller side")
    made.add_argument("--rows", type=measure.counts, help="of the input, comma-separated")
    made.add_argument("--no-compile", action="store_true", help="skip the compiled layers")
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Measure both kinds of layers."""
    device = report.device
    options.ranks = options.ranks or list(FULL_RANKS if options.full else QUICK_RANKS)
    options.rows = options.rows or list(FULL_ROWS if options.full else QUICK_ROWS)
    options.conv_ranks = options.conv_ranks or (list(FULL_RANKS[1:]) if options.full else [0.111])
    rows, notes = _linears(options, device)
    report.table("linear layers, forward and backward, ms", rows)
    report.note("libraries", notes)
    convs = _convolutions(options, device)
    if convs:
        report.table("3×3 convolutions, forward and backward, ms", convs)
    calls = _calls(options, device)
    report.table("one row, forward alone, µs", calls)
    memory = _memory(options, device)
    _judge(report, rows, convs, calls, memory)
    report.table("memory of one pass", memory)
    if len(options.ranks) > 1:
        report.table("break-even rank, factored against dense", _break_even(rows))
    if not options.no_compile:
        compiled = _compiled(options, device)
        report.table("compiled by inductor", compiled)
        report.targets.append(Target("compiled ÷ compiled pair", compiled[0]["÷ pair"], 1.05))
    if options.plot:
        _draw(rows).savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
