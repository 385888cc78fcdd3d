"""Structures: how the factors of a product combine, and what follows from it.

A ``Structure`` knows the mathematics of one way to combine factors: shape, norm, gradients and
the dense tensor. ``CHAIN`` is W = U M.. Vᵀ of ``chain.py``, and what every ``Product`` is unless it
says otherwise. All functions see the factors as views (*batch, …); ``Product.scale`` is not theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from frobdecay.algebra.chain import chain_gradients, chain_materialize, chain_squared_norm, plan_of
from frobdecay.algebra.precision import Coefficient

Views = Sequence[Tensor]


class Structure(Protocol):
    """How factors combine; instances are hashable and equal where they mean the same."""

    @property
    def name(self) -> str:
        """What tables and messages call it."""

    def check(self, name: str, views: Views, batch: int) -> None:
        """Refuse factors whose shapes do not fit, with a ValueError that names the product."""

    def shape(self, views: Views, batch: int) -> tuple[int, ...]:
        """Shape of the dense product."""

    def rank(self, views: Views, batch: int) -> int:
        """The smallest inner size."""

    def squared_norm(self, views: Views, batch: int) -> Tensor:
        """‖W‖_F² over all of the batch, at least float32; differentiable."""

    def gradients(
        self, views: Views, batch: int, coefs: Sequence[Coefficient | None]
    ) -> list[Tensor | None]:
        """Gradients of ½‖W‖² for the factors, each times its coefficient; None for None.

        Tensors of the views' shapes, in their ``common_dtype``.
        """

    def materialize(self, views: Views, batch: int) -> Tensor:
        """Form W, shape ``shape``, at least float32; differentiable."""

    def route(self, views: Views, batch: int) -> str:
        """What the gradients go through: "gram" or "dense"."""


@dataclass(frozen=True)
class Chain:
    """W = U M₁ … M_d Vᵀ, for each entry of the batch; see ``chain.py``."""

    name: str = "chain"

    def check(self, name: str, views: Views, batch: int) -> None:
        """Both ends tall, all inner sizes equal to their neighbours'."""
        shapes = [tuple(view.shape) for view in views]
        if len(views) < 2:
            raise ValueError(f"{name}: expected two factors or more, got {len(views)}")
        if batch < 0 or any(len(shape) < batch + 2 for shape in shapes):
            raise ValueError(
                f"{name}: expected factors with {batch} batch axes and a matrix, got {shapes}"
            )
        bonds = [shape[-1] for shape in shapes[:-1]]
        entries = [shape[-2] for shape in shapes[1:-1]] + [shapes[-1][-1]]
        if bonds != entries or len({shape[:batch] for shape in shapes}) > 1:
            raise ValueError(
                f"{name}: the shapes {shapes} do not chain; expected U (*batch, m, r), "
                f"M (*batch, r, r'), V (*batch, n, r') with equal batch axes and both ends tall"
            )

    def shape(self, views: Views, batch: int) -> tuple[int, ...]:
        """(*batch, m, n), with more axes where factors have them."""
        inner = [size for view in views[1:-1] for size in view.shape[batch:-2]]
        return (*views[0].shape[:-1], *inner, *views[-1].shape[batch:-1])

    def rank(self, views: Views, batch: int) -> int:
        """The smallest bond."""
        return min(view.shape[-1] for view in views)

    def squared_norm(self, views: Views, batch: int) -> Tensor:
        """⟨L, R⟩ at a bond."""
        return chain_squared_norm(views, batch)

    def gradients(
        self, views: Views, batch: int, coefs: Sequence[Coefficient | None]
    ) -> list[Tensor | None]:
        """L C R for every factor C."""
        return chain_gradients(views, batch, coefs)

    def materialize(self, views: Views, batch: int) -> Tensor:
        """Multiply from left to right."""
        return chain_materialize(views, batch)

    def route(self, views: Views, batch: int) -> str:
        """The cheaper one for these shapes."""
        return plan_of(views, batch).gradient


CHAIN = Chain()
