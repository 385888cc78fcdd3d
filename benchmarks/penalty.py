"""The gradient of the penalty costs a fraction of what it costs by hand or by autograd.

    python -m benchmarks.penalty --threads 2                  # all suites, about two minutes
    python -m benchmarks.penalty --case resnet110,lora
    python -m benchmarks.penalty --scaling --plot scaling.png # time and memory by size
    python -m benchmarks.penalty --device cuda --compile

Every row adds λ·∇½‖W‖² of all products of a model to gradients that exist already. Compared are

    automatic, bucketed, …      frobdecay.add_penalty_grad_, by backend
    automatic, replayed         the same from a CUDA graph: what is left of it for the device
    automatic, calls alone      the calls of torch that it makes, one after the other
    released formulas           a loop over layers, VT stored r×n, each product of three in its
                                cheaper order, ``grad += coef * …``
    … by multi_dot              the same, the order left to torch.linalg.multi_dot
    autograd, W formed          λ/2·‖UVᵀ‖² added to the loss, as one writes it
    autograd, Gram              frobdecay.penalty added to the loss
    weight decay                of each factor, by torch._foreach_add_: what SGD does anyhow

and, for a whole ResNet, the step of torch's SGD and of the same SGD in FrobeniusDecay; all in
turns, within one run, beside the machine's limits: the rate of a large matrix product, and the
bandwidth of a copy, where factors count as read once, gradients as read and written once.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import measure
from benchmarks.cases import CASES, FRACTION, Case, stack, suites
from benchmarks.measure import Report, Target
from benchmarks.models import resnet
from frobdecay.gradient.backends import BACKENDS
from frobdecay.gradient.penalty import add_penalty_grad_
from frobdecay.models.factorize import factorize
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.product import Product, penalty

__all__ = ["COPY_BYTES", "GEMM_SIZE", "KINDS", "compare", "main"]

Run = Callable[[], object]
COEF = 1e-4
AUTO, RELEASED, MULTI_DOT = "automatic", "released formulas", "released, by multi_dot"
FORMED, GRAM, DECAY = "autograd, W formed", "autograd, Gram", "weight decay"
COMPILED = "autograd, Gram, compiled"
REPLAYED = f"{AUTO}, replayed"
ALONE = f"{AUTO}, calls alone"
GEMM, COPY = "GEMM", "copy"

PROMISED: dict[str, dict[str, dict[str, float]]] = {
    "cpu": {
        "resnet32": {RELEASED: 0.45, FORMED: 0.2, "µs per product": 8},
        "resnet110": {RELEASED: 0.45, FORMED: 0.2, "µs per product": 8},
        "bert": {RELEASED: 0.8, FORMED: 0.2, GEMM: 0.75},
        "lora": {RELEASED: 0.7, FORMED: 0.2, COPY: 0.75},
    },
    "cuda": {
        "resnet110": {RELEASED: 0.05, "µs in all": 100},
        "bert": {"roofline": 0.6},
        "lora7b": {COPY: 0.6},
    },
}
"""device -> case -> what -> limit: ratios of time to a baseline, shares of a limit, µs."""

STEPS: dict[str, int] = {"resnet110": 110}
"""Cases whose model's optimizer step is timed, too: the depth of the ResNet."""
STEP_RATIO = 1.25
PLAIN_STEP, WRAPPED_STEP = "SGD.step(), weight decay", "SGD.step() in FrobeniusDecay"

KINDS = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}
"""--kind -> dtype of factors and gradients, torch's precision of float32 products."""

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
LARGE = 1 << 22
"""Entries of all factors from which a limit of the machine is of interest."""
FORMED_ENTRIES = {"cpu": 150_000_000, "cuda": 1_500_000_000}
"""Entries of W, of all products together, that autograd is given at once; the rest is scaled."""


class Suite:
    """One model's factors and gradients, and everything that is timed on them.

    Args:
        case: gives the shapes.
        device: where the tensors are.
        dtype: of factors and gradients.
    """

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.pairs = case.factors(device, dtype)
        self.grads = [(torch.zeros_like(U), torch.zeros_like(V)) for U, V in self.pairs]
        self.products = []
        for pair, grads in zip(self.pairs, self.grads, strict=True):
            leaves = [tensor.detach().requires_grad_() for tensor in pair]
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad
            self.products.append(Product.of(*leaves))
        self.refused: dict[str, str] = {}
        self.share: dict[str, float] = {}  # of the products, where not all are measured

    def backends(self) -> dict[str, Run]:
        """The automatic choice, and every backend that can run here."""
        runs = {AUTO: self.backend(None)}
        for name, backend in BACKENDS.items():
            try:
                reasons = backend.why_not(self.products)
                if not reasons:
                    runs[name] = self.backend(name)
            except (ImportError, RuntimeError) as error:
                reasons = [str(error)]
            if reasons:
                self.refused[name] = reasons[0]
        if self.device.type == "cuda":
            runs[REPLAYED] = measure.captured(runs[AUTO], self.device)
        else:
            runs[ALONE] = _calls_of(runs[AUTO])
        return runs

    def backend(self, name: str | None) -> Run:
        """One backend, by the function that users call."""
        return lambda: add_penalty_grad_(self.products, COEF, backend=name)

    def baselines(self, compile_: bool) -> dict[str, Run]:
        """What a user would otherwise do."""
        runs = {
            RELEASED: self._released(_ordered),
            MULTI_DOT: self._released(torch.linalg.multi_dot),
            FORMED: self._formed(),
            GRAM: self._autograd(lambda products: penalty(products, COEF)),
            DECAY: self._decay(),
        }
        if compile_:
            compiled = torch.compile(_gram_penalty)
            leaves = self._leaves(len(self.pairs))
            runs[COMPILED] = lambda: compiled(leaves).backward()
        return runs

    def _released(self, multiply: Callable[[list[Tensor]], Tensor]) -> Run:
        layers = [(U.clone(), V.T.contiguous()) for U, V in self.pairs]
        grads = [(torch.zeros_like(U), torch.zeros_like(VT)) for U, VT in layers]

        @torch.no_grad()
        def run() -> None:
            for (U, VT), (into_U, into_VT) in zip(layers, grads, strict=True):
                into_U += COEF * multiply([U, VT, VT.T])
                into_VT += COEF * multiply([U.T, U, VT])

        return run

    def _leaves(self, count: int) -> list[tuple[Tensor, Tensor]]:
        leaves = [tuple(t.clone().requires_grad_() for t in pair) for pair in self.pairs[:count]]
        for leaf in (leaf for pair in leaves for leaf in pair):
            leaf.grad = torch.zeros_like(leaf)
        return leaves  # type: ignore[return-value]

    def _formed(self) -> Run:
        limit = FORMED_ENTRIES[self.device.type]
        sizes = [m * n for m, n, _ in self.case.pairs]
        taken = next((k for k in range(len(sizes), 1, -1) if sum(sizes[:k]) <= limit), 1)
        self.share[FORMED] = sum(sizes[:taken]) / sum(sizes)
        leaves = self._leaves(taken)

        def run() -> None:
            total = sum((U @ V.T).square().sum() for U, V in leaves)
            (0.5 * COEF * total).backward()  # type: ignore[union-attr]

        return run

    def _autograd(self, value: Callable[[list[Product]], Tensor]) -> Run:
        products = [Product.of(U, V) for U, V in self._leaves(len(self.pairs))]
        return lambda: value(products).backward()

    def _decay(self) -> Run:
        flat = [t for pair in self.pairs for t in pair]
        grads = [t for pair in self.grads for t in pair]
        return lambda: torch._foreach_add_(grads, flat, alpha=COEF)

    def limits(self) -> dict[str, Run]:
        """A large matrix product and a large copy, where they can be a limit at all."""
        if self.case.parameters < LARGE:
            return {}
        size, count = GEMM_SIZE[self.device.type], COPY_BYTES[self.device.type]
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        c, source = torch.empty_like(a), torch.ones(count // 4, device=self.device)
        target = torch.zeros_like(source)
        return {GEMM: lambda: torch.mm(a, b, out=c), COPY: lambda: target.copy_(source)}


class _Calls(TorchFunctionMode):
    """Writes down what is called of torch, but for what only looks at a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Run] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call it, and keep how."""
        if func.__name__ not in ("__get__", "data_ptr", "unbind", "_set_grad_enabled"):
            self.found.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _calls_of(run: Run) -> Run:
    """The same calls of torch, on the same tensors: no Python is left but a loop."""
    run()
    with _Calls() as calls:
        run()

    @torch.no_grad()
    def replay() -> None:
        for call in calls.found:
            call()

    return replay


def _ordered(matrices: list[Tensor]) -> Tensor:
    """The product of three in the order that needs fewer multiplications."""
    A, B, C = matrices
    (m, k), (_, n), (_, p) = A.shape, B.shape, C.shape
    return (A @ B) @ C if m * k * n + m * n * p <= k * n * p + m * k * p else A @ (B @ C)


def _gram_penalty(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return 0.5 * COEF * sum(((U.T @ U) * (V.T @ V)).sum() for U, V in pairs)  # type: ignore[return-value]


def _python_share(run: Run, calls: int = 30) -> float:
    """The part of the time that is spent outside of torch's operators, by its profiler."""
    run()
    with measure.profiled() as profile, torch.profiler.record_function("all"):
        for _ in range(calls):
            run()
    events = profile.key_averages()
    (whole,) = (event.cpu_time_total for event in events if event.key == "all")
    inside = sum(event.self_cpu_time_total for event in events if event.key.startswith("aten::"))
    return float(max(0.0, 1 - inside / whole))


def _measure(name: str, case: Case, device: torch.device, options: Any) -> tuple[Any, ...]:
    """Rows and targets of one case."""
    suite = Suite(case, device, KINDS[options.kind][0])
    ours = suite.backends()
    runs = {**ours, **suite.baselines(options.compile), **suite.limits()}
    timings = measure.interleave(runs, device, seconds=options.seconds)
    times = {key: timing.ms / suite.share.get(key, 1.0) for key, timing in timings.items()}
    # whichever of the two ways to write the loop is faster
    times[RELEASED] = min(times[RELEASED], times[MULTI_DOT])
    shares = _shares(suite, times)
    rows = []
    for key, timing in timings.items():
        if key in (GEMM, COPY):
            continue
        share = suite.share.get(key, 1.0)
        ms = timing.ms / share
        row = {"": key, "ms": ms, "quartiles": timing.quartiles(share)}
        row |= {name: ms / times[base] for name, base in _RATIOS.items()}
        row["µs/product"] = 1e3 * ms / len(case.pairs)
        row |= {f"of {limit}": shares[limit] / ms for limit in (GEMM, COPY) if shares}
        if key in ours:
            row["peak KiB"] = measure.memory(ours[key], device)[0] / 2**10
        rows.append(row)
    targets = _targets(name, case, device, times, shares)
    return rows, targets, _notes(suite, times, ours[AUTO])


_RATIOS = {"÷ released": RELEASED, "÷ autograd": FORMED, "÷ decay": DECAY}


def _notes(suite: Suite, times: dict[str, float], automatic: Run) -> list[str]:
    notes = [f"{name} cannot run: {reason}" for name, reason in suite.refused.items()]
    if GEMM in times:
        rate = 2e-9 * GEMM_SIZE[suite.device.type] ** 3 / times[GEMM]
        bandwidth = 2e-6 * COPY_BYTES[suite.device.type] / times[COPY]
        return [*notes, f"limits: {rate:.3g} Tflop/s, {bandwidth:.3g} GB/s"]
    if suite.device.type == "cpu":
        notes.append(f"outside of operators, by a profile: {_python_share(automatic):.0%}")
    return notes


def _shares(suite: Suite, times: dict[str, float]) -> dict[str, float]:
    """The least milliseconds that each limit allows for a case."""
    if GEMM not in times:
        return {}
    rate = 2 * GEMM_SIZE[suite.device.type] ** 3 / times[GEMM]
    bandwidth = 2 * COPY_BYTES[suite.device.type] / times[COPY]
    traffic = 3 * suite.dtype.itemsize * suite.case.parameters
    least = {GEMM: suite.case.flops / rate, COPY: traffic / bandwidth}
    return {**least, "roofline": max(least.values())}


def _steps(name: str, device: torch.device, options: Any) -> tuple[list[dict[str, Any]], Target]:
    """The step of an optimizer with its weight decay, and wrapped."""
    model = resnet(STEPS[name])
    factorize(model, rank=FRACTION, exclude=["conv1", "fc"])
    runs = {}
    for key in (PLAIN_STEP, WRAPPED_STEP):
        own = copy.deepcopy(model).to(device)
        for param in own.parameters():
            param.grad = torch.randn_like(param) * 1e-3
        sgd = torch.optim.SGD(own.parameters(), lr=1e-3, momentum=0.9, weight_decay=COEF)
        runs[key] = (sgd if key == PLAIN_STEP else FrobeniusDecay(sgd, own)).step
    timings = measure.interleave(runs, device, seconds=options.seconds)
    ms = {key: timing.ms for key, timing in timings.items()}
    rows = [
        {"": key, "ms": timing.ms, "quartiles": timing.quartiles()}
        | {"÷ plain": timing.ms / ms[PLAIN_STEP]}
        for key, timing in timings.items()
    ]
    ratio = ms[WRAPPED_STEP] / ms[PLAIN_STEP]
    return rows, Target(f"{name}, wrapped SGD step ÷ plain", ratio, STEP_RATIO)


def _targets(
    name: str,
    case: Case,
    device: torch.device,
    times: dict[str, float],
    shares: dict[str, float],
) -> list[Target]:
    found = []
    for called, ms in ((key, times[key]) for key in (AUTO, REPLAYED) if key in times):
        about = name if called == AUTO else f"{name}, replayed"
        for what, limit in PROMISED.get(device.type, {}).get(name, {}).items():
            if what in shares:
                share = shares[what] / ms
                found.append(Target(f"{about}, of {what}", share, limit, above=True, unit="of it"))
            elif what.startswith("µs"):
                value = 1e3 * ms / (len(case.pairs) if "product" in what else 1)
                found.append(Target(f"{about}, {what}", value, limit, unit="µs"))
            else:
                found.append(Target(f"{about} ÷ {what}", ms / times[what], limit))
    return found


SCALES: dict[str, tuple[list[int], Callable[[int], Case]]] = {
    "layers": ([8, 16, 32, 64, 128], lambda k: stack(k, 768, 64)),
    "width": ([256, 512, 1024, 2048, 4096], lambda k: stack(16, k, 32)),
    "rank": ([8, 16, 32, 64, 128, 256], lambda k: stack(16, 1024, k)),
}


def _scaling(report: Report, device: torch.device, options: Any) -> None:
    """Time and memory against one size, the others fixed; beside the cost model."""
    for what, (sizes, make) in SCALES.items():
        rows = []
        for size in sizes[: options.points]:
            case = make(size)
            suite = Suite(case, device)
            runs = {AUTO: suite.backend(None), RELEASED: suite._released(_ordered)}
            timings = measure.interleave(runs, device, seconds=options.seconds / 4)
            peak, _ = measure.memory(lambda s=suite: s.backend(None)(), device)
            rows.append(
                {
                    what: size,
                    "ms": timings[AUTO].ms,
                    "released, ms": timings[RELEASED].ms,
                    "Gflop": case.flops / 1e9,
                    "factors, MiB": 4 * case.parameters / 2**20,
                    "buffers, MiB": peak / 2**20,
                }
            )
        report.table(f"scaling by {what}, from {make(sizes[0]).title}", rows)
        first, last = rows[0], rows[-1]
        growth = last["ms"] / first["ms"] / (last["Gflop"] / first["Gflop"])
        report.targets.append(Target(f"growth by {what} ÷ that of the flops", growth, 1.25))
    if options.plot:
        _draw(report).savefig(options.plot, dpi=150)


def _draw(report: Report) -> Any:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 7), layout="constrained")
    axes = drawn.subplots(2, len(SCALES))
    for (above, below), what, rows in zip(axes.T, SCALES, report.tables.values(), strict=True):
        sizes = [row[what] for row in rows]
        flops = [row["Gflop"] * rows[-1]["ms"] / rows[-1]["Gflop"] for row in rows]
        above.loglog(sizes, [row["ms"] for row in rows], "o-", label="automatic")
        above.loglog(sizes, [row["released, ms"] for row in rows], "s-", label=RELEASED)
        above.loglog(sizes, flops, "k:", label="as the flops, 4r²(m+n)")
        below.loglog(sizes, [row["factors, MiB"] for row in rows], "k:", label="factors")
        below.loglog(sizes, [row["buffers, MiB"] for row in rows], "o-", label="buffers")
        above.set(title=what, ylabel="ms")
        below.set(xlabel=what, ylabel="MiB")
        for part in (above, below):
            part.set_xticks(sizes, [f"{size:,}" for size in sizes])
            part.minorticks_off()
            part.grid(alpha=0.3)
            part.legend()
    return drawn


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("penalty", __doc__ or "", seconds=2.0)
    some = f"some of {', '.join(CASES)}"
    made.add_argument("--case", type=measure.names(CASES), help=some)
    made.add_argument("--plot", type=Path, help="draw to this file")
    made.add_argument("--compile", action="store_true", help="time a compiled penalty, too")
    made.add_argument("--kind", choices=KINDS, default="float32", help="default: %(default)s")
    made.add_argument("--scaling", action="store_true", help="by layers, width, rank instead")
    made.add_argument("--points", type=measure.count, help="of each scaling; all unless given")
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Measure the cases, or how they scale."""
    if options.scaling:
        _scaling(report, report.device, options)
        return
    for name in options.case or suites(report.device):
        compare(report, name, CASES[name], options)


def compare(report: Report, name: str, case: Case, options: argparse.Namespace) -> None:
    """Report one case.

    Args:
        report: gets tables and targets.
        name: of the case.
        case: gives the shapes.
        options: ``seconds``, ``kind``, ``compile``.
    """
    with measure.precision(KINDS[options.kind][1]):
        rows, targets, notes = _measure(name, case, report.device, options)
    report.table(f"{case.title}, {options.kind}: {len(case.pairs)} products", rows)
    report.targets += targets
    report.note(name, notes)
    if name in STEPS:
        rows, target = _steps(name, report.device, options)
        report.table(f"ResNet-{STEPS[name]}, all parameters", rows)
        report.targets.append(target)


if __name__ == "__main__":
    main()
