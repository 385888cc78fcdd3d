"""Which products the kernels cannot take, and why: each reason names what another backend does."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from frobdecay.gradient.triton.tables import MAX_STRIDE, pieces
from frobdecay.gradient.triton.tiles import MAX_RANK
from frobdecay.product.product import Product

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_PIECES = 64  # of a factor's row axes: more are many small launches' work


@cache
def load_kernels() -> ModuleType | None:
    """Launches of the kernels, or None where triton is not installed; imported when needed."""
    if find_spec("triton") is None:
        return None
    from frobdecay.gradient.triton import launches

    return launches


def refusals(product: Product) -> list[str]:
    """Reasons why this product cannot run in the kernels; empty where it can."""
    kernels, views = load_kernels(), product.views()
    device, reasons = views[0].device.type, []
    if kernels is None:
        reasons.append("triton is not installed: pip install 'frobdecay[triton]'")
    elif device != "cuda" and not (device == "cpu" and kernels.INTERPRETED):
        reasons.append(f"on {device}, not on a CUDA device")
    elif device == "cuda" and kernels.INTERPRETED:
        reasons.append("TRITON_INTERPRET is set: kernels run on the CPU")
    if len(views) != 2:
        reasons.append(f"a chain of {len(views)} factors, not of two")
    if not 1 <= views[0].shape[-1] <= MAX_RANK:
        reasons.append(f"rank {views[0].shape[-1]} is not in 1 … {MAX_RANK}")
    dtypes = sorted({str(view.dtype) for view in views if view.dtype not in _DTYPES})
    reasons += [f"{dtype}: kernels are for float32, bfloat16 and float16" for dtype in dtypes]
    if len(views) == 2:
        reasons += [reason for view in views for reason in _odd_strides(view, product.batch)]
    return [f"{product.name}: {reason}" for reason in reasons]


def _odd_strides(view: Tensor, batch: int) -> list[str]:
    strides = [view.stride()]
    count = sum(piece.head == 0 for piece in pieces(view.shape, batch, strides))
    if count > _MAX_PIECES:
        return [f"row axes with strides {view.stride()} are {count} pieces: over {_MAX_PIECES}"]
    if max(view.stride()[batch:]) >= MAX_STRIDE:
        return [f"strides {view.stride()} are not below {MAX_STRIDE}, as places in a tile need"]
    return []
