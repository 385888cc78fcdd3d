"""A fixed matrix plus low-rank products: W = W₀ + Σ s_k U_k V_kᵀ, the weight that adapters train.

With U = [s₁U₁ s₂U₂ …] and V = [V₁ V₂ …] side by side, W = W₀ + U Vᵀ and

    ‖W‖_F² = ‖W₀‖² + 2⟨W₀V, U⟩ + ⟨UᵀU, VᵀV⟩
    ∇_U ½‖W‖² = W₀V + U (VᵀV)        ∇_V ½‖W‖² = W₀ᵀU + V (UᵀU)        ∇_{W₀} ½‖W‖² = W

so that the gradients of the adapters cost two products of W₀ with a tall matrix, and neither W nor
anything else of its size is formed; except where W₀ itself is trained, whose gradient is W. W₀ is
read where it is: one in half precision is cast block by block, and summed up in float32.

Tensors are (*batch, rows, columns), W₀ first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from frobdecay.algebra.lowering import times_rows
from frobdecay.algebra.precision import Coefficient, Views, common_dtype, scaled
from frobdecay.algebra.scaling import shortened

BLOCK = 1 << 22
"""Entries of W₀ that are cast at once: 16 MB of float32."""


@dataclass(frozen=True)
class Shifted:
    """W = W₀ + Σ s_k U_k V_kᵀ, of the factors W₀ (*batch, m, n), U₁, V₁, U₂, V₂, ….

    Examples:
        >>> import torch
        >>> from frobdecay.product.product import Product, product_norm
        >>> W0, B, A = torch.eye(4), torch.ones(4, 1), torch.ones(4, 1)
        >>> product = Product.of(W0, B, A, structure=Shifted((0.5,)))
        >>> torch.allclose(product_norm(product), torch.linalg.norm(W0 + 0.5 * B @ A.T))
        True

    W₀ is a factor like the others: frozen, it is a constant in the product; trained, it decays to
    zero along with the rest. Nothing of it is kept, so that it may change from step to step.

    Attributes:
        scales: s_k, one a pair U_k (*batch, m, r_k), V_k (*batch, n, r_k); LoRA's α/r.
    """

    scales: tuple[float, ...]
    name: str = "shifted"
    is_chain: ClassVar[bool] = False

    def check(self, name: str, views: Views, batch: int) -> None:
        """One W₀, then as many tall pairs as scales, all for the same m×n."""
        shapes = [tuple(view.shape) for view in views]
        pairs = len(self.scales)
        if not pairs or len(views) != 1 + 2 * pairs:
            raise ValueError(
                f"{name}: expected W₀ and {pairs} pairs, one or more, as there are scales, got "
                f"{len(views)} factors"
            )
        if any(len(shape) != batch + 2 for shape in shapes):
            raise ValueError(
                f"{name}: expected factors with {batch} batch axes and a matrix, got {shapes}"
            )
        *outer, m, n = shapes[0]
        for u, v in zip(shapes[1::2], shapes[2::2], strict=True):
            if u != (*outer, m, u[-1]) or v != (*outer, n, u[-1]):
                raise ValueError(
                    f"{name}: the shapes {shapes} do not fit; expected W₀ (*batch, m, n), then U "
                    "(*batch, m, r) and V (*batch, n, r) of each pair, both tall"
                )

    def shape(self, views: Views, batch: int) -> tuple[int, ...]:
        """That of W₀."""
        return tuple(views[0].shape)

    def rank(self, views: Views, batch: int) -> int:
        """The rank of what is added to W₀: Σ r_k."""
        return sum(view.shape[-1] for view in views[1::2])

    def squared_norm(self, views: Views, batch: int) -> Tensor:
        """From W₀V and the Grams."""
        base, u, v = self._joined(views)
        short = [shortened(block, u.dtype) for block in _blocks(base)]
        norms = [torch.linalg.vector_norm(block, dtype=u.dtype) for block in short]
        own = torch.stack(norms).square().sum()
        return own + 2 * (_times(base, v) * u).sum() + (times_rows(u, u) * times_rows(v, v)).sum()

    def gradients(
        self, views: Views, batch: int, coefs: Sequence[Coefficient | None]
    ) -> list[Tensor | None]:
        """W V for U, Wᵀ U for V, and W for W₀ where it is wanted."""
        base, u, v = self._joined(views)
        ranks = [view.shape[-1] for view in views[1::2]]
        found = [None if coefs[0] is None else scaled(base + u @ v.mT, coefs[0])]
        lefts: Sequence[Tensor] = ()
        rights: Sequence[Tensor] = ()
        if any(coef is not None for coef in coefs[1::2]):
            lefts = torch.split(_times(base, v) + u @ times_rows(v, v), ranks, dim=-1)
        if any(coef is not None for coef in coefs[2::2]):
            rights = torch.split(_times(base.mT, u) + v @ times_rows(u, u), ranks, dim=-1)
        for k, scale in enumerate(self.scales):
            left, right = coefs[1 + 2 * k], coefs[2 + 2 * k]
            found.append(None if left is None else scaled(lefts[k] * scale, left))
            found.append(None if right is None else scaled(rights[k], right))
        return found

    def materialize(self, views: Views, batch: int) -> Tensor:
        """Form W₀ + U Vᵀ."""
        base, u, v = self._joined(views)
        return base + u @ v.mT

    def route(self, views: Views, batch: int) -> str:
        """Always Grams: of the size of W there is nothing but W₀."""
        return "gram"

    def describe(self, views: Views, batch: int) -> str:
        """What is done, in words."""
        return "W₀V + U (VᵀV) and W₀ᵀU + V (UᵀU)"

    def _joined(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """W₀ as it is, and U with its scales and V side by side, at least float32."""
        dtype = common_dtype(views)
        pairs = zip(self.scales, views[1::2], strict=True)
        u = torch.cat([scale * view.to(dtype) for scale, view in pairs], dim=-1)
        return views[0], u, torch.cat([view.to(dtype) for view in views[2::2]], dim=-1)


def _blocks(matrix: Tensor) -> Sequence[Tensor]:
    """Split along the first axis into pieces of ``BLOCK`` entries, or single ones if larger."""
    return torch.split(matrix, max(1, BLOCK // max(1, prod(matrix.shape[1:]))))


class _Times(Function):
    """W X without a copy of W, in either direction and any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, x: Tensor) -> Tensor:
        """Multiply block by block, in the dtype of X."""
        blocks = _blocks(matrix)
        xs = torch.split(x, len(blocks[0])) if matrix.ndim > 2 else [x] * len(blocks)
        return torch.cat([block.to(x.dtype) @ part for block, part in zip(blocks, xs, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep what is there anyway."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        """G Xᵀ for W, where W is trained, and Wᵀ G for X."""
        matrix, x = ctx.saved_tensors
        own = grads[0] @ x.mT if ctx.needs_input_grad[0] else None
        return None if own is None else own.to(matrix.dtype), _times(matrix.mT, grads[0])


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    if matrix.dtype == x.dtype:
        return matrix @ x
    product: Tensor = _Times.apply(matrix, x)  # type: ignore[no-untyped-call]
    return product
