"""Fingerprints of weights: whether the outputs that were summed are those that they make now."""

from __future__ import annotations

import torch
from torch import nn

from frobdecay.models.select import Weight, bias_of

Print = list[list[float]]
"""Number of entries, Σ w, √Σ w² and the dtype's ε of a weight, and of its bias if it has one."""


def print_of(weight: Weight) -> Print | None:
    """The fingerprint of a weight and its bias; None where they are not all here."""
    found: Print = []
    for tensor in (weight.tensor, bias_of(weight)):
        if tensor is None:
            continue
        plain = type(tensor) is nn.Parameter and not tensor.is_meta and tensor.is_floating_point()
        if not plain:
            return None
        kept = tensor.detach()
        kept = kept.cpu() if kept.device.type == "mps" else kept  # which has no float64
        sums = kept.sum(dtype=torch.float64), kept.double().norm()
        found.append(
            [float(kept.numel()), *(one.item() for one in sums), torch.finfo(tensor.dtype).eps]
        )
    return found or None


def alike(one: Print, other: Print) -> bool:
    """Whether two fingerprints are of one weight, up to its rounding."""
    if [number for number, *_ in one] != [number for number, *_ in other]:
        return False
    for (number, *mine, one_eps), (_, *theirs, other_eps) in zip(one, other, strict=True):
        close = max(one_eps, other_eps) * max(mine[1], theirs[1])
        gaps = [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
        if not (gaps[0] <= close * number**0.5 and gaps[1] <= close):
            return False
    return True


def check_same(name: str, held: Print | None, weight: Weight) -> None:
    """Refuse a weight whose outputs were summed before it changed.

    Raises:
        ValueError: says which.
    """
    now = None if held is None else print_of(weight)
    if held is not None and now is not None and not alike(held, now):
        raise ValueError(
            f"{name}: the moment of its outputs was summed before its weight or bias changed, and "
            "is not that of what it makes now; calibrate again, after training or loading"
        )
