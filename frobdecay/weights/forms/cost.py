"""Is a function cheaper on the factors or on the materialized weight? Decided from shapes.

Let P be the positions that a weight is applied to: rows of a linear layer's input, pixels of a
convolution's output. In multiply-adds,

    factored  P · factored          materialized  P · dense + once

where ``once`` forms the product. A backward pass doubles each term once more (P · dense for the
activations and again for the weight; m·n·r for each factor of an m×n product), so that the
comparison is the same with and without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from frobdecay.weights.tracing import scripting

# A function call takes the time of this many multiply-adds: 3 µs at 3e10 a second, one core.
CALL = 100_000

forced: bool | None = None


def factors_cheaper(
    positions: Callable[[], Any], *, dense: float, factored: float, once: float, calls: int = 0
) -> bool:
    """Compare the two ways to apply a weight, in multiply-adds.

    Where the factors need no more multiply-adds for a position than the dense weight, they are
    cheaper for any number of positions, and the number is not asked for: a graph with dynamic
    shapes gets no guard. Where they need more they still win for few positions; a number that
    is not known when a graph is compiled or exported counts as many. ``torch.jit.trace`` records
    the arithmetic of shapes, so there the factors are taken unasked.

    Args:
        positions: gives the number of positions.
        dense: for each position with the dense weight.
        factored: for each position with the factors.
        once: to form the dense weight.
        calls: how many more functions the factored form calls than the materialized one.

    Returns:
        True for the factors.
    """
    if forced is not None:
        return forced
    if scripting():
        return True
    return cheaper(positions, dense - factored, once - calls * CALL)


def cheaper(positions: Callable[[], Any], saved: float, once: float) -> bool:
    """Whether ``positions · saved + once >= 0``, with ``positions`` asked for only if needed."""
    if (saved >= 0) == (once >= 0):
        return saved >= 0
    total = positions() * saved + once
    return not known(total < 0) if saved >= 0 else known(total >= 0)


def known(condition: Any) -> bool:
    """Whether a condition holds, False where it depends on a dynamic size."""
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        # Imported here because it loads sympy, a quarter of a second.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def rows(x: Tensor) -> Callable[[], Any]:
    """The number of vectors that the last dimension of a tensor holds."""
    return lambda: x.numel() // max(x.shape[-1], 1) if x.ndim else 1


@contextmanager
def force(factored: bool | None) -> Iterator[None]:
    """Make every choice the given one; for tests and measurements."""
    global forced
    before, forced = forced, factored
    try:
        yield
    finally:
        forced = before
