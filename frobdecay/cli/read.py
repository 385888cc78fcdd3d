"""A file, or a folder of several -> named tensors. Whatever is in a file, nothing in it is run.

Three formats (``models/checkpoints/formats.py``): safetensors, the zip archives of
``torch.save``, and what it wrote before those. The latter two are unpickled by
``torch.load(weights_only=True)``, which makes tensors and plain containers and refuses everything
else. The tensors are mapped, not read: they take memory where they are looked at, which the system
takes back.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frobdecay.models.checkpoints.configs import config_records
from frobdecay.models.checkpoints.files import read_safetensors, readable
from frobdecay.models.checkpoints.folders import CONFIG, folder_of, weight_files
from frobdecay.models.checkpoints.formats import PICKLE, SAFETENSORS, ZIP, recognized
from frobdecay.models.checkpoints.records import (
    HEADER,
    factor_key,
    factors_of,
    parse_records,
    weight_of,
)
from frobdecay.models.checkpoints.tensors import identity
from frobdecay.product.names import naming

_DEPTH = 4


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, or a folder of them.

    Attributes:
        path: of the file or of the folder.
        key: where in the file the tensors are, "" at the top.
        tensors: by name.
        records: of the factorized weights, by name.
        tied: name -> the name that its numbers are saved under, for those that are there twice.
        others: what lies beside the tensors in their table.
        files: name of a file -> names of the tensors in it.
    """

    path: str
    key: str
    tensors: dict[str, Tensor]
    records: dict[str, Mapping[str, Any]]
    tied: dict[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The dense ones that could be factorized."""
        dense = [key for key, weight in self.entries(self.tensors) if weight is None]
        found = {name: self.tensors[name] for name in dense}
        return {name: one for name, one in found.items() if why_unread(name, one) is None}

    def entries(self, keys: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """What some keys stand for: dense tensors, and weights with a record by their first factor.

        Yields:
            a key, and the weight whose factor it is; None of a dense tensor.
        """
        firsts = {factor_key(name, 0): name for name in self.records}
        for key in keys:
            if key in firsts or weight_of(key) not in self.records:
                yield key, firsts.get(key)

    @cached_property
    def factorized(self) -> dict[str, tuple[Any, list[Tensor]]]:
        """Weight -> its parametrization and its factors; as ``factors_of``."""
        return {name: factors_of(name, one, self.tensors) for name, one in self.records.items()}

    @property
    def total(self) -> int:
        """How many numbers there are in it, weights or not, but for a normalization's averages.

        Those of tied tensors once.
        """
        return count(
            tensor
            for name, tensor in self.tensors.items()
            if tensor.is_floating_point() and not name.endswith(("running_mean", "running_var"))
        )


def count(tensors: Iterable[Tensor]) -> int:
    """How many numbers tensors have, those of tied ones once."""
    return sum({identity(tensor): tensor.numel() for tensor in tensors}.values())


def check_factors(checkpoint: Checkpoint) -> None:
    """Refuse factors that are missing, beside the dense weight, or that nobody knows how to read.

    Raises:
        ValueError: naming them.
    """
    tensors, records = checkpoint.tensors, checkpoint.records
    if unknown := [n for n in dict.fromkeys(map(weight_of, tensors)) if n and n not in records]:
        raise ValueError(
            f"it has factors of {unknown[:8]}, but not how they are to be read; load it "
            "into the factorized model, and save that with save_factorized"
        )
    if lost := [name for name in records if factor_key(name, 0) not in tensors]:
        raise ValueError(f"the factors of {lost[:8]} are missing")
    if both := [name for name in records if name in tensors]:
        raise ValueError(f"it has both the factors of {both[:8]} and the dense weights")
    checkpoint.factorized  # noqa: B018 - refuses what does not fit


def why_unread(name: str, tensor: Tensor) -> str | None:
    """Why a tensor without a record is no weight that could be factorized; None if it is one."""
    if weight_of(name) is not None:
        return "a factor; the file does not say how it is to be read"
    if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
        return f"not read: {tensor.dtype}, {tensor.layout}"
    if not tensor.numel():
        return "empty"
    return None if 2 <= tensor.ndim <= 5 else f"not read: {tensor.ndim} dimensions"


def read(path: str, key: str | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: of the file, of an index of several files, or of a folder as transformers writes it.
        key: the keys of nested dictionaries that lead to the tensors, joined by "/"; by default
            the only dictionary of weights is taken, those of optimizers left aside.

    Raises:
        ImportError: a safetensors file, but no safetensors.
        OSError: the file cannot be opened.
        ValueError: not a checkpoint, a damaged one, one that asks for code to be run, or one with
            no weights or with several dictionaries of them.
    """
    parts = {file.name: _file(str(file), key) for file in weight_files(path)}
    first, *others = parts.values()
    whole = replace(first, path=path, files={name: [*one.tensors] for name, one in parts.items()})
    for part in others:
        if twice := [name for name in part.tensors if name in whole.tensors]:
            raise ValueError(f"{path}: {twice[:8]} are in more than one of its files")
        whole.tensors.update(part.tensors)
        whole.records.update(part.records)
        whole.tied.update(part.tied)
    folder = folder_of(path)
    if not whole.records and folder is not None and (folder / CONFIG).exists():
        whole.records.update(_records_of_config(folder / CONFIG))
    return whole


def _records_of_config(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The records that ``save_pretrained`` wrote."""
    try:
        return config_records(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _file(path: str, key: str | None) -> Checkpoint:
    with naming(path):
        what = recognized(path)
        if what == SAFETENSORS:
            return _checked(_from_safetensors(path, key))
        if what in (ZIP, PICKLE):
            return _checked(_from_torch(path, what == ZIP, key))
        raise ValueError(f"neither a safetensors file nor one of torch.save, but {what}")


def _from_safetensors(path: str, key: str | None) -> Checkpoint:
    if key is not None:
        raise ValueError(f"a safetensors file is one flat table, without a key {key!r}")
    tensors, metadata = read_safetensors(path)
    if HEADER not in metadata:
        return Checkpoint(path, "", tensors, {})
    found, tied = parse_records(metadata[HEADER], tensors)
    records = dict(found)
    for name, source in tied.items():
        tensors[name] = tensors[source]
        ours, theirs = weight_of(name), weight_of(source)
        if ours is not None and theirs in records:  # one module under two names
            records.setdefault(ours, records[theirs])
    return Checkpoint(path, "", tensors, records, tied)


def _from_torch(path: str, zipped: bool, key: str | None) -> Checkpoint:
    where, table = _table(_unpickled(path, zipped), key)
    tensors = {name: value for name, value in table.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in table.items() if name not in tensors}
    return Checkpoint(path, where, tensors, _records(table), others=others)


def _unpickled(path: str, zipped: bool) -> Any:
    try:
        with warnings.catch_warnings(), readable(path) as name:
            warnings.simplefilter("ignore")  # of formats that torch still reads
            return torch.load(name, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a damaged pickle leads torch to
        text = str(error)
        unsupported = re.search(r"Unsupported [^\n]*?(?=\.? ?(?:\n|$| was not| Please))", text)
        if unsupported or "UnpicklingError" in type(error).__name__:
            what = unsupported[0] if unsupported else text.partition("\n")[0]
            raise ValueError(
                f"refused: a pickle of objects, such as a whole model ({what}), but only tensors "
                "and plain containers are unpickled; save the weights alone: "
                "torch.save(model.state_dict(), ...)"
            ) from error
        line = text.partition("\n")[0] or type(error).__name__
        raise ValueError(f"damaged, or not a file of torch.save: {line}") from error


def _table(loaded: Any, key: str | None) -> tuple[str, Mapping[str, Any]]:
    """The dictionary of weights, and where it is."""
    if not isinstance(loaded, Mapping):
        raise ValueError(f"expected a dictionary of tensors, got a {type(loaded).__name__}")
    found = dict(_tables(loaded, ()))
    if key is not None:
        if key not in found:
            raise ValueError(f"no weights under {key!r}; there are some under {_listed(found)}")
        return key, found[key]
    likely = [where for where in found if "optim" not in where.lower()]
    if not likely:
        keys = [str(name) for name in loaded][:8]
        raise ValueError(f"no weights found, under none of its keys {keys}")
    if len(likely) > 1:
        raise ValueError(f"weights under {_listed(likely)}; choose with --key")
    return likely[0], found[likely[0]]


def _listed(keys: Any) -> str:
    names = [repr(key) if key else "the top ('')" for key in keys]
    return ", ".join(names[:8]) or "no key"


def _tables(table: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Dictionaries that hold a matrix, by their keys."""
    matrices = any(isinstance(value, Tensor) and value.ndim >= 2 for value in table.values())
    if matrices and all(isinstance(name, str) for name in table):
        yield "/".join(path), table
    for name, value in table.items():
        if isinstance(name, str) and isinstance(value, Mapping) and len(path) < _DEPTH:
            yield from _tables(value, (*path, name))


def _records(table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The records in the metadata of a ``state_dict``; see ``weights/parametrization.py``."""
    metadata = getattr(table, "_metadata", None)
    found: dict[str, Mapping[str, Any]] = {}
    for place, entry in metadata.items() if isinstance(metadata, Mapping) else ():
        record = entry.get("frobdecay") if isinstance(entry, Mapping) else None
        name = weight_of(f"{str(place).rpartition('.')[0]}.original0")
        if isinstance(record, Mapping) and name is not None:
            found[name] = record
    return found


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """Refuse tensors that say they are larger than what is in the file (by strides of zero)."""
    for name, tensor in checkpoint.tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            continue
        there = tensor.untyped_storage().nbytes()
        if tensor.nbytes > there:
            raise ValueError(
                f"{name} says that it is of shape {tuple(tensor.shape)}, {tensor.nbytes:,} bytes, "
                f"but the file has {there:,}"
            )
    if not checkpoint.tensors:
        raise ValueError("no tensors in it")
    return checkpoint


def check_memory(needed: int) -> None:
    """Refuse dense weights that the machine's memory cannot hold, where the system says its size.

    Raises:
        ValueError: saying how much is needed.
    """
    if not hasattr(os, "sysconf"):
        return
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(f"its dense weights take {needed:,} bytes, more than there is memory")
