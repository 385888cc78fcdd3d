"""What parametrizations by a tensor decomposition have in common.

A weight is read as a tensor with d modes (``algebra/tensorize.py``) and replaced by the factors of
a spectral initialization (``algebra/decompositions.py``). Where the modes can be cut into the two
sides of a layer, as those of ``"o i kh kw -> o i (kh kw)"``, the product is a matrix L Rᵀ, and the
forward pass is that of a low-rank weight, a ``FactoredTensor``: two layers, or the dense weight
where that is cheaper. Otherwise, as for "flat", each forward pass forms the dense weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from frobdecay.algebra.network import Network
from frobdecay.algebra.precision import full_precision
from frobdecay.algebra.reading import Matricization, plain_axes
from frobdecay.algebra.scaling import check_not_zero, check_weight, root_mean_square
from frobdecay.algebra.tensorize import FLAT, Rank, Tensorization, plain_ranks
from frobdecay.product.factor import Factor
from frobdecay.product.find import VERSION
from frobdecay.product.product import Product
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.parametrization import Recorded, Shapes, check_same_shape

Stages = tuple[Tensor, Tensor, Tensor]
Init = Callable[[Tensor, Any], tuple[Tensor, ...]]
"""``init(tensor, ranks)`` -> factors, for a tensor (n_1, …, n_d)."""


class Tensorized(Recorded, ABC):
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
        super().__init__()
        if isinstance(modes, bool) or not isinstance(modes, int) or modes < 2:
            raise ValueError(f"expected modes to be an int of at least 2, got {modes!r}")
        named = {"matched": self._matched, **self.inits}
        if not callable(init) and not (isinstance(init, str) and init in named):
            raise ValueError(
                f"expected init of {type(self).__name__} to be one of {sorted(named)} or a "
                f"callable, got {init!r}"
            )
        self.rank = plain_ranks(rank)
        if not isinstance(self.rank, tuple):
            self.ranks((2, 2))  # refuses what is no rank
        self.pattern, self.axes, self.modes = pattern, dict(axes or {}), modes
        self.init = init
        self.view: Tensorization | None = None
        self.cut: tuple[int, Matricization] | None = None
        self.materialized = False
        self.order: tuple[str, ...] = ()  # the module's parameters while dense, for merge

    # --- what a subclass says ---------------------------------------------------------------------

    @abstractmethod
    def ranks(self, modes: Sequence[int]) -> Any:
        """The rank for these modes, in numbers of columns."""

    @abstractmethod
    def shapes(self, modes: Sequence[int], ranks: Any) -> Shapes:
        """Shapes of the factors."""

    @abstractmethod
    def structure(self, modes: Sequence[int], ranks: Any) -> Network:
        """How the factors combine."""

    @abstractmethod
    def bond(self, ranks: Any, cut: int) -> int:
        """Columns of L and R behind the first ``cut`` modes."""

    @abstractmethod
    def sides(self, factors: Sequence[Tensor], cut: int) -> tuple[Tensor, Tensor]:
        """The tensor as a matrix L Rᵀ whose rows are the first ``cut`` modes."""

    @abstractmethod
    def paths(self, modes: Sequence[int], ranks: Any) -> int:
        """How many products of factors' entries add up to one of the tensor's."""

    # --- what ``factorize``, ``merge`` and files ask for ------------------------------------------

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the dense weight, once it is known."""
        return None if self.view is None else self.view.shape

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make this parametrization again, ranks as plain numbers."""
        rank: Any = self.rank if self.view is None else self.ranks(self.view.modes)
        config: dict[str, Any] = {
            "rank": list(rank) if isinstance(rank, tuple) else rank,
            "pattern": self.pattern if self.view is None else self.view.pattern,
            "axes": plain_axes(self.axes),
            "modes": self.modes,
        }
        return config if callable(self.init) else {**config, "init": self.init}

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

    def resolve(self, shape: tuple[int, ...]) -> Any:
        """The rank for a weight of this shape, in numbers of columns."""
        return self.ranks(self.matricize(shape).modes)

    def factor_shapes(self, shape: tuple[int, ...]) -> Shapes:
        """Shapes of the factors for a weight of this shape, from the shape alone."""
        modes = self.matricize(shape).modes
        return self.shapes(modes, self.ranks(modes))

    def adopt(self, shape: tuple[int, ...]) -> None:
        """Take the shape of the dense weight, without a weight.

        Raises:
            ValueError: it cannot be factorized, or another shape was adopted before.
        """
        if self.view is None:
            view = self.matricize(shape)
            self.cut = self._cheapest_cut(view)
            self.view = view
            VERSION.value += 1
        else:
            check_same_shape(self.view.shape, shape)

    def _cheapest_cut(self, view: Tensorization) -> tuple[int, Matricization] | None:
        """The cut with the smallest L and R; None where the dense weight is smaller than those."""
        ranks, least, found = self.ranks(view.modes), prod(view.shape), None
        for k, matricization in view.cuts():
            size = self.bond(ranks, k) * (matricization.rows + matricization.columns)
            if size < least:
                least, found = size, (k, matricization)
        return found

    @property
    def derives(self) -> bool:
        """Whether ``init`` takes the factors from the weight; one of somebody's own may not."""
        return not callable(self.init)

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Factorize a weight that is to be kept: by a decomposition, whatever ``init`` is.

        Raises:
            TypeError, ValueError: a weight that cannot be factorized.
        """
        init = self.init if self.init in self.inits else "spectral"
        return self._factorize(weight, init, derives=True)

    def _factorize(self, weight: Tensor, init: str | Init, derives: bool) -> tuple[Tensor, ...]:
        check_weight(weight)
        if derives:
            check_not_zero(weight)
        shape = tuple(weight.shape)
        if self.view is not None:
            self.adopt(shape)  # refuses another one
        view = self.view or self.matricize(shape)
        ranks = self.ranks(view.modes)
        made = init if callable(init) else {"matched": self._matched, **self.inits}[init]
        return self._adopted(
            weight,
            lambda: made(view.tensor(weight.detach()), ranks),
            self.shapes(view.modes, ranks),
        )

    def _matched(self, tensor: Tensor, ranks: Any) -> tuple[Tensor, ...]:
        """Gaussian factors whose product's entries have the tensor's mean square."""
        shapes = self.shapes(tuple(tensor.shape), ranks)
        size = root_mean_square(tensor) / self.paths(tuple(tensor.shape), ranks) ** 0.5
        std = size ** (1 / len(shapes))
        return tuple(tensor.new_empty(shape).normal_(0, std) for shape in shapes)

    def forward(self, *factors: Tensor) -> Tensor:
        """Multiply the factors, as late as possible."""
        view = self._known()
        with full_precision(factors[0].device.type):
            # A trace would record the arithmetic of L's and R's shapes, and warn of it.
            if self.cut is None or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
                return view.weight(self.dense(factors))
            k, matricization = self.cut
            weight = FactoredTensor(self.sides(factors, k), matricization)
            if not torch.compiler.is_compiling():
                stages = self.stages(factors)
                weight.stages = _detached(stages) if stages and weight.constant else stages
            return weight.materialize() if self.materialized else weight

    def stages(self, factors: Sequence[Tensor]) -> Stages | None:
        """U (out, r), kernel (r, s, …) and V (in, s) where the weight is three convolutions'."""
        return None

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """Multiply the factors to a tensor (n_1, …, n_d) of their own dtype."""
        modes = self._known().modes
        ranks = self.ranks(modes)
        cut = narrowest(modes, [self.bond(ranks, k) for k in range(1, len(modes))])
        L, R = self.sides(factors, cut)
        return (L @ R.mT).reshape(modes)

    def product(self, name: str, parameters: nn.Module) -> Product:
        """Record the product of the factors that a ``ParametrizationList`` holds.

        Args:
            name: the dense weight's qualified name.
            parameters: the list, ``module.parametrizations[tensor_name]``.
        """
        modes = self._known().modes
        ranks = self.ranks(modes)
        count = len(self.shapes(modes, ranks))
        factors = tuple(Factor(parameters, f"original{i}") for i in range(count))
        return Product(name, factors, structure=self.structure(modes, ranks))

    def _known(self) -> Tensorization:
        if self.view is None:
            kind = type(self).__name__
            raise RuntimeError(f"{kind} knows no shape yet; register it on a weight first")
        return self.view

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        if self.view is None:
            return f"rank={self.rank}"
        shapes = self.factor_shapes(self.view.shape)
        factors = " · ".join("×".join(map(str, shape)) for shape in shapes)
        kept = sum(map(prod, shapes)) / prod(self.view.shape)
        modes = "×".join(map(str, self.view.modes))
        return f"{self.view.pattern!r}, {modes}, {factors}, kept {kept:.3g}"


def _detached(stages: Stages) -> Stages:
    """As factors made under no_grad: no gradient goes through them."""
    out, core, into = stages
    return out.detach(), core.detach(), into.detach()


def narrowest(dims: Sequence[int], ranks: Sequence[int]) -> int:
    """The number of modes after which to cut a tensor into L Rᵀ: least rank, then least entries.

    Args:
        dims: sizes of the modes.
        ranks: columns of L and R, cut after 1, …, d − 1 modes.
    """

    def cost(k: int) -> tuple[int, int]:
        return ranks[k - 1], prod(dims[:k]) + prod(dims[k:])

    return min(range(1, len(dims)), key=cost)
