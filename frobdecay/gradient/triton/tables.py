"""Tables for grouped kernels: what each program of a launch has to do, as rows of numbers.

A *slot* is one factor of one pair, seen as (*batch, *summed, rows, r). Its heads are matrices of
their own, with one Gram each; its row axes are joined where strides permit, and what cannot be
joined makes further *pieces* of the same matrix, whose Grams are summed. Pieces are cut into
ranges of rows, so that a few long factors and many short ones both fill the device.

Columns of a row of the Gram table, and of the update table (places and strides in elements):

    0 address of the first row      5 tile row           10 number of partial sums
    1 rows                          6 tile column        11 place of the first partial sum
    2 row stride                    7 place of the Gram  12 ticket counter
    3 column stride                 8 its row length     13 layout
    4 rank                          9 partial sum

    0 … 4 as above                  6 its row length      9 target's row stride
    5 place of the partner's Gram   7 slot               10 target's column stride
                                    8 place in target    11 layout

Everything here is arithmetic on shapes, strides and addresses; nothing is read from memory.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from frobdecay.gradient.overlaps import turns

MAX_STRIDE = 2**31 // 512
"""Of rows and columns: places in a tile, of up to 256 rows and 256 columns, have 32 bits."""

_MAX_PARTIALS = 64  # of one tile: the program that adds them up does so alone


class Piece(NamedTuple):
    """A matrix of rows with one stride: a head, or a part of its rows.

    Attributes:
        head: its number.
        places: of the first row in each tensor seen alike, in elements.
        rows: their number.
        row_strides: in each tensor.
    """

    head: int
    places: tuple[int, ...]
    rows: int
    row_strides: tuple[int, ...]


def pieces(shape: Sequence[int], batch: int, strides: Sequence[Sequence[int]]) -> Iterator[Piece]:
    """Take a view apart into as few matrices as strides permit, for several tensors alike.

    Examples:
        >>> list(pieces((2, 3, 4), 0, [(12, 4, 1)]))
        [Piece(head=0, places=(0,), rows=6, row_strides=(4,))]
        >>> [piece.places for piece in pieces((2, 3, 4), 0, [(24, 4, 1)])]
        [(0,), (24,)]
    """
    axes = [(size, tuple(s[k] for s in strides)) for k, size in enumerate(shape[:-1])]
    heads, joined = axes[:batch], _joined(axes[batch:])
    longest = max(range(len(joined)), key=lambda k: joined[k][0])
    rows, row_strides = joined.pop(longest)
    inner = list(_places(joined, len(strides)))
    for head, start in enumerate(_places(heads, len(strides))):
        for extra in inner:
            places = tuple(a + b for a, b in zip(start, extra, strict=True))
            yield Piece(head, places, rows, row_strides)


_Axis = tuple[int, tuple[int, ...]]  # size, and stride in each tensor


def _joined(axes: Sequence[_Axis]) -> list[_Axis]:
    """Join neighbouring axes that one stride runs through."""
    found: list[_Axis] = []
    for size, steps in axes:
        if found and (size == 1 or found[-1][0] == 1):
            found[-1] = (size, steps) if found[-1][0] == 1 else found[-1]
        elif found and all(o == i * size for o, i in zip(found[-1][1], steps, strict=True)):
            found[-1] = (found[-1][0] * size, steps)
        else:
            found.append((size, steps))
    return found


def _places(axes: Sequence[_Axis], count: int) -> Iterator[tuple[int, ...]]:
    for index in itertools.product(*(range(size) for size, _ in axes)):
        yield tuple(
            sum(i * steps[t] for i, (_, steps) in zip(index, axes, strict=True))
            for t in range(count)
        )


@dataclass(frozen=True)
class Slot:
    """One factor of one pair.

    Attributes:
        number: position among all slots; that of its partner differs in the last bit.
        view: (*batch, *summed, rows, r).
        batch: number of leading batch axes.
        gram: place of its first head's Gram.
        leading: row length of a Gram, the rank rounded up to whole tiles.
    """

    number: int
    view: Tensor
    batch: int
    gram: int
    leading: int

    @cached_property
    def address(self) -> int:
        """Of its first number."""
        return self.view.data_ptr()

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.view.shape[-1]

    @property
    def length(self) -> int:
        """Numbers in the Grams of all heads."""
        return prod(self.view.shape[: self.batch]) * self.leading**2

    def gram_in(self, buffer: Tensor) -> Tensor:
        """Its Grams, (*batch, r, r), in a buffer of all."""
        shape = *self.view.shape[: self.batch], self.leading, self.leading
        return buffer[self.gram : self.gram + self.length].view(shape)[
            ..., : self.rank, : self.rank
        ]

    @property
    def partner_gram(self) -> int:
        """Place of the other side's first Gram: both sides' Grams are neighbours, U's first."""
        return self.gram + (-self.length if self.number % 2 else self.length)

    @property
    def rows(self) -> int:
        """Rows of all heads together."""
        return prod(self.view.shape[:-1])

    def pieces(self, *others: Sequence[int]) -> Iterator[Piece]:
        """Its matrices, together with those of tensors of its shape and other strides."""
        return pieces(self.view.shape, self.batch, [self.view.stride(), *others])


def _layout(address: int, rows: int, rank: int, strides: tuple[int, int], vector: int) -> int:
    """1: adjacent columns, rows at 16 bytes; 2: the transpose of that; 0: any."""
    row_stride, column_stride = strides
    if address % 16:
        return 0
    if (column_stride == 1 or rank == 1) and row_stride != 1:
        return 1 if row_stride % vector == 0 and rank % vector == 0 else 0
    if row_stride == 1:
        return 2 if (column_stride % vector == 0 or rank == 1) and rows % vector == 0 else 0
    return 0


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


@dataclass(frozen=True)
class GramTable:
    """Launch A.

    Attributes:
        rows: of the table.
        partials: numbers needed for the partial sums.
        counters: number of ticket counters.
        layouts: bit set of those that occur.
    """

    rows: list[list[int]]
    partials: int
    counters: int
    layouts: int


def gram_table(
    slots: Sequence[Slot], block: int, step: int, programs: int, partials: int, counters: int
) -> GramTable:
    """Plan launch A.

    Args:
        slots: of one dtype.
        block: columns of a tile.
        step: rows that a program multiplies at a time.
        programs: how many are wanted for the device to be full.
        partials: numbers for partial sums that other tables have taken.
        counters: counters that other tables have taken.
    """
    tiles = {slot.number: _tiles(slot.leading // block) for slot in slots}
    work = sum(slot.rows * len(tiles[slot.number]) for slot in slots)
    length = max(_ceil(work, programs * step), 1) * step
    table: list[list[int]] = []
    for slot in slots:
        heads: dict[int, list[Piece]] = defaultdict(list)
        for piece in slot.pieces():
            heads[piece.head].append(piece)
        for head, parts in heads.items():
            rows = sum(part.rows for part in parts)
            cut = max(length, _ceil(rows, _MAX_PARTIALS * step) * step)
            ranges = [
                _rows_of(slot, part, at, count)
                for part in parts
                for at, count in _cuts(part, cut, step)
            ]
            gram = slot.gram + head * slot.leading**2
            for i, j in tiles[slot.number]:
                for k, row in enumerate(ranges):
                    about = [i, j, gram, slot.leading, k, len(ranges), partials, counters]
                    table.append([*row[:5], *about, row[5]])
                if len(ranges) > 1:
                    partials += len(ranges) * block**2
                    counters += 1
    return GramTable(table, partials, counters, _layouts(table))


def _tiles(count: int) -> list[tuple[int, int]]:
    """Tiles on and below the diagonal."""
    return [(i, j) for i in range(count) for j in range(i + 1)]


def _cuts(piece: Piece, length: int, step: int) -> Iterator[tuple[int, int]]:
    """Starts and lengths of ranges of rows, of at most ``length`` and about equal."""
    each = _ceil(_ceil(piece.rows, _ceil(piece.rows, length)), step) * step
    return ((at, min(each, piece.rows - at)) for at in range(0, piece.rows, each))


def _rows_of(slot: Slot, piece: Piece, at: int, rows: int) -> list[int]:
    """The first five columns of a range of rows, and its layout."""
    size = slot.view.element_size()
    address = slot.address + size * (piece.places[0] + at * piece.row_strides[0])
    strides = piece.row_strides[0], slot.view.stride(-1)
    layout = _layout(address, rows, slot.rank, strides, 16 // size)
    # One column has no use for a stride, and the layouts promise one that divides.
    return [address, rows, *strides, slot.rank, layout]


def _layouts(table: Sequence[Sequence[int]]) -> int:
    return sum(1 << layout for layout in {row[-1] for row in table})


def update_table(
    slots: Sequence[Slot],
    targets: Sequence[tuple[Sequence[int], int]],
    itemsize: int,
    step: int,
    programs: int,
) -> tuple[list[list[int]], int]:
    """Plan launch B.

    Args:
        slots: of one dtype.
        targets: strides of each slot's target, seen as the slot is, and its address modulo 16.
        itemsize: bytes of a number in a target.
        step: rows that a program updates at a time.
        programs: how many are wanted for the device to be full.

    Returns:
        The rows of the table, and the bit set of layouts that occur.
    """
    share = _ceil(sum(slot.rows * slot.rank for slot in slots), programs)
    table: list[list[int]] = []
    # From the end: what launch A read last is still in the cache.
    for slot, (strides, address) in reversed(list(zip(slots, targets, strict=True))):
        length = max(_ceil(share, slot.rank * step), 1) * step
        vector = 16 // min(itemsize, slot.view.element_size())
        for piece in slot.pieces(strides):
            gram = slot.partner_gram + piece.head * slot.leading**2
            for at, count in _cuts(piece, length, step):
                row = _rows_of(slot, piece, at, count)
                place = piece.places[1] + at * piece.row_strides[1]
                steps = piece.row_strides[1], strides[-1]
                layouts = {
                    _layout(row[0], row[1], slot.rank, (row[2], row[3]), vector),
                    _layout(address + place * itemsize, row[1], slot.rank, steps, vector),
                }
                layout = layouts.pop() if len(layouts) == 1 else 0
                about = [gram, slot.leading, slot.number, place, *steps, layout]
                table.append([*row[:5], *about])
    return table, _layouts(table)


def sheets(
    places: Sequence[int], dtypes: Sequence[torch.dtype], groups: Sequence[int]
) -> list[tuple[torch.dtype, list[int]]]:
    """Distribute targets over launches, so that no two programs of one write the same numbers.

    Usually there is one. A second dtype among the targets makes another one, and so does a
    parameter that is a factor twice: its updates are added one after the other, in the order of
    the products. Atomic additions would need no second launch, but their sums differ from run to
    run.

    Args:
        places: addresses of the targets, one a slot; 0 for none.
        dtypes: of the targets, one a slot; any for none.
        groups: from ``overlapping``.

    Returns:
        For each launch the dtype of its targets and their addresses, one a slot, 0 for none.
    """
    wanted = [slot for slot, place in enumerate(places) if place]
    order = turns([places[slot] for slot in wanted], [groups[slot] for slot in wanted])
    found: dict[tuple[int, torch.dtype], list[int]] = {}
    for turn, slot in zip(order, wanted, strict=True):
        found.setdefault((turn, dtypes[slot]), [0] * len(places))[slot] = places[slot]
    return [(dtype, addresses) for (_, dtype), addresses in found.items()]
