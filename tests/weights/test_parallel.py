"""Tensor parallelism: the sharded layers compute what the layers did, and send r numbers a row."""

import copy
import re
import subprocess
import sys
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from gloo import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.communication import Traffic
from frobdecay.models.factorize import factorize
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.weights.lowrank import LowRank
from frobdecay.weights.parallel import ColwiseFactored, RowwiseFactored

pytestmark = pytest.mark.slow

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


class MLP(nn.Module):
    """up, GELU, down, behind a normalization where there is to be one."""

    def __init__(self, width=12, hidden=16, bias=True, norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        """Normalize, widen, narrow."""
        return self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Causal attention, with as many heads as the projections give."""

    def __init__(self, width=16, head=4):
        super().__init__()
        self.head = head
        self.q, self.v, self.o = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)  # its bias would get no gradient

    def forward(self, x):
        """Attend."""
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(-2))


def mlp_plan():
    """The two layers as a pair."""
    return {"up": ColwiseFactored(), "down": RowwiseFactored()}


def whole_plan(local):
    """The hidden layer is gathered between the two."""
    up = ColwiseFactored(output_layouts=Replicate(), use_local_output=local)
    return {"up": up, "down": RowwiseFactored(input_layouts=Replicate())}


def sequence_plan(local):
    """Rows are divided before and behind the pair."""
    return {
        "norm": SequenceParallel(use_local_output=local),
        "up": ColwiseFactored(input_layouts=Shard(1)),
        "down": RowwiseFactored(output_layouts=Shard(1)),
    }


def attention_plan():
    """Heads are divided."""
    columns = {name: ColwiseFactored() for name in "qkv"}
    return {**columns, "o": RowwiseFactored()}


# model, rank, depth, plan, layout of the model's input and output
NORMED = partial(MLP, norm=True)
CASES = {
    "mlp": (MLP, 4, 0, mlp_plan, Replicate()),
    "without bias": (partial(MLP, bias=False), 4, 0, mlp_plan, Replicate()),
    "deep": (MLP, 4, 2, mlp_plan, Replicate()),
    "wide": (MLP, 20, 1, mlp_plan, Replicate()),
    "uneven": (partial(MLP, 11, 18), 3, 1, mlp_plan, Replicate()),
    "an empty shard": (partial(MLP, 12, 5), 3, 0, mlp_plan, Replicate()),
    "attention": (Attention, 5, 0, attention_plan, Replicate()),
    "whole between": (MLP, 4, 1, partial(whole_plan, True), Replicate()),
    "DTensor between": (MLP, 4, 0, partial(whole_plan, False), Replicate()),
    "sequence": (NORMED, 4, 0, partial(sequence_plan, True), Shard(1)),
    "sequence, DTensor between": (NORMED, 4, 0, partial(sequence_plan, False), Shard(1)),
    "sequence, deep": (NORMED, 4, 2, partial(sequence_plan, True), Shard(1)),
    "sequence, uneven features": (
        partial(NORMED, 11, 18),
        3,
        0,
        partial(sequence_plan, True),
        Shard(1),
    ),
}


def perturbed(model, rank, depth=0):
    """Factorize, and move away from identities, which would hide a transposition."""
    plan = factorize(model, rank=rank, parametrization=partial(LowRank, depth=depth))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return plan


def compare(mesh, case, dtype):
    """The largest relative difference to the layers in one process, by tensor."""
    make, rank, depth, plan, layout = CASES[case]
    torch.manual_seed(1)
    single = make().to(dtype)
    perturbed(single, rank, depth)
    width = next(m.in_features for m in single.modules() if isinstance(m, nn.Linear))
    x, weights = torch.randn(2, 2, 8, width, dtype=dtype)
    model = parallelize_module(copy.deepcopy(single), mesh, plan())

    def part(tensor):
        return distribute_tensor(tensor.detach(), mesh, [layout]).to_local()

    inner = x.clone().requires_grad_()
    outer = part(x).requires_grad_()
    expected, y = single(inner), model(outer)
    expected.backward(weights)
    y.backward(part(weights))
    pairs = {"output": (part(expected), y), "input": (part(inner.grad), outer.grad)}
    for (name, one), other in zip(single.named_parameters(), model.parameters(), strict=True):
        pairs[name] = one.grad, other.grad.full_tensor()
    return {name: float((a - b).norm() / a.norm()) for name, (a, b) in pairs.items() if a.numel()}


def compare_all(rank, world):
    """The differences of all cases."""
    mesh = init_device_mesh("cpu", (world,))
    return {(case, str(dtype)): compare(mesh, case, dtype) for case in CASES for dtype in BOUND}


@cache
def differences(world):
    """Of all processes."""
    return run(compare_all, world)


@pytest.mark.covers("C14", "P27")
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_equal_to_one_process(world, case, dtype):
    """Outputs and all gradients are those of the layers in one process."""
    for difference in differences(world):
        errors = difference[case, str(dtype)]
        assert len(errors) > 4
        assert max(errors.values()) < BOUND[dtype], errors


def shape_of(layout):
    """What a placement looks like as text."""
    return f"{type(layout).__name__}({getattr(layout, 'dim', '')})"


def observe(rank, world):
    """What else there is to see of an MLP, dense and factorized, and of a sequence-parallel one."""
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(2, 8, 12)  # the same in every process
    torch.manual_seed(rank)  # the parameters are not
    dense = MLP()
    model = copy.deepcopy(dense)
    perturbed(model, 4)
    model.up.parametrizations.weight.original1.requires_grad_(False)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parallelize_module(dense, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    parallelize_module(model, mesh, mlp_plan())
    sent = {}
    for name, network in {"dense": dense, "factors": model}.items():
        with Traffic() as traffic, CommDebugMode() as debug:
            network(x.clone().requires_grad_()).square().sum().backward()
        counts = {str(op): count for op, count in debug.get_comm_counts().items()}
        sent[name] = dict(traffic.calls), dict(traffic.bytes), counts
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.down.parametrizations.weight.original0.zero_()
        twin.down.bias.zero_()
        silent = float(twin(x).norm())
        loud = float(model(x).norm())
    sequence = NORMED()
    perturbed(sequence, 4, depth=1)
    parallelize_module(sequence, mesh, sequence_plan(local=True))
    with Traffic() as traffic:
        sequence(x.chunk(world, dim=1)[rank].clone().requires_grad_()).square().sum().backward()
    factors = {n: p for n, p in sequence.named_parameters() if not n.startswith("norm")}
    return {
        "sent": sent,
        "sequence": (dict(traffic.calls), dict(traffic.bytes)),
        "own": own,
        "full": {name: p.full_tensor().detach() for name, p in model.named_parameters()},
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "placements": {name: [shape_of(q) for q in p.placements] for name, p in factors.items()},
        "of gradients": {
            name: [shape_of(q) for q in p.grad.placements] for name, p in factors.items()
        },
        "norms of copy and model": (silent, loud),
    }


@cache
def observed(world=2):
    """Of all processes."""
    return run(observe, world)


def test_r_numbers_a_row_are_sent():
    """Forward and backward send one sum each, as dense layers do, of r instead of n numbers."""
    for seen in observed():
        calls, sent, counts = seen["sent"]["dense"]
        assert calls == {"all_reduce": 2}
        assert sent["all_reduce"] == 2 * 16 * 12 * 4  # both ways, rows, features, bytes
        factored_calls, factored, factored_counts = seen["sent"]["factors"]
        assert (factored_calls, factored_counts) == (calls, counts)
        assert factored["all_reduce"] == 2 * 16 * 4 * 4


def test_sequence_parallel_layers_exchange_r_numbers_a_row():
    """Activations are gathered and scattered while a row has r numbers, in both directions."""
    for seen in observed():
        calls, sent = seen["sequence"]
        assert calls["all_gather"] == calls["reduce_scatter"] == 2
        assert sent["all_gather"] == 2 * 8 * 4 * 4  # a process has 8 of the 16 rows
        assert sent["reduce_scatter"] == 2 * 16 * 4 * 4


def test_factors_are_sharded_along_features():
    """U of a column-wise and V of a row-wise layer are sharded, the others replicated."""
    assert observed()[0]["placements"] == {
        "up.bias": ["Shard(0)"],
        "up.parametrizations.weight.original0": ["Shard(0)"],
        "up.parametrizations.weight.original1": ["Replicate()"],
        "up.parametrizations.weight.original2": ["Replicate()"],
        "down.bias": ["Replicate()"],
        "down.parametrizations.weight.original0": ["Replicate()"],
        "down.parametrizations.weight.original1": ["Replicate()"],
        "down.parametrizations.weight.original2": ["Shard(0)"],
    }


def test_gradients_are_placed_as_factors():
    """No gradient is a partial sum, to which a decay would be added by every process."""
    for seen in observed():
        assert seen["of gradients"] == seen["placements"]


def test_the_first_process_gives_the_values():
    """As with torch's styles, all get the parameters that the first process has."""
    first, *others = observed()
    for seen in (first, *others):
        for name, value in first["own"].items():
            assert torch.equal(seen["full"][name], value), name
    assert not torch.equal(first["own"]["up.bias"], others[0]["own"]["up.bias"])


def test_frozen_factors_stay_frozen():
    """``requires_grad`` of every parameter is kept."""
    assert observed()[0]["frozen"] == ["up.parametrizations.weight.original1"]


def test_a_copy_computes_with_its_own_factors():
    """A deep copy of a sharded model does not run the original's layers."""
    silent, loud = observed()[0]["norms of copy and model"]
    assert silent == 0 < loud


BASES = {
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.5),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
}


def train_sharded(rank, world, base, data):
    """Steps of Frobenius decay on a (data, tensor)-parallel mesh and in one process: difference."""
    mesh = init_device_mesh("cpu", (data, world // data), mesh_dim_names=("dp", "tp"))
    single = NORMED(11, 18).double()
    perturbed(single, 4, depth=1)
    model = parallelize_module(copy.deepcopy(single), mesh["tp"], sequence_plan(local=False))
    if data > 1:
        fully_shard(model, mesh=mesh["dp"])
    pairs = (
        (single, FrobeniusDecay(BASES[base](single.parameters()), single)),
        (
            model,
            FrobeniusDecay(BASES[base](model.parameters()), model),
        ),
    )
    for _ in range(3):
        x = torch.randn(2 * data, 8, 11, dtype=torch.float64)
        part = x.chunk(data)[mesh["dp"].get_local_rank()]
        part = part.chunk(world // data, dim=1)[mesh["tp"].get_local_rank()]
        single(x).square().sum().backward()
        (model(part).square().sum() * data).backward()  # fully_shard takes the mean
        for _, optimizer in pairs:
            optimizer.step()
            optimizer.zero_grad()
    parameters = zip(single.parameters(), model.parameters(), strict=True)
    return max(float((a - b.full_tensor()).norm() / a.norm()) for a, b in parameters)


def train_both(rank, world, data):
    """By optimizer."""
    return {base: train_sharded(rank, world, base, data) for base in BASES}


@cache
def trained(data):
    """Of all processes."""
    return run(train_both, 2 * data, data)


@pytest.mark.parametrize("data", [1, 2], ids=["alone", "fully_shard"])
@pytest.mark.parametrize("base", BASES)
def test_trains_as_in_one_process(base, data):
    """With Frobenius decay; also where ``fully_shard`` shards in another dimension of the mesh."""
    assert max(found[base] for found in trained(data)) < 1e-10


def refusals(rank, world):
    """What the styles say to what they cannot shard, and whether that was left as it was."""
    mesh = init_device_mesh("cpu", (world,))

    def factored(module, **options):
        model = nn.Sequential(module)
        factorize(model, rank=2, **options)
        return model[0]

    def sharded():
        return parallelize_module(factored(nn.Linear(8, 8)), mesh, ColwiseFactored())

    transposed = partial(LowRank, pattern="o i -> i o")
    blocks = partial(LowRank, pattern="(g o) i -> g o i", axes={"g": 2})
    both = factored(nn.Linear(8, 8))
    register_parametrization(both, "bias", nn.Identity())
    cases = {
        "dense": (nn.Linear(8, 8), mesh),
        "conv": (factored(nn.Conv2d(4, 4, 3)), mesh),
        "embedding": (factored(nn.Embedding(8, 8)), mesh),
        "sharded": (sharded(), mesh),
        "transposed": (factored(nn.Linear(8, 8), parametrization=transposed), mesh),
        "blocks": (factored(nn.Linear(8, 8), parametrization=blocks), mesh),
        "other": (orthogonal(nn.Linear(8, 8)), mesh),
        "both": (both, mesh),
        "mesh": (factored(nn.Linear(8, 8)), init_device_mesh("cpu", (1, world))),
    }
    said = {}
    for name, (module, where) in cases.items():
        for style in (ColwiseFactored(), RowwiseFactored()):
            before = dict(module.named_parameters())
            try:
                parallelize_module(module, where, style)
            except (TypeError, ValueError) as error:
                said[name, type(style).__name__] = f"{type(error).__name__}: {error}"
            after = dict(module.named_parameters())
            assert all(after[key] is value for key, value in before.items())
            assert len(after) == len(before)
    return said


REFUSED = {
    "dense": r"ValueError: {0}Factored: .*dense Linear\(in_features=8.*parallel\.{0}Parallel",
    "conv": r"TypeError: {0}Factored: expected a factorized nn.Linear, got ParametrizedConv2d",
    "embedding": r"TypeError: {0}Factored: expected a factorized nn.Linear, got Parametrized",
    "sharded": r"ValueError: {0}Factored: .*sharded already; first parallelize_module",
    "transposed": r"ValueError: {0}Factored: .*U of 8 rows.*o i -> i o.*default pattern",
    "blocks": r"ValueError: {0}Factored: .*U of 8 rows.*default pattern",
    "other": r"ValueError: {0}Factored: .*U of 8 rows.*_Orthogonal.*default pattern",
    "both": r"ValueError: {0}Factored: .*no other parametrization",
    "mesh": r"ValueError: {0}Factored: .*one dimension.*mesh\['tp'\]",
}


@cache
def refused():
    """Of all processes."""
    return run(refusals, 2)


@pytest.mark.covers("P27")
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("style", ["Colwise", "Rowwise"])
def test_refusals(style, case):
    """What cannot be sharded is refused with the reason and the remedy, and left as it was."""
    for said in refused():
        assert re.match(REFUSED[case].format(style), said[case, f"{style}Factored"], re.S)


def test_not_imported_with_the_package():
    """``import frobdecay`` does not bring in ``torch.distributed.tensor``'s parallel styles."""
    code = "import sys, frobdecay; print('frobdecay.weights.parallel' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("style", [ColwiseFactored, RowwiseFactored])
def test_styles_print_their_layouts(style):
    """The repr shows what was asked for."""
    shown = repr(style(input_layouts=Shard(1), use_local_output=False))
    assert "Shard(dim=1)" in shown
    assert "use_local_output=False" in shown
