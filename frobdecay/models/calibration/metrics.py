"""From sums to the metric of one weight: shared moments joined, biases taken out, means removed."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from frobdecay.algebra.calibrated.moment import Moment
from frobdecay.algebra.calibrated.truncation import Metric
from frobdecay.algebra.reading import Matricization
from frobdecay.models.calibration.prints import check_same
from frobdecay.models.calibration.sums import Key, Sums
from frobdecay.models.select import Weight, bias_of


def why_not_read(weight: Weight, view: Matricization) -> str | None:
    """Say why the rows of a matrix are not the outputs of its module, and its columns the inputs.

    Axes of one entry do not count, and rows may be cut into a batch: any ``"(g o) i -> g o i"``.
    """
    layout = weight.layout
    if layout is None:
        return "its module type has no default reading, so that outputs and inputs are not known"
    own = Matricization.of(layout.channel or layout.pattern, view.shape, layout.axes)

    def places(axes: tuple[str, ...], of: Matricization) -> list[tuple[int, int]]:
        """Dimension of the tensor and place in it of each axis, in order."""
        where = {
            axis: (dim, place)
            for dim, item in enumerate(of.tensor_axes)
            for place, axis in enumerate(item)
        }
        return [where[axis] for axis in axes if of.sizes[axis] > 1]

    rows, columns = places(view.batch_axes + view.row_axes, view), places(view.column_axes, view)
    expected = {dim for dim, _ in places(own.batch_axes + own.row_axes, own)}
    if {dim for dim, _ in rows} <= expected and rows == sorted(rows) and columns == sorted(columns):
        return None
    what = "the rows of {!r} are not its module's outputs"
    how = "; parametrization=functools.partial(LowRank, pattern='channel') makes them so"
    hint = how if len(view.shape) > 2 else ""
    return what.format(view.pattern) + hint


class _Sum(NamedTuple):
    """Σ 1 (*batch), Σ x (*batch, k) and Σ x xᵀ (*batch, k, k), in float64."""

    number: Tensor
    first: Tensor
    second: Tensor

    def plus(self, other: _Sum) -> _Sum:
        """Of both."""
        return _Sum(*(one + two for one, two in zip(self, other, strict=True)))

    def without(self, bias: Tensor) -> _Sum:
        """Of x − b, for b (*batch, k)."""
        cross = self.first.unsqueeze(-1) * bias.unsqueeze(-2)
        square = self.number[..., None, None] * bias.unsqueeze(-1) * bias.unsqueeze(-2)
        first = self.first - self.number.unsqueeze(-1) * bias
        return _Sum(self.number, first, self.second - cross - cross.mT + square)

    def through(self, W: Tensor) -> _Sum:
        """Of Wx."""
        return _Sum(self.number, (W @ self.first.unsqueeze(-1)).squeeze(-1), W @ self.second @ W.mT)

    def about_mean(self) -> _Sum:
        """Of x less its mean, which stays ``first``; what varies by rounding only does not."""
        outer = self.first.unsqueeze(-1) * self.first.unsqueeze(-2)
        second = self.second - outer / self.number[..., None, None].clamp_min(1)
        square, varies = (each.diagonal(dim1=-2, dim2=-1) for each in (self.second, second))
        kept = (varies > 1e-13 * square).to(second)
        return self._replace(second=second * kept.unsqueeze(-1) * kept.unsqueeze(-2))


def metric_of(
    sums: Sums, weight: Weight, view: Matricization, moves: bool, shrink: float
) -> Metric:
    """The metric in which a weight is truncated.

    Args:
        sums: what is known; ``why_unseen`` says nothing.
        weight: with a tensor.
        view: how it is read, as ``why_not_read`` allows.
        moves: whether its bias may be moved, which takes the mean out of the inputs.
        shrink: λ.
    """
    parts = _parts(sums, weight)
    tensor, bias = weight.parameter, bias_of(weight)
    if all(of == "rows" for met in parts for _, of in met):
        (key,) = parts[0]
        held = sums.moments[key]
        often, count = held.second / held.count.item(), held.count.item()
        return Metric(often, "rows", None, max(shrink, _smoothing(often, count, tensor)))
    W = view.matrix(tensor.detach()).double()
    b = None if bias is None else bias.detach().double().reshape(W.shape[:-1])
    found = [_joined(met, sums, W, b) for met in parts]
    of, total = found[0][0], found[0][1]
    if len(found) > 1:
        total = _Sum(*(torch.stack(each) for each in zip(*(one for _, one in found), strict=True)))
    centred = moves and b is not None
    total = total.about_mean() if centred else total
    mean = total.first / total.number.unsqueeze(-1).clamp_min(1) if centred else None
    return Metric(total.second / total.number.max().clamp_min(1), of, mean, shrink)


SEEN = 0.1
"""How often every row of a table counts as looked up, beside the times that it was."""


def _smoothing(often: Tensor, count: float, table: Tensor) -> float:
    """λ with which rows that were not looked up are not given up (Lidstone's smoothing).

    To add ``SEEN`` to every row's count is to shrink towards the plain metric.
    """
    squares = table.detach().to(often).square().sum(-1)
    plain = SEEN / count * float(squares.sum())
    return plain / (plain + float(often @ squares)) if plain else 0.0


def _parts(sums: Sums, weight: Weight) -> list[Mapping[Key, int]]:
    """Whose moments each part of a weight shares; a single one where all share the same."""
    parts: list[Mapping[Key, int]] = [
        met for part, met in sums.shared.items() if part.partition("#")[0] in weight.names
    ]
    return parts[:1] if all(met == parts[0] for met in parts) else parts


def why_unseen(sums: Sums, weight: Weight, view: Matricization) -> str | None:
    """Say why there is no moment that fits a weight.

    Raises:
        ValueError: moments of another shape, of some of the calls, or of a weight that changed.
    """
    sizes = {"inputs": view.columns, "outputs": prod(view.matrix_shape[:-1]), "rows": view.rows}
    parts = _parts(sums, weight)
    for key, calls in (pair for met in parts for pair in met.items()):
        held, expected = sums.moments[key], sizes[key[1]]
        batch, size = held.second.shape[:-2], held.second.shape[-1]
        size = size * prod(batch) if key[1] == "outputs" else size
        if size != expected:
            raise ValueError(
                f"{weight.name} has {expected} {key[1]}, but {size} were summed for {key[0]}: the "
                "moments are of another model; calibrate this one"
            )
        if key[1] == "outputs":
            check_same(weight.name, sums.prints.get(key[0].partition("#")[0]), weight)
        if calls != sums.calls(key):
            raise ValueError(
                f"{weight.name} met {calls} of the {sums.calls(key)} inputs that were summed for "
                f"{key[0]}, which it shares, and its own were not summed apart; calibrate one of "
                "the two in a run of its own, with include="
            )
        batch = batch or torch.Size([len(parts)] * (len(parts) > 1))  # of queries, keys, values
        if batch != view.batch and (batch or key[1] == "outputs"):
            return f"{view.pattern!r} joins or cuts the matrices that were watched"
    return None if parts else "it saw no input"


def _joined(
    met: Mapping[Key, int], sums: Sums, W: Tensor, b: Tensor | None
) -> tuple[Literal["inputs", "outputs"], _Sum]:
    """The sum over all calls, by outputs if some of them were taken by outputs."""
    by_outputs = any(of == "outputs" for _, of in met)
    total: _Sum | None = None
    for key in met:
        held = sums.moments[key]
        assert isinstance(held, Moment)
        one = _Sum(*(part.to(W) for part in (*held.parts()[:2], held.full())))
        if key[1] == "outputs":
            one = one if b is None else one.without(b)
        elif by_outputs:
            one = one.through(W)
        total = one if total is None else total.plus(one)
    assert total is not None
    return "outputs" if by_outputs else "inputs", total
