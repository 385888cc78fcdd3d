"""The departure W − W₀ of a product from what it was, from its factors now and then.

With D = C − C⁰ of each factor C, the difference of two einsums is the sum of one for each factor,

    W − W₀ = Σ_k T_k,  T_k of C⁰ … C⁰ D_k C … C        U Vᵀ − U₀V₀ᵀ = D_U Vᵀ + U₀ D_Vᵀ

    ‖W − W₀‖² = Σ_jk ⟨T_j, T_k⟩                        ∇_U ½‖W − W₀‖² = D_U (VᵀV) + U₀ (D_VᵀV)
    ∇_C ½‖W − W₀‖² = Σ_k ∇_C ⟨W, T_k⟩

where each is a contraction of thin tensors, and small where the factors are near those that were:
differences of Grams would be of their rounding errors there. Nothing of the size of W is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, ClassVar

import torch
from torch import Tensor

from frobdecay.algebra.contraction import Plan, plan
from frobdecay.algebra.precision import Coefficient, Views, accumulable


@dataclass(frozen=True)
class Departure:
    """W − W₀, of the factors of W and then as many of W₀, which are constants unless trained.

    Examples:
        >>> import torch
        >>> from frobdecay.algebra.network import Network
        >>> from frobdecay.product.product import Product, product_norm
        >>> U, V, before = torch.randn(4, 1), torch.randn(3, 1), torch.zeros(4, 1)
        >>> structure = Departure(Network.of("mr,nr->mn"))
        >>> product = Product.of(U, V, before, torch.ones(3, 1), structure=structure)
        >>> torch.allclose(product_norm(product), torch.linalg.norm(U @ V.T))
        True

    Attributes:
        network: how either's factors combine.
    """

    network: Any
    name: str = "departure"
    is_chain: ClassVar[bool] = False

    def check(self, name: str, views: Views, batch: int) -> None:
        """The factors of two products of one shape and one rank."""
        now, before = self.halves(views)
        self.network.check(name, now, batch)
        shapes, others = ([tuple(view.shape) for view in each] for each in (now, before))
        if shapes != others:
            raise ValueError(
                f"{name}: expected factors of the same shapes as those before, {others}, got "
                f"{shapes}"
            )

    def halves(self, views: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """What there is of W, and of W₀."""
        count = len(self.network.terms)
        return views[:count], views[count:]

    def shape(self, views: Views, batch: int) -> tuple[int, ...]:
        """That of W."""
        shape: tuple[int, ...] = self.network.shape(self.halves(views)[0], batch)
        return shape

    def rank(self, views: Views, batch: int) -> int:
        """That of W; the difference may have twice as much."""
        rank: int = self.network.rank(self.halves(views)[0], batch)
        return rank

    def squared_norm(self, views: Views, batch: int) -> Tensor:
        """Of all pairs of terms; differentiable."""
        terms = self._terms(views)
        pairs = combinations_with_replacement(range(len(terms)), 2)
        parts = [
            (1 if j == k else 2) * self._plan(terms[j], batch, ()).result([*terms[j], *terms[k]])
            for j, k in pairs
        ]
        return torch.stack(parts).sum()

    def gradients(
        self, views: Views, batch: int, coefs: Sequence[Coefficient | None]
    ) -> list[Tensor | None]:
        """What is around each factor in Σ_k ⟨W, T_k⟩; for those of W₀, less that with W₀."""
        terms, found = self._terms(views), []
        for sign, factors, own in zip(
            (1, -1), self.halves(accumulable(views)), self.halves(coefs), strict=True
        ):
            wanted = tuple(coef is not None for coef in own)
            sums: list[Tensor | None] = [None] * len(wanted)
            for term in terms if any(wanted) else ():
                contraction = self._plan(term, batch, wanted)
                held = contraction.run([*factors, *term])
                for k, (end, coef) in enumerate(zip(contraction.ends, own, strict=False)):
                    if end is not None and coef is not None:
                        part, before = end(held, sign * coef), sums[k]
                        sums[k] = part if before is None else before + part
            found += sums
        return found

    def materialize(self, views: Views, batch: int) -> Tensor:
        """Form W − W₀."""
        now, before = (self.network.materialize(each, batch) for each in self.halves(views))
        difference: Tensor = now - before
        return difference

    def route(self, views: Views, batch: int) -> str:
        """Always thin products."""
        return "gram"

    def describe(self, views: Views, batch: int) -> str:
        """What is done, in words."""
        return f"{self.network.equation}, with each factor's difference from what it was"

    def _terms(self, views: Views) -> list[list[Tensor]]:
        now, before = self.halves(accumulable(views))
        return [[*before[:k], now[k] - before[k], *now[k + 1 :]] for k in range(len(now))]

    def _plan(self, factors: Views, batch: int, wanted: tuple[bool, ...]) -> Plan:
        """Of the inner product of two einsums of such factors, or of what is around the first's."""
        terms = self.network.with_batch(batch)
        shapes = tuple(tuple(view.shape) for view in factors)
        both = (*terms, *map(self.network.copied, terms))
        none = (False,) * len(wanted)
        return plan(both, "", shapes * 2, (), wanted + none)
