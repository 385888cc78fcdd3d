"""What a module holds itself, as opposed to what it forwards from a module that it wraps.

Wrappers forward attributes that they lack to the module that they wrap (``torch.compile``'s, those
of adapters, many of users). Asked through ``getattr``, as torch's ``is_parametrized`` asks, such a
wrapper has the weights and the parametrizations of another module. Here it has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

_LISTS = "parametrizations"


class Version:
    """A counter that moves whenever a weight is factorized, merged or unrolled.

    It lets an optimizer that was built earlier notice cheaply that it may hold stale parameters.
    """

    value = 0


VERSION = Version()


def check_module(model: object) -> None:
    """Refuse what is no model.

    Raises:
        TypeError: no module, or a scripted one, whose weights are fixed in its code.
    """
    scripted = isinstance(model, torch.jit.ScriptModule)
    if scripted or not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        what = f"the class {kind}" if isinstance(model, type) else f"a {kind}"
        raise TypeError(
            f"expected a torch.nn.Module, got {what}"
            + ("; do this before scripting or tracing it" if scripted else "")
        )


def lists_of(module: nn.Module) -> Mapping[str, Any]:
    """Attribute -> ``ParametrizationList`` of a module's own parametrized tensors."""
    held = None if isinstance(module, torch.jit.ScriptModule) else module._modules.get(_LISTS)
    if not isinstance(held, nn.ModuleDict):
        return {}
    return {name: one for name, one in held.items() if isinstance(one, ParametrizationList)}


def factorized(module: nn.Module) -> dict[str, Any]:
    """Attribute -> ``ParametrizationList`` of the weights of a module that are products."""
    held = lists_of(module).items()
    return {name: one for name, one in held if hasattr(one[0], "factor_shapes")}


def dense_type(module: nn.Module) -> type[nn.Module]:
    """The type that the module has without its parametrizations."""
    kind: type[Any] = type(module)
    return kind.__bases__[0] if lists_of(module) else kind


def copied_class(kind: type[nn.Module], *bases: type[nn.Module]) -> Any:
    """A class with the content of another, and its bases unless others are given."""
    content = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases or kind.__bases__, content)
