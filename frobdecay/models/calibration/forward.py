"""Running a model to look at it: on batches as loaders make them, and as if nobody did."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.algebra.scaling import DTYPES

# The second is that of DistributedDataParallel, whose first forward pass would wait for others.
_FLAGS = ("training", "require_forward_param_sync")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, dropout and running statistics, for a while; then all is as it was."""
    with restoring(model) as flags, torch.no_grad():
        for module, flag, _ in flags:
            setattr(module, flag, False)
        yield


@contextmanager
def restoring(model: nn.Module) -> Iterator[list[tuple[nn.Module, str, Any]]]:
    """Give a model its mode and its buffers back afterwards, whatever runs it.

    Some modules write to buffers in evaluation mode, too (observers of quantization, counters), and
    an embedding with ``max_norm`` to its table: those are copied, and get their numbers back.

    Yields:
        modules, and what says in which mode they are.

    Raises:
        ValueError: other parameters were written to, or buffers that are sparse, sharded or packed.
    """
    every = list(model.modules())
    held_in = ((m, flag, getattr(m, flag, None)) for m in every for flag in _FLAGS)
    flags = [(m, flag, was) for m, flag, was in held_in if isinstance(was, bool)]
    written: list[Any] = [module._buffers for module in every]
    written += [m._parameters for m in every if getattr(m, "max_norm", None) is not None]
    kept = [(at, name, x, x.clone()) for at in written for name, x in at.items() if _plain(x)]
    known = {id(held) for _, _, held, _ in kept}
    named = (*model.named_parameters(), *model.named_buffers())
    others = [(name, one, version_of(one)) for name, one in named if id(one) not in known]
    try:
        yield flags
    finally:
        for module, flag, was in flags:
            setattr(module, flag, was)
        with torch.no_grad():
            for holder, name, held, copy in kept:
                holder[name] = held
                if held.shape != copy.shape:
                    held.resize_(copy.shape)
                if not torch.equal(held, copy):
                    held.copy_(copy)
    if changed := [name for name, one, version in others if version_of(one) != version]:
        raise ValueError(
            f"the forward pass wrote to {changed[:8]}: the model is not as it was; "
            "load it again, and run copy.deepcopy(model) instead"
        )


_NUMBERS = {*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _plain(held: Any) -> bool:
    """Whether it is a dense tensor of numbers, which torch copies and compares."""
    dense = type(held) in (Tensor, nn.Parameter) and held.layout == torch.strided
    return dense and not held.is_nested and not held.is_meta and held.dtype in _NUMBERS


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to."""
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def eagerly() -> Iterator[None]:
    """Without ``torch.compile``, which knows nothing of hooks that came after it, for a while."""
    loaded = "torch._dynamo" in sys.modules  # else nothing is compiled, and it takes seconds
    with torch.compiler.set_stance("force_eager") if loaded else nullcontext():
        yield


def check_batches(batches: object) -> None:
    """Refuse what is one batch.

    Raises:
        TypeError: saying what is expected.
    """
    if isinstance(batches, nn.Module | Tensor | str | Mapping):
        raise TypeError(
            f"expected batches to be a loader or a list of batches, got a {type(batches).__name__}"
        )


def default_forward(model: nn.Module, batch: Any) -> object:
    """Run a model on a batch as data loaders make them."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items()})
    if isinstance(batch, list | tuple):
        batch = batch[0]
    if isinstance(batch, str):
        raise TypeError(
            f"expected tensors, got the text {batch[:20]!r}; tokenize it, or give forward="
        )
    return model(moved(batch))
