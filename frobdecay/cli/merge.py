"""``merge``: a factorized checkpoint -> a dense one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import prod

from torch import Tensor

from frobdecay.cli.read import Checkpoint, check_factors, check_memory, read
from frobdecay.cli.write import TORCH, check_target, write
from frobdecay.models.checkpoints.records import dense_weight
from frobdecay.models.checkpoints.streams import Part
from frobdecay.models.progress import Progress
from frobdecay.models.tables.table import printable
from frobdecay.product.names import naming


def run(options: argparse.Namespace) -> None:
    """Merge ``options.checkpoint`` into ``options.out``.

    Raises:
        ImportError, OSError, ValueError: as ``read`` and ``write``; an output that exists, or of a
            suffix that says no format; factors that cannot be multiplied. Nothing was written then.
    """
    suffixes = (".safetensors", *TORCH)
    target = check_target(options.out, options.checkpoint, suffixes, options.force)
    checkpoint = read(options.checkpoint, options.key)
    with naming(checkpoint.path):
        check_factors(checkpoint)
        if not checkpoint.records:
            raise ValueError("nothing to merge: it has no factorized weights")
        sizes = {
            name: prod(made.shape) * factors[0].itemsize
            for name, (made, factors) in checkpoint.factorized.items()
        }
        with Progress(sum(sizes.values()), None, "merging") as bar:
            files = {
                file: [_part(*entry, checkpoint, sizes, bar) for entry in checkpoint.entries(keys)]
                for file, keys in checkpoint.files.items()
            }
            parts = [part for some in files.values() for part in some]
            whole = target.suffix in TORCH  # is written from memory
            check_memory(sum(p.nbytes for p in parts) if whole else max(sizes.values()))
            write(target, checkpoint, files, {})
    numbers = sum(prod(shape) for part in parts for shape in part.shapes)
    count, to = len(checkpoint.records), printable(str(target))
    print(f"{to}: {count} weights merged, {len(parts)} tensors, {numbers:,} numbers")


def _part(
    key: str, name: str | None, checkpoint: Checkpoint, sizes: dict[str, int], bar: Progress
) -> Part:
    """A tensor as it is, or a dense weight, which is made when it is to be written."""
    if name is None:
        return Part.of(key, checkpoint.tensors[key])
    made, factors = checkpoint.factorized[name]

    def make() -> Sequence[Tensor]:
        bar.advance(sizes[name])
        return [dense_weight(made, factors)]

    return Part((name,), (tuple(made.shape),), factors[0].dtype, make)
