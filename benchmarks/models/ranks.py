"""The paper's rule for the ranks of convolutions."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

__all__ = ["output_ranks"]


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
