"""What a user's loss becomes if weights are truncated, before anything is factorized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import Tensor, nn

from frobdecay.models.calibration.forward import restoring, version_of

Evaluate = Callable[[nn.Module], float]
"""A loss, the lower the better; of an accuracy, its negative."""


@dataclass(frozen=True)
class Loss:
    """The user's loss of a model.

    Attributes:
        model: the whole one, dense.
        evaluate: called with it.
        progress: for a bar, see ``factorize``.
    """

    model: nn.Module
    evaluate: Evaluate
    progress: bool | None = None

    def of(self, instead: Iterable[tuple[Tensor, Tensor]] = ()) -> float:
        """The loss with some weights replaced; they, mode and buffers are restored to the bit.

        Args:
            instead: weights, and what they hold meanwhile.

        Raises:
            TypeError, ValueError: what ``evaluate`` returns is no finite number, or it changed a
                parameter.
        """
        with _replaced(instead), restoring(self.model):
            before = self._written()
            found: Any = self.evaluate(self.model)
            if changed := before ^ self._written():
                raise ValueError(f"evaluate(model) changed {min(changed)[0]}; it may change none")
        try:
            value = float(found.detach() if isinstance(found, Tensor) else found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"expected evaluate(model) to return a number, the loss, got {type(found).__name__}"
            ) from error
        if not isfinite(value):
            raise ValueError(f"expected evaluate(model) to return a finite loss, got {value}")
        return value

    def _written(self) -> set[tuple[str, int, int]]:
        """Which parameters there are, and how often each was written to."""
        return {(name, id(p), version_of(p)) for name, p in self.model.named_parameters()}


@contextmanager
def _replaced(instead: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Weights hold something else inside, and themselves afterwards."""
    with ExitStack() as undo:
        for weight, other in instead:
            held = weight.detach()
            undo.callback(held.copy_, held.clone())
            held.copy_(other)
        yield
