"""``LowRank``: a dense weight is replaced by factors whose product it is, U M.. Vᵀ.

It plugs into ``torch.nn.utils.parametrize``: ``right_inverse`` turns the dense weight into the
factors (U, M.., V), which become the module's parameters ``original0``, ``original1``, …, and
``forward`` turns them into a ``FactoredTensor``, the weight that is never formed where its factors
can be applied one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.algebra.reading import Matricization, plain_axes
from frobdecay.algebra.scaling import check_not_zero, check_weight
from frobdecay.algebra.spectral import (
    INITS,
    Init,
    check_depth,
    kaiming_init,
    plain_rank,
    randomized_init,
    resolve_init,
    resolve_rank,
    spectral_init,
)
from frobdecay.product.factor import Factor
from frobdecay.product.find import VERSION
from frobdecay.product.product import Product
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.layouts import NAMED_PATTERNS, default_layout
from frobdecay.weights.parametrization import Recorded, check_same_shape, recorded


@recorded
class LowRank(Recorded):
    """Parametrize a weight as W = U M₁ … M_d Vᵀ, spectrally initialized from the dense weight.

    Examples:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> layer = torch.nn.Linear(12, 8)
        >>> _ = parametrize.register_parametrization(layer, "weight", LowRank(2))
        >>> [tuple(p.shape) for p in layer.parametrizations.weight.parameters()]
        [(8, 2), (12, 2)]

    U (m×r) and V (n×r) are both stored tall and contiguous; a weight that is read as a batch of
    matrices (groups of a convolution, blocks of an attention) has a leading batch axis.
    Assigning to the weight factorizes the new value at the same rank.

    Args:
        rank: r, an int or a float fraction of min(m, n); more than min(m, n) is overcomplete.
        pattern: how the weight is read as a matrix, an einops pattern such as
            ``"o i kh kw -> o (i kh kw)"``; by default by the number of dimensions, convolutions
            spatially (``"o i kh kw -> (o kh) (i kw)"``), but where that cannot pay at any rank,
            as for k×1 kernels on one channel, by the first split of ``o, kh, kw`` that can.
            "channel" is that first pattern in as many dimensions as needed, "spatial" the default
            whether it can pay or not.
        axes: lengths that the pattern needs, such as ``{"g": 4}`` for ``"(g o) i -> g o i"``.
        depth: number d of inner factors M (r×r), the identity at first.
        init: "spectral", or another of ``INITS`` in ``algebra/spectral.py``, or a callable.

    Raises:
        TypeError, ValueError: a rank, depth or initialization that is none.
    """

    def __init__(
        self,
        rank: int | float,
        *,
        pattern: str | None = None,
        axes: Mapping[str, int] | None = None,
        depth: int = 0,
        init: str | Init = "spectral",
    ) -> None:
        super().__init__()
        rank = plain_rank(rank)
        check_depth(depth)
        self.rank, self.depth = rank, depth
        self.pattern, self.axes = pattern, dict(axes or {})
        self.init = resolve_init(init)
        self.matricization: Matricization | None = None
        self.materialized = False
        self.order: tuple[str, ...] = ()  # the module's parameters while dense, for merge

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the dense weight, once it is known."""
        return None if self.matricization is None else self.matricization.shape

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make this parametrization again.

        The rank as a number of columns and the pattern itself, once the shape is known. An
        initialization of one's own has no name and is left out.
        """
        view = self.matricization
        rank = self.rank if view is None else resolve_rank(self.rank, view.rows, view.columns)
        config: dict[str, Any] = {
            "rank": rank,
            "pattern": self.pattern if view is None else view.pattern,
            "axes": plain_axes(self.axes),
            "depth": self.depth,
        }
        names = [name for name, init in INITS.items() if init is self.init]
        return {**config, "init": names[0]} if names else config

    def matricize(self, shape: tuple[int, ...]) -> Matricization:
        """Fit the pattern to a weight's shape.

        Raises:
            ValueError: the pattern does not fit, or the shape needs one.
        """
        pattern = self.pattern
        if pattern is None or pattern in NAMED_PATTERNS:
            layout = default_layout(len(shape))
            if layout is None:
                raise ValueError(
                    f"expected a weight with 2 to 5 dimensions, got shape {tuple(shape)}; "
                    "give LowRank a pattern that reads it as a matrix"
                )
            pattern = layout.reading(pattern, shape)
        return Matricization.of(pattern, tuple(shape), self.axes)

    def resolve(self, shape: tuple[int, ...]) -> int:
        """The rank in numbers of columns for a weight of this shape."""
        view = self.matricize(shape)
        return resolve_rank(self.rank, view.rows, view.columns)

    def factor_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of U, M.., V for a weight of this shape, from the shape alone."""
        view = self.matricize(shape)
        r = resolve_rank(self.rank, view.rows, view.columns)
        inner = [(*view.batch, r, r)] * self.depth
        return ((*view.batch, view.rows, r), *inner, (*view.batch, view.columns, r))

    def adopt(self, shape: tuple[int, ...]) -> None:
        """Take the shape of the dense weight, without a weight.

        Raises:
            ValueError: it cannot be factorized, or another shape was adopted before.
        """
        known = self.matricization
        if known is None:
            self.matricization = self.matricize(shape)
            VERSION.value += 1
        else:
            check_same_shape(known.shape, shape)

    @property
    def derives(self) -> bool:
        """Whether ``init`` takes the factors from the weight; one of somebody's own may not."""
        return self.init in INITS.values() and self.init is not kaiming_init

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Factorize a weight that is to be kept: its spectral factors, whatever ``init`` is.

        Only "randomized", which approximates the weight as well, stays what it is.

        Raises:
            TypeError, ValueError: a weight that cannot be factorized.
        """
        init = self.init if self.init is randomized_init else spectral_init
        return self._factorize(weight, init, derives=True)

    def _factorize(self, weight: Tensor, init: Init, derives: bool) -> tuple[Tensor, ...]:
        check_weight(weight)
        shape = tuple(weight.shape)
        if self.matricization is not None:
            self.adopt(shape)  # refuses another one
        view = self.matricization or self.matricize(shape)
        rank = resolve_rank(self.rank, view.rows, view.columns)
        matrix = view.matrix(weight.detach())
        if derives:
            check_not_zero(matrix, len(view.batch))
        return self._adopted(
            weight, lambda: init(matrix, rank, depth=self.depth), self.factor_shapes(shape)
        )

    def forward(self, *factors: Tensor) -> Tensor:
        """Multiply the factors, as late as possible."""
        view = self.matricization
        if view is None:
            raise RuntimeError("LowRank knows no shape yet; register it on a weight first")
        weight = FactoredTensor(factors, view)
        return weight.materialize() if self.materialized else weight

    def product(self, name: str, parameters: nn.Module) -> Product:
        """Record the product of the factors that a ``ParametrizationList`` holds.

        Args:
            name: the dense weight's qualified name.
            parameters: the list, ``module.parametrizations[tensor_name]``.
        """
        view = self.matricization
        if view is None:
            raise RuntimeError(f"{name}: LowRank knows no shape yet; register it on a weight first")
        factors = (Factor(parameters, f"original{i}") for i in range(self.depth + 2))
        return Product(name, tuple(factors), batch=len(view.batch))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        view = self.matricization
        if view is None:
            return f"rank={self.rank}, depth={self.depth}"
        shapes = self.factor_shapes(view.shape)
        factors = " · ".join("×".join(map(str, shape)) for shape in shapes)
        return f"{view.pattern!r}, {factors}, kept {sum(map(prod, shapes)) / prod(view.shape):.3g}"
