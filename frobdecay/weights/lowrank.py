"""``LowRank``: a dense weight is replaced by factors whose product it is, U M.. Vᵀ.

It plugs into ``torch.nn.utils.parametrize``: ``right_inverse`` turns the dense weight into the
factors (U, M.., V), which become the module's parameters ``original0``, ``original1``, …, and
``forward`` turns them into a ``FactoredTensor``, the weight that is never formed where its factors
can be applied one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from frobdecay.algebra.reading import Matricization
from frobdecay.algebra.spectral import (
    INITS,
    Init,
    check_depth,
    plain_rank,
    randomized_init,
    resolve_init,
    resolve_rank,
    spectral_init,
)
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.layouts import NAMED_PATTERNS, default_layout
from frobdecay.weights.parametrization import Recorded, Shapes, recorded


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

    inits: ClassVar[Mapping[str, Init]] = {
        "spectral": spectral_init,
        "randomized": randomized_init,
    }

    def __init__(
        self,
        rank: int | float,
        *,
        pattern: str | None = None,
        axes: Mapping[str, int] | None = None,
        depth: int = 0,
        init: str | Init = "spectral",
    ) -> None:
        check_depth(depth)
        super().__init__(plain_rank(rank), pattern, axes, resolve_init(init))
        self.depth = depth

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make this parametrization again."""
        return {**super().config(), "depth": self.depth}

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

    def ranks(self, sizes: Sequence[int]) -> int:
        """The number of columns for (*batch, m, n)."""
        return resolve_rank(self.rank, *sizes[-2:])

    def shapes(self, sizes: Sequence[int], ranks: int) -> Shapes:
        """Those of U, M.., V."""
        *batch, m, n = sizes
        inner = [(*batch, ranks, ranks)] * self.depth
        return ((*batch, m, ranks), *inner, (*batch, n, ranks))

    @property
    def init_name(self) -> str | None:
        """The initialization's name; None of one of somebody's own."""
        return next((name for name, init in INITS.items() if init is self.init), None)

    @property
    def derives(self) -> bool:
        """Whether ``init`` takes the factors from the weight; one of somebody's own may not."""
        return self.init_name not in (None, "kaiming")

    def _initial(self, init: str | Init, read: Tensor, ranks: int) -> tuple[Tensor, ...]:
        return resolve_init(init)(read, ranks, depth=self.depth)

    def forward(self, *factors: Tensor) -> Tensor:
        """Multiply the factors, as late as possible."""
        view = self.matricization
        if view is None:
            raise RuntimeError("LowRank knows no shape yet; register it on a weight first")
        weight = FactoredTensor(factors, view)
        return weight.materialize() if self.materialized else weight
