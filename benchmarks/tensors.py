"""Decay, forward pass and initialization of Tucker, tensor-train and CP weights pay for themselves.

    python -m benchmarks.tensors --threads 1                  # about two minutes
    python -m benchmarks.tensors --only decay --case tiny

Three tables, each of what frobdecay does against what one would write without it, in turns:

    decay             the penalty's gradient from Grams, against autograd through the tensor formed
    forward           a layer after factorize, forward and backward: automatic, factored and formed;
                      the dense layer beside it
    initialization    HOSVD, HOOI, TT-SVD, CP by least squares, against tensorly's (where installed)
                      for as many sweeps, ours in float64 and theirs in float32; error ÷ their error
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.cases import CONVS, Conv
from benchmarks.measure import Report, Timing
from frobdecay import CP, TensorTrain, Tucker, factorize, products
from frobdecay.algebra.decompositions import cp_als, hooi, hosvd, tt_svd
from frobdecay.algebra.network import cp, tucker
from frobdecay.gradient.accumulate import Accumulator
from frobdecay.product.product import Product
from frobdecay.weights.forms.cost import force

__all__ = ["main"]

Run = Callable[[], object]
COEF = 1e-4
PART = 0.25
"""Of a mode, for Tucker and train; CP gets the terms that take as many parameters."""
SWEEPS = 10
GRAM, AUTOGRAD, PLAIN = "Grams", "autograd, formed", "weight decay"
AUTO, FACTORED, FORMED, DENSE = "automatic", "factored", "formed", "dense"
OURS, THEIRS = "frobdecay", "tensorly"


@dataclass(frozen=True)
class Weight:
    """A layer's weight.

    Attributes:
        layer: makes the layer.
        pattern: how it is read; None for the default.
    """

    layer: Callable[[], nn.Module]
    pattern: str | None = None


WEIGHTS: Mapping[str, Weight] = {
    "conv 256": Weight(lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False)),
    "conv 64": Weight(lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False)),
    "1×1 640 flat": Weight(lambda: nn.Conv2d(640, 640, 1, bias=False), "flat"),
    "tiny": Weight(lambda: nn.Conv2d(8, 12, 3, bias=False)),
}
DEFAULT = [name for name in WEIGHTS if name != "tiny"]
KINDS = {"Tucker": Tucker, "TensorTrain": TensorTrain, "CP": CP}


def _layer(weight: Weight, kind: str) -> nn.Module:
    """The layer factorized, with random factors: times do not depend on the numbers."""
    layer = weight.layer()
    tucker = Tucker(PART, pattern=weight.pattern)
    shape = tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]
    modes = tucker.matricize(shape).modes
    count = sum(torch.Size(s).numel() for s in tucker.factor_shapes(shape))
    rank: int | float = max(1, count // sum(modes)) if kind == "CP" else PART
    made = partial(KINDS[kind], pattern=weight.pattern, init="matched")
    factorize(layer, rank=rank, parametrization=made)
    return layer


def _decay(names: Sequence[str], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for kind in KINDS:
            layer = _layer(WEIGHTS[name], kind).to(device)
            (product,) = products(layer)
            timings = measure.interleave(_decays(product), device, seconds=seconds)
            ms = {what: timing.ms for what, timing in timings.items()}
            about = {"weight": name, "kind": kind, "r": product.rank}
            rows.append({**about, **ms, "÷ autograd": ms[GRAM] / ms[AUTOGRAD]})
    return rows


def _decays(product: Product) -> dict[str, Run]:
    params = product.params
    targets = [[torch.zeros_like(p) for p in params]]
    accumulator = Accumulator([product])

    def autograd() -> None:
        value = 0.5 * COEF * product.materialize().square().sum()
        for target, grad in zip(targets[0], torch.autograd.grad(value, params), strict=True):
            target.add_(grad)

    @torch.no_grad()
    def plain() -> None:
        for target, param in zip(targets[0], params, strict=True):
            target.add_(param, alpha=COEF)

    return {
        GRAM: lambda: accumulator.accumulate(targets, [[COEF] * len(params)]),
        AUTOGRAD: autograd,
        PLAIN: plain,
    }


def _forward(convs: Sequence[str], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for name in convs:
        conv = CONVS[name]
        x = torch.randn(conv.batch, conv.channels, conv.size, conv.size, device=device)
        for kind in KINDS:
            timings = _forwards(conv, kind, x.requires_grad_(), seconds, device)
            ms = {what: timing.ms for what, timing in timings.items()}
            best = min(ms[FACTORED], ms[FORMED])
            ratios = {"÷ formed": ms[AUTO] / ms[FORMED], "÷ best": ms[AUTO] / best}
            rows.append({"layer": name, "kind": kind, **ms, **ratios})
    return rows


def _forwards(
    conv: Conv, kind: str, x: Tensor, seconds: float, device: torch.device
) -> dict[str, Timing]:
    def make() -> nn.Module:
        return nn.Conv2d(conv.channels, conv.channels, 3, padding=1, bias=False)

    dense = make().to(device)
    layer = _layer(Weight(make), kind).to(device)
    cotangent = torch.randn_like(dense(x))

    def run(module: nn.Module, forced: bool | None) -> None:
        with force(forced):
            out = module(x)
        torch.autograd.grad(out, [x, *module.parameters()], cotangent)

    runs: dict[str, Run] = {
        AUTO: partial(run, layer, None),
        FACTORED: partial(run, layer, True),
        FORMED: partial(run, layer, False),
        DENSE: partial(run, dense, None),
    }
    return measure.interleave(runs, device, seconds=seconds)


# --- initialization -------------------------------------------------------------------------------


def _initialization(
    names: Sequence[str], device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        layer = WEIGHTS[name].layer()
        view = Tucker(PART, pattern=WEIGHTS[name].pattern).matricize(
            tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]
        )
        tensor = view.read(layer.weight.detach()).to(device)  # type: ignore[union-attr, operator]
        for what, (ours, theirs) in _decompositions(tensor).items():
            runs: dict[str, Callable[[], Tensor]] = {OURS: ours}
            if importlib.util.find_spec("tensorly") is not None:
                runs[THEIRS] = theirs
            formed = {key: run() for key, run in runs.items()}
            errors = {k: float((tensor - W).norm() / tensor.norm()) for k, W in formed.items()}
            timings = measure.interleave(runs, device, seconds=seconds)
            row = {"weight": name, "": what, **{k: t.ms for k, t in timings.items()}}
            row["error"] = errors[OURS]
            if THEIRS in runs:
                row["÷ tensorly"] = row[OURS] / row[THEIRS]
                row["error ÷ tensorly's"] = errors[OURS] / errors[THEIRS]
            rows.append(row)
    return rows


def _decompositions(
    tensor: Tensor,
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Name -> ours and tensorly's, to the formed tensor; neither stops before its last sweep."""
    ranks = tuple(max(1, round(PART * n)) for n in tensor.shape)
    bonds = tuple(min(pair) for pair in pairwise(ranks))
    rank = ranks[0]
    endless: dict[str, Any] = {"sweeps": SWEEPS, "tolerance": -1.0}

    def star(factors: Sequence[Tensor], structure: Any) -> Tensor:
        return Product.of(*factors, structure=structure).materialize()

    def theirs(what: str) -> Tensor:
        return _tensorly(tensor, what, ranks, bonds, rank)

    found: dict[str, Callable[[], Tensor]] = {
        "HOSVD": lambda: star(hosvd(tensor, ranks), tucker(tensor.ndim)),
        "HOOI": lambda: star(hooi(tensor, ranks, **endless), tucker(tensor.ndim)),
        "TT-SVD": lambda: Product.of(*tt_svd(tensor, bonds), batch=0).materialize(),
        "CP": lambda: star(_quiet(partial(cp_als, tensor, rank, **endless)), cp(tensor.ndim)),
    }
    return {what: (run, partial(theirs, what)) for what, run in found.items()}


def _quiet(run: Callable[[], Any]) -> Any:
    """Call without the warning that the sweeps were too few, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def _tensorly(tensor: Tensor, what: str, ranks: Any, bonds: Any, rank: int) -> Tensor:
    import tensorly
    from tensorly import decomposition

    with tensorly.backend_context("pytorch"):
        if what == "TT-SVD":
            cores = decomposition.tensor_train(tensor, [1, *bonds, 1])
            return tensorly.tt_to_tensor(cores)
        if what == "CP":
            options: dict[str, Any] = {"n_iter_max": SWEEPS, "init": "svd", "tol": 0}
            run = partial(decomposition.parafac, tensor, rank, **options)
            return tensorly.cp_to_tensor(_quiet(run))
        sweeps = 0 if what == "HOSVD" else SWEEPS
        found = decomposition.tucker(tensor, ranks, n_iter_max=sweeps, init="svd", tol=0)
        return tensorly.tucker_to_tensor(found)


# --- report ---------------------------------------------------------------------------------------


PROMISED = {
    "decay": {"÷ autograd": 0.5},
    "forward": {"÷ formed": 1.1},
    "initialization": {"÷ tensorly": 1.1, "error ÷ tensorly's": 1.01},
}
"""Table -> column -> limit of its worst row."""


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("tensors", __doc__ or "", seconds=1.0)
    measure.add_names(made, "--case", WEIGHTS, ",".join(DEFAULT))
    measure.add_names(made, "--convs", CONVS)
    measure.add_names(made, "--only", PROMISED)
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Measure the tables."""
    makers = {
        "decay": partial(_decay, options.case),
        "forward": partial(_forward, options.convs),
        "initialization": partial(_initialization, options.case),
    }
    for name in options.only:
        rows = makers[name](report.device, options.seconds)
        report.table(f"{name}, ms", rows)
        for key, limit in PROMISED[name].items():
            report.worst(f"{name} {key}", key, [row for row in rows if key in row], limit)
    if "initialization" in options.only and importlib.util.find_spec("tensorly") is None:
        report.note("initialization", ["tensorly: not installed"])


if __name__ == "__main__":
    main()
