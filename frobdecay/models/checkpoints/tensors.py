"""The tensors of a model by their names in files, and what is to be true of a file for them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.models.memory import has_memory
from frobdecay.product.factor import is_sharded
from frobdecay.product.names import strip_wrappers


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the ``state_dict`` of a model has, by names that no wrapper changes.

    Raises:
        ValueError: it has something else than parameters and buffers, or only a shard.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"{path or 'the model'} is a DataParallel, whose names are those of the model "
                "inside of it; take its .module"
            )
    found = model.state_dict(keep_vars=True)  # some wrappers add no segments here
    params, buffers, state = (
        without_wrappers(dict(named))
        for named in (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
            found.items(),
        )
    )
    held = params | buffers
    other = {name for name in state if state[name] is not held.get(name)} | params.keys() - state
    if other:
        raise ValueError(
            f"{type(model).__name__} keeps more or less than parameters and buffers in its "
            f"state_dict, which this file format cannot hold: {sorted(other)[:8]}"
        )
    for name, tensor in state.items():
        if is_sharded(tensor):
            raise ValueError(
                f"{name} is sharded (DTensor); load before fully_shard or parallelize_module, and "
                "save a model that was gathered"
            )
    return state


def without_wrappers(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table by names, and the names in it, without the segments that wrappers add.

    Raises:
        ValueError: two names that are one then.
    """
    names: dict[str, str] = {}
    for name in table:
        if (other := names.setdefault(strip_wrappers(name), name)) != name:
            raise ValueError(f"expected either {other} or {name}, got both, which are one weight")
    values = {plain: table[name] for plain, name in names.items()}
    return {n: strip_wrappers(one) if isinstance(one, str) else one for n, one in values.items()}


def unsaved_buffers(model: nn.Module) -> Callable[[str, Any], bool]:
    """Whether what a model lacks, by name and value, is no weight that was trained."""
    unsaved = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    said = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()

    def buffer(key: str, value: Any) -> bool:
        if key in unsaved or any(re.search(pattern, key) for pattern in said):
            return True
        return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())

    return buffer


def identity(tensor: Tensor) -> Hashable:
    """Equal for names of one tensor (tied)."""
    if not has_memory(tensor):
        return id(tensor)
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def like(tensor: Tensor) -> str:
    """What two tensors have to agree in, in words: ``"float32 8×4"``."""
    shape = "×".join(map(str, tensor.shape)) or "scalar"
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape}"


def check_same(
    expected: Mapping[str, str], found: Mapping[str, str], theirs: str, ours: str
) -> None:
    """Refuse tables that differ, listing how.

    Raises:
        ValueError: missing or unexpected names, or descriptions that differ.
    """
    lists = {
        f"{ours} needs, but {theirs} lacks": [key for key in expected if key not in found],
        f"{theirs} has, but {ours} does not": [key for key in found if key not in expected],
        f"{theirs} differs from {ours} in": [
            f"{key} ({found[key]}; {ours} has {expected[key]})"
            for key in expected
            if key in found and found[key] != expected[key]
        ],
    }
    problems = [
        f"{what} {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
        for what, keys in lists.items()
        if keys
    ]
    if problems:
        raise ValueError("; ".join(problems))


def check_ties(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Refuse a file that ties other names than the model does.

    Args:
        tensors: of the model.
        tied: name -> the name that the file has its numbers under; both are in ``tensors``.

    Raises:
        ValueError: naming both.
    """
    for name, source in tied.items():
        if identity(tensors[name]) != identity(tensors[source]):
            raise ValueError(
                f"{name} and {source} are one tensor in it, but two in the model; tie them first "
                "(model.tie_weights(), in transformers)"
            )
    groups: dict[Hashable, set[str]] = defaultdict(set)
    for name, tensor in tensors.items():
        groups[identity(tensor)].add(tied.get(name, name))
    for names in groups.values():
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(sorted(names))} are one tensor in the model, but not in it; untie "
                "them first, by giving one of the two modules a parameter of its own"
            )


def check_buffers(model: nn.Module) -> None:
    """Refuse buffers that would stay without numbers.

    Raises:
        ValueError: naming the first that is on the meta device and in no ``state_dict``.
    """
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                raise ValueError(
                    f"{path}.{name} is a buffer on the meta device that no checkpoint holds "
                    "(persistent=False); build the model with its buffers on a device, for "
                    "instance under accelerate.init_empty_weights()"
                )


@torch.no_grad()
def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into a model; what cannot be written to is replaced, ties kept."""
    made: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for key, tensor in state.items():
        value = values[strip_wrappers(key)]
        if not tensor.is_meta and not tensor.is_inference():
            tensor.copy_(value)
            continue
        if id(tensor) not in made:
            device = "cpu" if tensor.is_meta else tensor.device
            copy = value.to(device, copy=True)  # not a part of a file in memory
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if parameter else copy
        state[key] = made[id(tensor)]
    model.load_state_dict(state, assign=True)
