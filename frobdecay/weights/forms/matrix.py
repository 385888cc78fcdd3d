"""A weight read as a matrix U M Vᵀ, whichever way its pattern writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from frobdecay.weights.forms.cost import cheaper, factors_cheaper
from frobdecay.weights.product_tensor import ProductTensor, folded
from frobdecay.weights.tracing import scripting


class Matrix(NamedTuple):
    """W = U M Vᵀ with U along dimension -2 of the weight and V along dimension -1.

    ``blocks`` is the dimension (-2 or -1) of the weight along which the products of a batch lie
    side by side, as the three of an attention layer's in_proj_weight; None for none.
    """

    U: Tensor
    inner: tuple[Tensor, ...]
    V: Tensor
    blocks: int | None = None

    @property
    def mT(self) -> Matrix:
        """The transposed matrix: V and U exchanged."""
        blocks = None if self.blocks is None else -3 - self.blocks
        return Matrix(self.V, tuple([M.mT for M in reversed(self.inner)]), self.U, blocks)

    def cheaper(self, positions: Callable[[], Any]) -> bool:
        """Whether ``positions`` vectors are multiplied faster with the factors."""
        shape, n = self.U.shape, self.V.shape[-2]
        m, r, b = shape[-2], shape[-1], 1 if self.blocks is None else shape[0]
        dense = b * m * n
        return factors_cheaper(positions, dense=dense, factored=b * r * (m + n), once=dense * r)

    def folded(self, positions: Callable[[], Any]) -> Matrix:
        """Multiply the inner factors into U or V unless the positions are fewer than its rows."""
        if not self.inner:
            return self
        if not scripting():
            short = min(self.U.shape[-2], self.V.shape[-2])
            if cheaper(positions, -1, short):
                return self
        U, V = folded((self.U, *self.inner, self.V))
        return Matrix(U, (), V, self.blocks)


def matrix(weight: ProductTensor) -> Matrix | None:
    """Read a weight as a matrix, or as a batch of them; None where its pattern is neither."""
    view, (U, *inner, V) = weight.matricization, weight.factors
    whole = Matrix(U, tuple(inner), V)
    if view.straight:
        return whole
    batch, dims, rows, columns = view.batch_axes, view.tensor_axes, view.row_axes, view.column_axes
    for W, U_axes, V_axes in ((whole, rows, columns), (whole.mT, columns, rows)):
        if dims == (*((name,) for name in batch), U_axes, V_axes):
            return W
        if len(batch) == 1 and dims == (batch + U_axes, V_axes):
            return W._replace(blocks=-2)
        if len(batch) == 1 and dims == (U_axes, batch + V_axes):
            return W._replace(blocks=-1)
    return None
