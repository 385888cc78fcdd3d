"""Accelerate with FSDP2: ``prepare`` swaps every parameter for a sharded one; the decay follows."""

import os
from functools import partial

import pytest
import torch
from gloo import run
from torch import nn

pytest.importorskip("accelerate")

from frobdecay.models.factorize import factorize
from frobdecay.optim.frobenius import FrobeniusDecay

pytestmark = pytest.mark.integration(row="Accelerate", column="FSDP2")

BASES = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.2),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
}


def factored():
    """A model with two products, the same in every process; 17 rows do not divide evenly."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 17), nn.GELU(), nn.Linear(17, 6)).double()
    factorize(model, rank=3)
    return model


def accelerator(rank, world):
    """One that shards by FSDP2; on a CPU it has to be told."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", OMP_NUM_THREADS="1")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    made = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (PartialState(), made.state):
        state.distributed_type = DistributedType.FSDP
    made.state.fsdp_plugin = plugin
    return made


def train(model, optimizer, backward, rank, world, steps):
    """The same steps of the whole batch, whatever the number of processes."""
    for step in steps:
        x = torch.linspace(-1, 1, 96, dtype=torch.float64).unflatten(0, (8, 12)) * (step + 1)
        optimizer.zero_grad()
        backward(model(x.chunk(world)[rank]).square().mean())
        optimizer.step()


def far(single, model):
    """The largest difference of the parameters."""
    pairs = zip(single.parameters(), model.parameters(), strict=True)
    return max(float((a - b.full_tensor()).detach().abs().max()) for a, b in pairs)


def prepared(rank, world, directory):
    """How far the prepared models are from those of one process, trained on and resumed."""
    accelerate = accelerator(rank, world)
    found = {}
    for name, make in BASES.items():
        single = factored()
        plain = FrobeniusDecay(make(single.parameters()), single)
        model = factored()
        optimizer = FrobeniusDecay(make(model.parameters()), model)
        model, wrapped = accelerate.prepare(model, optimizer)
        before = far(single, model)
        train(single, plain, torch.Tensor.backward, 0, 1, range(3))
        train(model, wrapped, accelerate.backward, rank, world, range(3))
        after = far(single, model)
        accelerate.save_state(f"{directory}/{name}")
        train(model, wrapped, accelerate.backward, rank, world, range(9, 12))
        astray = far(single, model)
        accelerate.load_state(f"{directory}/{name}")
        train(single, plain, torch.Tensor.backward, 0, 1, range(3, 6))
        train(model, wrapped, accelerate.backward, rank, world, range(3, 6))
        sharded = all(hasattr(param, "device_mesh") for param in model.parameters())
        decays = [group["frobenius_decay"] for group in wrapped.param_groups]
        found[name] = {
            "differences": [before, after, far(single, model)],
            "astray": astray,
            "sharded": sharded,
            "decays": decays,
        }
        accelerate.free_memory()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes found."""
    return run(prepared, 2, str(tmp_path_factory.mktemp("accelerate")))


@pytest.mark.covers("P26")
@pytest.mark.parametrize("name", BASES)
def test_prepared_training_is_that_of_one_process(results, name):
    """Before, after three steps, and after three more from a saved state."""
    for result in results:
        assert result[name]["sharded"]
        assert max(result[name]["differences"]) < 1e-10


@pytest.mark.parametrize("name", BASES)
def test_loading_a_state_goes_back(results, name):
    """What was trained in between was something else."""
    assert all(result[name]["astray"] > 1e-3 for result in results)


@pytest.mark.covers("P40")
@pytest.mark.parametrize(("name", "decay"), [("SGD", 0.2), ("AdamW", 0.5)])
def test_the_coefficient_survives_prepare(results, name, decay):
    """The groups are as the wrapper made them."""
    assert all(result[name]["decays"] == [0.0, decay] for result in results)
