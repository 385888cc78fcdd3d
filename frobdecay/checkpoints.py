"""Checkpoints of factorized models: dense weights in, factors to and from a file.

``load_state_dict`` of a factorized model takes factorized and dense weights; of a dense one it
rebuilds nothing, and with ``strict=False`` torch drops the factors without a word, which no code
of ours sees. The functions here cannot go wrong that way:

    load_dense_        a dense state_dict into a factorized model, and the error that this makes
    save_factorized    factors, buffers and how they are to be read, in one safetensors file
    load_factorized    such a file into a dense model, also on the meta device: structure first

Each checks everything before it changes anything.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from frobdecay.algebra.tensorize import Tensorization
from frobdecay.modules.candidates import Entry
from frobdecay.modules.files import FilePath, read_safetensors, write_safetensors
from frobdecay.modules.formats import SAFETENSORS, recognized
from frobdecay.modules.records import (
    HEADER,
    RECORDS_VERSION,
    factor_key,
    factorized_weights,
    parse_records,
    rebuild,
    record_of,
    weight_of,
)
from frobdecay.modules.restoring import dense_to_factors, restorable
from frobdecay.modules.selection import Weight, weights
from frobdecay.modules.slots import (
    Slot,
    check_buffers,
    check_same,
    check_ties,
    fill,
    like,
    slots_of,
)
from frobdecay.modules.support import check_unwrapped, reason_against, ties
from frobdecay.modules.surgery import ordinary, settle_encoders, settle_recurrent, transaction
from frobdecay.modules.untying import forget_ties, other_ties
from frobdecay.plan import PlanRow, RankPlan
from frobdecay.product.holding import check_module, factorized
from frobdecay.registry import parameter_order, relative_error
from frobdecay.weights.registration import register_parametrization

M = TypeVar("M", bound=nn.Module)


# --- dense weights into a factorized model ------------------------------------------------------


@ordinary("load")
def load_dense_(
    model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True
) -> RankPlan:
    """Load a dense ``state_dict`` into a factorized model, and say how well the ranks hold it.

    Each factorized weight gets the spectral factors of the dense one at the rank it has, whatever
    its initialization; everything else is loaded as it is. Parameters stay the same objects, so an
    optimizer goes on. ``model.load_state_dict(state_dict)`` does the same without the report; with
    ``assign=True`` also on the meta device.

    Args:
        model: with factorized weights.
        state_dict: of the dense model: its shapes exactly, and its keys. Tensors of integers or
            truth values may be more, which are no weights but buffers that a version of the model
            had (``position_ids``, ``num_batches_tracked``, masks); they are left out.
        strict: False to leave out every key that the model lacks, and to leave what the
            ``state_dict`` lacks as it is.

    Returns:
        A plan with the relative error ‖W − UVᵀ‖_F / ‖W‖_F of every factorized weight, and a row
        for every key that was left out, or not found; prints as a table.

    Raises:
        TypeError, ValueError: keys or shapes that differ; weights that cannot be factorized; a
            model that is dense, sharded, on the meta device or made under ``inference_mode``.
            Nothing was changed then.

    Example:
        >>> import torch, frobdecay
        >>> dense, model = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)
        >>> _ = frobdecay.factorize(model, rank=6)
        >>> plan = load_dense_(model, dense.state_dict())
        >>> plan.rows[0].error < 1e-6, torch.allclose(model.weight, dense.weight, atol=1e-6)
        (True, True)
    """
    check_module(model)
    if not factorized_weights(model):
        inside = [key for key in state_dict if ".parametrizations." in f".{key}"]
        raise ValueError(
            f"expected a model with factorized weights, got a dense {type(model).__name__}; "
            + ("the state_dict is factorized, too: save it with save_factorized, and "
               "load_factorized rebuilds the structure" if inside
               else "load it with model.load_state_dict")
        )  # fmt: skip
    converted: OrderedDict[str, Any] = OrderedDict(state_dict)
    rows: dict[int, PlanRow] = {}
    done: dict[int, tuple[Tensor, ...]] = {}
    absent: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, held in factorized(module).items():
            name = f"{path}.{attribute}".lstrip(".")
            if name not in converted:
                _check_dense(name, held, state_dict)
                absent.add(name)
                continue
            dense = converted.pop(name)
            if id(held) not in done:
                try:
                    done[id(held)] = dense_to_factors(held, dense)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{name}: {error}") from error
                rows[id(held)] = _row(name, held, dense, done[id(held)])
            converted.update({factor_key(name, i): f for i, f in enumerate(done[id(held)])})
    rest = _left_out(model, converted, absent, strict)
    # Modules read there which version of themselves was saved.
    converted._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(converted, strict=strict)
    after = sum(parameter.numel() for parameter in model.parameters())
    saved = sum(row.before - row.after for row in rows.values())
    return RankPlan((*rows.values(), *rest), after + saved, after)


def _check_dense(name: str, held: Any, state_dict: Mapping[str, Any]) -> None:
    if any(factor_key(name, i) in state_dict for i in range(held.ntensors)):
        raise ValueError(
            f"{name} is factorized in the state_dict already; load it with model.load_state_dict"
        )


def _left_out(
    model: nn.Module, converted: dict[str, Any], absent: set[str], strict: bool
) -> list[PlanRow]:
    """Take out what the model lacks, if it may lack it; a row for that and for what it misses.

    Raises:
        ValueError: keys or shapes that differ, or tensors that cannot be written to.
    """
    state = model.state_dict(keep_vars=True)
    fixed = [k for k, value in state.items() if isinstance(value, Tensor) and value.is_inference()]
    if fixed:
        raise ValueError(
            f"{fixed[:8]} were made under torch.inference_mode, and cannot be written to; make "
            "the model outside of it"
        )
    expected = {key: what for key, what in _shapes(state).items() if weight_of(key) not in absent}
    expected.update(dict.fromkeys(absent, "a dense weight"))
    more = [key for key in converted if key not in expected]
    more = [key for key in more if not strict or _is_buffer(converted[key])]
    left = [_unused(key, converted.pop(key), "not in the model; left out") for key in more]
    found = _shapes(converted)
    if not strict:
        gone = [key for key in expected if key not in found]
        left += [_unused(key, state.get(key), "not in the state_dict; as it was") for key in gone]
        expected = {key: what for key, what in expected.items() if key in found}
    try:
        check_same(expected, found, "the state_dict", "the model")
    except ValueError as error:
        if strict and expected.keys() != found.keys():
            raise ValueError(f"{error}; strict=False passes over such names") from None
        raise
    return left


def _is_buffer(value: Any) -> bool:
    """Whether it is a tensor that no optimizer could have trained."""
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def _unused(name: str, value: Any, reason: str) -> PlanRow:
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    return PlanRow(name, shape, None, None, 0, 0, None, reason)


def _row(name: str, held: Any, dense: Tensor, factors: tuple[Tensor, ...]) -> PlanRow:
    first = held[0]
    with torch.no_grad():
        formed = first(*factors)
        for other in list(held)[1:]:
            formed = other(formed)
        error = relative_error(dense.to(factors[0].device), formed)
    shape, after = tuple(dense.shape), sum(factor.numel() for factor in factors)
    view, rank = first.matricize(shape), first.resolve(shape)
    tensor = isinstance(view, Tensorization)
    return PlanRow(name, shape, view.matrix_shape, rank, prod(shape), after, error, tensor=tensor)


def _shapes(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """What has to agree: shapes; anything else that modules keep, by key alone."""
    return {
        key: f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "extra state"
        for key, value in state_dict.items()
    }


# --- save ---------------------------------------------------------------------------------------


def save_factorized(model: nn.Module, path: FilePath) -> None:
    """Write a factorized model to one safetensors file, with its structure in the header.

    The structure is how each factorized weight is parametrized: kind, rank, pattern, axes, depth,
    initialization. Parameters and buffers are saved under their ``state_dict`` keys (without the
    segments that ``torch.compile`` adds), tied ones once; factors are not multiplied out. For a
    dense checkpoint save ``merge(copy.deepcopy(model)).state_dict()``. Needs ``safetensors``.

    Args:
        model: factorized in part, in whole or not at all.
        path: of the file; an existing one is replaced as a whole, through links and with its
            permissions, or stays if something fails. Several may save to it at once.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written: a full disk, no permission, no regular file.
        ValueError: tensors that are sharded, sparse or on the meta device; data-parallel wrappers;
            extra state; parametrizations that no file can name. Nothing was written then.

    Example:
        >>> import tempfile, torch, frobdecay
        >>> model = torch.nn.Linear(8, 6)
        >>> _ = frobdecay.factorize(model, rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_factorized(model, f"{folder}/model.safetensors")
        ...     again = load_factorized(torch.nn.Linear(8, 6), f"{folder}/model.safetensors")
        >>> torch.equal(again.weight, model.weight)
        True
    """
    check_unwrapped(model, "save model.module, or save")
    records = {weight.name: record_of(weight) for weight in factorized_weights(model)}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for name, slot in slots_of(model).items():
        source = first.setdefault(slot.identity, name)
        if source != name:
            tied[name] = source
        else:
            tensors[name] = slot.tensor.detach()
    structure = {"version": RECORDS_VERSION, "weights": records, "tied": tied}
    write_safetensors(path, tensors, {HEADER: json.dumps(structure)})


# --- load ---------------------------------------------------------------------------------------


@ordinary("load")
def load_factorized(model: M, path: FilePath) -> M:
    """Factorize a dense model as a file of ``save_factorized`` says, and load the file, in place.

    Nothing is decomposed and nothing drawn, so the model may be on the meta device: what is there
    comes to the CPU, what is elsewhere stays. A model that is factorized the same way already is
    only loaded. Needs ``safetensors``.

    For models of ``transformers``, whose ``from_pretrained`` would initialize the weights anew:
    ``load_factorized(AutoModel.from_config(config), path)``.

    Args:
        model: of the class that was saved, fresh; make the optimizer afterwards.
        path: of the file.

    Returns:
        The model.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be opened, or is a folder, a pipe or a device.
        ValueError: not such a file, or one of a later version; names, shapes, dtypes or ties that
            differ; weights that cannot be factorized; a buffer on the meta device that no file
            holds. Nothing was changed then.

    Example:
        See ``save_factorized``.
    """
    check_unwrapped(model, "load")
    try:
        if (what := recognized(path)) != SAFETENSORS:
            raise ValueError(f"expected a safetensors file of save_factorized, got {what}")
        tensors, metadata = read_safetensors(path)
        if HEADER not in metadata:
            raise ValueError(
                "it has no structure of frobdecay: a dense checkpoint is loaded with "
                "load_state_dict; a factorized one has to be written by save_factorized"
            )
        records, tied = parse_records(metadata[HEADER], tensors)
        fresh = _fit(model, records)
        slots = _expected(model, fresh)
        values = {**tensors, **{name: tensors[source] for name, source in tied.items()}}
        found = {name: like(value.shape, value.dtype) for name, value in values.items()}
        check_same({name: slot.like for name, slot in slots.items()}, found, "it", "the model")
        check_ties(slots, tied)
        check_buffers(model)
    except ValueError as error:
        raise ValueError(f"cannot load {os.fspath(path)}: {error}") from error
    touched = [weight.module for weight, _ in fresh]
    tied_before = ties(model)
    untied = [Entry(weight) for weight, _ in fresh if id(weight.tensor) in tied_before]
    others = other_ties(model, untied)
    with transaction(touched):
        for weight, made in fresh:
            _register(weight, made)
        settle_recurrent(touched)
        restorable(touched)
        fill(model, values)
    forget_ties(others)
    settle_encoders(model)
    return model


def _fit(
    model: nn.Module, records: Mapping[str, Mapping[str, Any]]
) -> list[tuple[Weight, nn.Module]]:
    """The weights to be factorized, each with its parametrization.

    Raises:
        ValueError: the model has no such weights, or is factorized in another way.
    """
    known = {name: weight for weight in weights(model) for name in weight.names}
    present = {weight.name: record_of(weight) for weight in factorized_weights(model)}
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
        assert weight.tensor is not None
        if tuple(weight.tensor.shape) != shape:
            raise ValueError(
                f"it has {name} of shape {shape}, the model of {tuple(weight.tensor.shape)}"
            )
        fresh.append((weight, made))
    return fresh


def _structure(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what does not matter once there are factors."""
    config = {key: value for key, value in record["config"].items() if key != "init"}
    return {"kind": record["kind"], "shape": list(record["shape"]), **config}


def _expected(model: nn.Module, fresh: list[tuple[Weight, Any]]) -> dict[str, Slot]:
    """The slots that the model will have."""
    slots = slots_of(model)
    for weight, made in fresh:
        assert weight.tensor is not None
        for name in weight.names:
            del slots[name]
            for i, shape in enumerate(made.factor_shapes(tuple(weight.tensor.shape))):
                described = like(shape, weight.tensor.dtype)
                place = (weight.module, f"original{i}", described, (id(made), i))
                slots[factor_key(name, i)] = Slot(*place)
    return slots


def _register(weight: Weight, made: Any) -> None:
    """Put factors without numbers in the weight's place."""
    made.order = parameter_order(weight.module)

    def empty(tensor: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.new_empty(shape) for shape in made.factor_shapes(tuple(tensor.shape)))

    made.right_inverse = empty  # on the instance, for this one call
    register_parametrization(weight.module, weight.attribute, made, unsafe=True)
    del made.right_inverse
