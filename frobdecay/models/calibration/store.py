"""Files of moments: safetensors, or archives of ``torch.save``; nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from frobdecay.models.calibration.sums import Sums
from frobdecay.models.checkpoints.files import (
    FilePath,
    read_safetensors,
    readable,
    write_torch,
)
from frobdecay.models.checkpoints.formats import PICKLE, SAFETENSORS, ZIP, recognized
from frobdecay.models.checkpoints.streams import Part, write_stream

HEADER, VERSION = "frobdecay.calibration", 1
PARTS = {"inputs": 3, "outputs": 3, "rows": 2}


def write(path: FilePath, sums: Sums, said: Mapping[str, Any]) -> None:
    """Write sums, and what else there is to say, to a file."""
    keys = list(sums.moments)
    tensors = {
        f"{k}.{i}": part
        for k, key in enumerate(keys)
        for i, part in enumerate(sums.moments[key].parts())
    }
    shared = {
        name: [[keys.index(k), n] for k, n in met.items()] for name, met in sums.shared.items()
    }
    text = json.dumps(
        {
            "version": VERSION,
            "dtype": str(sums.dtype).rpartition(".")[2],
            "moments": [[*key, sums.calls(key)] for key in keys],
            "shared": shared,
            "prints": sums.prints,
            **said,
        }
    )
    if os.fsdecode(path).endswith(".safetensors"):
        parts = [Part.of(name, tensor) for name, tensor in tensors.items()]
        write_stream(path, parts, {HEADER: text})
    else:
        write_torch(path, {HEADER: text, **tensors})


def read(path: FilePath, device: torch.device | str) -> tuple[Sums, dict[str, Any]]:
    """What ``write`` wrote, on a device.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    if (kind := recognized(path)) == SAFETENSORS:
        tensors, metadata = read_safetensors(path)
        text: Any = metadata.get(HEADER)
    elif kind not in (ZIP, PICKLE):
        raise ValueError(f"{os.fsdecode(path)}: not a file of moments, but {kind}")
    else:
        try:
            with readable(path) as name:
                tensors = torch.load(name, map_location="cpu", weights_only=True)
            text = tensors.pop(HEADER, None)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{os.fsdecode(path)}: not a file of moments: {error}") from error
    try:
        if text is None:
            raise ValueError("it has none in it, as Calibration.save writes them")
        said = json.loads(text)
        if said["version"] != VERSION:
            raise ValueError(f"of version {said['version']}, which this one does not read")
        sums = Sums({"float64": torch.float64, "float32": torch.float32}[said["dtype"]], device)
        keys = [(str(name), str(of)) for name, of, _ in said["moments"]]
        for name, met in said["shared"].items():
            sums.shared[name].update({keys[k]: int(n) for k, n in met})
        sums.prints = dict(said.get("prints", {}))  # which older files lack
        for k, key in enumerate(keys):
            parts = [tensors[f"{k}.{i}"] for i in range(PARTS[key[1]])]
            held = sums.empty((key[1], tuple(parts[0].shape), parts[-1].shape[-1]), "meta")
            fitting = [(part.shape, part.dtype) for part in held.parts()]
            held.become(*parts)
            if [(part.shape, part.dtype) for part in parts] != fitting or not held.finite():
                raise ValueError(f"the {key[1]} of {key[0]} are no sums")
            sums.moments[key] = held
        sums.to(device)
        return sums, {"shrink": float(said["shrink"]), "unwatched": dict(said["unwatched"])}
    except (TypeError, LookupError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fsdecode(path)}: not a file of moments: {error}") from error
