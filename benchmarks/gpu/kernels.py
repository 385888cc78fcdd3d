"""The kernels on a device: exact, two launches, nothing beyond their tensors.

Gradients are compared with float64 formulas on the device, as relative errors of whole matrices.
On a CPU everything runs in small, the kernels in Triton's interpreter.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES, Shape
from benchmarks.gpu.parts import part
from benchmarks.measure import Report, precision, synchronize
from frobdecay import Product, add_penalty_grad_
from frobdecay.gradient.accumulate import Accumulator

__all__ = ["KINDS", "LAYOUTS", "check", "error", "exact"]

KINDS: dict[str, tuple[torch.dtype, torch.dtype, str, float]] = {
    # factors, targets, torch's precision of float32 products, relative error allowed: what the
    # targets' own numbers are rounded to, else that of sums of some thousand products
    "float32": (torch.float32, torch.float32, "highest", 3e-6),
    "tf32": (torch.float32, torch.float32, "high", 2e-3),
    "bfloat16": (torch.bfloat16, torch.bfloat16, "highest", 4e-3),
    "bfloat16 → float32": (torch.bfloat16, torch.float32, "highest", 3e-6),
    "float16": (torch.float16, torch.float16, "highest", 1e-3),
    "float16 → float32": (torch.float16, torch.float32, "highest", 3e-6),
}


COEF = 0.5


def suites(device: torch.device) -> dict[str, list[Shape]]:
    """The different shapes of the products of three models; on a CPU, of something small."""
    if device.type == "cpu":
        return {"tiny": CASES["tiny"].pairs[-2:]}
    return {name: sorted(set(CASES[name].pairs)) for name in ("resnet110", "bert", "lora7b")}


def error(found: Tensor, wanted: Tensor) -> float:
    difference = float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())
    return difference if math.isfinite(difference) else math.inf


def exact(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """∇½‖UVᵀ‖² in float64."""
    U, V = U.double(), V.double()
    return U @ (V.mT @ V), V @ (U.mT @ U)


def check(report: Report, title: str, rows: list[dict[str, Any]]) -> None:
    """Report rows with an error and what is allowed, then refuse those above it."""
    report.table(title, rows)
    wrong = [row for row in rows if not row["error"] <= row["allowed"]]
    if wrong:
        raise AssertionError(f"{title}: expected errors within what is allowed, got {wrong}")


def _adjacent(rows: int, r: int) -> Tensor:
    return torch.randn(rows, r) * rows**-0.5


def _cut_out(rows: int, r: int) -> Tensor:
    return _adjacent(rows, r + 3)[:, 1 : r + 1]


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "columns adjacent": _adjacent,
    "rows adjacent": lambda rows, r: _adjacent(r, rows).mT,
    "cut out": _cut_out,
}


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On a device with the strides and the offset that it has here."""
    base = tensor if tensor._base is None else tensor._base
    moved = base.to(device, dtype)
    return moved.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@part("smoke", 90)
def gradients(report: Report) -> None:
    """Gradients of three models' shapes equal float64, in all dtypes and layouts, in one call."""
    rows = []
    for suite, shapes in suites(report.device).items():
        for kind, (dtype, into, setting, allowed) in KINDS.items():
            for layout, make in LAYOUTS.items():
                pairs = [
                    [_placed(make(rows_, r), report.device, dtype) for rows_ in (m, n)]
                    for m, n, r in shapes
                ]
                targets = [
                    [
                        torch.randn_like(factor, dtype=into) * factor.shape[0] ** -0.5
                        for factor in pair
                    ]
                    for pair in pairs
                ]
                wanted = [
                    [
                        target.double() + COEF * gradient
                        for target, gradient in zip(two, exact(*pair), strict=True)
                    ]
                    for pair, two in zip(pairs, targets, strict=True)
                ]
                plan = Accumulator([Product.of(*pair) for pair in pairs], "triton")
                with precision(setting):
                    plan.accumulate(targets, [[COEF, COEF]] * len(pairs))
                errors = [
                    error(*each)
                    for two in zip(targets, wanted, strict=True)
                    for each in zip(*two, strict=True)
                ]
                row = {"suite": suite, "kind": kind, "layout": layout, "error": max(errors)}
                # Triton's interpreter cuts numbers off where a device rounds them
                cut = 2 if report.device.type == "cpu" and into == torch.bfloat16 else 1
                rows.append(row | {"allowed": allowed * cut})
    check(report, "relative errors", rows)


@part("smoke", 60)
def launches(report: Report) -> None:
    """The penalty of all products of a model is two launches, whatever their shapes."""
    if report.device.type == "cpu":
        return
    found = [
        Product.of(*(t.requires_grad_() for t in pair))
        for pair in CASES["resnet110"].factors(report.device)
    ]
    for product in found:
        for param in product.params:
            param.grad = torch.zeros_like(param)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    for _ in range(2):
        add_penalty_grad_(found, 1e-4)
    with torch.profiler.profile(activities=activities) as profile:
        add_penalty_grad_(found, 1e-4)
        synchronize(report.device)
    kinds = torch.autograd.DeviceType.CUDA
    names = Counter(e.name for e in profile.events() if e.device_type == kinds)
    report.table("on the device", [{"": name, "launches": count} for name, count in names.items()])
    if sum(names.values()) != 2:
        raise AssertionError(f"expected two launches, got {dict(names)}")


@part("smoke", 100, under=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"))
def memory(report: Report) -> None:
    """No kernel reads or writes beyond its tensors, watched by compute-sanitizer."""
    _pointers(report)


@part("smoke", 100, under=("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"))
def races(report: Report) -> None:
    """Nor do its threads race for shared memory."""
    _pointers(report)


def _pointers(report: Report) -> None:
    """The smallest tables: all layouts, odd sizes, Grams of several programs, updates in place."""
    device, count = report.device, 0
    shapes = [(70, 33, 5), (130, 40, 16), (65, 31, 17)] if device.type == "cuda" else [(9, 7, 5)]
    for dtype in (torch.float32, torch.bfloat16):
        for make in LAYOUTS.values():
            pairs = [
                [_placed(make(rows, r), device, dtype) for rows in (m, n)] for m, n, r in shapes
            ]
            plan = Accumulator([Product.of(*pair) for pair in pairs], "triton")
            plan.accumulate(
                [[torch.zeros_like(t) for t in pair] for pair in pairs], [[1.0, 1.0]] * len(pairs)
            )
            plan.accumulate(pairs, [[-0.1, -0.1]] * len(pairs))
            count += 1
    synchronize(device)
    report.note("cases", [f"{count} mixtures of {len(shapes)} products"])


@part("suite", 200, alone=True)
def tests(report: Report) -> None:
    """The tests that need a device, compiled."""
    files = [str(path) for path in _TESTS.rglob("test_*.py") if "mark.cuda" in path.read_text()]
    _pytest(report, ["-m", "cuda", *files])


@part("suite", 200, alone=True)
def whole_suite(report: Report) -> None:
    """All tests of the core, with the device as torch's default."""
    others = [f"--ignore={_TESTS / name}" for name in ("third_party", "with_timm")]
    _pytest(report, ["-m", "not slow", *others, str(_TESTS)])


_TESTS = Path(__file__).parents[2] / "tests"


def _pytest(report: Report, arguments: list[str]) -> None:
    """Run tests in several processes; on a CPU, only find them."""
    on_cpu = report.device.type == "cpu"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark"]  # which warns of xdist, where it is installed
    workers = max(1, (os.cpu_count() or 2) - 2)
    command += ["--collect-only"] if on_cpu else ["-n", str(workers), "--dist", "loadfile"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"HYPOTHESIS_MAX_EXAMPLES": "10", "FROBDECAY_TEST_DEVICE": report.device.type}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    print(done.stdout)
    report.note("pytest", done.stdout.splitlines()[-1 if not done.returncode else -40 :])
    if done.returncode:
        raise AssertionError(f"pytest: exit status {done.returncode}\n{done.stdout[-5000:]}")
