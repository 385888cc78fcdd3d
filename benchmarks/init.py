"""Spectral initialization of a whole model takes a fraction of what a loop over SVDs takes.

    python -m benchmarks.init --threads 2                    # under two minutes
    python -m benchmarks.init --case bert --all              # every layer of BERT, not one in six

Every row factorizes all matrices of a model, from random (flat) spectra, to balanced factors:

    one by one        spectral_init on each weight
    equal together    the same on stacks of equal shapes
    randomized        randomized_init on each weight: a choice, never the default
    SVD               torch.linalg.svd of each weight, cut off, its square root on both sides
    factorize         frobdecay.factorize on the module: with registration and the plan's errors

in turns. ``error`` is how far the worst ‖W − UVᵀ‖ is above the smallest possible, relative;
``balance`` the worst ‖UᵀU − VᵀV‖ ÷ ‖UᵀU‖.

``calibration`` is what the metric of the data costs a transformer layer of BERT's shape: the passes
over the data alone, and watched by ``frobdecay.calibrate``; ``factorize`` without its moments, and
with them. ``peak`` is the memory that ``factorize`` takes for one tall weight, beside the float32
Gram of its shorter side.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from benchmarks import measure
from benchmarks.cases import CASES, Case, Shape
from benchmarks.measure import Report, Target
from benchmarks.step import Layer
from frobdecay.algebra.spectral import randomized_init, spectral_init
from frobdecay.models.calibration.run import calibrate
from frobdecay.models.factorize import factorize

__all__ = ["main"]

Pair = tuple[Tensor, ...]
EACH, TOGETHER, RANDOMIZED = "one by one", "equal together", "randomized"
SVD, FACTORIZE = "SVD", "factorize"
PROMISED, ALLOWED = 2.5, 1e-5
CALIBRATION, PEAK = "calibration", "peak"
DEFAULT = f"resnet110,bert,{CALIBRATION}"
PART = 6
"""Of the matrices of a large model, whose layers are all alike, one in so many is measured."""
LARGE = 1 << 24
"""Entries of all matrices from which a model is large."""
STACK = 4
"""Times the largest weight that a stack of equal shapes may take."""
WATCHED, CALIBRATED = 1.3, 2.0
"""What is promised of calibration, times the passes that it watches and the plain factors' time."""
BATCH = 8, 128
"""Sequences and tokens of one of the batches that are watched."""
BATCHES = 8
TALL = 4
"""Rows ÷ columns of the weight whose peak is taken."""
AT_ONCE = 3.0
"""What is promised of it, times the weight in its own dtype."""
HEAD = 64
"""The width of an attention head."""


def _by_svd(weight: Tensor, r: int) -> Pair:
    p, s, qh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:r].sqrt()
    return (p[:, :r] * root).contiguous(), (qh[:r].T * root).contiguous()


class Matrices:
    """The dense weights of a case.

    Args:
        case: gives shapes and ranks.
        device: where they are.
        whole: all of a large model.
    """

    def __init__(self, case: Case, device: torch.device, whole: bool) -> None:
        entries = sum(m * n for m, n, _ in case.pairs)
        self.part = 1 if whole or entries < LARGE else PART
        shapes = case.pairs[: -(-len(case.pairs) // self.part)]
        self.ranks = [r for _, _, r in shapes]
        self.weights = [torch.randn(m, n, device=device) * n**-0.5 for m, n, _ in shapes]
        self.alike: dict[Shape, list[int]] = defaultdict(list)
        for k, shape in enumerate(shapes):
            self.alike[shape].append(k)

    def loop(self, function: Callable[[Tensor, int], Pair]) -> list[Pair]:
        """One by one."""
        return [function(W, r) for W, r in zip(self.weights, self.ranks, strict=True)]

    def together(self) -> list[Pair]:
        """Stacks of equal shapes, as large as a few of the largest weight."""
        found: dict[int, Pair] = {}
        bound = STACK * max(W.numel() for W in self.weights)
        for (m, n, r), members in self.alike.items():
            size = max(1, bound // (m * n))
            for start in range(0, len(members), size):
                chunk = members[start : start + size]
                U, V = spectral_init(torch.stack([self.weights[k] for k in chunk]), r)
                found |= {k: (U[j], V[j]) for j, k in enumerate(chunk)}
        return [found[k] for k in range(len(self.weights))]

    def model(self) -> nn.Module:
        """Linear layers with these weights."""
        layers = nn.ModuleList(nn.Linear(*W.T.shape, bias=False) for W in self.weights)
        for layer, W in zip(layers, self.weights, strict=True):
            layer.weight = nn.Parameter(W.clone())
        return layers

    def quality(self, factors: list[Pair]) -> tuple[float, float]:
        """The worst relative excess of the error, and the worst imbalance, over all shapes."""
        errors, imbalances = [], []
        for (*_, r), (k, *_) in self.alike.items():
            W, (U, V) = self.weights[k].double(), (factor.double() for factor in factors[k])
            best = torch.linalg.svdvals(W)[r:].square().sum().sqrt()
            errors.append(float((W - U @ V.T).norm() / best - 1))
            gram = U.T @ U
            imbalances.append(float((gram - V.T @ V).norm() / gram.norm()))
        return max(errors), max(imbalances)


def _measure(name: str, case: Case, device: torch.device, options: Any) -> tuple[Any, Any]:
    matrices = Matrices(case, device, options.all)
    model = matrices.model()
    plan = {f"{k}.weight": r for k, r in enumerate(matrices.ranks)}
    makers: dict[str, Callable[[], list[Pair]]] = {
        EACH: lambda: matrices.loop(spectral_init),
        TOGETHER: matrices.together,
        RANDOMIZED: lambda: matrices.loop(randomized_init),
        SVD: lambda: matrices.loop(_by_svd),
    }
    runs: dict[str, Callable[[], object]] = dict(makers)
    runs[FACTORIZE] = lambda: factorize(copy.deepcopy(model), rank=plan)
    timings = measure.interleave(runs, device, seconds=options.seconds, rounds=options.rounds)
    rows, excess = [], {}
    for key, timing in timings.items():
        row = {"": key, "ms": timing.ms * matrices.part, "SVD ÷": timings[SVD].ms / timing.ms}
        if key in makers:
            excess[key], balance = matrices.quality(makers[key]())
            row |= {"error": f"{excess[key]:.1e}", "balance": f"{balance:.1e}"}
        rows.append(row)
    W, r = max(zip(matrices.weights, matrices.ranks, strict=True), key=lambda pair: pair[0].numel())
    peak, _ = measure.memory(lambda: spectral_init(W, r), device)
    best = min((EACH, TOGETHER), key=lambda key: timings[key].ms)
    targets = [
        Target(f"{name}, SVD ÷ {best}", timings[SVD].ms / timings[best].ms, PROMISED, above=True),
        Target(f"{name}, error of {best}", excess[best], ALLOWED, unit="relative"),
        Target(f"{name}, memory ÷ largest weight", peak / (W.numel() * W.element_size()), 8),
    ]
    return rows, targets


class Attending(Layer):
    """A transformer layer, with its attention."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (sequences, tokens, width) to the same."""
        y = self.norm1(x)
        q, k, v = (
            each(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        x = x + self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


def _calibration(device: torch.device, options: Any) -> tuple[str, Any, Any]:
    model = Attending(options.width).to(device)
    batches = [torch.randn(*BATCH, options.width, device=device) for _ in range(BATCHES)]

    @torch.no_grad()
    def passes() -> None:
        for batch in batches:
            model(batch)

    def calibrated() -> Any:
        return calibrate(model, batches, progress=False)

    def factorized(**init: Any) -> Any:
        return factorize(copy.deepcopy(model), rank=options.width // 4, **init)

    stats = calibrated()
    runs = {
        "passes": passes,
        "calibrate": calibrated,
        FACTORIZE: factorized,
        f"{FACTORIZE}, calibrated": lambda: factorized(init=stats),
    }
    timings = measure.interleave(runs, device, seconds=options.seconds, rounds=options.rounds)
    rows = [{"": key, "ms": one.ms, "samples": one.samples} for key, one in timings.items()]
    plain, watched, spectral, metric = (one.ms for one in timings.values())
    targets = [
        Target("calibrate ÷ the passes alone", watched / plain, WATCHED),
        Target(f"{FACTORIZE}, calibrated ÷ {FACTORIZE}", metric / spectral, CALIBRATED),
    ]
    return f"a layer of width {options.width}, {BATCHES} batches", rows, targets


def _peak(device: torch.device, options: Any) -> tuple[str, Any, Any]:
    width = options.width
    rows, targets, gram = [], [], width * width * torch.float32.itemsize
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(width, TALL * width, bias=False, device=device, dtype=dtype)
        weight = layer.weight.numel() * dtype.itemsize
        taken, _ = measure.memory(partial(factorize, layer, rank=width // 4), device)
        name = str(dtype).removeprefix("torch.")
        times = (taken - gram) / weight
        rows.append({"": name, "weight, MB": weight / 1e6, "peak, MB": taken / 1e6, "×": times})
        targets.append(Target(f"{name}, peak beside the Gram ÷ the weight", times, AT_ONCE))
    return f"factorize, a weight of {TALL * width}×{width}", rows, targets


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("init", __doc__ or "", seconds=2.0)
    measure.add_names(made, "--case", [*CASES, CALIBRATION, PEAK], DEFAULT)
    made.add_argument("--all", action="store_true", help="every layer of large models")
    made.add_argument("--rounds", type=measure.count, default=3, help="default: %(default)s")
    made.add_argument(
        "--width", type=measure.count, default=768, help=f"of {CALIBRATION} and {PEAK}; %(default)s"
    )
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Measure the cases."""
    of_a_layer = {CALIBRATION: _calibration, PEAK: _peak}
    for name in options.case:
        if name in of_a_layer:
            title, rows, targets = of_a_layer[name](report.device, options)
        else:
            case = CASES[name]
            title = f"{case.title}: {len(case.pairs)} matrices"
            rows, targets = _measure(name, case, report.device, options)
        report.table(title, rows)
        report.targets += targets


if __name__ == "__main__":
    main()
