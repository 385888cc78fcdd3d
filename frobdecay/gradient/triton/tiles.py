"""How the grouped kernels cut matrices up, by rank: a table to be filled by measurement."""

from __future__ import annotations

from dataclasses import dataclass

MAX_RANK = 256
"""The largest rank that is multiplied in the kernels. Above it, matrix products are large enough
for the vendor's library, and a program could not hold all columns of a row in its registers."""

WAVES = 4
"""Programs of a launch for each multiprocessor: several, to hide each other's latency."""


@dataclass(frozen=True)
class Tile:
    """How the kernels cut matrices up; all but the pipeline's depth are powers of two.

    Attributes:
        block: columns of a Gram's tile, and of a factor's; at least 16, which a tensor core needs.
        inner: columns of a factor that launch B multiplies at a time, where ``block`` does not
            hold the whole rank.
        gram_rows: rows multiplied at a time by launch A.
        update_rows: rows multiplied at a time by launch B; half of them where a program
            has to hold all columns of more than one block, in place.
        gram_warps: warps of a program of launch A.
        update_warps: warps of a program of launch B.
        stages: depth of the software pipeline.
    """

    block: int
    inner: int
    gram_rows: int
    update_rows: int
    gram_warps: int
    update_warps: int
    stages: int


# By the largest rank they are for. First choices, by registers and shared memory of the compiled
# kernels, not by time: benchmarks/gpu.py times these and alternatives on a device.
TILES: dict[int, Tile] = {
    16: Tile(16, 16, 128, 128, 1, 4, 3),
    32: Tile(32, 32, 64, 64, 2, 4, 3),
    64: Tile(64, 64, 64, 64, 8, 8, 3),
    MAX_RANK: Tile(64, 32, 64, 64, 8, 8, 3),
}


def tile_for(rank: int) -> Tile:
    """Look up the tile for products whose largest rank is this.

    Example:
        >>> tile_for(17).block
        32
    """
    return next(tile for largest, tile in TILES.items() if rank <= largest)
