"""What parametrizations by a tensor decomposition have in common.

A weight is read as a tensor with d modes (``algebra/tensorize.py``) and replaced by the factors of
a spectral initialization (``algebra/decompositions.py``). Where the modes can be cut into the two
sides of a layer, as those of ``"o i kh kw -> o i (kh kw)"``, the product is a matrix L Rᵀ, and the
forward pass is that of a low-rank weight, a ``FactoredTensor``: two layers, or the dense weight
where that is cheaper. Otherwise, as for "flat", each forward pass forms the dense weight.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from frobdecay.algebra.precision import full_precision
from frobdecay.algebra.reading import Matricization
from frobdecay.algebra.scaling import root_mean_square
from frobdecay.algebra.tensorize import FLAT, Rank, Tensorization, plain_ranks
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.parametrization import Recorded
from frobdecay.weights.tracing import scripting

Stages = tuple[Tensor, Tensor, Tensor]
Init = Callable[[Tensor, Any], tuple[Tensor, ...]]
"""``init(tensor, ranks)`` -> factors, for a tensor (n_1, …, n_d)."""


class Tensorized(Recorded):
    """What the three have in common; a subclass says what ranks, shapes and products are.

    Args:
        rank: one for all, an int or a fraction, or several, see the subclass.
        pattern: how the weight is read as a tensor: an einops pattern with the modes on its right
            side, or "flat". By default a weight with three axes or more keeps them, the kernel's
            as one mode, and every other one is read "flat".
        axes: lengths that the pattern needs.
        modes: how many modes "flat" makes.
        init: "spectral", or another key of ``inits``, or a callable ``init(tensor, ranks)``.

    Raises:
        TypeError, ValueError: a rank, a number of modes or an initialization that is none.
    """

    inits: ClassVar[Mapping[str, Init]]

    def __init__(
        self,
        rank: Rank,
        *,
        pattern: str | None = None,
        axes: Mapping[str, int] | None = None,
        modes: int = 3,
        init: str | Init = "spectral",
    ) -> None:
        if isinstance(modes, bool) or not isinstance(modes, int) or modes < 2:
            raise ValueError(f"expected modes to be an int of at least 2, got {modes!r}")
        named = {"matched", *self.inits}
        if not callable(init) and not (isinstance(init, str) and init in named):
            raise ValueError(
                f"expected init of {type(self).__name__} to be one of {sorted(named)} or a "
                f"callable, got {init!r}"
            )
        super().__init__(plain_ranks(rank), pattern, axes, init)
        if not isinstance(self.rank, tuple):
            self.ranks((2, 2))  # refuses what is no rank
        self.modes = modes
        self.cut: tuple[int, Matricization] | None = None

    # --- what a subclass says, besides ranks, shapes and structure --------------------------------

    @abstractmethod
    def bond(self, ranks: Any, cut: int) -> int:
        """Columns of L and R behind the first ``cut`` modes."""

    @abstractmethod
    def sides(self, factors: Sequence[Tensor], cut: int) -> tuple[Tensor, Tensor]:
        """The tensor as a matrix L Rᵀ whose rows are the first ``cut`` modes."""

    # --- what ``factorize``, ``merge`` and files ask for ------------------------------------------

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make this parametrization again."""
        return {**super().config(), "modes": self.modes}

    @property
    def init_name(self) -> str | None:
        """The initialization's name; None of one of somebody's own."""
        return None if callable(self.init) else self.init

    def matricize(self, shape: tuple[int, ...]) -> Tensorization:
        """Fit the pattern to a weight's shape.

        Raises:
            ValueError: the pattern does not fit, or the weight's entries make no modes.
        """
        pattern = self.pattern
        if pattern is None:
            own = [name for name, n in zip("oi", shape, strict=False) if n > 1]
            kernel = [f"k{i}" for i in range(len(shape) - 2)]
            keeps = len(own) == 2 and prod(shape[2:]) > 1
            left, last = " ".join(["o", "i", *kernel]), " ".join(kernel)
            pattern = f"{left} -> o i ({last})" if keeps else FLAT
        return Tensorization.of(pattern, tuple(shape), self.axes, self.modes)

    def adopt(self, shape: tuple[int, ...]) -> None:
        """Take the shape of the dense weight, without a weight, and choose a cut.

        Raises:
            ValueError: it cannot be factorized, or another shape was adopted before.
        """
        if self.shape is None:
            self.cut = self._cheapest_cut(self.matricize(shape))
        super().adopt(shape)

    def _cheapest_cut(self, view: Tensorization) -> tuple[int, Matricization] | None:
        """The cut with the smallest L and R; None where the dense weight is smaller than those."""
        ranks, least, found = self.ranks(view.modes), prod(view.shape), None
        for k, matricization in view.cuts():
            size = self.bond(ranks, k) * (matricization.rows + matricization.columns)
            if size < least:
                least, found = size, (k, matricization)
        return found

    def _initial(self, init: str | Init, read: Tensor, ranks: Any) -> tuple[Tensor, ...]:
        made = init if callable(init) else {"matched": self._matched, **self.inits}[init]
        return made(read, ranks)

    def _matched(self, tensor: Tensor, ranks: Any) -> tuple[Tensor, ...]:
        """Gaussian factors whose product's entries have the tensor's mean square."""
        factors = tuple(map(tensor.new_empty, self.shapes(tensor.shape, ranks)))
        network = self.structure(tensor.shape, ranks)
        lengths = network.sizes(factors, 0)
        # So many products of factors' entries add up to one of the tensor's.
        paths = prod(lengths[c] for c in network.bonds)
        std = (root_mean_square(tensor) / paths**0.5) ** (1 / len(factors))
        return tuple(factor.normal_(0, std) for factor in factors)

    def forward(self, *factors: Tensor) -> Tensor:
        """Multiply the factors, as late as possible."""
        view: Tensorization = self._known()
        with full_precision(factors[0].device.type):
            # A trace would record the arithmetic of L's and R's shapes, and warn of it.
            if self.cut is None or scripting():
                return view.back(self.dense(factors))
            k, matricization = self.cut
            weight = FactoredTensor(self.sides(factors, k), matricization)
            if not torch.compiler.is_compiling():
                # No gradient goes through what was made under no_grad.
                held = [f.detach() for f in factors] if weight.constant else factors
                weight.stages = self.stages(held)
            return weight.materialize() if self.materialized else weight

    def stages(self, factors: Sequence[Tensor]) -> Stages | None:
        """U (out, r), kernel (r, s, …) and V (in, s) where the weight is three convolutions'."""
        return None

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """Multiply the factors to a tensor (n_1, …, n_d) of their own dtype."""
        modes = self._known().modes
        ranks = self.ranks(modes)
        cuts = range(1, len(modes))
        sizes = [(self.bond(ranks, k), prod(modes[:k]) + prod(modes[k:]), k) for k in cuts]
        L, R = self.sides(factors, min(sizes)[-1])  # of least rank, then with the least entries
        return (L @ R.mT).reshape(modes)
