"""The table of the functions that run on the factors of a weight instead of on the weight.

A form takes the arguments of the function it stands for and returns its result, or
``NotImplemented`` where the factors do not fit the function or are dearer than the dense
weight. It enters itself with the decorator ``form``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

FORMS: dict[Any, Callable[..., Any]] = {}

Form = TypeVar("Form", bound=Callable[..., Any])


def form(*functions: Any, told: bool = False) -> Callable[[Form], Form]:
    """Enter a form in the table; a decorator.

    Args:
        functions: torch's own, that it stands for.
        told: whether the form's first argument is the function that was called.
    """

    def enter(made: Form) -> Form:
        FORMS.update({one: partial(made, one) if told else made for one in functions})
        return made

    return enter
