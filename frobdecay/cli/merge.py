"""``merge``: a factorized checkpoint -> a dense one."""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path

from torch import Tensor

from frobdecay.cli.read import Checkpoint, check_memory, read
from frobdecay.models.checkpoints.files import write_safetensors, write_torch
from frobdecay.models.checkpoints.records import dense_weight, factor_key, rebuild, weight_of
from frobdecay.models.progress import Progress
from frobdecay.models.tables.table import printable

_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def run(options: argparse.Namespace) -> None:
    """Merge ``options.checkpoint`` into ``options.out``.

    Raises:
        ImportError, OSError, ValueError: as ``read``; an output that exists, or of a suffix that
            says no format; factors that cannot be multiplied. Nothing was written then.
    """
    target = Path(options.out)
    if target.suffix not in (".safetensors", *_TORCH):
        raise ValueError(
            f"{target}: expected a name that ends with .safetensors or {', '.join(_TORCH)}"
        )
    if target.exists() and not options.force:
        raise ValueError(f"{target}: exists already; --force replaces it")
    checkpoint = read(options.checkpoint, options.key)
    try:
        merged = _merged(checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    if target.suffix == ".safetensors":
        if checkpoint.others:
            raise ValueError(
                f"{checkpoint.path} holds more than tensors, which safetensors cannot hold: "
                f"{list(checkpoint.others)[:8]}; write a .pt file"
            )
        write_safetensors(target, merged)
    else:
        write_torch(target, {**merged, **checkpoint.others})
    count, size = len(checkpoint.records), sum(tensor.numel() for tensor in merged.values())
    print(
        f"{printable(str(target))}: {count} weights merged, {len(merged)} tensors, {size:,} numbers"
    )


def _merged(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors with dense weights, each in the place of its first factor."""
    tensors, records = checkpoint.tensors, checkpoint.records
    if checkpoint.unknown:
        raise ValueError(
            f"it has factors of {checkpoint.unknown[:8]}, but not how they are to be read; load it "
            "into the factorized model, and save that with save_factorized"
        )
    if not records:
        raise ValueError("nothing to merge: it has no factorized weights")
    for name, record in records.items():
        rebuild(name, record)
    sizes = {name: prod(record["shape"]) for name, record in records.items()}
    places = {factor_key(name, 0): name for name in records}
    lost = [name for key, name in places.items() if key not in tensors]
    if lost:
        raise ValueError(f"the factors of {lost[:8]} are missing")
    both = [name for name in records if name in tensors]
    if both:
        raise ValueError(f"it has both the factors of {both[:8]} and the dense weights")
    check_memory(sum(sizes[name] * tensors[key].itemsize for key, name in places.items()))
    merged: dict[str, Tensor] = {}
    with Progress(sum(sizes.values()), None, "merging") as bar:
        for key, tensor in tensors.items():
            if key in places:
                name = places[key]
                merged[name] = dense_weight(name, records[name], tensors)
                bar.advance(sizes[name])
            elif weight_of(key) not in records:
                merged[key] = tensor
    return merged
