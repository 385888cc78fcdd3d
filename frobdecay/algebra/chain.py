"""The theorem: norm and gradients of a chain of factors from small Grams.

A chain is W = U M₁ … M_d Vᵀ, with U (m×r) and V (n×r) both stored tall. Its squared Frobenius
norm needs r×r Grams only, never the m×n matrix:

    L₁ = UᵀU,    L_{k+1} = M_kᵀ L_k M_k          left Grams, one for each bond
    R_d = VᵀV,   R_{k-1} = M_k R_k M_kᵀ          right Grams
    ‖W‖_F² = ⟨L_k, R_k⟩ for every bond k
    ∇_U ½‖W‖² = U R₁    ∇_{M_k} ½‖W‖² = L_k M_k R_{k+1}    ∇_V ½‖W‖² = V L_d

so that the gradient of a pair costs 4r²(m+n) flops instead of 6mnr. Where r is so near to full
rank that forming W is cheaper, the plan says so and W is formed. Euler's identity
⟨C, ∇_C ½‖W‖²⟩ = ‖W‖² holds for every factor C. (Khodak et al., ICLR 2021, arXiv:2105.01029,
Frobenius decay; the released research code has the formulas for up to three factors.)

Tensors here are (*batch, *summed, rows, columns): the last two axes are the matrix, leading
``batch`` axes keep chains apart (attention heads), and axes between them are further rows whose
Grams are summed (grouped queries, cores of a train).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from frobdecay.algebra.precision import Coefficient, accumulable, is_long, times_rows


@dataclass(frozen=True)
class ContractionPlan:
    """How a product of given shapes is contracted, and what that costs.

    Attributes:
        shapes: of the factors' views.
        batch: number of leading batch axes.
        value_flops, gradient_flops: cost by route, ``{"gram": …, "dense": …}``.
    """

    shapes: tuple[tuple[int, ...], ...]
    batch: int
    value_flops: Mapping[str, int]
    gradient_flops: Mapping[str, int]

    @property
    def value(self) -> str:
        """The cheaper route to ‖W‖²: ``"gram"`` or ``"dense"``."""
        return min(self.value_flops, key=self.value_flops.__getitem__)

    @property
    def gradient(self) -> str:
        """The cheaper route to the gradients of all factors."""
        return min(self.gradient_flops, key=self.gradient_flops.__getitem__)

    def __str__(self) -> str:
        lines = [" · ".join("×".join(map(str, shape)) for shape in self.shapes)]
        for what, flops, choice in (
            ("value", self.value_flops, self.value),
            ("gradient", self.gradient_flops, self.gradient),
        ):
            costs = ", ".join(f"{route} {cost:,} flops" for route, cost in flops.items())
            lines.append(f"  {what:<9} {choice:<6} ({costs})")
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def contraction_plan(shapes: tuple[tuple[int, ...], ...], batch: int = 0) -> ContractionPlan:
    """Count both routes' flops for factors of these shapes.

    Example:
        >>> print(contraction_plan(((64, 4), (32, 4))))
        64×4 · 32×4
          value     gram   (gram 3,072 flops, dense 16,384 flops)
          gradient  gram   (gram 6,144 flops, dense 49,152 flops)
    """
    heads = 2 * prod(shapes[0][:batch])
    sizes = [(prod(s[batch:-2]), s[-2], s[-1]) for s in shapes]
    (m, first), (n, last) = ((s * rows, columns) for s, rows, columns in (sizes[0], sizes[-1]))
    inner = sizes[1:-1]
    ends = m * first**2 + n * last**2
    through = sum(s * (left**2 * right + left * right**2) for s, left, right in inner)
    value = {"gram": heads * (ends + through)}
    gradient = {"gram": heads * (2 * ends + 3 * through)}
    if all(len(shape) == batch + 2 for shape in shapes):  # one matrix each: W is a matrix, too
        bonds = sum(left * right for _, left, right in inner)
        value["dense"] = heads * (m * bonds + m * n * last)
        inside = sum(m * n * right + m * left * right for _, left, right in inner)
        gradient["dense"] = heads * ((m + n) * bonds + m * n * (2 * last + first) + inside)
    return ContractionPlan(shapes, batch, value, gradient)


def plan_of(views: Sequence[Tensor], batch: int) -> ContractionPlan:
    """The cached plan for these views."""
    return contraction_plan(tuple(tuple(view.shape) for view in views), batch)


def _lift(matrix: Tensor, view: Tensor) -> Tensor:
    """Give a matrix (*batch, ·, ·) the summed axes of a view to broadcast over."""
    for _ in range(view.ndim - matrix.ndim):
        matrix = matrix.unsqueeze(-3)
    return matrix


def _sum(gram: Tensor, batch: int) -> Tensor:
    """Sum a Gram over the axes between the batch and the matrix."""
    return gram if gram.ndim == batch + 2 else gram.flatten(batch, -3).sum(batch)


def end_gram(view: Tensor, batch: int) -> Tensor:
    """UᵀU (*batch, r, r) of an end of a chain."""
    return _sum(times_rows(view, view), batch)


def left_grams(first: Tensor, inner: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The left Grams at every bond, from UᵀU and the inner factors."""
    grams = [first]
    for view in inner:
        grams.append(_sum(view.mT @ _lift(grams[-1], view) @ view, batch))
    return grams


def right_grams(last: Tensor, inner: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The right Grams at every bond, from VᵀV and the inner factors."""
    grams = [last]
    for view in reversed(inner):
        grams.append(_sum(view @ _lift(grams[-1], view) @ view.mT, batch))
    return grams[::-1]


def chain_grams(views: Sequence[Tensor], batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Left and right Grams (*batch, r, r) at every bond of a chain."""
    first, inner, last = end_gram(views[0], batch), views[1:-1], end_gram(views[-1], batch)
    return left_grams(first, inner, batch), right_grams(last, inner, batch)


def chain_materialize(views: Sequence[Tensor], batch: int) -> Tensor:
    """Form W: (*batch, m, n), with further axes in order where factors have them."""
    views = accumulable(views)
    ends = {0, len(views) - 1}
    free = [
        size
        for k, view in enumerate(views)
        for size in (view.shape[batch:-1] if k in ends else view.shape[batch:-2])
    ]
    dense = views[0].flatten(batch, -2)
    for k, view in enumerate(views[1:], 1):
        matrix = view.mT if k == len(views) - 1 else view
        dense = _lift(dense, matrix) @ matrix  # (*batch, *summed, free, right)
        dense = dense.movedim(-2, batch)
        if k < len(views) - 1:
            dense = dense.flatten(batch, -2)
    return dense.reshape(*views[0].shape[:batch], *free)


def chain_squared_norm(views: Sequence[Tensor], batch: int) -> Tensor:
    """‖U M Vᵀ‖_F² summed over the batch; by the cheaper route; differentiable."""
    views = accumulable(views)
    # Of long factors, autograd would sum over the rows of W in its own way.
    if plan_of(views, batch).value == "gram" or any(map(is_long, views)):
        left = left_grams(end_gram(views[0], batch), views[1:-1], batch)[-1]
        return (left * end_gram(views[-1], batch)).sum()
    dense = views[0]
    for view in views[1:-1]:
        dense = dense @ view
    return (dense @ views[-1].mT).square().sum()


def chain_gradients(
    views: Sequence[Tensor], batch: int, coefs: Sequence[Coefficient | None]
) -> list[Tensor | None]:
    """Gradients of ½‖W‖² for the factors of a chain, each times its coefficient.

    Args:
        views: the factors, (*batch, *summed, rows, columns).
        batch: number of leading batch axes.
        coefs: one a factor: a number, a tensor that broadcasts over (*batch, 1, 1), or None
            for a factor whose gradient is not wanted.

    Returns:
        Tensors of the views' shapes, in their ``common_dtype``; None where not wanted.
    """
    views = accumulable(views)
    route = _gram_gradients if plan_of(views, batch).gradient == "gram" else _dense_gradients
    return route(views, batch, coefs)


def _gram_gradients(
    views: Sequence[Tensor], batch: int, coefs: Sequence[Coefficient | None]
) -> list[Tensor | None]:
    lefts, rights = chain_grams(views, batch)
    around = zip([None, *lefts], views, [*rights, None], coefs, strict=True)
    return [
        None if coef is None else gram_gradient(left, view, right, coef)
        for left, view, right, coef in around
    ]


def chain_sharpness(views: Sequence[Tensor], batch: int) -> Tensor:
    """The largest eigenvalue of C ↦ L C R over all factors C: by how much a gradient scales one."""
    lefts, rights = chain_grams(views, batch)
    left, right = (
        [torch.linalg.eigvalsh(gram)[..., -1] for gram in grams] for grams in (lefts, rights)
    )
    one = torch.ones_like(left[0])
    pairs = zip([one, *left], [*right, one], strict=True)
    return torch.stack([a * b for a, b in pairs]).max()


def gram_gradient(
    left: Tensor | None, view: Tensor, right: Tensor | None, coef: Coefficient
) -> Tensor:
    """Compute coef · L C R of a factor C between its Grams; None for the one that an end lacks.

    Both ends are stored tall, so that V, too, is multiplied from the right.
    """
    if left is None or right is None:
        gram = right if left is None else left
        assert gram is not None
        return view @ _lift(gram * coef, view)
    return _lift(left * coef, view) @ view @ _lift(right, view)


def _dense_gradients(
    views: Sequence[Tensor], batch: int, coefs: Sequence[Coefficient | None]
) -> list[Tensor | None]:
    prefixes, suffixes = [views[0]], [views[-1]]  # U, U M₁, … (m×r) and V, V M_dᵀ, … (n×r)
    for view in views[1:-1]:
        prefixes.append(prefixes[-1] @ view)
    for view in reversed(views[1:-1]):
        suffixes.append(suffixes[-1] @ view.mT)
    suffixes.reverse()
    dense = prefixes[-1] @ views[-1].mT
    out: list[Tensor | None] = []
    for k, coef in enumerate(coefs):
        if coef is None:
            out.append(None)
        elif k == len(views) - 1:
            out.append(times_rows(dense, prefixes[-1]) * coef)
        elif k == 0:
            out.append(dense @ suffixes[0] * coef)
        else:
            out.append(times_rows(prefixes[k - 1], dense @ suffixes[k]) * coef)
    return out
