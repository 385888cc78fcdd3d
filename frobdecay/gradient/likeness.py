"""Whether tensors are what they were at the last call, asked of every factor at every step.

To read one attribute of a tensor from Python costs as much as a kernel needs for a small factor,
and here it takes five. ``torch.compile`` asks the same of its inputs and has a function in C++
that asks it of all at once: where that says yes, nothing else is read. Where it says no, which it
also does in another autocast state, or cannot be asked, attributes are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is not public
    TensorGuards = None  # type: ignore[assignment, misc]

_Guards: Any = TensorGuards


class Likeness:
    """What the tensors of a list are, all but their numbers and addresses.

    Args:
        tensors: none of them is kept.

    Attributes:
        trained: of each, whether it required a gradient when they were last compared.
    """

    trained: list[bool]

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._about = list(map(_about, tensors))
        self._guard(tensors)

    def _guard(self, tensors: Sequence[Tensor]) -> None:
        self.trained = [tensor.requires_grad for tensor in tensors]
        once = len({*map(id, tensors)}) == len(tensors)  # others are never alike to the guards
        self._guards = _Guards and once and _Guards(*tensors, **_FIXED)

    def of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these, in their order, have the same dtypes, devices, shapes and strides."""
        if len(tensors) != len(self._about):
            return False
        if self._guards and self._guards.check(*tensors):
            return True
        if list(map(_about, tensors)) != self._about:
            return False
        self._guard(cast(Sequence[Tensor], tensors))  # None is like no tensor
        return True


_FIXED = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}


def _about(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    if tensor.layout is not torch.strided:
        return tensor.layout
    writable = torch.is_inference_mode_enabled() or not tensor.is_inference()
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), writable


def check_writable(name: str, attribute: str, target: Tensor, shape: torch.Size) -> None:
    """Refuse a target that the penalty's gradient cannot be added to in place.

    Raises:
        TypeError, ValueError: names the product and the factor.
    """
    if target.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense gradient for {attribute}, got {target.layout}; the "
            "penalty moves every row of a factor: make the layer's gradients dense "
            "(sparse=False), or its λ zero"
        )
    if target.shape != shape:
        found = f"one of shape {tuple(target.shape)}, from before the factor was changed"
    elif target.is_inference() and not torch.is_inference_mode_enabled():
        found = "one made under inference_mode"
    elif any(n > 1 and step == 0 for n, step in zip(target.shape, target.stride(), strict=True)):
        found = "an expanded one, whose entries share memory"
    else:
        return
    raise ValueError(
        f"{name}: expected a gradient for {attribute} of shape {tuple(shape)} that can be written "
        f"to, got {found}; clone it, or set it to None before backward()"
    )
