"""Forms of the functions whose weight has more than two dimensions.

A convolution whose pattern puts the output channels and some spatial axes in the rows, the input
channels and the other spatial axes in the columns, is two convolutions with r channels between
them, each over its own spatial axes:

    "o i kh kw -> (o kh) (i kw)"    a 1×kw convolution with V, then a kh×1 convolution with U
    "o i kh kw -> o (i kh kw)"      a kh×kw convolution with V, then a 1×1 convolution with U

Zero padding, stride and dilation act on each axis for itself, so each convolution takes those of
its own axes. A batch of products is a grouped convolution. A Tucker tensor of output channels,
input channels and kernel is a 1×1, a kh×kw and another 1×1 convolution.
"""

# ruff: noqa: A002  arguments have the names of torch's, which may be given by name

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, compress
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from einops import rearrange, repeat
from torch import Tensor

from frobdecay.algebra.reading import Matricization
from frobdecay.weights.forms.cost import factors_cheaper, known, rows
from frobdecay.weights.forms.table import form
from frobdecay.weights.product_tensor import ProductTensor, folded

# A multiply-add in one of two thin convolutions takes as long as this many in the dense one:
# 256 channels, 3×3, 2 cores, 97 ms dense against 27 ms at r = 85 (a count ratio of 0.22) and
# 102 ms at r = 253 (0.66).
THIN = 1.5

# Convolutions compute channels in vectors of this many: fewer take as long.
LANES = 16

# Through memory, a channel of a position between two convolutions takes as long as this many
# multiply-adds: fitted to 16 channels, 3×3, r = 4, on one core, where three are the slower.
MOVED = 150

_NEUTRAL = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}

Axes = tuple[str, ...]


class Half(NamedTuple):
    """The factor with one channel dimension of a convolution's weight, and some of its kernel's.

    Attributes:
        side: 0 for U, 1 for V.
        axes: of the factor's rows.
        channels: those of them that are the channel dimension's.
        spatial: whether the factor has that dimension of the kernel.
    """

    side: int
    axes: Axes
    channels: Axes
    spatial: tuple[bool, ...]

    def kernel(self, factor: Tensor, view: Matricization, channels: str, copies: int = 1) -> Tensor:
        """The factor as a convolution's weight, ``channels`` being its first two dimensions."""
        sizes = {name: view.sizes[name] for name in (*view.batch_axes, *self.axes)}
        if "copyaxis" in channels:
            sizes["copyaxis"] = copies
        spatial = " ".join(
            f"({' '.join(item)})" if held else "()"
            for item, held in zip(view.tensor_axes[2:], self.spatial, strict=True)
        )
        pattern = f"{' '.join(view.batch_axes)} ({' '.join(self.axes)}) rankaxis"
        kernel: Tensor = repeat(factor, f"{pattern} -> {channels} {spatial}", **sizes)
        # With any other strides it could pass for channels_last, and so would the output.
        return kernel.reshape(-1).view(kernel.shape)

    def own(self, value: Any, neutral: int) -> Any:
        """An option's values for the spatial axes held, the neutral one for the others."""
        if isinstance(value, str):
            return value
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        values = values * len(self.spatial) if len(values) == 1 else values
        return tuple(v if held else neutral for v, held in zip(values, self.spatial, strict=True))


def halves(view: Matricization, home: int = 0) -> tuple[Half, Half] | None:
    """What holds channel dimension 0 and 1 of a convolution's weight; None if no two factors do.

    Args:
        view: how the weight is read.
        home: the channel dimension that starts with the batch axes.
    """
    batch, sides = view.batch_axes, (view.row_axes, view.column_axes)
    if view.tensor_axes[home][: len(batch)] != batch:
        return None
    channels = [item[len(batch) * (d == home) :] for d, item in enumerate(view.tensor_axes[:2])]
    kernel = view.tensor_axes[2:]
    for first, second in ((0, 1), (1, 0)):
        held = tuple(set(item) <= set(sides[first]) for item in kernel)
        if set(sides[first]) == {*channels[0], *chain.from_iterable(compress(kernel, held))}:
            rest = tuple(not h for h in held)
            return (
                Half(first, sides[first], channels[0], held),
                Half(second, sides[second], channels[1], rest),
            )
    return None


def kernels(
    pair: tuple[Half, Half],
    view: Matricization,
    factors: tuple[Tensor, Tensor],
    home: int = 0,
    copies: int = 1,
) -> list[Tensor]:
    """The weights of the two convolutions, U or V with channel dimension 0, then the other.

    Args:
        pair: from ``halves``.
        view: how the weight is read.
        factors: U and V.
        home: as for ``halves``.
        copies: of the second in each product of a batch.
    """
    lead = " ".join(view.batch_axes)
    zero, one = (" ".join(half.channels) for half in pair)
    channels = (
        f"({zero}) ({lead} rankaxis)" if home else f"({lead} {zero}) rankaxis",
        f"({lead} {'copyaxis' * (copies > 1)} rankaxis) ({one})",
    )
    return [
        half.kernel(factors[half.side], view, names, copies)
        for half, names in zip(pair, channels, strict=True)
    ]


def _grouping(view: Matricization, home: int, groups: int) -> tuple[int, int, int] | None:
    """Groups of the halves with channel dimension 0 and 1, and copies of the latter.

    Dimension 0 of a convolution's weight runs over all groups, dimension 1 over one.
    """
    batch = prod(view.batch)
    if home == 1:
        return (1, batch, 1) if groups == 1 else None
    if batch % groups == 0:
        return batch, groups, 1
    return (groups, groups, groups // batch) if groups % batch == 0 else None


def _two_convolutions(
    function: Callable[..., Tensor],
    transposed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    options: dict[str, Any],
) -> Any:
    if not isinstance(weight, ProductTensor) or isinstance(input, ProductTensor):
        return NotImplemented
    view = weight.matricization
    batch = view.batch_axes
    home = 1 if batch and view.tensor_axes[1][: len(batch)] == batch else 0
    pair, grouping = halves(view, home), _grouping(view, home, groups)
    if pair is None or grouping is None:
        return NotImplemented
    *group_counts, copies = grouping
    if not _cheaper(input, weight, pair, options["stride"], copies, transposed):
        return NotImplemented
    weights = kernels(pair, view, folded(weight.factors), home, copies)
    order = (0, 1) if transposed else (1, 0)
    x = input
    for d in order:
        own = {name: pair[d].own(value, _NEUTRAL[name]) for name, value in options.items()}
        last = bias if d == order[1] else None
        y = function(x, weights[d], last, groups=group_counts[d], **own)
        strided = not transposed and own["stride"][-1] > 1 and y.is_cpu
        # Torch's own convolution to one column is wrong so, with AMX; the first is that of any step
        if strided and y.dtype is torch.bfloat16 and known(y.shape[-1] == 1):
            own["stride"] = (*own["stride"][:-1], 1)
            y = function(x, weights[d], last, groups=group_counts[d], **own)[..., :1]
        x = y
    return x


def _cheaper(
    input: Tensor,
    weight: ProductTensor,
    pair: tuple[Half, Half],
    stride: Any,
    copies: int,
    transposed: bool,
) -> bool:
    """Compare two convolutions with one, at each output position (transposed: input position).

    The convolution away from these positions runs at the other's stride times as many.
    """
    near, far = pair
    *batch, m, n = weight.matricization.matrix_shape
    r, dense, more = weight.factors[0].shape[-1], prod(batch) * m * n, prod(near.own(stride, 1))

    def positions() -> Any:
        pixels = input.numel() // max(input.shape[-len(near.spatial) - 1], 1)
        return pixels if transposed else pixels // prod(far.own(stride, 1)) // more

    sides = (m, n)[near.side] + (m, n)[far.side] * copies * more
    thin = prod(batch) * sides * -(-r // LANES) * LANES
    return factors_cheaper(positions, dense=dense, factored=THIN * thin, once=dense * r)


def _three_cheaper(
    input: Tensor, weight: Tensor, stages: tuple[Tensor, Tensor, Tensor], stride: Any
) -> bool:
    """Compare three convolutions with two, and with one; the first runs before the stride."""
    if isinstance(input, ProductTensor):
        return False
    out, core, into = stages
    strides = tuple(stride) if isinstance(stride, (tuple, list)) else (stride,) * (core.ndim - 2)
    thin = out.numel() + core.numel() + into.numel() * prod(strides)
    dense = weight.numel()
    pair = out.numel() + dense // out.shape[0] * out.shape[1]

    def positions() -> Any:
        pixels = input.numel() // max(input.shape[1 - core.ndim], 1)
        return pixels // prod(strides)

    moved = 2 * (core.shape[0] + core.shape[1] * prod(strides))
    factored, once = THIN * thin + MOVED * moved, dense * out.shape[1]
    return bool(thin < pair) and factors_cheaper(
        positions, dense=dense, factored=factored, once=once, calls=1
    )


@form(F.conv1d, F.conv2d, F.conv3d, told=True)
def _conv(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    stages = getattr(weight, "stages", None)
    if stages is not None and groups == 1 and _three_cheaper(input, weight, stages, stride):
        out, core, into = stages
        spatial = (1,) * (core.ndim - 2)
        x = function(input, into.mT.reshape(*into.mT.shape, *spatial))
        return function(function(x, core, **options), out.reshape(*out.shape, *spatial), bias)
    return _two_convolutions(function, False, input, weight, bias, groups, options)


@form(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, told=True)
def _conv_transpose(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "output_padding": output_padding,
    }
    return _two_convolutions(function, True, input, weight, bias, groups, options)


@form(F.bilinear)
def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Contract the inputs whose axes share no factor with the outputs first, then the others."""
    if not isinstance(weight, ProductTensor) or weight.matricization.batch_axes:
        return NotImplemented
    view, (U, V) = weight.matricization, folded(weight.factors)
    out, one, two = view.tensor_axes
    first, last = (view.column_axes, V), (view.row_axes, U)
    if set(out) <= set(view.column_axes):
        first, last = last, first
    dense, factored = len(U) * len(V), U.numel() + V.numel()
    if not factors_cheaper(rows(input1), dense=dense, factored=factored, once=len(U) * V.numel()):
        return NotImplemented
    if set(last[0]) == set(out):
        hidden = F.bilinear(input1, input2, _spread(view, *first, ("rankaxis",), one, two))
        return F.linear(hidden, _spread(view, *last, out, ("rankaxis",)), bias)
    if set(last[0]) == {*out, *one}:
        hidden = input2 @ _spread(view, *first, two, ("rankaxis",))
        return F.bilinear(input1, hidden, _spread(view, *last, out, one, ("rankaxis",)), bias)
    if set(last[0]) == {*out, *two}:
        hidden = input1 @ _spread(view, *first, one, ("rankaxis",))
        return F.bilinear(hidden, input2, _spread(view, *last, out, ("rankaxis",), two), bias)
    return NotImplemented


def _spread(view: Matricization, axes: Axes, factor: Tensor, *dims: Axes) -> Tensor:
    """The factor as a tensor whose dimensions are made of the given axes."""
    target = " ".join(f"({' '.join(item)})" for item in dims)
    sizes = {name: view.sizes[name] for name in axes}
    result: Tensor = rearrange(factor, f"({' '.join(axes)}) rankaxis -> {target}", **sizes)
    return result
