"""Safetensors files written tensor by tensor, each made when its turn comes.

``safetensors`` itself writes what is in memory as a whole, and a file by its name.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from frobdecay.models.checkpoints.files import FilePath, replacing

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Tensors of one dtype that are made together.

    Attributes:
        names: in the file.
        shapes: of each.
        dtype: of all.
        make: called when they are to be written.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    make: Callable[[], Sequence[Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Part:
        """A tensor that is there already.

        Raises:
            ValueError: it is not a whole dense tensor in memory.
        """
        dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        if not dense or (tensor.numel() and not tensor.data_ptr()):  # of others' subclasses
            kind = f"{type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise ValueError(
                f"{name} is no whole dense tensor ({kind}); gather, materialize or dequantize it, "
                "or leave it out"
            )
        return cls((name,), (tuple(tensor.shape),), tensor.dtype, lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(map(prod, self.shapes)) * self.dtype.itemsize


def write_stream(path: FilePath, parts: Iterable[Part], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the memory of its largest part.

    Raises:
        OSError: as ``replacing``.
        ValueError: a dtype without a name in the format; nothing was written then.
    """
    # The widest first, so that every tensor starts at a multiple of its own width.
    ordered = sorted(parts, key=lambda part: -part.dtype.itemsize)
    text = json.dumps(_header(ordered, metadata)).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in ordered:
            for tensor, shape in zip(part.make(), part.shapes, strict=True):
                if tuple(tensor.shape) != shape or tensor.dtype != part.dtype:
                    raise ValueError(f"{part.names}: expected {shape}, made {tensor.shape}")
                # Views may say of their memory that it is conjugated or negated, at no cost.
                plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
                file.write((ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()))


def _header(parts: Iterable[Part], metadata: Mapping[str, str]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for part in parts:
        if part.dtype not in _DTYPES:
            raise ValueError(
                f"{part.names[0]} is of {part.dtype}, which safetensors has no name for"
            )
        for name, shape in zip(part.names, part.shapes, strict=True):
            end = at + prod(shape) * part.dtype.itemsize
            entry = {"dtype": _DTYPES[part.dtype], "shape": shape, "data_offsets": [at, end]}
            header[name], at = entry, end
    return header
