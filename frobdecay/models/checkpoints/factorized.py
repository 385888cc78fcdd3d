"""Factorized models to and from a file.

``load_state_dict`` of a dense model rebuilds nothing, and with ``strict=False`` torch drops the
factors without a word, which no code of ours sees. The functions here cannot go wrong that way:

    save_factorized    factors, buffers and how they are to be read, in one safetensors file
    load_factorized    such a file into a dense model, also on the meta device: structure first

Each changes nothing if anything is wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from frobdecay.models.checkpoints.files import FilePath, read_safetensors
from frobdecay.models.checkpoints.folders import weight_files
from frobdecay.models.checkpoints.formats import SAFETENSORS, recognized
from frobdecay.models.checkpoints.records import (
    HEADER,
    RECORDS_VERSION,
    factors_of,
    parse_records,
    rebuild,
    record_of,
)
from frobdecay.models.checkpoints.restoring import factorizing
from frobdecay.models.checkpoints.streams import Part, write_stream
from frobdecay.models.checkpoints.tensors import (
    check_buffers,
    check_same,
    check_ties,
    fill,
    identity,
    like,
    named_tensors,
    unsaved_buffers,
    without_wrappers,
)
from frobdecay.models.fitness import reason_against, unwrapped
from frobdecay.models.select import Walk, Weight
from frobdecay.models.surgery import ordinary, place

M = TypeVar("M", bound=nn.Module)


# --- save ---------------------------------------------------------------------------------------


def save_factorized(model: nn.Module, path: FilePath) -> None:
    """Write a factorized model to one safetensors file, with its structure in the header.

    Examples:
        >>> import tempfile, torch, frobdecay
        >>> model = torch.nn.Linear(8, 6)
        >>> _ = frobdecay.factorize(model, rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_factorized(model, f"{folder}/model.safetensors")
        ...     again = load_factorized(torch.nn.Linear(8, 6), f"{folder}/model.safetensors")
        >>> torch.equal(again.weight, model.weight)
        True

    The structure is how each factorized weight is parametrized: kind, rank, pattern, axes, depth,
    initialization. Parameters and buffers are saved under their ``state_dict`` keys (without the
    segments that ``torch.compile`` adds), tied ones once; factors are not multiplied out. For a
    dense checkpoint save ``merge(copy.deepcopy(model)).state_dict()``.

    Args:
        model: factorized in part, in whole or not at all.
        path: of the file; an existing one is replaced as a whole, through links and with its
            permissions, or stays if something fails. Several may save to it at once.

    Raises:
        OSError: the file cannot be written: a full disk, no permission, no regular file.
        ValueError: tensors that are sharded, sparse or on the meta device; data-parallel wrappers;
            extra state; parametrizations that no file can name. Nothing was written then.
    """
    walk = unwrapped(model, "save model.module, or save")
    records = {weight.name: record_of(weight) for weight in walk.factorized}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for name, tensor in named_tensors(model).items():
        source = first.setdefault(identity(tensor), name)
        if source != name:
            tied[name] = source
        else:
            tensors[name] = tensor
    structure = {"version": RECORDS_VERSION, "weights": records, "tied": tied}
    parts = [Part.of(name, tensor) for name, tensor in tensors.items()]
    write_stream(path, parts, {HEADER: json.dumps(structure)})


# --- load ---------------------------------------------------------------------------------------


@ordinary("load")
def load_factorized(model: M, path: FilePath) -> M:
    """Factorize a dense model as a file of ``save_factorized`` says, and load the file, in place.

    Examples:
        >>> import tempfile, torch, frobdecay
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> _ = frobdecay.factorize(model, rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_factorized(model, f"{folder}/it")
        ...     _ = load_factorized(torch.nn.Sequential(torch.nn.Linear(8, 6)), f"{folder}/it")

    Nothing is decomposed or drawn, so the model may be on the meta device: what is there comes to
    the CPU. A model that is factorized the same way already is only loaded. Needs ``safetensors``.
    Folders that ``save_pretrained`` of ``transformers`` wrote are for its ``from_pretrained``.
    Buffers that its ``state_dict`` does not have are left out, as by ``load_dense_``.

    Args:
        model: of the class that was saved, fresh; make the optimizer afterwards.
        path: of the file, or of a folder that ``frobdecay factorize`` wrote.

    Returns:
        The model.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be opened, or is a pipe or a device.
        ValueError: no such file, or of a later version; names, shapes, dtypes or ties that differ;
            weights that cannot be factorized; a meta buffer that no file holds. Nothing changed.
    """
    walk = unwrapped(model, "load")
    try:
        tensors, records, tied = _read(path)
        values = {**tensors, **{name: tensors[source] for name, source in tied.items()}}
        fresh = fit(walk, records)
        for name, record in records.items():
            factors_of(name, record, values)  # or a record alone could say how much is allocated
        with placed(walk, fresh):
            expected = named_tensors(model)
            left_out = unsaved_buffers(model)
            values = {n: t for n, t in values.items() if n in expected or not left_out(n, t)}
            theirs, ours = ({n: like(t) for n, t in some.items()} for some in (values, expected))
            check_same(ours, theirs, "it", "the model")
            check_ties(expected, tied)
            check_buffers(model)
            fill(model, values)
    except ValueError as error:
        raise ValueError(f"cannot load {os.fspath(path)}: {error}") from error
    return model


def _read(path: FilePath) -> tuple[dict[str, Tensor], dict[str, Mapping[str, Any]], dict[str, str]]:
    """Tensors, records and ties of a file, or of those of a folder.

    Raises:
        ValueError: other files, or without a structure.
    """
    tensors: dict[str, Tensor] = {}
    records: dict[str, Mapping[str, Any]] = {}
    tied: dict[str, str] = {}
    structured = False
    for file in weight_files(path):
        if (what := recognized(file)) != SAFETENSORS:
            raise ValueError(f"expected a safetensors file of save_factorized, got {what}")
        some, metadata = read_safetensors(file)
        tensors |= without_wrappers(some)
        if HEADER in metadata:
            here, ties = parse_records(metadata[HEADER], some)
            records, tied = records | without_wrappers(here), tied | without_wrappers(ties)
            structured = True
    if not structured:
        raise ValueError(
            "it has no structure of frobdecay: a dense checkpoint is loaded with load_state_dict, "
            "a folder of save_pretrained with from_pretrained; a factorized one has to be written "
            "by save_factorized"
        )
    return tensors, records, tied


@contextmanager
def placed(walk: Walk, fresh: Sequence[tuple[Weight, Any]]) -> Iterator[None]:
    """Factors without numbers in the place of weights; inside, they are to get their numbers.

    If that fails, the weights are there again.

    Args:
        walk: over the model.
        fresh: as ``fit`` gives them.
    """
    with factorizing(walk, [weight for weight, _ in fresh]):
        for weight, made in fresh:
            shapes = made.factor_shapes(tuple(weight.parameter.shape))
            factors = [weight.parameter.new_empty(shape) for shape in shapes]
            place(weight.module, weight.attribute, made, factors)
        yield


def fit(walk: Walk, records: Mapping[str, Mapping[str, Any]]) -> list[tuple[Weight, Any]]:
    """The weights to be factorized, each with its parametrization.

    Raises:
        ValueError: the model has no such weights, or is factorized in another way.
    """
    known = {name: weight for weight in walk.weights for name in weight.names}
    present = {weight.name: record_of(weight) for weight in walk.factorized}
    extra = [name for name in present if name not in records]
    if extra:
        raise ValueError(f"it has {extra[:8]} dense, which the model has factorized; merge them")
    fresh = []
    met: dict[str, str] = {}
    for name, record in records.items():
        made = rebuild(name, record)
        if name not in known:
            raise ValueError(f"it has {name} factorized, which the model does not have")
        weight, shape = replace(known[name], named=True), tuple(record["shape"])
        if (other := met.setdefault(weight.name, name)) != name:
            raise ValueError(f"it has both {other} and {name} factorized, one weight in the model")
        if weight.name in present:
            theirs, ours = (_structure(r) for r in (record, present[weight.name]))
            if theirs != ours:
                raise ValueError(
                    f"it has {name} factorized as {theirs}, the model as {ours}; merge it first"
                )
            continue
        if reason := reason_against(weight):
            raise ValueError(f"{name} cannot be factorized: {reason}")
        if (here := tuple(weight.parameter.shape)) != shape:
            raise ValueError(f"it has {name} of shape {shape}, the model of {here}")
        fresh.append((weight, made))
    return fresh


def _structure(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what does not matter once there are factors."""
    config = {key: value for key, value in record["config"].items() if key != "init"}
    return {"kind": record["kind"], "shape": list(record["shape"]), **config}
