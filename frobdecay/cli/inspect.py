"""``inspect``: spectra of the weights in a checkpoint, and what ranks would cost.

A checkpoint has no modules. Its weights are put into a model of nothing but layers of their shapes,
on the meta device, for which ``plan_ranks`` plans as for any; spectra come from the numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.algebra.matricize import Matricization
from frobdecay.algebra.scaling import is_finite, root_mean_square
from frobdecay.cli.read import Checkpoint, check_memory, printable, read
from frobdecay.diagnostics.measurement import measure
from frobdecay.models.checkpoints.files import write_figure
from frobdecay.models.checkpoints.records import (
    dense_weight,
    factor_key,
    factors_of,
    weight_of,
)
from frobdecay.models.plan import RankPlan, tabulated
from frobdecay.models.progress import Progress
from frobdecay.models.ranks import energy_rank, plan_ranks, singular_values
from frobdecay.product.product import Product
from frobdecay.weights.lowrank import LowRank


@dataclass
class Row:
    """What is known of one weight.

    Attributes:
        name, shape: of the dense weight.
        kind: "dense", or the parametrization's name.
        parameters: numbers in the file.
        matrix: how it is read, (*batch, m, n).
        rank: that it has, where it is factorized; several, if it is a tensor's.
        product: whether it is a chain of factors, whose spectrum needs no dense weight.
        norm, stable_rank: ‖W‖_F and ‖W‖_F² / σ₁².
        energy_rank: the rank that keeps the share --energy of ‖W‖_F².
        planned_rank, planned_parameters: under --ratio; None where it stays dense.
        planned_energy: the share of ‖W‖_F² that the planned rank keeps.
        remark: why numbers are missing.
        singular_values: largest first, of all matrices of a batch.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    parameters: int
    matrix: tuple[int, ...] = ()
    rank: int | list[int] | None = None
    product: bool = False
    norm: float | None = None
    stable_rank: float | None = None
    energy_rank: int | None = None
    planned_rank: int | None = None
    planned_parameters: int | None = None
    planned_energy: float | None = None
    remark: str = ""
    singular_values: tuple[float, ...] = ()


def run(options: argparse.Namespace) -> None:
    """Print the report on ``options.checkpoint``.

    Raises:
        ImportError, OSError, ValueError: as ``read``; a ratio that cannot be attained.
    """
    checkpoint = read(options.checkpoint, options.key)
    try:
        rows = _rows(checkpoint)
        plan = _plan(checkpoint, rows, options.ratio) if options.ratio is not None else None
        with Progress(sum(map(_work, rows)), None, "decomposing") as bar:
            for row in rows:
                _measure(row, checkpoint, options.energy)
                bar.advance(_work(row))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    if options.plot is not None:
        _plot(rows, options.plot)
    if options.json:
        print(json.dumps(_as_json(checkpoint, rows, plan, options.energy), allow_nan=False))
    else:
        _print(checkpoint, rows, plan, options.energy)


def _work(row: Row) -> float:
    return prod(row.shape) * min(row.matrix[-2:], default=1)


# --- what there is ------------------------------------------------------------------------------


def _rows(checkpoint: Checkpoint) -> list[Row]:
    """The weights, in the order of the file; a factorized one where its first factor is."""
    places = {factor_key(name, 0): name for name in checkpoint.records}
    rows = []
    for key, tensor in checkpoint.tensors.items():
        if key in places:
            rows.append(_factorized(checkpoint, places[key]))
        elif tensor.ndim >= 2 and weight_of(key) not in checkpoint.records:
            rows.append(_dense(key, tensor))
    if not rows:
        raise ValueError("no weights in it: nothing has two dimensions or more")
    for row in rows:
        if weight_of(row.name) is not None:
            row.matrix, row.remark = (), "a factor; the file does not say how it is to be read"
    return rows


def _factorized(checkpoint: Checkpoint, name: str) -> Row:
    record = checkpoint.records[name]
    made, factors = factors_of(name, record, checkpoint.tensors)
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
    if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
        row.remark = f"not read: {tensor.dtype}, {tensor.layout}"
    elif not tensor.numel():
        row.remark = "empty"
    elif tensor.ndim > 5:
        row.remark = f"not read: {tensor.ndim} dimensions"
    else:
        row.matrix = LowRank(1).matricize(row.shape).matrix_shape
    return row


# --- ranks --------------------------------------------------------------------------------------

_LAYERS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def _plan(checkpoint: Checkpoint, rows: list[Row], ratio: float) -> RankPlan:
    """Plan for a model of the file's weights, dense, and note in the rows what is planned."""
    model, layers = nn.Module(), {str(i): row for i, row in enumerate(rows) if row.matrix}
    for name, row in layers.items():
        model.add_module(name, _layer(row.shape))
    rest = _total(checkpoint) - sum(row.parameters for row in layers.values())
    model.rest = nn.Parameter(torch.empty(rest, dtype=torch.float32, device="meta"))
    plan = plan_ranks(model, ratio=ratio)
    for entry in plan.rows:
        if isinstance(entry.rank, int):  # LowRank's
            row = layers[entry.name.removesuffix(".weight")]
            row.planned_rank, row.planned_parameters = entry.rank, entry.after
    return plan


def _layer(shape: tuple[int, ...]) -> nn.Module:
    """A module with nothing but a weight of this shape, of the type that has such weights."""
    sizes = [1] * min(len(shape), 3)
    layer: nn.Module = _LAYERS[len(shape)](*sizes, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))
    return layer


# --- spectra ------------------------------------------------------------------------------------


def _measure(row: Row, checkpoint: Checkpoint, energy: float) -> None:
    """Fill in what the numbers say."""
    if not row.matrix:
        return
    if row.product:
        measured = measure(_product(row.name, checkpoint))[row.name]
        sigma, row.stable_rank = measured.spectrum, measured.stable_rank
        finite = isfinite(measured.norm)
    else:
        tensor = _tensor(row, checkpoint)
        finite = is_finite(tensor)
        if finite:
            sigma = singular_values(LowRank(1).matricize(row.shape).matrix(tensor))
            top = float(sigma.max())
            row.stable_rank = float((sigma / top).square().sum()) if top else 0.0
    if not finite:
        row.remark, row.stable_rank = "has NaN or infinity", None
        return
    row.norm = root_mean_square(sigma) * sigma.numel() ** 0.5
    row.singular_values = tuple(sigma.flatten().sort(descending=True)[0].tolist())
    if not row.norm:
        row.remark = "zero"
        return
    row.energy_rank = energy_rank(sigma, energy)
    if row.planned_rank is not None:
        squares = (sigma / sigma.max()).square()
        row.planned_energy = float(squares[..., : row.planned_rank].sum() / squares.sum())


def _tensor(row: Row, checkpoint: Checkpoint) -> Tensor:
    """The dense weight."""
    if row.kind == "dense":
        tensor = checkpoint.tensors[row.name]
    else:
        factors = factors_of(row.name, checkpoint.records[row.name], checkpoint.tensors)[1]
        check_memory(prod(row.shape) * factors[0].itemsize)
        tensor = dense_weight(row.name, checkpoint.records[row.name], checkpoint.tensors)
    return tensor.float() if tensor.itemsize == 1 else tensor  # eight bits are for storage only


def _product(name: str, checkpoint: Checkpoint) -> Product:
    made, factors = factors_of(name, checkpoint.records[name], checkpoint.tensors)
    holder = nn.Module()
    for i, factor in enumerate(factors):
        holder.register_parameter(f"original{i}", nn.Parameter(factor, requires_grad=False))
    product: Product = made.product(name, holder)
    return product


# --- output -------------------------------------------------------------------------------------


def _total(checkpoint: Checkpoint) -> int:
    return sum(t.numel() for t in checkpoint.tensors.values() if t.is_floating_point())


def _as_json(
    checkpoint: Checkpoint, rows: list[Row], plan: RankPlan | None, energy: float
) -> dict[str, Any]:
    return {
        "version": 1,
        "file": checkpoint.path,
        "key": checkpoint.key,
        "energy": energy,
        "parameters": _total(checkpoint),
        "planned": None if plan is None else {"before": plan.before, "after": plan.after},
        "weights": [asdict(row) for row in rows],
    }


def _print(checkpoint: Checkpoint, rows: list[Row], plan: RankPlan | None, energy: float) -> None:
    columns: dict[str, Callable[[Row], str]] = {
        "weight": lambda row: printable(row.name),
        "shape": lambda row: _times(row.shape),
        "kind": lambda row: row.kind if row.rank is None else f"{row.kind} {_times(row.rank)}",
        "read as": lambda row: _times(row.matrix),
        "parameters": lambda row: f"{row.parameters:,}",
        "‖W‖": lambda row: _cell(row.norm),
        "stable rank": lambda row: _cell(row.stable_rank),
        f"rank @ {energy:g}": lambda row: _cell(row.energy_rank),
    }
    if plan:
        columns |= {
            "planned rank": lambda row: str(row.planned_rank or "dense"),
            "planned energy": lambda row: _cell(row.planned_energy),
            "planned parameters": lambda row: f"{row.planned_parameters or prod(row.shape):,}",
        }
    columns["remarks"] = lambda row: row.remark
    lines = [[*columns], *([cell(row) for cell in columns.values()] for row in rows)]
    total = f"{_total(checkpoint):,} floating-point numbers"
    if plan:
        total += f"; planned {plan.after:,} of {plan.before:,} when dense, ratio {plan.ratio:.3g}"
    print(_table(printable(checkpoint.path), lines, range(2, len(columns) - 1)), total, sep="\n")


def _table(title: str, lines: list[list[str]], right: Container[int]) -> str:
    """As wide as the terminal; for files and other programs no line is broken, and it is quick."""
    if not sys.stdout.isatty():
        return f"{title}\n{tabulated(lines, right)}"
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for k, head in enumerate(lines[0]):
        table.add_column(head, justify="right" if k in right else "left", overflow="fold")
    for cells in lines[1:]:
        table.add_row(*map(Text, cells))
    console = Console()
    with console.capture() as printed:  # rich would exit by itself where nobody reads on
        console.print(table)
    return printed.get().rstrip("\n")


def _times(sizes: int | Sequence[int]) -> str:
    return str(sizes) if isinstance(sizes, int) else "×".join(map(str, sizes))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plot(rows: list[Row], path: str) -> None:
    """σᵢ/σ₁ over i/k, one line a weight.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a suffix that matplotlib does not know.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'frobdecay[plot]'") from error
    drawn = [row for row in rows if row.norm]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in drawn:
        top, count = row.singular_values[0], len(row.singular_values)
        share = [(i + 1) / count for i in range(count)]
        name = printable(row.name).replace("$", r"\$")
        axes.plot(share, [value / top for value in row.singular_values], label=name, linewidth=1)
    axes.set(xlabel="share of the singular values", ylabel="σᵢ / σ₁", yscale="log", ylim=(1e-4, 2))
    if 0 < len(drawn) <= 12:
        axes.legend(fontsize="small")
    write_figure(path, figure)
