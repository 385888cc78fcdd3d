"""The einsum of two tensors as one product of matrices, chosen once for their shapes.

Letters that both terms have are kept (a batch) or summed over; the others are rows of the one and
columns of the other. Where each of these groups is one letter, that is ``mm`` or ``bmm`` of the
tensors or their transposes. A group of several letters that are adjacent is flattened into one axis
if the tensor is contiguous; otherwise its last letter is the axis of the matrix product, and the
others become batch axes. The smaller tensor's columns take the place of the axis that is summed
over in the larger one, so that the other axes stay in order.
Sums over many rows are made in parts, so that they keep their digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]
Pair = Callable[[Tensor, Tensor], Tensor]

Groups = tuple[str, str, str, str]
"""Letters of a batch, of rows, of what is summed over, and of columns."""

STACK, LONG = 1 << 12, 1 << 15
"""Rows that are multiplied at once where a sum is long, and from how many on it is."""

_BOTH = (slice(None), slice(None))
_NONE = "#"  # the letter of an axis of length 1 that a term lacks


def lowered(
    left: str, right: str, kept: str, sizes: Mapping[str, int], exact: bool = False
) -> tuple[str, Pair, int]:
    """Lower ``left,right->kept``.

    Args:
        left: a term; what it has alone has to be kept.
        right: the other.
        kept: letters of the result.
        sizes: of the letters.
        exact: whether they have to come in this order; else as it is cheapest.

    Returns:
        The letters of the result in their order, the function of the two tensors, and its flops.
    """
    if _volume(left, sizes) < _volume(right, sizes):
        found, swapped, flops = lowered(right, left, kept, sizes, exact)
        return found, lambda x, y: swapped(y, x), flops
    batch = "".join(c for c in left if c in right and c in kept)
    summed = "".join(c for c in left if c in right and c not in kept)
    rows, columns = (
        "".join(c for c in one if c not in other) for one, other in ((left, right), (right, left))
    )
    flops = (1 + bool(summed)) * _volume({*left, *right}, sizes)
    if not summed:
        found = kept if exact else batch + rows + columns
        return found, _entrywise(left, right, found), flops
    if not kept:
        align = aligned(right, left)
        return "", lambda x, y: (x * align(y)).sum(), flops
    found, run = _matrices(
        left, right, (batch, rows, summed, columns), sizes, kept if exact else ""
    )
    if exact and found != kept:
        back = aligned(found, kept)
        return kept, lambda x, y: back(run(x, y)), flops
    return found, run, flops


def aligned(term: str, letters: str) -> View:
    """Permute axes from the order of a term to that of ``letters``; 1 where the term lacks one."""
    if term == letters:
        return _same
    order = [term.index(c) for c in letters if c in term]
    index = tuple(slice(None) if c in term else None for c in letters)
    if order == sorted(order):
        return lambda x: x[index]
    if None not in index:
        return lambda x: x.permute(order)
    return lambda x: x.permute(order)[index]


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.mT


def _volume(letters: Iterable[str], sizes: Mapping[str, int]) -> int:
    return prod([sizes[c] for c in letters])


def _entrywise(left: str, right: str, kept: str) -> Pair:
    if left == right == kept:
        return torch.mul
    one, other = aligned(left, kept), aligned(right, kept)
    return lambda x, y: one(x) * other(y)


def _matrices(
    left: str, right: str, groups: Groups, sizes: Mapping[str, int], exact: str
) -> tuple[str, Pair]:
    """The product of two tensors, of which the left one is the larger, and its letters."""
    batch, rows, summed, columns = groups
    multiply: Pair = torch.matmul
    if _volume(summed, sizes) > LONG:
        multiply = _long
    elif len(batch) < 2:
        multiply = torch.bmm if batch else torch.mm
    over = "".join(c for c in right if c in summed)
    if _is(left, batch, rows, over) or not _is(left, batch, rows, summed):
        summed = over
    first, between, last = left.removeprefix(batch).partition(summed)
    inside = first and last and left == batch + first + between + last
    if inside and _is(right, batch, summed, columns):
        parts = batch, first, summed, last, columns
        return batch + first + columns + last, _inside(right, parts, sizes)
    turned = exact == batch + columns + rows if exact else left.endswith(rows)
    if turned:
        run = _product(right, left, (batch, columns, summed, rows), sizes, multiply)
        return batch + columns + rows, lambda x, y: run(y, x)
    return batch + rows + columns, _product(
        left, right, (batch, rows, summed, columns), sizes, multiply
    )


def _is(term: str, batch: str, one: str, other: str) -> bool:
    """Whether a term's letters are side by side as those of a matrix, or of its transpose."""
    return term in (batch + one + other, batch + other + one)


def _matrix(term: str, batch: str, one: str, other: str, sizes: Mapping[str, int]) -> View:
    """See a tensor as (*batch, one, other)."""
    if len(one) == len(other) == 1:
        same, turned = term == batch + one + other, term == batch + other + one
        return _same if same else _transposed if turned else aligned(term, batch + one + other)
    shape = [*(sizes[c] for c in batch), _volume(one, sizes), _volume(other, sizes)]
    if term == batch + other + one:
        shape[-2:] = shape[:-3:-1]
        return lambda x: x.reshape(shape).mT
    back = aligned(term, batch + one + other)
    return lambda x: back(x).reshape(shape)


def _product(
    left: str, right: str, groups: Groups, sizes: Mapping[str, int], multiply: Pair
) -> Pair:
    """(*batch, *rows, *columns), from matrices, or from stacks of them instead of copies."""
    batch, rows, summed, columns = groups
    one = _matrix(left, batch, rows, summed, sizes)
    other = _matrix(right, batch, summed, columns, sizes)
    if len(rows) == len(summed) == len(columns) == 1:
        return _direct(one, other, multiply)
    shape = [sizes[c] for c in batch + rows + columns]

    def folded(x: Tensor, y: Tensor) -> Tensor:
        return multiply(one(x), other(y)).reshape(shape)

    if len(rows) > 1 < len(columns):
        return folded
    stacked, ahead = _stacked(left, right, groups), batch + summed[:-1]
    fits = _is(left, batch, rows, summed) and _is(right, batch, summed, columns)
    if not fits and left.startswith(ahead) and right.startswith(ahead):
        return stacked
    return lambda x, y: (
        folded(x, y) if not fits or (x.is_contiguous() and y.is_contiguous()) else stacked(x, y)
    )


def _direct(one: View, other: View, multiply: Pair) -> Pair:
    """The product of two matrices that are there, without needless calls."""
    if one is _same and other is _same:
        return multiply
    if one is _transposed and other is _same:
        return lambda x, y: multiply(x.mT, y)
    if one is _same and other is _transposed:
        return lambda x, y: multiply(x, y.mT)
    return lambda x, y: multiply(one(x), other(y))


def _inside(right: str, parts: tuple[str, str, str, str, str], sizes: Mapping[str, int]) -> Pair:
    """(*batch, *first, *columns, *last), of a tensor with what is summed between first and last."""
    batch, first, summed, last, columns = parts
    ahead = [sizes[c] for c in batch]
    shape = [*ahead, *(_volume(part, sizes) for part in (first, summed, last))]
    result = [*ahead, *(sizes[c] for c in first + columns + last)]
    matrix = _matrix(right, batch, summed, columns, sizes)
    return lambda x, y: times_rows(matrix(y).unsqueeze(-3), x.reshape(shape)).reshape(result)


def _stacked(left: str, right: str, groups: Groups) -> Pair:
    """(*batch, *rows, *columns) from the last letters of each, stacked over all other letters."""
    batch, rows, summed, columns = groups
    row, column = rows[-1:] or _NONE, columns[-1:] or _NONE
    ahead = batch + summed[:-1] + rows[:-1] + columns[:-1]
    one, other = (
        aligned(left, ahead + summed[-1] + row),
        aligned(right, ahead + summed[-1] + column),
    )
    over = list(range(len(batch), len(batch + summed) - 1))
    made, wanted = batch + rows[:-1] + columns[:-1] + row + column, batch + rows + columns
    back = aligned(made.replace(_NONE, ""), wanted)
    alone = tuple(0 if c == _NONE else slice(None) for c in (row, column))

    def multiply(x: Tensor, y: Tensor) -> Tensor:
        found = times_rows(one(x), other(y))
        found = found.sum(over) if over else found
        return back(found if alone == _BOTH else found[(..., *alone)])

    return multiply


def _long(x: Tensor, y: Tensor) -> Tensor:
    """The product of two matrices, whose sums may be long."""
    return times_rows(x.mT, y)


# --- sums over many rows --------------------------------------------------------------------------


def is_long(view: Tensor) -> bool:
    """Whether a sum over its rows, one after the other, loses digits of float32."""
    return view.shape[-2] > LONG and view.device.type == "cpu"


def times_rows(left: Tensor, right: Tensor) -> Tensor:
    """LᵀR, summed over the rows of both; those of long ones stack by stack.

    On a CPU one narrow product adds up its rows one after the other: UᵀU of 10⁶×3 was off by 6e-4
    in float32. In stacks it is by 2e-7, and takes no longer.
    """
    if not is_long(left):
        return left.mT @ right
    even = left.shape[-2] // STACK * STACK
    stacks = [torch.unflatten(view[..., :even, :], -2, (-1, STACK)) for view in (left, right)]
    rest: Tensor = left[..., even:, :].mT @ right[..., even:, :]
    return rest + (stacks[0].mT @ stacks[1]).sum(-3)


def matrix_gram(view: Tensor, batch: int) -> Tensor:
    """VᵀV of (*batch, *summed, rows, columns): over the rows and what is summed beside them."""
    gram = times_rows(view, view)
    summed = list(range(batch, view.ndim - 2))
    return gram.sum(summed) if summed else gram
