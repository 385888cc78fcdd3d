"""Named tensors -> a file, or a folder as transformers reads it; as a whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frobdecay.cli.read import Checkpoint
from frobdecay.models.checkpoints.configs import config_entries, without_entries
from frobdecay.models.checkpoints.files import own_folder, sync, write_torch
from frobdecay.models.checkpoints.folders import CONFIG, INDEX, NAMES, folder_of
from frobdecay.models.checkpoints.records import HEADER, RECORDS_VERSION, factor_key
from frobdecay.models.checkpoints.streams import Part, write_stream

TORCH = (".pt", ".pth", ".bin", ".ckpt")

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx",
            "*.gguf", "*.ot", "*.tflite", f"*{INDEX}")  # fmt: skip
"""What is not copied with a folder: its weights in any format, which would be others than ours."""

Records = Mapping[str, Mapping[str, Any]]


def check_target(out: str, source: str, suffixes: Sequence[str], force: bool) -> Path:
    """Where to write: a file of a known suffix, or a new folder for what comes from a folder.

    Raises:
        ValueError: neither, or there is something.
    """
    target, folder = Path(out), folder_of(source)
    if target.suffix in suffixes:
        if target.exists() and not force:
            raise ValueError(f"{target}: exists already; --force replaces it")
    elif folder is None:
        raise ValueError(f"{target}: expected a name that ends with {' or '.join(suffixes)}")
    elif target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target}: exists already; expected the name of a new folder")
    return target


def write(
    target: Path,
    checkpoint: Checkpoint,
    files: Mapping[str, Sequence[Part]],
    records: Records,
    names: Mapping[str, str] | None = None,
) -> None:
    """Write tensors where ``check_target`` says.

    Args:
        target: of ``check_target``.
        checkpoint: where they come from, and what else it has.
        files: name of each file that they come from -> what is to be written in its place.
        records: of the weights that are factorized in it, by name.
        names: in the files -> in the model, for configurations, where they differ.

    Raises:
        OSError: it cannot be written. Nothing was written then.
        ValueError: something that safetensors cannot hold.
    """
    every = [part for some in files.values() for part in some]
    if target.suffix in TORCH:
        tensors = {n: t for part in every for n, t in zip(part.names, part.make(), strict=True)}
        write_torch(target, {**tensors, **checkpoint.others})
        return
    if checkpoint.others:
        raise ValueError(
            f"it holds more than tensors, which safetensors cannot hold: "
            f"{list(checkpoint.others)[:8]}; write a .pt file, or give --key"
        )
    if target.suffix == ".safetensors":
        write_stream(target, every, _metadata(every, records, checkpoint.tied))
        return
    source = folder_of(checkpoint.path)
    assert source is not None
    parent = target.absolute().parent
    with own_folder(parent) as temporary:
        made = temporary / target.name
        shutil.copytree(source, made, ignore=shutil.ignore_patterns(*_WEIGHTS, ".*"))
        _write_files(made, files, records, checkpoint.tied)
        if (config := made / CONFIG).exists():
            content = without_entries(json.loads(config.read_text(encoding="utf-8")))
            content.update(config_entries({(names or {}).get(n, n): r for n, r in records.items()}))
            config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for written in (*made.rglob("*"), made):
            sync(written)
        os.replace(made, target)
        sync(parent)


def _write_files(
    folder: Path, files: Mapping[str, Sequence[Part]], records: Records, tied: Mapping[str, str]
) -> None:
    """The files of weights, and the index of several."""
    table: dict[str, str] = {}
    size = 0
    for file, parts in files.items():
        name = str(Path(file.replace("pytorch_model", "model")).with_suffix(".safetensors"))
        name = NAMES[0] if len(files) == 1 else name
        write_stream(folder / name, parts, _metadata(parts, records, tied))
        table |= {each: name for part in parts for each in part.names}
        size += sum(part.nbytes for part in parts)
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": table}
        (folder / f"{NAMES[0]}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")


def _metadata(parts: Sequence[Part], records: Records, tied: Mapping[str, str]) -> dict[str, str]:
    """The structure of what is in one file, as ``save_factorized`` writes it."""
    here = {name for part in parts for name in part.names}
    weights = {name: record for name, record in records.items() if factor_key(name, 0) in here}
    if not weights:
        return {}
    ties = {name: source for name, source in tied.items() if source in here and name not in here}
    return {HEADER: json.dumps({"version": RECORDS_VERSION, "weights": weights, "tied": ties})}
