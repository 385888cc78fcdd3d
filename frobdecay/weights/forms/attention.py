"""Attention runs on the factors of its projections: torch's own function, seen from inside.

``F.multi_head_attention_forward`` is Python. It hands itself over as a whole when an argument
overrides torch's functions; its body, run without that one question, meets the factored weights
in ``linear``, ``chunk`` and ``split``, which have forms of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from frobdecay.weights.forms.table import form

_QUESTION = "has_torch_function"


def _never(tensors: Any) -> bool:
    return False


def _names(function: FunctionType) -> dict[str, Any]:
    """The globals that a function uses, with the question answered."""
    used = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {name: value for name, value in used.items() if value is not None} | {_QUESTION: _never}


def _body(function: FunctionType) -> FunctionType:
    """The function as if no argument overrode it."""
    # Without a __name__ in the globals: torch.compile would look the others up in that module.
    names = {"__builtins__": function.__globals__["__builtins__"], **_names(function)}
    body = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _attention_form(function: FunctionType) -> Callable[..., Any]:
    body = _body(function)

    def attention(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            # Somebody may have replaced a function meanwhile, such as scaled_dot_product_attention.
            body.__globals__.update(_names(function))
        return body(*args, **kwargs)

    return attention


_torch_attention: Any = F.multi_head_attention_forward

# A version of torch whose function asks otherwise gets dense weights.
if isinstance(_torch_attention, FunctionType) and _QUESTION in _torch_attention.__code__.co_names:
    form(_torch_attention)(_attention_form(_torch_attention))
