"""Distributed checkpoints: sharded factors are saved by some processes and resumed by others."""

from concurrent.futures import Future
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from gloo import run
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge
from frobdecay.optim.frobenius import FrobeniusDecay

pytestmark = pytest.mark.slow


def in_background(state, checkpoint_id):
    """``async_save``, with a process group of its own: the training goes on in the other."""
    return dcp.async_save(state, checkpoint_id=checkpoint_id, process_group=dist.new_group())


BASES = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
}
# How the checkpoint is written, and whether the optimizer's state is one flat dict.
WAYS = {"save": (dcp.save, False), "flat": (dcp.save, True), "async": (in_background, False)}
X = torch.linspace(-1, 1, 44, dtype=torch.float64).unflatten(0, (4, 11))


def dense(seed=3):
    """A model of two layers, one of which is to stay dense; its sizes do not divide evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(11, 18), nn.GELU(), nn.Linear(18, 7)).double()


def factored(seed=3):
    """The model with its first layer factorized."""
    model = dense(seed)
    factorize(model, rank=3, include="0")
    return model


def shard(model, world):
    """Shard over several processes; one has the model as it is."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (world,))) if world > 1 else model


def optimizer_of(case, model):
    """The case's optimizer."""
    kind, base, _ = case.split("-")
    optimizer = BASES[base](model.parameters())
    return FrobeniusDecay(optimizer, model) if kind == "wrapped" else optimizer


def train(model, optimizer, rank, world, steps):
    """The same steps of the whole batch, whatever the number of processes."""
    for step in steps:
        torch.manual_seed(step)
        x, y = torch.randn(8, 11, dtype=torch.float64), torch.randn(8, 7, dtype=torch.float64)
        loss = F.mse_loss(model(x.chunk(world)[rank]), y.chunk(world)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def values(model):
    """All parameters, whole."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def begin(rank, world, directory, case):
    """Train three steps, save, train on; the parameters at the save and at the end."""
    save, flat = WAYS[case.split("-")[2]]
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = shard(factored(), world)
    optimizer = optimizer_of(case, model)
    train(model, optimizer, rank, world, range(3))
    weights, moments = get_state_dict(model, optimizer, options=options)
    pending = save({"model": weights, "optimizer": moments}, checkpoint_id=f"{directory}/{case}")
    train(model, optimizer, rank, world, range(3, 6))
    if isinstance(pending, Future):  # it was written meanwhile
        pending.result()
    return values(model)


def resume(rank, world, directory, case):
    """Load into a model and an optimizer that never made a step, and train on."""
    options = StateDictOptions(flatten_optimizer_state_dict=WAYS[case.split("-")[2]][1])
    model = shard(factored(seed=4), world)
    optimizer = optimizer_of(case, model)
    untouched = values(model)
    weights, moments = get_state_dict(model, optimizer, options=options)
    for name, value in values(model).items():
        assert torch.equal(value, untouched[name]), f"to ask for the state dict moved {name}"
    undecayed = [group["params"] for group in optimizer.param_groups if not group["weight_decay"]]
    assert len(undecayed) == case.startswith("wrapped")
    for param in (param for group in undecayed for param in group):
        for key, moment in optimizer.state[param].items():
            assert key == "step" or not bool(moment.any()), f"... made {key} something else than 0"
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=f"{directory}/{case}")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    train(model, optimizer, rank, world, range(3, 6))
    return values(model)


def each_case(rank, world, act, directory, cases):
    """Call for every case; results by case, or what was said against it."""
    return {case: act(rank, world, directory, case) for case in cases}


@pytest.fixture(scope="module", params=["plain", "wrapped"])
def trajectories(request, tmp_path_factory):
    """The cases' parameters: straight on with 2 processes, and resumed by 4, 2 and 1."""
    directory = str(tmp_path_factory.mktemp("checkpoints"))
    cases = [f"{request.param}-{base}-{way}" for base in BASES for way in WAYS]
    straight = run(each_case, 2, begin, directory, cases)
    resumed = {world: run(each_case, world, resume, directory, cases) for world in (4, 2, 1)}
    return request.param, straight[0], resumed


@pytest.mark.covers("P39")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("world", [4, 2, 1])
def test_resuming_is_going_on(trajectories, world, base, way):
    """Saved by 2 processes and resumed by as many as one likes, the trajectory is the same."""
    kind, straight, resumed = trajectories
    case = f"{kind}-{base}-{way}"
    assert len(straight[case]) == 5
    for values_of_rank in resumed[world]:
        torch.testing.assert_close(values_of_rank[case], straight[case], rtol=0, atol=1e-10)


def convert(rank, world, directory):
    """Dense to factored and back through checkpoints; what was there in between."""
    options = StateDictOptions(full_state_dict=True)
    if world > 1:
        model = shard(dense(), world)
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{directory}/dense")
        small = shard(factored(), world)
        train(small, optimizer_of("plain-SGD-save", small), rank, world, range(2))
        dcp.save({"model": get_model_state_dict(small)}, checkpoint_id=f"{directory}/factored")
        return {"y": small(X).detach(), "dense": get_model_state_dict(model, options=options)}
    model = dense(seed=4)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=f"{directory}/dense")
    set_model_state_dict(model, state["model"])
    factorize(model, rank=3, include="0")
    small = factored(seed=4)
    state = {"model": get_model_state_dict(small)}
    dcp.load(state, checkpoint_id=f"{directory}/factored")
    set_model_state_dict(small, state["model"])
    merge(small)
    dcp.save({"model": get_model_state_dict(small)}, checkpoint_id=f"{directory}/merged")
    return {"factorized": values(model), "y": small(X).detach()}


def load_merged(rank, world, directory):
    """A dense sharded model with the merged checkpoint; what it computes."""
    model = shard(dense(seed=5), world)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=f"{directory}/merged")
    set_model_state_dict(model, state["model"])
    return model(X).detach()


@pytest.fixture(scope="module")
def conversions(tmp_path_factory):
    """What 2 processes had, what one made of it, what 2 loaded of that."""
    directory = str(tmp_path_factory.mktemp("conversions"))
    sharded = run(convert, 2, directory)[0]
    (single,) = run(convert, 1, directory)
    return sharded, single, run(load_merged, 2, directory)


def test_a_dense_checkpoint_can_be_factorized(conversions):
    """Saved by a sharded dense model, loaded into a dense one, then factorized: as if never so."""
    _, single, _ = conversions
    torch.testing.assert_close(single["factorized"], values(factored()))


def test_a_factored_checkpoint_can_be_merged(conversions):
    """Loaded, merged and saved, it is a checkpoint of the dense model, sharded or not."""
    sharded, single, merged = conversions
    for y in (single["y"], *merged):
        torch.testing.assert_close(y, sharded["y"], rtol=0, atol=1e-12)
