"""``factorize``: a checkpoint -> one with more of it factorized, weight by weight."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frobdecay.cli.read import Checkpoint, check_factors, read
from frobdecay.cli.skeleton import skeleton
from frobdecay.cli.write import check_target, write
from frobdecay.models.checkpoints.records import factor_key
from frobdecay.models.checkpoints.streams import Part
from frobdecay.models.fitness import relative_error
from frobdecay.models.plan import PlanRow
from frobdecay.models.progress import Progress, decomposition
from frobdecay.product.names import naming

_SETTINGS = ("ratio", "rank", "energy", "allocate", "include", "exclude")


def run(options: argparse.Namespace) -> None:
    """Factorize ``options.checkpoint`` into ``options.out``, and print the plan.

    Raises:
        ImportError, OSError, ValueError: as ``read`` and ``write``; ranks that cannot be had,
            weights with NaN. Nothing was written then.
    """
    target = check_target(options.out, options.checkpoint, (".safetensors",), options.force)
    checkpoint = read(options.checkpoint, options.key)
    with naming(checkpoint.path):
        check_factors(checkpoint)
        _factorize(checkpoint, target, options)


def _factorize(checkpoint: Checkpoint, target: Path, options: argparse.Namespace) -> None:
    made = skeleton(checkpoint, numbers=True)
    plan = made.plan(**{name: getattr(options, name) for name in _SETTINGS})
    chosen = {row.name: row for row in plan.rows if row.made is not None}
    records: dict[str, Any] = dict(checkpoint.records)
    for name, row in chosen.items():
        row.made.adopt(row.shape)
        records[name] = json.loads(json.dumps(row.made.record()))
    errors: dict[str, float] = {}
    with Progress(sum(map(_work, chosen.values())), None, "factorizing") as bar:
        files = {
            file: [
                _part(name, checkpoint.tensors[name], chosen.get(name), errors, bar)
                for name in names
                if name not in checkpoint.tied
            ]
            for file, names in checkpoint.files.items()
        }
        write(
            target, checkpoint, files, records, {there: here for here, there in made.names.items()}
        )
    rows = (replace(row, error=errors.get(row.name)) for row in plan.rows)
    print(replace(plan, rows=tuple(rows)).table(folds=not options.all))


def _work(row: PlanRow) -> float:
    assert row.matrix is not None
    return decomposition(row.matrix, len(row.matrix) - 2)


def _part(
    name: str, tensor: Tensor, row: PlanRow | None, errors: dict[str, float], bar: Progress
) -> Part:
    """A tensor as it is, or its factors, which are made when they are to be written."""
    if row is None:
        return Part.of(name, tensor)

    def make() -> Sequence[Tensor]:
        with naming(name), torch.no_grad():
            factors: Sequence[Tensor] = row.made.right_inverse(tensor)
            errors[name] = relative_error(tensor, row.made(*factors))
        bar.advance(_work(row))
        return factors

    shapes = tuple(map(tuple, row.made.factor_shapes(row.shape)))
    names = tuple(factor_key(name, i) for i in range(len(shapes)))
    return Part(names, shapes, tensor.dtype, make)
