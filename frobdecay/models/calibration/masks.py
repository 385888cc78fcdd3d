"""Masks of padding: which rows of a batch count, and for which weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

CROSS = tuple(
    f"*decoder.*{attention}.*"
    for attention in (
        *(f"{name}*.[kv]*" for name in ("EncDecAttention", "encoder_attn", "enc_attn", "cross")),
        "cross*.c_attn",  # GPT-2's keys and values
    )
)
"""Weights of decoders that multiply what the encoder puts out."""

DEFAULT = "attention_mask"

IGNORED = -100
"""The label of a padded row, which cross-entropy leaves out."""

Mask = Tensor | Mapping[str, Tensor | tuple[Tensor, ...] | None] | None
"""Rows that count, (batch, length) of booleans; or globs of weights' names, the first of which that
fits says which, or which several, of which the first counts whose shape fits; None for all."""

MaskOf = str | Callable[[Any], Mask] | None


def mask_of(model: nn.Module, batch: Any, mask: MaskOf) -> Mask:
    """Which rows of a batch count.

    Raises:
        ValueError: a key that the batch does not have, other than the default one, or whose value
            is not of shape (batch, length).
    """
    if callable(mask):
        return mask(batch)
    held = batch if isinstance(batch, Mapping) else {}
    found = None if mask is None else held.get(mask)
    if mask is None or (mask == DEFAULT and found is None):
        return None
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"expected mask={mask!r} to be one of the batch's keys {list(held)}, a tensor of shape "
            f"(batch, length), got {what}; give another, a function of the batch, or None"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        own = _decoder_mask(batch, mask)
        inside = None if own is None else (own, found)  # what has another length is the encoder's
        return {**dict.fromkeys(CROSS, found), "*decoder.*": inside, "*lm_head.*": own, "*": found}
    return found


def _decoder_mask(batch: Mapping[str, Any], mask: str) -> Tensor | None:
    """Which rows of a decoder count, if the batch has no mask: those whose label the loss reads."""
    found = batch.get(f"decoder_{mask}")
    if isinstance(found, Tensor):
        return found
    given = (batch.get(name) for name in ("labels", "decoder_input_ids", "decoder_inputs_embeds"))
    own = next((one for one in given if isinstance(one, Tensor) and one.ndim > 1), None)
    return None if own is None else (own[..., 0] if own.ndim > 2 else own) != IGNORED


def fitting(mask: Mask, name: str, tensor: Tensor) -> Tensor | None:
    """Which of the rows of (…, k) count, that a weight of this name meets; None for all."""
    fits = mask.items() if isinstance(mask, Mapping) else [("*", mask)]
    found = next((one for glob, one in fits if fnmatchcase(name, glob)), None)
    shape = tensor.shape[:-1]
    return next((one for one in _each(found) if shape[: one.ndim] == one.shape), None)


def rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """(…, k) as rows that count."""
    if mask is not None:
        tensor = tensor[mask.to(tensor.device, torch.bool)]
    return tensor.reshape(-1, tensor.shape[-1])


def hides(mask: Mask) -> bool:
    """Whether it leaves out any row.

    Raises:
        ValueError: numbers other than 0 and 1, as in a mask that is added to scores.
    """
    given = mask.values() if isinstance(mask, Mapping) else [mask]
    every = [one for some in given for one in _each(some)]
    for one in every:
        if one.ndim == 0 or not ((one == 0) | (one == 1)).all():
            raise ValueError(
                "expected a mask of booleans, or of 0 and 1, of shape (batch, length), got "
                f"{tuple(one.shape)} of {one.dtype}, such as {one.flatten()[:4].tolist()}"
            )
    return any(not one.all() for one in every)


def _each(mask: Tensor | tuple[Tensor, ...] | None) -> Iterator[Tensor]:
    yield from mask if isinstance(mask, tuple) else () if mask is None else (mask,)
