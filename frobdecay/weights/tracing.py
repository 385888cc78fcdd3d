"""Whether torch.compile, a trace or a transform of torch.func is at work here."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad as forward_ad

# None but in a trace of torch.jit; ``torch.jit.is_tracing`` without its calls of Python's.
scripting: Callable[[], object] = torch._C._get_tracing_state

functorch_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)

# None but where torch.compile looks at the functions that are called.
frames: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback


def transforms_active() -> bool:
    """Whether torch.func transforms what runs here, or its tensors may be dual ones."""
    return functorch_active() or forward_ad._current_level >= 0


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from tracing a function that answers for torch's own functions.

    It runs as it is while a graph is made of weights that the graph itself makes. Where it is
    called between graphs, a trace of it would be taken again for other functions than the first.
    """
    outside: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal outside
        if not torch.compiler.is_dynamo_compiling() and frames() is None:
            return function(*args, **kwargs)
        if outside is None:
            # Not before the compiler is there: to import it takes more than a second.
            disable = torch.compiler.disable
            outside = disable(function, reason="a factored weight is used")  # type: ignore[no-untyped-call]
        return outside(*args, **kwargs)

    return call
