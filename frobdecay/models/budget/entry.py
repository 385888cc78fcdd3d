"""A weight on its way into the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from frobdecay.algebra.calibrated.truncation import Metric
from frobdecay.algebra.reading import Matricization
from frobdecay.algebra.spectral import Init
from frobdecay.algebra.tensorize import Rank, Tensorization
from frobdecay.models.budget.spectra import first_reaching, shares, singular_values
from frobdecay.models.plan import PlanRow, parameters
from frobdecay.models.progress import decomposition
from frobdecay.models.select import Weight
from frobdecay.product.holding import factorized
from frobdecay.product.names import naming


@runtime_checkable
class Metrics(Protocol):
    """An initialization that knows of each weight by name in which metric it is truncated."""

    def why_not(self, weight: Weight, view: Matricization) -> str | None:
        """Why there is no metric for a weight that is read so; refuses those of other models."""

    def metric(self, weight: Weight, view: Matricization, moves: bool) -> Metric:
        """The metric; ``moves`` says whether the bias may be moved."""


Initialization = str | Init | Metrics


@dataclass
class Entry:
    """A weight on its way into the plan: either it gets a rank or a reason.

    Attributes:
        weight: which one.
        make: rank -> its parametrization.
        view: how it is read as a matrix or as a tensor.
        made: the parametrization at the rank that was decided.
        reason: why it stays dense.
        untied: names of the weights that it shared memory with, where it gets a copy of its own.
        copied: parameters that the copy adds to the model.
        error: of the factors.
        metric: makes the metric in which it is truncated, if the initialization is calibrated.
        note: what is remarkable about it.
        shift: what to add to its bias.
        price: what the loss rises by for each share of its energy that is lost, if measured.
        floor: the lowest rank, in numbers of columns, that a budget may give it.
        shape, dense: the weight's shape and number of parameters; of a product, of its factors.
        there: the parametrization of a weight that is a product already, which stays as it is.
    """

    weight: Weight
    make: Callable[[Rank], Any] | None = None
    view: Matricization | Tensorization | None = None
    made: Any = None
    reason: str | None = None
    untied: tuple[str, ...] = ()
    copied: int = 0
    error: float | None = None
    metric: Callable[[], Metric] | None = None
    note: str | None = None
    shift: Tensor | None = None
    price: float | None = None
    floor: int = 1
    shape: tuple[int, ...] = ()
    dense: int = 0
    there: Any = None

    def __post_init__(self) -> None:
        # Noted now: the weight itself is gone once it is factorized.
        if (own := self.weight.tensor) is not None:
            self.shape, self.dense = () if own.is_nested else tuple(own.shape), own.numel()
            return
        held = factorized(self.weight.module).get(self.weight.attribute, [None])[0]
        if shape := getattr(held, "shape", None):
            self.there, self.shape, self.dense = held, shape, parameters(held, shape)

    @property
    def open(self) -> bool:
        """Whether nothing is decided yet."""
        return self.reason is None and self.made is None

    @property
    def work(self) -> float:
        """The time of a decomposition, in a unit of its own."""
        assert self.view is not None
        return decomposition(self.view.matrix_shape, len(self.view.batch))

    def made_at(self, rank: Rank) -> Any:
        """The parametrization at a rank."""
        assert self.make is not None
        return self.make(rank)

    def _at(self, rank: Rank) -> tuple[Any, Any]:
        """The parametrization at a rank, or at the floor, and its rank in numbers of columns."""
        made = self.made_at(rank)
        found = made.resolve(self.shape)
        if isinstance(found, int) and found < self.floor:
            return self.made_at(self.floor), self.floor
        return made, found

    def rank_at(self, scale: Rank) -> Any:
        """The rank in numbers of columns; a float is a fraction of min(m, n)."""
        with naming(self.weight.name):
            return self._at(scale)[1]

    def size(self, rank: Rank) -> int:
        """Parameters of the factors."""
        return parameters(self.made_at(rank), self.shape)

    def size_at(self, scale: Rank) -> int:
        """Parameters at a rank, of the dense weight where factors have more."""
        return min(self.dense, parameters(self._at(scale)[0], self.shape))

    @cached_property
    def energies(self) -> Tensor:
        """The share of ‖W‖² that each further rank keeps, (k,), in float64.

        Where the initialization is calibrated, in its metric.

        Raises:
            ValueError: it is read as a tensor.
        """
        if self.view is None or isinstance(self.view, Tensorization):
            raise ValueError(
                f"{self.weight.name} is read as a tensor, whose energy is no sum over ranks; plan "
                "with rank= or ratio=, allocate='fraction' or 'uniform'"
            )
        with naming(self.weight.name):
            matrix = self.view.matrix(self.weight.parameter.detach())
            own = singular_values(matrix) if self.metric is None else self.metric().spectrum(matrix)
            return shares(own)

    def energy_rank(self, share: float) -> int:
        """The smallest rank that keeps a share of the energy; as ``energies``."""
        return first_reaching(self.energies, share)

    @torch.no_grad()
    def truncated(self, rank: Rank) -> tuple[Tensor, Tensor]:
        """The weight, and what it would be at a rank, both dense."""
        made = self.made_at(rank)
        made.materialized = True
        with naming(self.weight.name):
            if self.metric is not None:
                assert isinstance(self.view, Matricization)
                made.adopt(self.shape)
                matrix = self.view.matrix(self.weight.parameter.detach())
                factors = self.metric().factors(matrix, made.rank, depth=made.depth).factors
            else:
                factors = getattr(made, "approximate", made.right_inverse)(self.weight.parameter)
            product: Tensor = made(*factors)
        return self.weight.parameter, product

    def settle(self, rank: Rank) -> None:
        """Take the rank if it pays, else say that it does not."""
        if (after := self.size(rank)) < self.dense:
            self.made = self.made_at(rank)
        else:
            self.reason = f"does not pay: {after:,} parameters at rank {rank}"

    def reopen(self) -> None:
        """Take back what was decided."""
        self.made, self.reason, self.floor = None, None, 1

    def row(self) -> PlanRow:
        """The entry as a row of the plan."""
        name, shape, dense = self.weight.name, self.shape, self.dense
        untied = f"untied from {', '.join(self.untied)}" if self.untied else None
        said = (self.reason,) if self.made is None else (untied, self.note)
        remark = "; ".join(filter(None, said)) or None
        if self.there is not None:
            row = PlanRow.of(name, shape, self.there, reason=remark)
            return replace(row, before=dense, made=None)
        if self.made is None:
            row = PlanRow(name, shape, before=dense, after=dense, reason=remark)
        else:
            row = PlanRow.of(name, shape, self.made, self.error, remark)
        return replace(row, price=self.price, calibrated=self.metric is not None)
