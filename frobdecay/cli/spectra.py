"""Spectra of the weights in a checkpoint, several at once.

Note [precision of spectra]. Singular values are the roots of the smaller Gram's eigenvalues, in
float64: exact to about 1e-8 of the largest one (in float32 it would be 3e-4, and the tail that is
plotted would be noise); norms, stable ranks and shares of energy to float64's digits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from math import isfinite, prod

import torch
from torch import Tensor, nn

from frobdecay.algebra.scaling import is_finite, root_mean_square
from frobdecay.cli.read import Checkpoint, check_memory
from frobdecay.cli.show import Row
from frobdecay.diagnostics.measurement import measure
from frobdecay.models.budget.spectra import first_reaching, shares, singular_values
from frobdecay.models.checkpoints.records import dense_weight
from frobdecay.models.progress import Progress, decomposition
from frobdecay.product.product import Product
from frobdecay.weights.lowrank import LowRank


def measure_all(rows: list[Row], checkpoint: Checkpoint, energy: float) -> None:
    """Several at once, each in one thread: an eigenvalue problem has no use for more."""
    threads = torch.get_num_threads()
    with (
        Progress(sum(map(_work, rows)), None, "decomposing") as bar,
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        some = {
            pool.submit(_measure, row, checkpoint, energy): row
            for row in sorted(rows, key=_work, reverse=True)
        }
        try:
            for done in as_completed(some):
                done.result()
                bar.advance(_work(some[done]))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # BLAS has one number for all


def _work(row: Row) -> float:
    return decomposition(row.matrix, len(row.matrix) - 2) if row.matrix else 0


def _measure(row: Row, checkpoint: Checkpoint, energy: float) -> None:
    """Fill in what the numbers say."""
    if not row.matrix:
        return
    sigma = _spectrum(row, checkpoint)
    if sigma is None:
        row.remark = "has NaN or infinity"
        return
    top = float(sigma.max())
    row.stable_rank = float((sigma / top).square().sum()) if top else 0.0
    row.norm = root_mean_square(sigma) * sigma.numel() ** 0.5
    row.singular_values = tuple(sigma.flatten().sort(descending=True)[0].tolist())
    if not row.norm:
        row.remark = "zero"
        return
    kept = shares(sigma)
    row.energy_rank = first_reaching(kept, energy)
    if row.planned_rank is not None:
        row.planned_energy = float(kept[: row.planned_rank].sum())


def _spectrum(row: Row, checkpoint: Checkpoint) -> Tensor | None:
    """Singular values (*batch, k); None where a number is not finite."""
    if row.product:
        (measured,) = measure(_product(row.name, checkpoint))
        return measured.spectrum if isfinite(measured.norm) else None
    tensor = _tensor(row, checkpoint)
    if not is_finite(tensor):
        return None
    return singular_values(LowRank(1).matricize(row.shape).matrix(tensor))


def _tensor(row: Row, checkpoint: Checkpoint) -> Tensor:
    """The dense weight."""
    if row.kind == "dense":
        tensor = checkpoint.tensors[row.name]
    else:
        made, factors = checkpoint.factorized[row.name]
        check_memory(prod(row.shape) * factors[0].itemsize)
        tensor = dense_weight(made, factors)
    return tensor.float() if tensor.itemsize == 1 else tensor  # eight bits are for storage only


def _product(name: str, checkpoint: Checkpoint) -> Product:
    made, factors = checkpoint.factorized[name]
    holder = nn.Module()
    for i, factor in enumerate(factors):
        holder.register_parameter(f"original{i}", nn.Parameter(factor, requires_grad=False))
    product: Product = made.product(name, holder)
    return product
