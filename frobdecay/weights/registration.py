"""Register a parametrization with factors that are computed already, also on wrappers.

A wrapper that forwards attributes answers for the module inside of it, where torch has to see the
wrapper itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from frobdecay.product.holding import copied_class, lists_of
from frobdecay.weights.adapters import adaptable


def put_factors(
    module: nn.Module, attribute: str, parametrization: nn.Module, factors: Sequence[Tensor]
) -> None:
    """Register a parametrization with factors that are known: nothing is computed from the weight.

    Args:
        module: dense in this weight; also one that forwards attributes, which torch would take for
            the module inside.
        attribute: the weight's name there.
        parametrization: fitted to the weight's shape.
        factors: what becomes ``original0``, ``original1``, …; requires a gradient as the weight.

    Raises:
        ValueError: they multiply to something else than a tensor of the weight's shape and dtype.
    """
    with _not_forwarding(module):
        register_parametrization(module, attribute, _Known(parametrization, factors))
    lists_of(module)[attribute][0] = parametrization
    adaptable(module, attribute)


class _Known(nn.Module):
    """Stands for a parametrization while torch asks for the factors of the weight."""

    def __init__(self, parametrization: nn.Module, factors: Sequence[Tensor]) -> None:
        super().__init__()
        self.parametrization, self.factors = parametrization, factors

    def right_inverse(self, weight: Tensor) -> Sequence[Tensor]:
        """What is known already."""
        return self.factors

    def forward(self, *factors: Tensor) -> Any:
        """The product, of which torch checks shape and dtype."""
        return self.parametrization(*factors)


_FORWARDING = ("__getattr__", "__setattr__", "__delattr__")


@contextmanager
def _not_forwarding(module: nn.Module) -> Iterator[None]:
    """Have a module answer for itself only; what its class gains is kept."""
    kind: Any = type(module)
    plain = {name: getattr(nn.Module, name) for name in _FORWARDING}
    if all(getattr(kind, name) is method for name, method in plain.items()):
        yield
        return
    blind: Any = type(kind.__name__, (kind,), plain)
    module.__class__ = blind
    try:
        yield
    finally:
        made: Any = type(module)
        if made is blind:  # it has a class of its own already, which takes what was added
            for name in set(vars(blind)).intersection(lists_of(module)):
                setattr(kind, name, vars(blind)[name])
        module.__class__ = kind if made is blind else copied_class(made, kind)
