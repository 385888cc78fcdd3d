"""Launches of the kernels of ``triton/kernels.py``, and what a launch compiles a kernel for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from frobdecay.gradient.triton.kernels import INTERPRETED, gram_kernel, update_kernel
from frobdecay.gradient.triton.tiles import Held, Tile

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TARGETS = {**_TYPES, torch.float64: tl.float64}


class Launch:
    """A launch of a kernel on tensors that stay where they are.

    Triton looks at all arguments of a launch to find what it has compiled for them, constants and
    addresses included: that takes the host as long as the device needs for a small model. The
    first launch does so, those after it run what it found. They go by Triton's way again where
    hooks want to see a launch before it; in the interpreter, which compiles nothing, all do.

    Args:
        kernel: one of ``triton/kernels.py``.
        tensors: its first arguments; the first one has a row for each program, or for
            each ACROSS ones.
        options: its constants, warps and stages.
    """

    def __init__(self, kernel: Any, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        self._kernel, self._tensors, self._options = kernel, tensors, options
        self._grid = len(tensors[0]) * options.get("ACROSS", 1), 1, 1
        self._run: Callable[..., None] | None = None
        self._constants = [options[name] for name in kernel.arg_names[len(tensors) :]]

    def __call__(self) -> None:
        """Launch it on the current device, which has to be the tensors' own, and its stream."""
        if self._run is not None and not self._kernel.pre_run_hooks:
            self._run(*self._tensors, *self._constants)
            return
        found = self._kernel[self._grid](*self._tensors, **self._options)
        if isinstance(found, CompiledKernel):
            self._run = found[self._grid]


gram_launch = partial(Launch, gram_kernel)
"""Launch A of the table, int64 (programs, 14), the Grams and the partial sums, float32, and the
counters, int32: zero before, and zero again afterwards. With ``gram_options``."""

update_launch = partial(Launch, update_kernel)
"""Launch B of the table, int64 (programs, 12), the Grams that A wrote, and int64 addresses, one a
slot: of the targets, 0 for none, and of float32 coefficients. With ``update_options``."""


def gram_options(dtype: torch.dtype, layouts: int, rank: int, tile: Tile) -> dict[str, Any]:
    """What launch A is compiled for: constants of the kernel, warps, depth of the pipeline.

    Args:
        dtype: of the factors.
        layouts: bit set of those in the table.
        rank: the largest one.
        tile: how the table was cut.
    """
    precision, rows, stages = precision_of(dtype), tile.gram_rows, tile.gram_stages
    tensor = dtype != torch.float32 or precision == "tf32"
    if precision == "tf32" and tile.block >= 64:
        # TF32's warp-group products cannot take Xᵀ from where it lies; bf16's can, and three of
        # bf16 terms are more precise than one of TF32. The terms take registers: half the rows.
        precision, rows, stages = "bf16x3", rows // 2, 1
    return {
        "TYPE": _TYPES[dtype],
        "VECTOR": 16 // dtype.itemsize,
        "LAYOUTS": layouts,
        "BLOCK": tile.block,
        "STEP": rows,
        "SINGLE": rank <= tile.block,
        "PRECISION": precision,
        "UPCAST": INTERPRETED,
        "num_warps": tile.tensor_warps[0] if tensor else tile.gram_warps,
        "num_stages": stages,
    }


def update_options(
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    layouts: int,
    rank: int,
    in_place: bool,
    tile: Tile,
) -> dict[str, Any]:
    """What launch B is compiled for, see ``gram_options``.

    Args:
        dtype: of the factors.
        target_dtype: of the targets.
        layouts: bit set of those in the table.
        rank: the largest one.
        in_place: whether a target may be the factor itself.
        tile: how the table was cut.
    """
    single, held = rank <= tile.block, held_columns(dtype, rank, tile)
    if in_place or layouts != 2 or target_dtype == torch.float64:
        held = None  # addresses of any strides would be more than the registers hold
    half = target_dtype.itemsize < 4
    # In place, all columns at once: none may be written while others still need it. Of half as
    # many rows, for all to stay in registers.
    whole, columns = in_place and not single, 1 << (rank - 1).bit_length()
    if not whole:
        columns = tile.block if single else min(tile.columns, columns)
    precision, half_factors = precision_of(dtype), dtype != torch.float32
    found = {
        "SOURCE": _TYPES[dtype],
        "TARGET": _TARGETS[target_dtype],
        "VECTOR": 16 // min(dtype.itemsize, target_dtype.itemsize),
        "LAYOUTS": layouts,
        "ROWS": tile.update_rows // 2 if whole else tile.update_rows,
        "BLOCK": tile.block if single or held else tile.inner,
        "COLUMNS": columns,
        "HELD": int(single),
        "ACROSS": 1,
        "IN_PLACE": in_place,
        "TERMS": 0 if not half_factors else 2 if half else 3,
        "PRECISION": "tf32" if dtype == torch.float16 else precision,
        "TURNED": precision == "tf32",
        "UPCAST": INTERPRETED,
        # float32 and, in place, all columns are more than the registers of few warps hold
        "num_warps": tile.tensor_warps[1] if half_factors and not whole else tile.update_warps,
        "num_stages": tile.update_stages,
    }
    if held:
        # Three terms of more than one block would not leave room for the factor.
        columns = tile.block if found["TERMS"] == 3 else held.columns
        found |= {"ROWS": held.rows, "COLUMNS": columns, "HELD": -(-rank // tile.block)}
        found |= {"ACROSS": -(-rank // columns), "num_warps": held.warps}
        found["num_stages"] = held.stages
    return found


def held_columns(dtype: torch.dtype, rank: int, tile: Tile) -> Held | None:
    """How launch B keeps columns of a Gram in shared memory, where it does."""
    if rank <= tile.block:
        return None
    if dtype == torch.bfloat16:
        return tile.bf16
    return tile.tf32 if precision_of(dtype) == "tf32" else None


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied, by torch's own setting at this moment; others have one way."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # newer; the other one may refuse then
    tf32 = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if tf32 else "ieee"
