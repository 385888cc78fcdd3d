"""The plan of a factorization: one row a weight, printed as a table."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from frobdecay.algebra.tensorize import Tensorization


@dataclass(frozen=True)
class PlanRow:
    """What happens to one weight.

    Attributes:
        name: the weight's qualified name.
        shape: its shape.
        matrix: how it is read, (*batch, m, n), or the modes of a tensor; None where it stays dense.
        rank: r, or one for each mode or bond of a tensor; None where it stays dense.
        before, after: numbers of parameters.
        error: ‖W − UVᵀ‖_F / ‖W‖_F of the initialization; None in a dry run.
        reason: why it stays dense; what it was untied from.
        tensor: whether it is read as a tensor.
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
        return cls(name, shape, *ranked, prod(shape), after, error, reason, tensor)

    def cells(self) -> tuple[str, ...]:
        """The row as it is printed."""
        matrix = self.matrix or ()
        count = 0 if self.tensor else len(matrix) - 2
        blocks = f"{'·'.join(map(str, matrix[:count]))} of " if count > 0 else ""
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        return (
            self.name,
            "×".join(map(str, self.shape)),
            blocks + "×".join(map(str, matrix[max(count, 0) :])),
            "dense" if self.rank is None else "×".join(map(str, ranks)),
            f"{self.before:,}",
            f"{self.after:,}",
            "" if self.error is None else f"{self.error:.3f}",
            self.reason or "",
        )


def parameters(made: Any, shape: tuple[int, ...]) -> int:
    """How many numbers the factors of a weight of this shape have."""
    return sum(map(prod, made.factor_shapes(shape)))


_HEAD = ("weight", "shape", "matrix", "rank", "before", "after", "error", "remarks")
_RIGHT = {3, 4, 5, 6}  # columns of numbers


@dataclass(frozen=True)
class RankPlan:
    """Which weights get which rank, and what the model then counts.

    Attributes:
        rows: one a weight that was looked at, in module order.
        before, after: parameters of the whole model, factorized or not.

    Example:
        >>> import torch, frobdecay
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
        >>> plan = frobdecay.plan_ranks(model, ratio=0.25, exclude="1")
        >>> plan.ranks, round(plan.ratio, 3)
        ({'0.weight': 7}, 0.254)
        >>> print(plan)
        weight          shape  matrix   rank  before  after  error  remarks
        0.weight        64×64  64×64       7   4,096    896
        1.weight        2×64           dense     128    128         excluded
        all parameters                         4,290  1,090         ratio 0.254
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
        """Weight name -> rank of everything factorized: plain numbers, fit for JSON.

        ``factorize(model, rank=plan.ranks)`` repeats the plan on another copy of the model.
        """
        return {row.name: row.rank for row in self.rows if row.rank is not None}

    def __str__(self) -> str:
        total = ("all parameters", "", "", "", f"{self.before:,}", f"{self.after:,}", "")
        lines = [_HEAD, *(row.cells() for row in self.rows), (*total, f"ratio {self.ratio:.3f}")]
        return tabulated(lines, _RIGHT)

    __repr__ = __str__


def tabulated(lines: Sequence[Sequence[str]], right: Container[int]) -> str:
    """Cells in columns, each as wide as it has to be.

    Args:
        lines: of as many cells each.
        right: the columns that are set to the right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
