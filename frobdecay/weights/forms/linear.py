"""Forms of the functions whose weight is a matrix.

With W = U M Vᵀ, U m×r and V n×r:

x Wᵀ = ((x V) Mᵀ) Uᵀ         x W = ((x U) M) Vᵀ         W x = U (M (Vᵀ x))
"""

# ruff: noqa: A002  arguments have the names of torch's, which may be given by name

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from frobdecay.weights.forms import cost
from frobdecay.weights.forms.cost import factors_cheaper, rows
from frobdecay.weights.forms.matrix import Matrix, matrix
from frobdecay.weights.forms.table import form
from frobdecay.weights.product_tensor import ProductTensor, folded


def _times_transposed(x: Tensor, W: Matrix, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + bias."""
    W = W.folded(rows(x))
    if W.blocks is not None:
        return _blockwise(x, W, bias)
    x = _hidden(x, W)
    return F.linear(x, W.U, bias) if W.U.ndim == 2 else x @ W.U.mT


def _blockwise(x: Tensor, W: Matrix, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + bias where W is a row or a column of b products, as b products at once."""
    U, blocks = W.U, W.blocks
    (b, m, r), lead = U.shape, x.shape[:-1]
    x = x.flatten(end_dim=-2) if x.ndim > 1 else x.unsqueeze(0)
    if blocks == -1:
        x = x.unflatten(-1, (b, W.V.shape[-2])).transpose(0, 1)  # type: ignore[no-untyped-call]
    x = _hidden(x, W)
    if blocks == -1:
        x = x.transpose(0, 1).flatten(start_dim=1)
        return F.linear(x, U.transpose(0, 1).reshape(m, b * r), bias).reshape(*lead, m)
    x = (x @ U.mT).transpose(0, 1).reshape(*lead, b * m)
    return x if bias is None else x + bias


def _hidden(x: Tensor, W: Matrix) -> Tensor:
    """Compute x V Mᵀ."""
    # x V and not linear(x, Vᵀ), which would make the gradient of V strided.
    return reduce(lambda h, M: h @ M.mT, reversed(W.inner), x @ W.V)


def _inner_times(W: Matrix, x: Tensor) -> Tensor:
    """Compute M Vᵀ x."""
    return reduce(lambda h, M: M @ h, reversed(W.inner), W.V.mT @ x)


@form(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, ProductTensor) or isinstance(input, ProductTensor):
        return NotImplemented
    if weight.direct and cost.forced is not False:  # what follows says so, too, in more calls
        U, V = weight.factors
        return F.linear(input @ V, U, bias)
    W = matrix(weight)
    if W is None or (W.U.ndim > 2 and W.blocks is None) or not W.cheaper(rows(input)):
        return NotImplemented
    return _times_transposed(input, W, bias)


@form(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _matmul(input: Any, other: Any, **others: Any) -> Any:
    if others or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    if isinstance(input, ProductTensor):
        return _from_right(input, other)
    return _from_left(input, other)


def _from_left(x: Tensor, weight: Any) -> Any:
    """X W."""
    W = matrix(weight)
    if W is None or (x.ndim < 2 and W.U.ndim > 2 and W.blocks is None) or not x.ndim:
        return NotImplemented
    return _times_transposed(x, W.mT) if W.cheaper(rows(x)) else NotImplemented


def _from_right(weight: ProductTensor, x: Tensor) -> Any:
    """W x."""
    x = x.materialize() if isinstance(x, ProductTensor) else x
    W = matrix(weight)
    if W is None or W.blocks is not None or not x.ndim or (x.ndim < 2 and W.U.ndim > 2):
        return NotImplemented

    def columns() -> Any:
        return x.numel() // max(x.shape[-2], 1) if x.ndim > 1 else 1

    if not W.cheaper(columns):
        return NotImplemented
    W = W.folded(columns)
    return W.U @ _inner_times(W, x)


@form(torch.mm, Tensor.mm)
def _mm(input: Tensor, mat2: Tensor, **others: Any) -> Any:
    return _matmul(input, mat2, **others) if input.ndim == mat2.ndim == 2 else NotImplemented


@form(torch.bmm, Tensor.bmm)
def _bmm(input: Tensor, mat2: Tensor, **others: Any) -> Any:
    fits = input.ndim == mat2.ndim == 3 and input.shape[0] == mat2.shape[0]
    return _matmul(input, mat2, **others) if fits else NotImplemented


@form(torch.mv, Tensor.mv)
def _mv(input: Tensor, vec: Tensor, **others: Any) -> Any:
    return _matmul(input, vec, **others) if input.ndim == 2 and vec.ndim == 1 else NotImplemented


@form(Tensor.__rmatmul__)
def _reversed_matmul(input: Tensor, other: Any) -> Any:
    return _matmul(other, input)


@form(torch.addmm, Tensor.addmm)
def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1, **others: Any
) -> Any:
    if others or isinstance(input, ProductTensor) or mat1.ndim != 2 or mat2.ndim != 2:
        return NotImplemented
    if isinstance(mat1, ProductTensor) and isinstance(mat2, ProductTensor):
        mat2 = mat2.materialize()
    weight, x = (mat1, mat2) if isinstance(mat1, ProductTensor) else (mat2, mat1.mT)
    if not isinstance(weight, ProductTensor) or (W := matrix(weight)) is None:
        return NotImplemented
    if W.blocks is not None or not W.cheaper(lambda: x.shape[-1]):
        return NotImplemented
    if weight is mat1:
        W = W.folded(lambda: x.shape[-1])
        return torch.addmm(input, W.U, _inner_times(W, x), beta=beta, alpha=alpha)
    U, V = folded((W.U, *W.inner, W.V))
    return torch.addmm(input, mat1 @ U, V.mT, beta=beta, alpha=alpha)


@form(torch._grouped_mm)
def _grouped_mm(input: Tensor, mat2: Tensor, *others: Any, **options: Any) -> Any:
    """Rows of x in groups, each group times its own matrix: x W = (x U) Vᵀ."""
    if not isinstance(mat2, ProductTensor) or isinstance(input, ProductTensor) or others:
        return NotImplemented
    W = matrix(mat2)
    if W is None or W.blocks is not None or W.U.ndim != 3 or input.ndim != 2:
        return NotImplemented
    # The kernel's rule for rows, which those of x U have to obey too.
    if W.U.shape[-1] * W.U.itemsize % 16 or not W.cheaper(lambda: len(input) // len(W.U)):
        return NotImplemented
    U, V = folded((W.U, *W.inner, W.V))
    hidden = torch._grouped_mm(input, U, offs=options.get("offs"))
    return torch._grouped_mm(hidden, V.mT, **options)


@form(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    _refuse_row_updates(max_norm, sparse)
    if scale_grad_by_freq or (W := _table(weight, input)) is None:
        return NotImplemented
    U, inner, V, _ = W.folded(input.numel)
    out = F.linear(reduce(torch.matmul, inner, F.embedding(input, U)), V)
    if padding_idx is not None:
        # Every row's gradient reaches V, also that of the padding row, which must have none.
        keep = input != padding_idx % len(U)
        out = torch.where(keep.unsqueeze(-1), out, out.detach())
    return out


@form(F.embedding_bag)
def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    _refuse_row_updates(max_norm, sparse)
    if scale_grad_by_freq or mode == "max" or (W := _table(weight, input)) is None:
        return NotImplemented
    U, V = folded((W.U, *W.inner, W.V))
    # Sums and means of rows commute with Vᵀ.
    bags = F.embedding_bag(
        input,
        U,
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )
    return F.linear(bags, V)


def _table(weight: Tensor, ids: Tensor) -> Matrix | None:
    """The matrix whose rows are looked up, None if not on the factors."""
    if not isinstance(weight, ProductTensor):
        return None
    W = matrix(weight)
    if W is None or W.blocks is not None or W.U.ndim != 2:
        return None
    (m, r), n = W.U.shape, W.V.shape[0]
    pays = factors_cheaper(ids.numel, dense=n, factored=r * (n + 1), once=m * n * r)
    return W if pays else None


def _refuse_row_updates(max_norm: float | None, sparse: bool) -> None:
    if max_norm is not None:
        raise RuntimeError(
            f"expected max_norm=None for a factored embedding, got {max_norm}: it rescales rows of "
            "the weight in place, and the factors have no rows of their own to rescale; merge the "
            "embedding or leave it dense"
        )
    if sparse:
        raise RuntimeError(
            "expected sparse=False for a factored embedding, got sparse=True: the gradient of a "
            "row reaches all rows of V; set sparse=False or leave the embedding dense"
        )


@form(torch._cudnn_rnn_flatten_weight)
def _flatten_recurrent_weights(*args: Any, **kwargs: Any) -> None:
    """Nothing: recurrent weights that are made anew at each access have no buffer to share."""
