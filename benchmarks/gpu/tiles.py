"""How far the kernels are from their roofline, by how they cut matrices up: to choose tiles.

For each model and way to multiply (float32 by IEEE and by TF32, bf16) the two launches are timed
alone, replayed from a CUDA graph, so that the host's part is left out; once with the tile that
the kernels have, and with others. Beside them stand the limits of the device, measured in the
same run: a large matrix product of that kind, and a large copy. Factors count as read twice,
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
from statistics import median
from typing import Any

import torch

from benchmarks import measure
from benchmarks.cases import CASES
from benchmarks.gpu.parts import part
from benchmarks.measure import Report
from frobdecay.gradient.bucketed import Job
from frobdecay.gradient.triton.executor import Grouped
from frobdecay.gradient.triton.tiles import Tile, tile_for

__all__ = ["KINDS", "limits", "microseconds"]

KINDS = {  # how it is called -> dtype, torch's precision of float32 products
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
}
TRIED = ("resnet110", "bert", "lora7b")
FIELDS = "block, inner, gram rows, update rows, gram warps, update warps, stages"
REPEATS = 10
BUDGET = 180
"""Seconds for all tiles; half of them at most to compile."""
GEMM_SIZE, COPY_BYTES = 8192, 1 << 30


def tiles(rank: int) -> Iterator[Tile]:
    """The tile in use, then those that differ in a few respects."""
    used = tile_for(rank)
    yield used
    for gram_rows, update_rows in itertools.product((32, 64, 128, 256), (32, 64, 128, 256)):
        if gram_rows == update_rows and gram_rows * used.block <= 8192:
            yield replace(used, gram_rows=gram_rows, update_rows=update_rows)
    for warps in (1, 2, 4, 8):
        yield replace(used, gram_warps=warps, update_warps=max(warps, 2))
    for stages in (2, 4):
        yield replace(used, stages=stages)
    if rank > 64:
        yield replace(used, block=128, gram_rows=32)
        yield replace(used, inner=64)


def _plan(pairs: list[tuple[int, int, int]], device: torch.device, kind: str, tile: Tile) -> Any:
    """A plan for random factors of these shapes, and a call that adds into gradients."""
    dtype, precision = KINDS[kind]
    torch.set_float32_matmul_precision(precision)
    factors = [
        [torch.randn(rows, r, device=device).mul_(rows**-0.5).to(dtype) for rows in (m, n)]
        for m, n, r in pairs
    ]
    targets = [torch.zeros_like(factor) for two in factors for factor in two]
    plan = Grouped([Job(tuple(two), 0) for two in factors], tile=tile)
    coefs = [1e-4] * len(targets)
    return plan, lambda: plan(targets, coefs)


def _compile(kind: str, rank: int, tile: Tile, device: str) -> None:
    """Compile what a tile needs, into Triton's cache on disk, on small factors."""
    with torch.no_grad():
        _, run = _plan([(512, 512, rank)], torch.device(device), kind, tile)
        run()
        measure.synchronize(torch.device(device))


def _compile_all(wanted: list[tuple[str, int, Tile]], device: str, seconds: float) -> None:
    """In as many processes as there are cores: one compiles a few kernels a second at best."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) // 2), mp_context=context) as pool:
        futures = [pool.submit(_compile, *one, device) for one in wanted]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and not all(future.done() for future in futures):
            time.sleep(0.2)
        pool.shutdown(wait=True, cancel_futures=True)


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call on the device alone: the median over replays of a graph of several calls."""
    run()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    graph.replay()
    samples = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / REPEATS)
    return median(samples)


def limits(device: torch.device, kind: str) -> tuple[float, float]:
    """Flops and bytes a microsecond, of a large matrix product and of a large copy."""
    small = device.type != "cuda"
    size, count = (256, 1 << 20) if small else (GEMM_SIZE, COPY_BYTES)
    dtype, precision = KINDS[kind]
    torch.set_float32_matmul_precision(precision)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rate = 2 * size**3 / microseconds(lambda: torch.mm(a, b, out=product), device)
    return rate, 2 * count / microseconds(lambda: target.copy_(source), device)


def _rows(name: str, kind: str, device: torch.device, end: float) -> list[dict[str, Any]]:
    """One row for each tile, as long as there is time; the least possible time beside it."""
    case = CASES[name]
    rank = max(r for _, _, r in case.pairs)
    rate, bandwidth = limits(device, kind)
    traffic = 4 * case.parameters * KINDS[kind][0].itemsize
    least = max(case.flops / rate, traffic / bandwidth)
    found: list[dict[str, Any]] = []
    for tile in dict.fromkeys(tiles(rank)):
        if time.perf_counter() > end and found:
            break
        row = {"": name, "kind": kind, FIELDS: " ".join(map(str, astuple(tile)))}
        try:
            plan, run = _plan(case.pairs, device, kind, tile)
            both = microseconds(run, device)
            grams = microseconds(plan.launch_grams, device)
            row |= {"µs": both, "Grams, µs": grams, "least, µs": least, "of it": least / both}
        except Exception as error:  # too large for the device: part of the answer
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        found.append(row)
    return found


@part("tune", 200, alone=True)
def tiles_tried(report: Report) -> None:
    """What two launches take with other tiles than those in use."""
    device = report.device
    names = TRIED if device.type == "cuda" else ("tiny",)
    ranks = {name: max(r for _, _, r in CASES[name].pairs) for name in names}
    wanted = [(kind, r, tile) for r in ranks.values() for kind in KINDS for tile in tiles(r)]
    start = time.perf_counter()
    if device.type == "cuda":
        _compile_all(list(dict.fromkeys(wanted)), str(device), BUDGET / 2)
    several = list(itertools.product(names, KINDS))
    share = (BUDGET - (time.perf_counter() - start)) / len(several)
    best = []
    with torch.no_grad():
        for k, (name, kind) in enumerate(several):
            end = start + BUDGET - share * (len(several) - 1 - k)
            rows = _rows(name, kind, device, end if device.type == "cuda" else 0)
            report.table(f"{CASES[name].title}, {kind}: in use, then others", rows)
            timed = [row for row in rows if "µs" in row]
            if timed:
                fastest = min(timed, key=lambda row: float(row["µs"]))
                best.append({**fastest, "in use, µs": rows[0].get("µs")})
    report.table("the fastest tiles", best)
    report.note("traffic", ["factors read twice, gradients read and written once"])
