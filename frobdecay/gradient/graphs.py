"""Whether calls are captured in a CUDA graph, which goes by the same addresses at every replay."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def is_capturing(devices: Iterable[str]) -> bool:
    """Whether the current stream is being captured, for work on devices of these types."""
    return "cuda" in devices and torch.cuda.is_current_stream_capturing()
