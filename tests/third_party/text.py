"""A small real text, character by character: the Zen of Python."""

from __future__ import annotations

import codecs
import contextlib
import io

import torch
from torch import Tensor

__all__ = ["TEXT", "batch", "examples"]


def _zen() -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


TEXT = _zen()
_CHARACTERS = sorted(set(TEXT))


def examples(length: int = 16) -> list[dict[str, Tensor]]:
    """The text in pieces, labels and all."""
    ids = torch.tensor([_CHARACTERS.index(character) for character in TEXT])
    return [{"input_ids": piece, "labels": piece} for piece in ids.split(length)[:-1]]


def batch(step: int, size: int = 8, length: int = 16) -> dict[str, Tensor]:
    """The same few pieces for the same step, stacked."""
    pieces = examples(length)
    chosen = [pieces[(step * size + k) % len(pieces)] for k in range(size)]
    return {key: torch.stack([piece[key] for piece in chosen]) for key in chosen[0]}
