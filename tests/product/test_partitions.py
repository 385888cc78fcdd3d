"""What others have cut up: ZeRO-1 works with groups of its own, flat parameters are refused."""

import copy
import re
from functools import cache

import pytest
import torch
from gloo import run
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from frobdecay.diagnostics import measure
from frobdecay.gradient.penalty import add_penalty_grad_
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.find import products
from frobdecay.product.product import penalty


def factored():
    """A model with two products, the same in every process."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    factorize(model, rank=3)
    return model


def groups(model):
    """Factors and other parameters apart."""
    held = {id(param) for product in products(model) for param in product.params}
    others = [param for param in model.parameters() if id(param) not in held]
    return [{"params": others}, {"params": [p for p in model.parameters() if id(p) in held]}]


def zero1_of(params, **options):
    """SGD in a ``ZeroRedundancyOptimizer``, whose import warns in the tests' own process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, torch.optim.SGD, **OPTIONS, **options)


OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}


def train(model, optimizer, steps):
    """Train on the same numbers in every process."""
    for step in steps:
        x = torch.linspace(-1, 1, 96).unflatten(0, (8, 12)) + step
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def zero1(rank, world):
    """How far ZeRO-1 is from the same optimizer without; and after a state dict."""
    found = {}
    for mode in ("coupled", "decoupled"):
        single, model = factored(), factored()
        parallel = nn.parallel.DistributedDataParallel(model)
        plain = FrobeniusDecay(torch.optim.SGD(groups(single), **OPTIONS), single, mode=mode)
        base = zero1_of(groups(model))
        optimizer = FrobeniusDecay(base, model, mode=mode)
        train(single, plain, range(6))
        train(parallel, optimizer, range(3))
        base.consolidate_state_dict()
        state = [optimizer.state_dict() if rank == 0 else None]
        torch.distributed.broadcast_object_list(state)
        model = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        base = zero1_of(groups(model))
        optimizer = FrobeniusDecay(base, model, mode=mode)
        optimizer.load_state_dict(state[0])
        train(parallel, optimizer, range(3, 6))
        pairs = zip(single.parameters(), model.parameters(), strict=True)
        found[mode] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return found


@pytest.mark.slow
@pytest.mark.covers("C14")
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_zero1_is_the_optimizer_it_shards(mode):
    """Trained, saved, resumed and trained on: the parameters of the unsharded optimizer."""
    for found in zero1_of_all():
        assert found[mode] < 1e-6


@cache
def zero1_of_all():
    """Of all processes."""
    return run(zero1, 2)


def said(act):
    """What is said against it; what it returns is nobody's business."""
    try:
        act()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def zero1_refusals():
    """What is said against ZeRO-1, and how many groups there are afterwards."""
    model = factored()
    base = zero1_of(model.parameters())
    overlapping = zero1_of(groups(model), overlap_with_ddp=True)
    return {
        "undivided": said(lambda: FrobeniusDecay(base, model, mode="coupled")),
        "untouched": str(len(base.param_groups)),
        "overlapping": said(lambda: FrobeniusDecay(overlapping, model, mode="coupled")),
    }


def flat_refusals(original):
    """What is said against each way to use what FSDP1 has flattened."""
    options = {"use_orig_params": original, "device_id": torch.device("cpu")}
    model, dense = factored(), nn.Sequential(nn.Linear(12, 16))
    before = products(model)
    flat = FullyShardedDataParallel(model, **options)
    dense_flat = FullyShardedDataParallel(dense, **options)
    flat(torch.ones(8, 12)).sum().backward()
    base = torch.optim.SGD(flat.parameters(), **OPTIONS)
    acts = {
        "products": lambda: products(flat),
        "products inside": lambda: products(model),
        "wrap": lambda: FrobeniusDecay(base, flat),
        "wrap older products": lambda: FrobeniusDecay(base, before),
        "penalty": lambda: penalty(before, 0.1),
        "add_penalty_grad_": lambda: add_penalty_grad_(before, 0.1),
        "measure": lambda: measure(before),
        "merge": lambda: merge(model),
        "factorize": lambda: factorize(dense_flat, rank=3),
        "factorize inside": lambda: factorize(dense, rank=3),
    }
    return {f"{name}, {original}": said(act) for name, act in acts.items()}


def refusals(rank, world):
    """All of them."""
    return zero1_refusals() | flat_refusals(False) | flat_refusals(True)


@cache
def refused():
    """By the first process."""
    return run(refusals, 2)[0]


USES = ["products", "products inside", "wrap", "wrap older products", "penalty", "measure", "merge"]


@pytest.mark.covers("C14", "P25")
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("act", [*USES, "add_penalty_grad_"])
def test_flat_parameters_are_refused(act, original):
    """Factors that FSDP1 has flattened, and freed, are never read; fully_shard is named."""
    assert re.match(
        r"0.weight: original0 is flattened by FullySharded.*fully_shard",
        refused()[f"{act}, {original}"],
    )


@pytest.mark.covers("P25")
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("act", ["factorize", "factorize inside"])
def test_flat_weights_are_not_factorized(act, original):
    """Neither through FSDP1's wrapper nor behind its back."""
    message = refused()[f"{act}, {original}"]
    assert re.search(r"FullySharded.*factorize before|0.weight: not a parameter", message, re.S)


def test_undivided_groups_of_zero1_are_refused():
    """They cannot be divided any more; the recipe is named and nothing was changed."""
    assert re.search(r"group 0 of Zero.*group of their own when building", refused()["undivided"])
    assert refused()["untouched"] == "1"


@pytest.mark.covers("P45")
def test_zero1_inside_the_backward_pass_is_refused():
    """There is no step that could decay anything."""
    assert re.search(r"overlap_with_ddp=True.*build it without", refused()["overlapping"])


@pytest.mark.covers("P44")
def test_partitions_of_deepspeed_are_refused():
    """A factor that ZeRO-3 has partitioned is named; gathered, it is a factor again."""
    model = factored()
    held = model[2].parametrizations.weight.original1
    whole = held.detach().clone()
    held.ds_id, held.ds_shape = 7, held.shape
    assert len(products(model)) == 2
    held.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"2.weight: original1 is partitioned by DeepSpeed ZeRO-3"):
        products(model)
    held.data = whole
    assert len(products(model)) == 2


@pytest.mark.covers("P44")
def test_optimizers_of_deepspeed_are_refused():
    """By name, whatever they derive from, with what works in their place."""
    kind = type(
        "DeepSpeedZeroOptimizer",
        (torch.optim.SGD,),
        {"__module__": "deepspeed.runtime.zero.stage_1_and_2"},
    )
    model = factored()
    with pytest.raises(ValueError, match=r"DeepSpeedZeroOptimizer: .*penalty\(products, λ\)"):
        FrobeniusDecay(kind(model.parameters(), lr=0.1), model)


@pytest.mark.covers("P44")
def test_engines_of_deepspeed_are_refused():
    """An engine goes on with the parameters it was made of."""

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match=r"DeepSpeedEngine.*factorize before wrapping"):
        factorize(DeepSpeedEngine(nn.Sequential(nn.Linear(8, 8))), rank=2)
