"""Running a model to look at it: on batches as loaders make them, and as if nobody did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def default_forward(model: nn.Module, batch: Any) -> object:
    """Run a model on a batch as data loaders make them."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items()})
    if isinstance(batch, list | tuple):
        batch = batch[0]
    return model(moved(batch))
