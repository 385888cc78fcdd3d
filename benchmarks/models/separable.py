"""Convolutions as a depthwise and a pointwise one, the form whose 1×1 part is tensorized."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from torch import nn

__all__ = ["separate_"]


def separate_(model: nn.Module, exclude: Collection[str] = ()) -> None:
    """Replace convolutions by "depthwise", k×k, then "pointwise", 1×1.

    Both are drawn anew (He et al., 2015), the pointwise one by its outputs. 1×1 convolutions stay
    as they are, as do the shortcuts of wide residual networks in the paper's tensor networks.

    Args:
        model: changed in place.
        exclude: names of other convolutions that stay.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False))
        >>> separate_(model)
        >>> [tuple(p.shape) for p in model.parameters()]
        [(4, 1, 3, 3), (8, 4, 1, 1)]
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and name not in exclude
    ]
    for name, module in found:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, _separated(module))


def _separated(dense: nn.Conv2d) -> nn.Sequential:
    depthwise = nn.Conv2d(
        dense.in_channels,
        dense.in_channels,
        dense.kernel_size,
        dense.stride,
        dense.padding,  # type: ignore[arg-type]
        groups=dense.in_channels,
        bias=False,
    )
    pointwise = nn.Conv2d(dense.in_channels, dense.out_channels, 1, bias=dense.bias is not None)
    nn.init.kaiming_normal_(depthwise.weight)
    nn.init.kaiming_normal_(pointwise.weight, mode="fan_out")
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))
