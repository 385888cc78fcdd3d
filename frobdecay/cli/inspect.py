"""``inspect``: spectra of the weights in a checkpoint, and what ranks would cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from frobdecay.algebra.reading import Matricization
from frobdecay.cli.read import Checkpoint, read, why_unread
from frobdecay.cli.show import Row, plot, report
from frobdecay.cli.skeleton import skeleton
from frobdecay.cli.spectra import measure_all
from frobdecay.models.checkpoints.tensors import identity
from frobdecay.models.plan import RankPlan
from frobdecay.product.names import naming
from frobdecay.weights.lowrank import LowRank


def run(options: argparse.Namespace) -> None:
    """Print the report on ``options.checkpoint``.

    Raises:
        ImportError, OSError, ValueError: as ``read``; a ratio that cannot be attained.
    """
    checkpoint = read(options.checkpoint, options.key)
    with naming(checkpoint.path):
        rows = _rows(checkpoint)
        plan = _plan(checkpoint, rows, options.ratio) if options.ratio is not None else None
        measure_all(rows, checkpoint, options.energy)
    if options.plot is not None:
        plot(rows, options.plot, options.energy, f"{Path(checkpoint.path).name}: energy by rank")
    if options.json:
        print(json.dumps(_as_json(checkpoint, rows, plan, options.energy), allow_nan=False))
    else:
        count, folds = checkpoint.total, not options.all
        print(report(checkpoint.path, rows, plan, options.energy, count, folds))


def _as_json(
    checkpoint: Checkpoint, rows: list[Row], plan: RankPlan | None, energy: float
) -> dict[str, Any]:
    return {
        "version": 1,
        "file": checkpoint.path,
        "key": checkpoint.key,
        "energy": energy,
        "parameters": checkpoint.total,
        "planned": None if plan is None else {"before": plan.before, "after": plan.after},
        "weights": [asdict(row) for row in rows],
    }


# --- what there is ------------------------------------------------------------------------------


def _rows(checkpoint: Checkpoint) -> list[Row]:
    """The weights, in the order of the file; a factorized one where its first factor is."""
    rows: list[Row] = []
    first: dict[Hashable, str] = {}
    for key, weight in checkpoint.entries(checkpoint.tensors):
        tensor = checkpoint.tensors[key]
        if weight is None and tensor.ndim < 2:
            continue
        row = _dense(key, tensor) if weight is None else _factorized(checkpoint, weight)
        rows.append(row)
        if (name := first.setdefault(identity(tensor), row.name)) != row.name:
            row.parameters, row.remark = 0, row.remark or f"tied to {name}"
    if not rows:
        raise ValueError("no weights in it: nothing has two dimensions or more")
    return rows


def _factorized(checkpoint: Checkpoint, name: str) -> Row:
    made, factors = checkpoint.factorized[name]
    shape, kind = tuple(made.shape), str(checkpoint.records[name]["kind"])
    view, numbers = made.matricize(shape), sum(factor.numel() for factor in factors)
    product = isinstance(view, Matricization)
    if not product:  # of a tensor: its spectrum is that of the dense weight
        view = LowRank(1).matricize(shape)
    return Row(name, shape, kind, numbers, view.matrix_shape, made.config()["rank"], product)


def _dense(name: str, tensor: Tensor) -> Row:
    shape, remark = tuple(tensor.shape), why_unread(name, tensor) or ""
    matrix = () if remark else LowRank(1).matricize(shape).matrix_shape
    return Row(name, shape, "dense", tensor.numel(), matrix, remark=remark)


# --- ranks --------------------------------------------------------------------------------------


def _plan(checkpoint: Checkpoint, rows: list[Row], ratio: float) -> RankPlan:
    """Plan for a model of the file's weights, and note in the rows what is planned."""
    known = {row.name: row for row in rows}
    plan = skeleton(checkpoint, numbers=False).plan(ratio=ratio)
    for entry in plan.rows:
        if entry.made is not None:
            assert isinstance(entry.rank, int)  # LowRank's
            row = known[entry.name]
            row.planned_rank, row.planned_parameters = entry.rank, entry.after
    return plan
