"""A model for a checkpoint, of which only the tensors are known: what ranks are planned for.

It has a layer for every weight, under the weight's name and of the type that has weights of such a
shape, so that ``plan_ranks`` and its selectors treat it as any model. Its layers hold the tensors
of the file themselves: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def skeleton(weights: Mapping[str, Tensor], rest: int) -> tuple[nn.Module, dict[str, str]]:
    """The model, and its parameters' names -> the names in the file.

    Args:
        weights: of two to five dimensions; others are not factorized.
        rest: how many further parameters there are.
    """
    model, names = nn.Module(), {}
    for name, tensor in weights.items():
        path = name.removesuffix(".weight") or name
        names[f"{path}.weight"] = name
        _put(model, path.split("."), _layer(tensor))
    model.register_parameter("rest", nn.Parameter(torch.empty(rest, device="meta")))
    return model, names


def _put(model: nn.Module, path: Iterable[str], layer: nn.Module) -> None:
    """Past the checks of names: a file may have any."""
    *around, last = path
    for part in around:
        model = model._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    model._modules[last] = layer


def _layer(tensor: Tensor) -> nn.Module:
    """A module with nothing but this weight."""
    kind: Any = _LAYERS[tensor.ndim]
    layer: nn.Module = kind(*[1] * min(tensor.ndim, 3), bias=False, device="meta")
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    return layer
