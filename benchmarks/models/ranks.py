"""Ranks by the paper's rules: of convolutions, and for a share of the whole model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

import frobdecay

__all__ = ["output_ranks", "selected_ratio"]


def selected_ratio(model: nn.Module, parameters: float, **selection: Any) -> float:
    """The ratio of selected weights at which the whole model has so many parameters.

    Args:
        model: dense.
        parameters: of the whole model, to keep.
        **selection: ``include`` and ``exclude``.
    """
    plan = frobdecay.plan_ranks(model, rank=1, **selection)
    selected = sum(row.before for row in plan.rows if row.rank is not None)
    return 1 - (plan.before - parameters) / selected


def output_ranks(model: nn.Module, scale: float, exclude: Collection[str] = ()) -> dict[str, int]:
    """Ranks of all convolutions: a fraction of outputs times kernel height, 1 at least.

    Khodak et al. (2021) measure a rank by the rows of the (outputs · height) × (inputs · width)
    matrix, also where it has fewer columns.

    Args:
        model: whose convolutions.
        scale: the fraction; above 1 over-complete.
        exclude: names of convolutions that stay dense.

    Example:
        >>> output_ranks(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 2)), 0.111)
        {'0': 3}
    """
    return {
        name: max(round(scale * module.out_channels * module.kernel_size[0]), 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name not in exclude
    }
