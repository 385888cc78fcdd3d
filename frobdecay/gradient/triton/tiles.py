"""How the grouped kernels cut matrices up, by rank: a table to be filled by measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

MAX_RANK = 256
"""The largest rank that is multiplied in the kernels. Above it, matrix products are large enough
for the vendor's library, and a program could not hold all columns of a row in its registers."""

_INTERPRETED_PROGRAMS = 4  # a program costs milliseconds for each tile there


@dataclass(frozen=True)
class Held:
    """How launch B multiplies by columns of a Gram that stay in shared memory while rows pass.

    Reading the Gram for each block of rows anew would be more traffic than the factor itself.
    This is for warp-group products, which take the Gram from there: Hopper's.

    Attributes:
        columns: that one program keeps, of all rows of the Gram.
        rows: multiplied at a time.
        warps: of a program.
        stages: depth of the software pipeline.
        waves: programs for each multiprocessor; each reads its columns once.
    """

    columns: int
    rows: int
    warps: int
    stages: int
    waves: int


@dataclass(frozen=True)
class Tile:
    """How the kernels cut matrices up; all but depths of pipelines are powers of two.

    Attributes:
        block: columns of a Gram's tile; at least 16, which a tensor core needs.
        gram_rows: rows multiplied at a time by launch A.
        gram_warps: warps of a program of launch A that multiplies float32 without tensor cores.
        gram_stages: depth of launch A's software pipeline.
        inner: columns of a factor that launch B multiplies at a time, where ``block`` does not
            hold the whole rank.
        columns: of the target that launch B has at a time, where ``block`` does not hold the
            whole rank and no target is the factor itself.
        update_rows: rows multiplied at a time by launch B; half of them where a program
            has to hold all columns of more than one block, in place.
        update_warps: the same of launch B.
        update_stages: depth of launch B's software pipeline.
        tensor_warps: warps with tensor cores: of launch A's programs, and of launch B's for
            half-precision factors.
        waves: programs of a launch for each multiprocessor: several, to hide each other's latency.
        bf16: for bf16 factors of more than one ``block`` of columns, where no target is the
            factor itself; None to read the Gram for each block of rows.
        tf32: the same for float32 factors multiplied as TF32.
    """

    block: int
    gram_rows: int
    gram_warps: int
    gram_stages: int
    inner: int
    columns: int
    update_rows: int
    update_warps: int
    update_stages: int
    tensor_warps: tuple[int, int]
    waves: int
    bf16: Held | None = None
    tf32: Held | None = None


# By the largest rank they are for: python -m benchmarks.gpu tune times these and alternatives.
TILES: dict[int, Tile] = {
    16: Tile(16, 64, 1, 3, 16, 16, 256, 4, 3, (1, 4), 16),
    32: Tile(32, 64, 2, 3, 32, 32, 64, 4, 3, (2, 4), 8),
    64: Tile(64, 64, 8, 3, 64, 64, 64, 8, 3, (4, 4), 8),
    MAX_RANK: Tile(
        64, 64, 8, 3, 32, 64, 64, 8, 3, (4, 4), 8,
        bf16=Held(columns=64, rows=64, warps=4, stages=2, waves=8),
        tf32=Held(columns=64, rows=64, warps=4, stages=1, waves=8),
    ),
}  # fmt: skip


def tile_for(rank: int, capability: int = 90) -> Tile:
    """Look up the tile for products whose largest rank is this, on such a device.

    Examples:
        >>> tile_for(17).block
        32
        >>> tile_for(192, 80).bf16 is None
        True
    """
    tile = next(tile for largest, tile in TILES.items() if rank <= largest)
    return tile if capability == 90 else replace(tile, bf16=None, tf32=None)


def capability_of(device: torch.device) -> int:
    """What ``tile_for`` asks of a device; the interpreter does what Hopper would."""
    major, minor = (9, 0) if device.type != "cuda" else torch.cuda.get_device_capability(device)
    return 10 * major + minor


def programs_for(device: torch.device, tile: Tile) -> int:
    """How many programs a launch should have there."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count) * tile.waves
