"""Stars: a tensor from one factor a mode, with a core (Tucker) or without (CP).

    Tucker   W = G ×₁ U₁ … ×_d U_d        CP   W = Σ_a U₁[:, a] ∘ … ∘ U_d[:, a]

with a core G (r₁×…×r_d) and factors U_k (n_k×r_k), in CP all n_k×r. As for a chain, norm and
gradients need the Grams A_k = U_kᵀU_k only, never the n₁×…×n_d tensor. With the core multiplied
by the Grams of the modes before k, P_k, and of those behind it, S_k, both unfolded along mode k,

    Tucker   ‖W‖² = ⟨G, P_d₊₁⟩       ∇_G ½‖W‖² = P_d₊₁    ∇_{U_k} ½‖W‖² = U_k P_k S_kᵀ
    CP       ‖W‖² = Σ A₁ ∗ … ∗ A_d                        ∇_{U_k} ½‖W‖² = U_k (∗_{j≠k} A_j)

where ∗ multiplies entry by entry. (Kolda & Bader 2009, doi:10.1137/07070111X, has the notation.)
A tensor train is no star but a chain of cores, see ``chain.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from frobdecay.algebra.precision import Coefficient, accumulable, times_rows
from frobdecay.algebra.structures import Views


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply a tensor along one mode: (…, r, …) with (n, r) is (…, n, …)."""
    if mode == tensor.ndim - 1:
        return tensor @ matrix.mT
    shape = tensor.shape
    seen = tensor.reshape(prod(shape[:mode]), shape[mode], -1)  # no transposed copy is made
    return (matrix @ seen).reshape(*shape[:mode], matrix.shape[0], *shape[mode + 1 :])


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Read a tensor as a matrix whose rows are one mode."""
    return tensor.movedim(mode, 0).flatten(1)


def narrowest(dims: Sequence[int], ranks: Sequence[int]) -> int:
    """The number of modes after which to cut a tensor into L Rᵀ: least rank, then least entries.

    Args:
        dims: sizes of the modes.
        ranks: columns of L and R, cut after 1, …, d − 1 modes.
    """

    def cost(k: int) -> tuple[int, int]:
        return ranks[k - 1], prod(dims[:k]) + prod(dims[k:])

    return min(range(1, len(dims)), key=cost)


# --- Tucker ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tucker:
    """W = G ×_k U_k; the factors are the core, then one U_k for each mode that is not whole.

    Attributes:
        whole: modes without a factor, counted from 0: there the core has the tensor's own size.
    """

    whole: tuple[int, ...] = ()
    name: str = "tucker"

    def modes(self, order: int) -> list[int]:
        """The modes that have a factor, in the order of the factors."""
        return [mode for mode in range(order) if mode not in self.whole]

    def check(self, name: str, views: Views, batch: int) -> None:
        """A core of two modes or more, and a tall matrix for each mode that is not whole."""
        shapes = [tuple(view.shape) for view in views]
        core = shapes[0] if shapes else ()
        wanted = [(None, core[mode]) for mode in self.modes(len(core))]
        got = [(None, s[1]) if len(s) == 2 else s for s in shapes[1:]]
        if batch or len(core) < 2 or got != wanted or max(self.whole, default=0) >= len(core):
            raise ValueError(
                f"{name}: expected, without batch axes, a core (r_1, …, r_d) and a factor "
                f"(n_k, r_k) for each mode not in {self.whole}, got {shapes}, batch {batch}"
            )

    def shape(self, views: Views, batch: int) -> tuple[int, ...]:
        """(n_1, …, n_d)."""
        dims = list(views[0].shape)
        for mode, U in zip(self.modes(len(dims)), views[1:], strict=True):
            dims[mode] = U.shape[0]
        return tuple(dims)

    def rank(self, views: Views, batch: int) -> int:
        """The smallest size of the core in a mode that has a factor."""
        return min([U.shape[1] for U in views[1:]] or views[0].shape)

    def squared_norm(self, views: Views, batch: int) -> Tensor:
        """⟨G, G ×_k A_k⟩."""
        core, *factors = accumulable(views)
        through = core
        for mode, U in zip(self.modes(core.ndim), factors, strict=True):
            through = mode_product(through, times_rows(U, U), mode)
        return (core * through).sum()

    def gradients(
        self, views: Views, batch: int, coefs: Sequence[Coefficient | None]
    ) -> list[Tensor | None]:
        """The core from all Grams, U_k from those of the other modes."""
        core, *factors = accumulable(views)
        modes, grams = self.modes(core.ndim), [times_rows(U, U) for U in factors]
        before = [core]
        for mode, gram in zip(modes, grams, strict=True):
            before.append(mode_product(before[-1], gram, mode))
        out: list[Tensor | None] = []
        behind = core
        for k in reversed(range(len(modes))):
            coef = coefs[k + 1]
            if coef is None:
                out.append(None)
            else:
                inner = unfold(before[k], modes[k]) @ unfold(behind, modes[k]).mT
                out.append(factors[k] @ (inner * coef))
            behind = mode_product(behind, grams[k], modes[k])
        return [None if coefs[0] is None else before[-1] * coefs[0], *reversed(out)]

    def materialize(self, views: Views, batch: int) -> Tensor:
        """Multiply the core by all factors."""
        core, *factors = accumulable(views)
        held = dict(zip(self.modes(core.ndim), factors, strict=True))
        return tucker_dense(core, by_growth(held))

    def route(self, views: Views, batch: int) -> str:
        """Grams are never dearer: they have the core's size, not the tensor's."""
        return "gram"


TUCKER = Tucker()


def tucker_dense(core: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """Multiply a core by factors {mode: (n_k, r_k)}, in their order; see ``by_growth``."""
    for mode, U in factors.items():
        core = mode_product(core, U, mode)
    return core


def by_growth(factors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Sort {mode: (n_k, r_k)} so that those come first that make a core grow least."""
    return dict(sorted(factors.items(), key=lambda item: item[1].shape[0] / item[1].shape[1]))


def tucker_sides(core: Tensor, factors: Mapping[int, Tensor], cut: int) -> tuple[Tensor, Tensor]:
    """The Tucker tensor as a matrix L Rᵀ whose rows are the first ``cut`` modes.

    Args:
        core: (r_1, …, r_d).
        factors: {mode: (n_k, r_k)}, counted from 0.
        cut: between 1 and d − 1.

    Returns:
        L (n_1·…, r) and R (…·n_d, r) with r the smaller side of the core, which is multiplied
        into the other side's factors; this side's stand alone, in a Kronecker product.
    """
    left = prod(core.shape[:cut]) <= prod(core.shape[cut:])
    side = range(cut) if left else range(cut, core.ndim)
    alone = [factors[m] if m in factors else _eye(core.shape[m], core) for m in side]
    through = tucker_dense(core, {m: U for m, U in factors.items() if m not in side})
    matrix = through.flatten(cut).flatten(0, cut - 1)
    kron = reduce(_kronecker, alone)
    return (kron, matrix.mT) if left else (matrix, kron)


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None, :, None] * b[None, :, None, :]).flatten(2).flatten(0, 1)


# --- CP -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Polyadic:
    """W = Σ_a U₁[:, a] ∘ … ∘ U_d[:, a]; all factors (n_k, r)."""

    name: str = "cp"

    def check(self, name: str, views: Views, batch: int) -> None:
        """Two tall matrices or more, all with as many columns."""
        shapes = [tuple(view.shape) for view in views]
        matrices = all(len(shape) == 2 for shape in shapes)
        if batch or len(shapes) < 2 or not matrices or len({s[1] for s in shapes}) > 1:
            raise ValueError(
                f"{name}: expected, without batch axes, two factors (n_k, r) or more with the "
                f"same r, got {shapes}, batch {batch}"
            )

    def shape(self, views: Views, batch: int) -> tuple[int, ...]:
        """(n_1, …, n_d)."""
        return tuple(U.shape[0] for U in views)

    def rank(self, views: Views, batch: int) -> int:
        """r, the number of terms."""
        return views[0].shape[1]

    def squared_norm(self, views: Views, batch: int) -> Tensor:
        """The sum of the Grams' entrywise product."""
        return reduce(torch.mul, [times_rows(U, U) for U in accumulable(views)]).sum()

    def gradients(
        self, views: Views, batch: int, coefs: Sequence[Coefficient | None]
    ) -> list[Tensor | None]:
        """U_k times the entrywise product of the others' Grams."""
        factors = accumulable(views)
        grams = [times_rows(U, U) for U in factors]
        before = [torch.ones_like(grams[0])]
        for gram in grams[:-1]:
            before.append(before[-1] * gram)
        out: list[Tensor | None] = []
        behind = torch.ones_like(grams[0])
        for k in reversed(range(len(factors))):
            coef = coefs[k]
            out.append(None if coef is None else factors[k] @ (before[k] * behind * coef))
            behind = behind * grams[k]
        return out[::-1]

    def materialize(self, views: Views, batch: int) -> Tensor:
        """Multiply two Khatri–Rao products."""
        factors, dims = accumulable(views), self.shape(views, batch)
        L, R = cp_sides(factors, narrowest(dims, [self.rank(views, batch)] * (len(dims) - 1)))
        return (L @ R.mT).reshape(dims)

    def route(self, views: Views, batch: int) -> str:
        """Always Grams."""
        return "gram"


CP = Polyadic()


def cp_sides(factors: Sequence[Tensor], cut: int) -> tuple[Tensor, Tensor]:
    """The CP tensor as a matrix L Rᵀ whose rows are the first ``cut`` modes.

    Returns:
        L (n_1·…, r) and R (…·n_d, r), the Khatri–Rao products of the factors of either side.
    """
    return reduce(_khatri_rao, factors[:cut]), reduce(_khatri_rao, factors[cut:])


def _khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker products of the columns of (m, r) and (n, r): (m·n, r)."""
    return (a[:, None] * b[None]).flatten(0, 1)
