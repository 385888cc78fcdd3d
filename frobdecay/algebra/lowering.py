"""The einsum of two tensors as one product of matrices, chosen once for their shapes.

Letters that both terms have are kept (a batch) or summed over; the others are rows of the one and
columns of the other. Where each of these groups is one letter, that is ``mm`` or ``bmm`` of the
tensors or their transposes. Each group of several letters is flattened into one axis, which copies
a tensor where they are not adjacent; except where a letter between others is summed over and many
entries follow it: then the smaller tensor's columns take its place, and the others stay in order.
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

WIDE = 16
"""Columns from which many products of matrices take less time than a copy and one product."""


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
    if term == letters[:-2] + letters[:-3:-1]:
        return _transposed
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
    inside = first and left == batch + first + between + last and _volume(last, sizes) >= WIDE
    if inside and _is(right, batch, summed, columns):
        parts = batch, first, summed, last, columns
        return batch + first + columns + last, _inside(right, parts, sizes)
    turned = exact == batch + columns + rows if exact else left.endswith(rows)
    if turned:
        left, right, rows, columns = right, left, columns, rows
    one = _matrix(left, batch, rows, summed, sizes)
    other = _matrix(right, batch, summed, columns, sizes)
    shape = [sizes[c] for c in batch + rows + columns]

    def folded(x: Tensor, y: Tensor) -> Tensor:
        return multiply(one(x), other(y)).reshape(shape)

    plain = len(rows) == len(summed) == len(columns) == 1
    run = _direct(one, other, multiply) if plain else folded
    return batch + rows + columns, (lambda x, y: run(y, x)) if turned else run


def _is(term: str, batch: str, one: str, other: str) -> bool:
    """Whether a term's letters are side by side as those of a matrix, or of its transpose."""
    return term in (batch + one + other, batch + other + one)


def _matrix(term: str, batch: str, one: str, other: str, sizes: Mapping[str, int]) -> View:
    """See a tensor as (*batch, one, other)."""
    turn = aligned(term, batch + one + other)
    if len(one) == len(other) == 1:
        return turn
    shape = [*(sizes[c] for c in batch), _volume(one, sizes), _volume(other, sizes)]
    return lambda x: turn(x).reshape(shape)


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
