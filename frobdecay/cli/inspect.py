"""``inspect``: spectra of the weights in a checkpoint, and what ranks would cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.reading import Matricization
from frobdecay.cli.read import Checkpoint, read, why_unread
from frobdecay.cli.show import Row, plot, report
from frobdecay.cli.skeleton import skeleton
from frobdecay.cli.spectra import measure_all
from frobdecay.models.checkpoints.records import factor_key, weight_of
from frobdecay.models.checkpoints.tensors import identity
from frobdecay.models.plan import RankPlan
from frobdecay.weights.lowrank import LowRank


def run(options: argparse.Namespace) -> None:
    """Print the report on ``options.checkpoint``.

    Raises:
        ImportError, OSError, ValueError: as ``read``; a ratio that cannot be attained.
    """
    checkpoint = read(options.checkpoint, options.key)
    try:
        rows = _rows(checkpoint)
        plan = _plan(checkpoint, rows, options.ratio) if options.ratio is not None else None
        measure_all(rows, checkpoint, options.energy)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
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
    places = {factor_key(name, 0): name for name in checkpoint.records}
    rows: list[Row] = []
    first: dict[Hashable, str] = {}
    for key, tensor in checkpoint.tensors.items():
        if key in places:
            row = _factorized(checkpoint, places[key])
        elif tensor.ndim >= 2 and weight_of(key) not in checkpoint.records:
            row = _dense(key, tensor)
        else:
            continue
        rows.append(row)
        if (name := first.setdefault(identity(tensor), row.name)) != row.name:
            row.parameters, row.remark = 0, row.remark or f"tied to {name}"
    if not rows:
        raise ValueError("no weights in it: nothing has two dimensions or more")
    for row in rows:
        if weight_of(row.name) is not None:
            row.matrix, row.remark = (), "a factor; the file does not say how it is to be read"
    return rows


def _factorized(checkpoint: Checkpoint, name: str) -> Row:
    record = checkpoint.records[name]
    made, factors = checkpoint.factorized[name]
    shape, kind = tuple(record["shape"]), str(record["kind"])
    row = Row(name, shape, kind, sum(factor.numel() for factor in factors))
    row.rank, view = made.config()["rank"], made.matricize(shape)
    row.product = isinstance(view, Matricization)
    if not row.product:  # of a tensor: its spectrum is that of the dense weight
        view = LowRank(1).matricize(shape)
    row.matrix = view.matrix_shape
    return row


def _dense(name: str, tensor: Tensor) -> Row:
    row = Row(name, tuple(tensor.shape), "dense", tensor.numel())
    row.remark = why_unread(tensor) or ""
    if not row.remark:
        row.matrix = LowRank(1).matricize(row.shape).matrix_shape
    return row


# --- ranks --------------------------------------------------------------------------------------


def _plan(checkpoint: Checkpoint, rows: list[Row], ratio: float) -> RankPlan:
    """Plan for a model of the file's weights, and note in the rows what is planned."""
    known = {row.name: row for row in rows if row.matrix and row.rank is None}
    tied: dict[Hashable, Tensor] = {}
    shapes = {
        name: tied.setdefault(
            identity(checkpoint.tensors[name]),
            torch.empty(row.shape, dtype=torch.float32, device="meta"),
        )
        for name, row in known.items()
    }
    plan = skeleton(checkpoint, shapes).plan(ratio=ratio)
    for entry in plan.rows:
        if entry.made is not None:
            assert isinstance(entry.rank, int)  # LowRank's
            row = known[entry.name]
            row.planned_rank, row.planned_parameters = entry.rank, entry.after
    return plan
