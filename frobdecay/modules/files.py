"""Files of tensors: written as a whole or not at all, read without running anything."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FilePath", "read_safetensors", "replacing", "write_safetensors"]

FilePath = str | os.PathLike[str]


@contextmanager
def replacing(path: FilePath) -> Iterator[Path]:
    """A path to write to, beside ``path``, which it replaces in one step if nothing fails."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would let nobody read
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        safetensors = importlib.import_module("safetensors")
        importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "safetensors files need safetensors: pip install safetensors, or frobdecay[cli]"
        ) from error
    return safetensors


def write_safetensors(
    path: FilePath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, none of which shares memory in the file, and metadata into the header.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a tensor that is not whole, dense and in memory, or of a dtype without a name
            in the format; nothing was written then.
    """
    safetensors = _safetensors()
    storages: set[int] = set()
    content = {name: _unshared(name, tensor, storages) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(content, temporary, {"format": "pt", **(metadata or {})})


def _unshared(name: str, tensor: Tensor, storages: set[int]) -> Tensor:
    """The tensor in memory of its own, copied where it is not."""
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} is a {type(tensor).__name__} ({tensor.layout}, {tensor.device}), not a whole "
            "dense tensor; gather or materialize it before saving"
        )
    storage = tensor.untyped_storage()
    alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
    storages.add(storage.data_ptr())
    plain = tensor.contiguous()
    return plain if alone or plain is not tensor else plain.clone()


def read_safetensors(path: FilePath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and the metadata of its header.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be opened.
        ValueError: it is not a safetensors file, or damaged.
    """
    safetensors = _safetensors()
    with open(path, "rb"):
        pass  # a missing file and a folder are errors of their own
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a whole safetensors file: {error}") from error
