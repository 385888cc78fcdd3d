"""The names of a model's ``state_dict``, and what has to be true of a file that is to fill them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from frobdecay.product.factor import is_sharded
from frobdecay.product.names import strip_wrappers


@dataclass(frozen=True)
class Slot:
    """One name of a ``state_dict``: where its tensor lives, and what it has to be like.

    Attributes:
        module, attribute: where; the tensor is looked up there.
        like: its shape and dtype, in words.
        identity: equal for names of one tensor (tied).
    """

    module: nn.Module
    attribute: str
    like: str
    identity: Hashable

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor


def like(shape: Iterable[int], dtype: torch.dtype) -> str:
    """What two tensors have to agree in, in words: ``"float32 8×4"``."""
    return f"{str(dtype).removeprefix('torch.')} {'×'.join(map(str, shape)) or 'scalar'}"


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """All parameters and persistent buffers by the name that no wrapper changes.

    Raises:
        ValueError: the model keeps something else in its ``state_dict``, or only a shard.
    """
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"{path or 'the model'} is a DataParallel, whose names are those of the model "
                "inside of it; take its .module"
            )
        passing = module._non_persistent_buffers_set
        kept = ((k, v) for k, v in module._buffers.items() if k not in passing)
        for attribute, tensor in chain(module._parameters.items(), kept):
            if tensor is not None:
                name = strip_wrappers(f"{path}.{attribute}".lstrip("."))
                if is_sharded(tensor):
                    raise ValueError(
                        f"{name} is sharded (DTensor); load before fully_shard or "
                        "parallelize_module, and save a model that was gathered"
                    )
                slots[name] = Slot(
                    module, attribute, like(tensor.shape, tensor.dtype), _identity(tensor)
                )
    other = {strip_wrappers(key) for key in model.state_dict(keep_vars=True)} ^ set(slots)
    if other:
        raise ValueError(
            f"{type(model).__name__} keeps more or less than parameters and buffers in its "
            f"state_dict, which this file format cannot hold: {sorted(other)[:8]}"
        )
    return slots


def _identity(tensor: Tensor) -> Hashable:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if tensor.is_meta or not plain or not tensor.numel():
        return id(tensor)
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


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


def check_ties(slots: Mapping[str, Slot], tied: Mapping[str, str]) -> None:
    """Refuse a file that ties other names than the model does.

    Args:
        slots: of the model.
        tied: name -> the name that the file has its numbers under; both are in ``slots``.

    Raises:
        ValueError: naming both.
    """
    for name, source in tied.items():
        if slots[name].identity != slots[source].identity:
            raise ValueError(
                f"{name} and {source} are one tensor in it, but two in the model; tie them first "
                "(model.tie_weights(), in transformers)"
            )
    groups: dict[Hashable, set[str]] = defaultdict(set)
    for name, slot in slots.items():
        groups[slot.identity].add(tied.get(name, name))
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
    for name, slot in slots_of(model).items():
        tensor, value = slot.tensor, values[name]
        if not tensor.is_meta and not tensor.is_inference():
            tensor.copy_(value)
            continue
        if id(tensor) not in made:
            device = "cpu" if tensor.is_meta else tensor.device
            copy = value.to(device, copy=True)  # not a part of a file in memory
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if parameter else copy
        setattr(slot.module, slot.attribute, made[id(tensor)])
