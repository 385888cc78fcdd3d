"""How far the kernels are from their roofline, by how they cut matrices up: to choose tiles.

For each model and way to multiply (float32 by IEEE and by TF32, bf16) the two launches are timed
alone, replayed from a CUDA graph, so that the host's part is left out; once with the tile that
the kernels have, and with others. Beside them stand the limits of the device, measured in the
same run: a large matrix product of that kind, and a large copy. Factors count as read once,
gradients as read and written once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from dataclasses import fields as fields_of
from statistics import median
from typing import Any

import torch

from benchmarks import measure
from benchmarks.cases import CASES
from benchmarks.gpu.parts import part
from benchmarks.measure import Report, captured, precision
from benchmarks.penalty import COPY_BYTES, GEMM_SIZE, KINDS
from frobdecay import Product
from frobdecay.gradient.bucketed import Job
from frobdecay.gradient.triton.executor import Grouped
from frobdecay.gradient.triton.tiles import Held, Tile, tile_for

__all__ = ["limits", "microseconds"]

TRIED = {"bert": ("bfloat16", "tf32", "float32"), "lora7b": ("float32", "bfloat16")}
REPEATS = 10
BUDGET = 60
"""Seconds for all tiles; what is left of them when everything is compiled is for timing."""

_A = ("block", "gram_rows", "gram_warps", "gram_stages", "waves")
_B = ("inner", "columns", "update_rows", "update_warps", "update_stages", "waves")
_SHORT_A = [*itertools.product((16,), (64, 128), (1, 2), (3,), (8, 16))]
_SHORT_B = [*itertools.product((16,), (16,), (128, 256), (2, 4), (3,), (8, 16))]
# Float32 by IEEE is multiplied without tensor cores, all rows of a step unrolled: small steps.
_IEEE_A = [(64, 32, 8, 3, 4), (64, 32, 8, 4, 8), (64, 16, 8, 4, 4), (64, 64, 8, 3, 8)]
_IEEE_B = [
    (32, 64, 64, 8, 3, 8),
    (16, 64, 64, 8, 3, 4),
    (16, 128, 64, 8, 3, 4),
    (16, 256, 64, 8, 2, 4),
]
_FIELDS_TENSOR_A = ("block", "gram_rows", "tensor_warps", "gram_stages", "waves")
_TENSOR_A = [  # by TF32 of half as many rows, and without a pipeline
    (64, 32, (4, 4), 4, 8),
    (64, 64, (4, 4), 2, 8),
    (64, 64, (4, 4), 4, 8),
    (64, 64, (8, 4), 3, 8),
    (64, 64, (4, 4), 3, 4),
    (64, 64, (4, 4), 3, 16),
    (64, 128, (4, 4), 2, 8),
    (64, 128, (8, 4), 3, 8),
]
_HELD = {  # columns, rows, warps, stages, waves; None reads a Gram for each block of rows
    "bfloat16": [
        None,
        Held(64, 64, 4, 2, 4),
        Held(64, 64, 4, 2, 16),
        Held(64, 64, 4, 1, 8),
        Held(64, 128, 4, 1, 8),
        Held(64, 128, 8, 1, 8),
        Held(64, 128, 8, 2, 4),
        Held(64, 64, 8, 1, 8),
        Held(128, 64, 4, 1, 8),
        Held(128, 64, 8, 2, 4),
    ],
    "tf32": [
        None,
        Held(64, 64, 4, 1, 4),
        Held(64, 64, 4, 1, 8),
        Held(64, 64, 4, 1, 16),
        Held(64, 64, 8, 1, 4),
        Held(64, 64, 8, 1, 8),
        Held(64, 64, 4, 2, 8),
        Held(64, 64, 8, 2, 8),
        Held(64, 128, 8, 1, 4),
        Held(128, 64, 8, 1, 4),
    ],
}


def tiles(rank: int, kind: str) -> Iterator[tuple[str, Tile]]:
    """The tile in use, then those that differ from it in one launch, named first."""
    used = tile_for(rank)
    yield "in use", used
    if rank <= 16:
        others = {"Grams": (_A, _SHORT_A), "updates": (_B, _SHORT_B)}
    elif kind == "float32":
        others = {"Grams": (_A, _IEEE_A), "updates": (_B, _IEEE_B)}
    else:
        held = [(one,) for one in _HELD[kind]]
        others = {
            "updates": (("bf16" if kind == "bfloat16" else kind,), held),
            "Grams": (_FIELDS_TENSOR_A, _TENSOR_A),
        }
    for launch, (fields, values) in others.items():
        for one in values:
            tile = replace(used, **dict(zip(fields, one, strict=True)))
            if tile != used:
                yield launch, tile


def _written(tile: Tile) -> str:
    """All numbers, and of what is held by which kind."""
    return " ".join(str(number).replace(" ", "") for number in astuple(tile))


def _plan(pairs: list[tuple[int, int, int]], device: torch.device, kind: str, tile: Tile) -> Any:
    """A plan for random factors of these shapes; calls that add into gradients, and in place."""
    dtype, _ = KINDS[kind]
    factors = [
        [torch.randn(rows, r, device=device).mul_(rows**-0.5).to(dtype) for rows in (m, n)]
        for m, n, r in pairs
    ]
    targets = [torch.zeros_like(factor) for two in factors for factor in two]
    made = [Product.of(*two) for two in factors]
    jobs = [
        Job(one.views(), one.batch, one.structure, slice(2 * k, 2 * k + 2))
        for k, one in enumerate(made)
    ]
    plan = Grouped(jobs, tile=tile)
    coefs = [1e-4] * len(targets)
    flat, tiny = [factor for two in factors for factor in two], [-1e-12] * len(targets)
    return plan, lambda: plan(targets, coefs), lambda: plan(flat, tiny)


def _compile(kind: str, rank: int, launch: str, tile: Tile, device: str) -> None:
    """Compile what a tile needs, into Triton's cache on disk, on small factors."""
    with torch.no_grad(), precision(KINDS[kind][1]):
        plan, run, in_place = _plan([(512, 512, rank)], torch.device(device), kind, tile)
        if launch == "Grams":
            plan.launch_grams()
        else:
            run()
        if launch == "in use":
            in_place()
        measure.synchronize(torch.device(device))


def _compile_all(wanted: list[tuple[str, int, str, Tile]], device: str, seconds: float) -> None:
    """In as many processes as there are cores: one compiles a few kernels a second at best."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=context) as pool:
        futures = [pool.submit(_compile, *one, device) for one in wanted]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and not all(future.done() for future in futures):
            time.sleep(0.2)
        pool.shutdown(wait=True, cancel_futures=True)


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call on the device alone: the median over replays of a graph of several calls."""
    if device.type != "cuda":
        run()
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    replay = captured(lambda: [run() for _ in range(REPEATS)], device)
    replay()
    samples = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / REPEATS)
    return median(samples)


def limits(device: torch.device, kind: str) -> tuple[float, float]:
    """Flops and bytes a microsecond, of a large matrix product and of a large copy."""
    small = device.type != "cuda"
    size, count = (256, 1 << 20) if small else (GEMM_SIZE["cuda"], COPY_BYTES["cuda"])
    dtype, _ = KINDS[kind]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rate = 2 * size**3 / microseconds(lambda: torch.mm(a, b, out=product), device)
    return rate, 2 * count / microseconds(lambda: target.copy_(source), device)


def _rows(name: str, kind: str, device: torch.device, end: float) -> list[dict[str, Any]]:
    """One row for each tile, as long as there is time; the least possible time beside it."""
    from triton.errors import TritonError

    case = CASES[name]
    rank = max(r for _, _, r in case.pairs)
    rate, bandwidth = limits(device, kind)
    traffic = 3 * case.parameters * KINDS[kind][0].itemsize
    least = max(case.flops / rate, traffic / bandwidth)
    found: list[dict[str, Any]] = []
    used = 0.0
    for launch, tile in tiles(rank, kind):
        if time.perf_counter() > end and found:
            break
        row = {"": name, "kind": kind, "launch": launch, "tile": _written(tile)}
        try:
            plan, run, in_place = _plan(case.pairs, device, kind, tile)
            both = microseconds(run, device)
            if launch == "in use":
                row["in place, µs"] = microseconds(in_place, device)
            if launch != "updates":
                grams = microseconds(plan.launch_grams, device)
                used = used or grams
                row["Grams, µs"] = grams
            if launch != "Grams":
                row["updates, µs"] = both - used
            row |= {"least, µs": least, "of it": least / both}
        except (RuntimeError, TritonError) as error:  # too large for it: part of the answer
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        found.append(row)
    return found


@part("tune", 120, alone=True)
def tiles_tried(report: Report) -> None:
    """What the two launches take with other tiles than those in use."""
    device = report.device
    tried = TRIED if device.type == "cuda" else {"tiny": ("float32",)}
    wanted = [
        (kind, rank, launch, tile)
        for name, kinds in tried.items()
        for rank in [max(r for _, _, r in CASES[name].pairs)]
        for kind in kinds
        for launch, tile in tiles(rank, kind)
    ]
    start = time.perf_counter()
    if device.type == "cuda":
        _compile_all(list(dict.fromkeys(wanted)), str(device), 0.6 * BUDGET)
    several = [(name, kind) for name, kinds in tried.items() for kind in kinds]
    share = (BUDGET - (time.perf_counter() - start)) / len(several)
    best = []
    with torch.no_grad():
        for k, (name, kind) in enumerate(several):
            end = start + BUDGET - share * (len(several) - 1 - k)
            with precision(KINDS[kind][1]):
                rows = _rows(name, kind, device, end if device.type == "cuda" else 0)
            report.table(f"{CASES[name].title}, {kind}: in use, then others", rows)
            for what in ("Grams, µs", "updates, µs"):
                timed = [row for row in rows if what in row]
                fastest = min(timed, key=lambda row: float(row[what]))
                best.append({**fastest, f"in use: {what}": rows[0][what]})
    report.table("the fastest tiles", best)
    fields = ", ".join(field.name for field in fields_of(Tile))
    report.note("columns", [f"tile: {fields}", "least: factors read once, gradients twice"])
