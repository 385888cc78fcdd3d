"""The plan of a factorization: one row a weight, printed as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

from frobdecay.algebra.tensorize import Tensorization
from frobdecay.models.tables.table import Column, screen, table, times

LITTLE = 0.1
"""Of an initialization that keeps less of ‖W‖², the plan remarks it."""


@dataclass(frozen=True)
class PlanRow:
    """What happens to one weight.

    Attributes:
        name: the weight's qualified name.
        shape: its shape.
        matrix: how it is read, (*batch, m, n), or the modes of a tensor; None where it stays dense.
        rank: r, or one for each mode or bond of a tensor; None where it stays dense.
        before, after: numbers of parameters; alike where it stays as it is, dense or factorized.
        error: ‖W − UVᵀ‖_F / ‖W‖_F of the initialization; None in a dry run.
        reason: why it stays as it is; what it was untied from.
        tensor: whether it is read as a tensor.
        made: the parametrization that it gets; None where it stays as it is.
        price: what the loss was measured to rise by for each share of its energy that is lost;
            None unless that decided the ranks.
        calibrated: whether energy, which the price is of, is that of the outputs, and not ‖W‖².
    """

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, ...] | None = None
    rank: int | tuple[int, ...] | None = None
    before: int = 0
    after: int = 0
    error: float | None = None
    reason: str | None = None
    tensor: bool = False
    made: Any = field(default=None, repr=False, compare=False)
    price: float | None = None
    calibrated: bool = field(default=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...],
        made: Any,
        error: float | None = None,
        reason: str | None = None,
    ) -> PlanRow:
        """What a parametrization makes of a weight of this shape."""
        view, after = made.matricize(shape), parameters(made, shape)
        tensor = isinstance(view, Tensorization)
        ranked = view.matrix_shape, made.resolve(shape)
        return cls(name, shape, *ranked, prod(shape), after, error, reason, tensor, made)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Why it stays dense, what it was untied from, and what is remarkable about its rank."""
        found = [self.reason] if self.reason else []
        if self.matrix is not None and isinstance(self.rank, int) and not self.tensor:
            full = min(self.matrix[-2:])
            if self.rank == 1 < full:
                found.append(f"rank 1 of {full}")
            elif self.rank > full:
                found.append(f"rank {self.rank} above the full {full}")
        if self.error is not None and (kept := 1 - self.error**2) < LITTLE:
            found.append(f"keeps {kept:.0%} of ‖W‖²".replace("%", " %"))
        return tuple(found)

    @property
    def reading(self) -> str | None:
        """How it is read, where that is not as it is stored."""
        if self.matrix in (None, self.shape):
            return None
        matrix = self.matrix
        count = 0 if self.tensor else len(matrix) - 2
        blocks = f"{'·'.join(map(str, matrix[:count]))} of " if count > 0 else ""
        return blocks + times(matrix[max(count, 0) :])


def parameters(made: Any, shape: tuple[int, ...]) -> int:
    """How many numbers the factors of a weight of this shape have."""
    return sum(map(prod, made.factor_shapes(shape)))


def _remark(row: PlanRow) -> str | None:
    return "; ".join(row.remarks) or None


_NAME = Column[PlanRow]("weight", lambda row: row.name)
_COLUMNS: tuple[Column[PlanRow], ...] = (
    Column("shape", lambda row: times(row.shape)),
    Column("matrix", lambda row: row.reading),
    Column("rank", lambda row: "dense" if row.rank is None else
           row.rank if isinstance(row.rank, int) else times(row.rank)),
    Column("before", lambda row: row.before, "{:,}".format, adds=True),
    Column("after", lambda row: row.after, "{:,}".format, adds=True),
    Column("error", lambda row: row.error, "{:.3f}".format),
    Column("price", lambda row: row.price, "{:.3g}".format),
)  # fmt: skip


@dataclass(frozen=True)
class RankPlan:
    """Which weights get which rank, and what the model then counts.

    Attributes:
        rows: one a weight that was looked at, in module order.
        before: parameters of the whole model, factorized or not.
        after: the same with the factors of the plan.

    Examples:
        >>> import torch, frobdecay
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
        >>> plan = frobdecay.plan_ranks(model, ratio=0.25, exclude="1")
        >>> plan.ranks, round(plan.ratio, 3)
        ({'0.weight': 7}, 0.254)
        >>> print(plan)
        weight    shape   rank  before  after  remarks
        0.weight  64×64      7   4,096    896
        1.weight  2×64   dense     128    128  excluded
        all parameters: 4,290 → 1,090, ratio 0.254
    """

    rows: tuple[PlanRow, ...]
    before: int
    after: int

    @property
    def ratio(self) -> float:
        """Parameters after ÷ before, all of the model's."""
        return self.after / self.before

    @property
    def ranks(self) -> dict[str, int | tuple[int, ...]]:
        """Weight name -> rank of everything that it factorizes: plain numbers, fit for JSON.

        ``factorize(model, rank=plan.ranks)`` repeats the plan on another copy of the model.
        """
        return {
            row.name: row.rank for row in self.rows if row.made is not None and row.rank is not None
        }

    def table(self, *, folds: bool = True) -> str:
        """The plan as it is printed, as wide as the terminal.

        Args:
            folds: False for a row of its own for every weight; else the repeated layers of a
                longer plan share one, with the range of each figure and the sum of parameters.
        """
        rows = table(self.rows, _NAME, _COLUMNS, _remark, folds=folds, width=screen())
        count = f"{self.before:,} → {self.after:,}"
        return f"{rows}\nall parameters: {count}, ratio {self.ratio:.3f}"

    __str__ = __repr__ = table
