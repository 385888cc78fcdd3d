"""Whether torch.compile, a trace or a transform of torch.func is at work here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad

scripting: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

_functorch_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)


def tracing() -> bool:
    """Whether what runs here is written down, by torch.compile, torch.export or torch.jit."""
    return torch.compiler.is_compiling() or scripting()


def transforms_active() -> bool:
    """Whether torch.func transforms what runs here, or its tensors may be dual ones."""
    return _functorch_active() or forward_ad._current_level >= 0


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from tracing a function that answers for torch's own functions.

    It runs as it is while a graph is made of weights that the graph itself makes. Where it is
    called between graphs, a trace of it would be taken again for other functions than the first.
    """
    outside: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal outside
        compiler = torch.compiler
        if "torch._dynamo" not in sys.modules or (
            compiler.is_compiling() and not compiler.is_dynamo_compiling()
        ):
            return function(*args)
        if outside is None:
            # Not before the compiler is there: to import it takes more than a second.
            outside = compiler.disable(function, reason="a factored weight is used")  # type: ignore[no-untyped-call]
        return outside(*args)

    return call
