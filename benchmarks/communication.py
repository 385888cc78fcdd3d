"""Decay of sharded factors costs one all-reduce a step, a fraction of what FSDP sends anyhow.

    python -m benchmarks.communication                                   # half a minute
    python -m benchmarks.communication --ranks 64,512 --ratio 0.1 --json communication.json

The model is Llama with all seven matrices of every layer factorized at ``--ratio``, embeddings
dense, under ``fully_shard``. For each number of processes,

    FD         one all-reduce of the Σ 2r² numbers of all Grams, float32 (a factor
               itself where it is no larger)
    bound      of steps in the product: the same once more, for the Grams of what moved
    gathering  an all-gather of all factors, (m+n)·r float32 numbers each, from which every process
               could form what it needs
    FSDP       two all-gathers of all parameters and a reduce-scatter of all gradients, bfloat16

are the bytes that one process sends in a step, by the ring algorithms: 2(P−1)/P of an all-reduce's
input, (P−1)/P of the whole of the others. Tensor parallelism sends r in place of n or m numbers a
token in each all-reduce.

The formulas are compared with what is really called, on one layer at full size, in this one process
that takes itself for the first of P (torch's fake process group: collectives that do nothing). The
tests compare them with processes that do communicate, of which a machine has only a few.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure
from benchmarks.measure import Report, Target
from frobdecay.gradient.penalty import add_penalty_grad_
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.product import Product

__all__ = ["LLAMAS", "Cost", "Llama", "Traffic", "cost", "counted", "main", "rows"]

FLOAT32, BFLOAT16 = 4, 2  # bytes
TOKENS = 4096  # of a process in a step

# The collectives that DTensor and FSDP call -> name, position of the input.
_COLLECTIVES = {
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
}
_OTHER = ("wait_tensor", "barrier", "_wrap_tensor_autograd")


class Traffic(TorchDispatchMode):
    """Count the collectives that run in this context, and the bytes a process puts into them.

    Attributes:
        calls: how often each ran, by name: all_reduce, all_gather, reduce_scatter, all_to_all.
        bytes: the inputs' bytes, by name.

    Raises:
        NotImplementedError: within the context, at a collective that is not in the table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in ("_c10d_functional", "c10d") and name not in _OTHER:
            if func._schema.name not in _COLLECTIVES:
                raise NotImplementedError(f"{func._schema.name} is not in the table of collectives")
            kind, position = _COLLECTIVES[func._schema.name]
            given = args[position]
            inputs = given if isinstance(given, list) else [given]
            self.calls[kind] += 1
            self.bytes[kind] += sum(tensor.nbytes for tensor in inputs)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Llama:
    """Shapes of a model.

    Attributes:
        layers, width, hidden, vocabulary: as they are called.
        kv: features of keys and of values.
    """

    layers: int
    width: int
    hidden: int
    kv: int
    vocabulary: int = 32_000

    def matrices(self) -> list[tuple[int, int]]:
        """(m, n) of the weights of one layer: q, k, v, o, gate, up, down."""
        d, h, kv = self.width, self.hidden, self.kv
        return [(d, d), (kv, d), (kv, d), (d, d), (h, d), (h, d), (d, h)]

    def factors(self, ratio: float) -> list[tuple[int, int, int]]:
        """(m, n, r) of the products of one layer, of which each keeps the ratio."""
        return [(m, n, max(1, round(ratio * m * n / (m + n)))) for m, n in self.matrices()]

    def others(self) -> int:
        """Parameters of the model that are no factors: embedding and head."""
        return 2 * self.vocabulary * self.width


LLAMAS = {"7B": Llama(32, 4096, 11_008, 4096), "70B": Llama(80, 8192, 28_672, 1024)}


@dataclass(frozen=True)
class Cost:
    """What one process of P does for Frobenius decay in a step, beside alternatives.

    Attributes:
        sums: bytes that it puts into the all-reduce, which the buffer of Grams occupies, too.
        part: bytes of the factors' shards that it would put into an all-gather.
        fd, bound, gathering, fsdp: bytes that it sends; for the bound beside those for FD.
        flops: multiplications and additions, of its rows' Grams and gradients.
        norms: those of the bound: its rows' Grams, and of every Gram, which all processes have,
            three products of r×r matrices.
        share, norms_share: of them in those of its training step.
    """

    sums: int
    part: int
    fd: float
    bound: float
    gathering: float
    fsdp: float
    flops: int
    norms: int
    share: float
    norms_share: float


def cost(
    factors: Sequence[tuple[int, int, int]], world: int, layers: int = 1, others: int = 0
) -> Cost:
    """Compute the cost from shapes.

    Args:
        factors: (m, n, r) of the products of one layer.
        world: P, the processes that shard every factor by rows.
        layers: how many such layers there are.
        others: number of other parameters.
    """
    sums = FLOAT32 * layers * sum(r * (min(m, r) + min(n, r)) for m, n, r in factors)
    held = [(-(-m // world) + -(-n // world), r) for m, n, r in factors]
    part = FLOAT32 * layers * sum(length * r for length, r in held)
    params = world * layers * sum(length * r for length, r in held) + others  # with padding
    flops = 4 * layers * sum(length * r * r for length, r in held)
    norms = 2 * layers * sum(length * r * r + 2 * 2 * 3 * r**3 for length, r in held)
    sent = (world - 1) / world
    return Cost(
        sums,
        part,
        fd=2 * sent * sums,
        bound=2 * sent * sums,
        gathering=(world - 1) * part,
        fsdp=3 * sent * params * BFLOAT16,
        flops=flops,
        norms=norms,
        share=flops / (6 * params * TOKENS),
        norms_share=norms / (6 * params * TOKENS),
    )


def rows(m: int, columns: int, mesh: DeviceMesh) -> nn.Parameter:
    """A factor m×r that is sharded by rows, of which only this process' part exists."""
    length = -(-m // mesh.size())
    part = torch.zeros(min(length, max(0, m - length * mesh.get_local_rank())), columns)
    shape = torch.Size((m, columns))
    return nn.Parameter(
        DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=shape, stride=(columns, 1)
        )
    )


def counted(factors: Sequence[tuple[int, int, int]], mesh: DeviceMesh) -> dict[str, Traffic]:
    """Count what Frobenius decay, a bounded step with it, and gathering put into collectives.

    Args:
        factors: (m, n, r) of products.
        mesh: of one dimension.
    """
    products = [
        Product.of(rows(m, r, mesh), rows(n, r, mesh), name=f"{k}")
        for k, (m, n, r) in enumerate(factors)
    ]
    params: list[Any] = [param for product in products for param in product.params]
    for param in params:
        param.grad = torch.zeros_like(param)
    add_penalty_grad_(products, 0.1)  # the first call makes sure that all processes agree
    found = {"FD": Traffic(), "bound": Traffic(), "gathering": Traffic()}
    with found["FD"]:
        add_penalty_grad_(products, 0.1)
    base = torch.optim.SGD(params, lr=0.1)
    optimizer = FrobeniusDecay(base, products, decay=0.1, bound=1.0)
    with found["bound"]:
        optimizer.step()
    with found["gathering"], torch.no_grad():
        wholes: list[Tensor] = [param.full_tensor() for param in params]
    assert all(whole.shape == param.shape for whole, param in zip(wholes, params, strict=True))
    return found


class _Layer(nn.Module):
    """Factors that are used."""

    def __init__(self, factors: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        shapes = [shape for m, n, r in factors for shape in ((m, r), (n, r))]
        made = (nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes)
        self.factors = nn.ParameterList(made)

    def forward(self, x: Tensor) -> Tensor:
        """Use them all."""
        return x + sum(factor.sum() for factor in self.factors)


def sharded_step(factors: Sequence[tuple[int, int, int]], mesh: DeviceMesh) -> Traffic:
    """Count what ``fully_shard`` puts into collectives, forward and backward, for one layer."""
    model = nn.Sequential(_Layer(factors))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    with Traffic() as traffic:
        model(torch.zeros(1, dtype=torch.bfloat16)).sum().backward()
    return traffic


@contextmanager
def pretended(world: int) -> Iterator[DeviceMesh]:
    """Be the first of P processes, whose collectives do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def _calls(traffic: Traffic) -> str:
    """As ``2 all_gather 1.58 MB``."""
    parts = (f"{traffic.calls[kind]} {kind} {_size(traffic.bytes[kind])}" for kind in traffic.calls)
    return ", ".join(parts)


def _size(bytes_: float) -> str:
    """In the unit that suits."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if bytes_ >= 10**power:
            return f"{bytes_ / 10**power:.3g} {unit}"
    return f"{bytes_:.0f} B"


def _table(name: str, ratio: float, ranks: Sequence[int], report: Report) -> None:
    model = LLAMAS[name]
    factors = model.factors(ratio)
    lines: list[dict[str, Any]] = []
    costs: list[Cost] = []
    for world in ranks:
        found = cost(factors, world, model.layers, model.others())
        costs.append(found)
        lines.append(
            {
                "processes": world,
                "FD": _size(found.fd),
                "bound": _size(found.bound),
                "gathering": _size(found.gathering),
                "FSDP": _size(found.fsdp),
                "FD ÷ gathering": found.fd / found.gathering,
                "FD ÷ FSDP": found.fd / found.fsdp,
                "Grams held": _size(found.sums),
                "GFLOP of FD": found.flops / 1e9,
                "of the step's": f"{100 * found.share:.2g} %",
                "GFLOP of the bound": found.norms / 1e9,
                "of the step's, too": f"{100 * found.norms_share:.2g} %",
            }
        )
        report.data.setdefault("costs", {}).setdefault(name, {})[world] = vars(found)
    worst = max(costs, key=lambda found: found.fd / found.fsdp)
    report.targets.append(Target(f"{name}: FD ÷ FSDP", worst.fd / worst.fsdp, ratio))
    worst = max(costs, key=lambda found: found.fd / found.gathering)
    report.targets.append(Target(f"{name}: FD ÷ gathering", worst.fd / worst.gathering, 2 * ratio))
    ranks_of = ", ".join(str(r) for r in dict.fromkeys(r for _, _, r in factors))
    report.table(f"Llama {name}, ratio {ratio}, ranks {ranks_of}: sent by a process a step", lines)


def _check(name: str, ratio: float, ranks: Sequence[int], report: Report) -> None:
    """Compare the formulas with the collectives of one layer."""
    factors = LLAMAS[name].factors(ratio)
    lines: list[dict[str, Any]] = []
    for world in ranks:
        expected = cost(factors, world)
        with pretended(world) as mesh:
            found = counted(factors, mesh)
            found["FSDP"] = sharded_step(factors, mesh)
        fd, gathering, fsdp = (found[key].bytes for key in ("FD", "gathering", "FSDP"))
        whole = world * expected.part * BFLOAT16 // FLOAT32
        sent = (world - 1) * (fsdp["all_gather"] + fsdp["reduce_scatter"] / world)
        lines.append(
            {
                "processes": world,
                "FD": _calls(found["FD"]),
                "FD and bound": _calls(found["bound"]),
                "gathering": _calls(found["gathering"]),
                "FSDP": _calls(found["FSDP"]),
                "FSDP sends": _size(sent),
            }
        )
        for what, difference in (
            ("FD", fd["all_reduce"] - expected.sums),
            ("FD and bound", found["bound"].bytes["all_reduce"] - 2 * expected.sums),
            ("gathering", gathering["all_gather"] - expected.part),
            ("FSDP", fsdp["reduce_scatter"] - whole),
        ):
            title = f"{name}, {world} processes, {what}: counted − formula"
            report.targets.append(Target(title, abs(difference), 0, unit="B"))
    report.table(f"Llama {name}, one layer: what is put into collectives", lines)


def _tensor_parallel(ratio: float, report: Report) -> None:
    lines: list[dict[str, Any]] = []
    for name, model in LLAMAS.items():
        *_, (m, n, r) = model.factors(ratio)
        lines.append(
            {
                "model": name,
                "down": f"{m}×{n}, r = {r}",
                "dense": _size(BFLOAT16 * m),
                "factorized": _size(BFLOAT16 * r),
                "ratio": r / m,
            }
        )
    report.table("Tensor parallel, a token in the all-reduce of a row-wise layer, bfloat16", lines)


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("communication", __doc__ or "", device=False)
    made.add_argument("--ratio", type=_ratio, default=0.25, help="default: %(default)s")
    ranks = {"type": measure.counts, "default": "8,64,512,4096"}
    made.add_argument("--ranks", **ranks, help="P, comma-separated; default: %(default)s")
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Print the tables and compare with what is called."""
    for name in LLAMAS:
        _table(name, options.ratio, options.ranks, report)
    _tensor_parallel(options.ratio, report)
    for name in LLAMAS:
        _check(name, options.ratio, [world for world in options.ranks if world >= 64], report)


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a ratio between 0 and 1, got {text}")
    return value


if __name__ == "__main__":
    main()
