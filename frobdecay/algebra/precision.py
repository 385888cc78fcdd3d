"""What products are computed in: the widest dtype, float32 at least, without autocast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
from torch import Tensor

Coefficient = float | Tensor
Views = Sequence[Tensor]

HALF = (torch.float16, torch.bfloat16)

# Asked once: compiled functions cannot ask in every torch.
_WITH_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
    if torch.amp.is_autocast_available(kind)
)


def full_precision(device: str) -> AbstractContextManager[object]:
    """Switch autocast off on a device type: it would compute the Grams in half precision."""
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """What tensors are multiplied in: the widest of their dtypes, float32 at least.

    A sum of squares of half-precision numbers loses float16's digits.
    """
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def accumulable(views: Sequence[Tensor]) -> list[Tensor]:
    """The factors of one product in the dtype that they are multiplied in."""
    dtype = common_dtype(views)
    return [view.to(dtype) for view in views]


def beside(matrix: Tensor, view: Tensor) -> Tensor:
    """(*batch, r, r) with axes of length 1 where (*batch, *summed, rows, r) has summed ones."""
    batch = matrix.shape[:-2]
    return matrix.reshape(*batch, *(1 for _ in range(view.ndim - matrix.ndim)), *matrix.shape[-2:])


def in_front(numbers: Tensor, view: Tensor) -> Tensor:
    """(*batch) with axes of length 1 behind, to be multiplied with (*batch, …)."""
    return numbers.reshape(*numbers.shape, *(1 for _ in range(view.ndim - numbers.ndim)))


def scaled(tensor: Tensor, coef: Coefficient) -> Tensor:
    """Multiply by a number, or by one for each entry of the first axis."""
    return tensor * (in_front(coef, tensor) if isinstance(coef, Tensor) and coef.ndim else coef)


def check_coefficient(coef: Coefficient, what: str) -> None:
    """Refuse a λ that is no finite number of at least 0; tensors are trusted (no host sync)."""
    if isinstance(coef, Tensor):
        if coef.numel() != 1:
            raise ValueError(f"expected {what} to be one number, got shape {tuple(coef.shape)}")
        return
    if isinstance(coef, bool) or not isinstance(coef, int | float):
        raise TypeError(f"expected {what} to be a number or a tensor, got {coef!r}")
    if not 0 <= coef < float("inf"):
        raise ValueError(f"expected {what} to be finite and at least 0, got {coef}")
