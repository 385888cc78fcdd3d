"""Running a model to look at it: on batches as loaders make them, and as if nobody did."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, dropout and running statistics, for a while."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


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
