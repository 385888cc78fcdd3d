"""The files of a checkpoint: one, or those of a folder as transformers writes it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from frobdecay.models.checkpoints.files import FilePath

CONFIG, INDEX = "config.json", ".index.json"
NAMES = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls the weights in a folder; an index of several files adds ``INDEX``."""


def folder_of(path: FilePath) -> Path | None:
    """The folder that a path means, or an index in it; None for a file of weights."""
    given = Path(os.fsdecode(path))
    return given if given.is_dir() else given.parent if given.name.endswith(INDEX) else None


def weight_files(path: FilePath) -> list[Path]:
    """The files of weights that a path means: itself, or those of a folder or of an index.

    Raises:
        OSError: it cannot be read.
        ValueError: a folder without weights, or an index that is none.
    """
    given = Path(os.fsdecode(path))
    if given.name.endswith(INDEX):
        return _indexed(given)
    if not given.is_dir():
        return [given]
    for name in NAMES:
        if (index := given / f"{name}{INDEX}").exists():
            return _indexed(index)
        if (single := given / name).exists():
            return [single]
    if len(found := sorted(given.glob("*.safetensors"))) == 1:
        return found
    what = f"{[file.name for file in found][:8]}; give one" if found else "neither, nor an index"
    raise ValueError(f"{given}: a folder, in which {' or '.join(NAMES)} is expected, has {what}")


def _indexed(index: Path) -> list[Path]:
    """The files that an index lists, which lie beside it."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of weights in several files") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: expected names of files beside it, got {name!r}")
        if not (index.parent / name).exists():
            missing = str(index.parent / name)
            raise FileNotFoundError(errno.ENOENT, "is missing, but listed in the index", missing)
    if not names:
        raise ValueError(f"{index}: lists no files")
    return [index.parent / name for name in names]
