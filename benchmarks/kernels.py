"""Kernels do not spill their registers, nor take more shared memory than a multiprocessor has.

    python -m benchmarks.kernels                          # every variant, for sm_80 and sm_90
    python -m benchmarks.kernels --only 'gram.*bf16' --capability 90 --json kernels.json

Compiles the grouped kernels ahead of time, in all variants that launches ask for: by rank, dtypes
of factors and targets, layouts, in place or not, float32 as IEEE or TF32. Needs no GPU, only
Triton; what it compiles, launches on such a GPU find in Triton's cache on disk. Registers and
local memory, where spilled registers go, are those of a thread of the compiled program, shared
memory what a launch asks for. "Wide" counts accesses of 16 bytes to global memory, "narrow" those
to one number, "tensor" instructions of the tensor cores.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.measure import Report, Target
from frobdecay.gradient.triton.refusals import load_kernels
from frobdecay.gradient.triton.tiles import MAX_RANK, tile_for

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Capability -> bytes of shared memory that a program can have."""

LOCAL = 8
"""Bytes of local memory that a thread may use: ptxas itself keeps two registers there at times, for
one more program on a multiprocessor; held back, it takes all registers and runs fewer."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = (*DTYPES, torch.float64)
_ARGUMENTS = {  # kernel -> dtypes of its tensors
    "gram": (torch.int64, torch.float32, torch.float32, torch.int32),
    "update": (torch.int64, torch.float32, torch.int64, torch.int64),
}
_INSTRUCTIONS = {  # partial sums, .cg, apart
    "wide loads": r"ld\.global(?!\.cg)\S*\.(v4\.b32|v2\.b64)|cp\.async\.cg",
    "wide stores": r"st\.global\S*\.(v4\.b32|v2\.b64)",
    "narrow loads": r"ld\.global(?!\.cg|\S*\.v\d)\S*\.b(16|32)\b",
    "narrow stores": r"st\.global(?!\S*\.v\d)\S*\.b(16|32)\b",
    "tensor": r"wgmma\.mma_async|mma\.sync",
}
_LEAST = ("wide loads", "wide stores", "tensor")


class Variant(NamedTuple):
    """A kernel and what a launch compiles it for.

    Attributes:
        kernel: gram or update.
        rank: the largest one that it is for.
        options: constants, warps and stages, sorted by name.
    """

    kernel: str
    rank: int
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """All but the layouts."""
        o = dict(self.options)
        words = [self.kernel, f"r≤{self.rank}"]
        words += [f"{o[k]}" for k in ("TYPE", "SOURCE") if k in o]
        words += [f"→{o['TARGET']}"] if "TARGET" in o else []
        words += [o["PRECISION"]] if "PRECISION" in o else []
        return " ".join(words + ["in place"] * o.get("IN_PLACE", False))

    def __str__(self) -> str:
        layouts = dict(self.options).get("LAYOUTS")
        return self.name + (f" layouts {layouts:03b}" if layouts else "")


def variants(capability: int) -> Iterator[Variant]:
    """Everything that launches may ask for on such a device, by the code that they ask for it."""
    kernels: Any = load_kernels()
    found: dict[tuple[str, tuple[tuple[str, Any], ...]], int] = {}

    def add(kernel: str, rank: int, options: dict[str, Any]) -> None:
        found[kernel, tuple(sorted(options.items(), key=lambda item: item[0]))] = rank

    for setting in ("highest", "high"):
        with measure.precision(setting):
            for rank, dtype, layouts in itertools.product(
                range(1, MAX_RANK + 1), DTYPES, range(1, 8)
            ):
                tile = tile_for(rank, capability)
                add("gram", rank, kernels.gram_options(dtype, layouts, rank, tile))
                for target, in_place in itertools.product(TARGETS, (False, True)):
                    if target == dtype or not in_place:
                        about = dtype, target, layouts, rank, in_place, tile
                        add("update", rank, kernels.update_options(*about))
    return (Variant(kernel, rank, options) for (kernel, options), rank in found.items())


class _Absent(NamedTuple):
    """Stands in for Triton's driver where there is no GPU, of that capability."""

    capability: int

    def get_current_device(self) -> int:
        return -self.capability  # nobody else's place in Triton's caches

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compiled(variant: Variant, capability: int) -> dict[str, Any]:
    """Compile a variant as a launch would, into the same cache on disk.

    No launch can follow in this process: Triton takes the GPU that there is not for its own.

    Args:
        variant: one of ``variants()``.
        capability: 80 or 90.

    Returns:
        What it takes and does, see the docstring of the module; memory in bytes.
    """
    import triton
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    kernel = getattr(load_kernels(), f"{variant.kernel}_kernel")
    driver.set_active(_Absent(capability))
    tensors = map(MockTensor, _ARGUMENTS[variant.kernel])
    found = kernel.warmup(*tensors, grid=(1,), **dict(variant.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(found.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {what: len(re.findall(how, found.asm["ptx"])) for what, how in _INSTRUCTIONS.items()}
    return {
        "registers": used["REG"],
        "local": used["STACK"] + used["LOCAL"],
        "shared": found.metadata.shared,
        **counts,
    }


def _narrow(variant: Variant, found: dict[str, Any]) -> bool:
    """Whether numbers that are adjacent, by the layouts, are accessed one by one."""
    layouts = dict(variant.options).get("LAYOUTS", 1)
    wide = found["wide loads"] and found["wide stores"]
    if layouts & 1:  # numbers with any strides, too
        return layouts != 1 and not wide
    coefs, others = (1, 0) if variant.kernel == "update" else (0, found["narrow stores"])
    return not wide or found["narrow loads"] > coefs or found["narrow stores"] > others


def _rows(found: dict[Variant, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all sets of layouts: the most that one of them takes, the least it does."""
    rows: dict[str, dict[str, Any]] = {}
    for variant, one in found.items():
        row = rows.setdefault(variant.name, {"": variant.name, **one})
        row |= {k: (min if k in _LEAST else max)(row[k], one[k]) for k in one}
    return list(rows.values())


def _targets(capability: int, found: dict[Variant, dict[str, Any]]) -> list[Target]:
    limit = SHARED[capability] / 1024
    narrow = sum(_narrow(variant, one) for variant, one in found.items())
    local, shared = (max(one[name] for one in found.values()) for name in ("local", "shared"))
    return [
        Target(f"sm_{capability}: local memory of a thread", local, LOCAL, unit="bytes"),
        Target(f"sm_{capability}: shared memory", shared / 1024, limit, unit="KiB"),
        Target(f"sm_{capability}: variants with narrow accesses", narrow, 0, unit=""),
    ]


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("kernels", __doc__ or "", device=False)
    made.add_argument("--capability", type=int, nargs="+", choices=SHARED, default=[*SHARED])
    made.add_argument("--only", default="", metavar="REGEX", help="variants with such a name")
    made.add_argument("--workers", type=measure.count, default=os.cpu_count(), help="processes")
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Compile them, and print a table."""
    os.environ.pop("TRITON_INTERPRET", None)
    if load_kernels() is None or load_kernels().INTERPRETED:
        raise SystemExit(
            "expected Triton's compiler, found none, or its interpreter in use already"
        )
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    report.data["variants"] = []
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        for capability in options.capability:
            every = variants(capability)
            wanted = [variant for variant in every if re.search(options.only, str(variant))]
            done = pool.map(compiled, wanted, [capability] * len(wanted))
            found = dict(zip(wanted, done, strict=True))
            report.table(f"sm_{capability}", _rows(found))
            report.targets += _targets(capability, found)
            report.data["variants"] += [
                {"": f"sm_{capability} {variant}", **one} for variant, one in found.items()
            ]
    seconds = time.perf_counter() - start
    count = len(report.data["variants"])
    report.note("time", [f"{count} programs in {seconds:.0f} s, {options.workers} processes"])


if __name__ == "__main__":
    main()
