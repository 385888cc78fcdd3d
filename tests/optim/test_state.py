"""Checkpoints and copies: a resumed run is the uninterrupted one, bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from optim_cases import Net, assert_identical, train, values
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from frobdecay.models.factorize import factorize
from frobdecay.optim.frobenius import FrobeniusDecay

LAMBDA = 0.05

BASES = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=LAMBDA),
    "Adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=LAMBDA),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, weight_decay=LAMBDA),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01, weight_decay=LAMBDA),
}
EACH = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])


def saved(state: object) -> object:
    """Through a file, as safely as torch reads one."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def wrap(make, net):
    """The optimizer over all parameters, wrapped."""
    return FrobeniusDecay(make(net.parameters()), net.products())


@pytest.mark.covers("C24", "D11", "P38")
@EACH
@DTYPES
def test_resuming_is_going_on(make, dtype):
    """Save, load into new objects, go on: the same bits, rounding at random included (D11)."""
    straight = Net(dtype)
    train(straight, wrap(make, straight), 6)
    net = Net(dtype)
    optimizer = wrap(make, net)
    train(net, optimizer, 3)
    weights, state = saved(net.state_dict()), saved(optimizer.state_dict())
    other = Net(dtype, seed=1)
    resumed = wrap(make, other)
    train(other, resumed, 1)
    other.load_state_dict(weights)
    other.x = net.x
    resumed.load_state_dict(state)
    train(other, resumed, 3)
    assert_identical(values(other), values(straight))


@pytest.mark.covers("P41")
@EACH
def test_the_round_trip_before_the_first_step_changes_nothing(make):
    """Accelerate saves and loads the state when it prepares an optimizer."""
    net, twin = Net(), Net()
    optimizer, untouched = wrap(make, net), wrap(make, twin)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_identical(optimizer.state_dict(), untouched.state_dict())
    train(net, optimizer)
    train(twin, untouched)
    assert_identical(values(net), values(twin))


@pytest.mark.covers("P31")
def test_the_state_dict_is_the_bases_with_one_key():
    """Only one versioned key is ours, and nothing of ours is in the state."""
    net = Net()
    optimizer = wrap(BASES["AdamW"], net)
    train(net, optimizer)
    state = optimizer.state_dict()
    base = optimizer.optimizer.state_dict()
    assert_identical({key: state[key] for key in base}, base)
    assert set(state) - set(base) == {"frobdecay"}
    assert state["frobdecay"]["version"] == 1
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in state["state"].values())


@EACH
def test_the_wrapped_checkpoint_loads_into_a_base_with_the_same_groups(make):
    """Who stops using frobdecay can keep his moments."""
    net = Net()
    optimizer = wrap(make, net)
    train(net, optimizer)
    base = make([{"params": net.others()}, {"params": net.factors(), "weight_decay": 0.0}])
    base.load_state_dict(saved(optimizer.state_dict()))
    assert_identical(base.state_dict()["state"], optimizer.state_dict()["state"])


# --- checkpoints of the plain base optimizer ----------------------------------------------------


@pytest.mark.covers("P38")
@EACH
def test_a_plain_checkpoint_loads(make):
    """Moments find their parameters, and the weight decay of factors becomes λ."""
    net = Net()
    base = make(net.parameters())
    train(net, base)
    for group in base.param_groups:
        group.update(weight_decay=0.7, lr=0.3)
    state = saved(base.state_dict())
    optimizer = wrap(make, net)
    optimizer.load_state_dict(state)
    assert [(g["weight_decay"], g["frobenius_decay"], g["lr"]) for g in optimizer.param_groups] == [
        (0.7, 0.0, 0.3),
        (0.0, 0.7, 0.3),
    ]
    for param in net.parameters():
        assert_identical(optimizer.state[param], base.state[param])


def test_a_plain_checkpoint_keeps_a_given_decay():
    """decay= overrides the weight decay of the checkpoint, as it did that of the optimizer."""
    net = Net()
    base = BASES["SGD"](net.parameters())
    state = saved(base.state_dict())
    optimizer = FrobeniusDecay(BASES["SGD"](net.parameters()), net.products(), decay=0.3)
    optimizer.load_state_dict(state)
    assert [(g["weight_decay"], g["frobenius_decay"]) for g in optimizer.param_groups] == [
        (LAMBDA, 0.0),
        (0.0, 0.3),
    ]


@pytest.mark.covers("D11")
def test_a_plain_checkpoint_of_several_groups_loads():
    """Divided, all-factor, factor-free and added groups each find theirs."""
    net, twin = Net(), Net()

    def make(net):
        return optim.SGD(
            [
                {"params": [net.U, net.before, net.V], "weight_decay": 0.1},
                {"params": [net.between]},
                {"params": [net.P, net.Q], "weight_decay": 0.2},
            ],
            lr=0.1,
            momentum=0.9,
        )

    base = make(net)
    base.add_param_group({"params": [net.behind], "weight_decay": 0.3})
    train(net, base)
    optimizer = FrobeniusDecay(make(twin), twin.products())
    optimizer.add_param_group({"params": [twin.behind], "weight_decay": 0.3})
    optimizer.load_state_dict(saved(base.state_dict()))
    for mine, other in zip(twin.parameters(), net.parameters(), strict=True):
        assert_identical(optimizer.state[mine], base.state[other])


@pytest.mark.covers("P38")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s["param_groups"][0]["params"].pop(), ValueError, "of 7 parameters|\\[7\\]"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), ValueError, r"\[7, 7\]"),
        (lambda s: s.update(frobdecay={"version": 2}), ValueError, "version 1"),
        (
            lambda s: s.update(frobdecay={"version": 1, "generators": {"cpu:0": 3}}),
            ValueError,
            "cpu:0",
        ),
    ],
    ids=["fewer parameters", "more groups", "newer version", "damaged"],
)
def test_a_bad_checkpoint_changes_nothing(change, error, message):
    """What cannot be loaded is refused before anything is."""
    net = Net()
    state = BASES["SGD"](net.parameters()).state_dict()
    change(state)
    optimizer = wrap(BASES["SGD"], net)
    train(net, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    assert_identical(optimizer.state_dict(), before)


def test_a_plain_checkpoint_with_weight_decay_in_an_undivided_group_is_refused():
    """Where factors share a group, its weight decay cannot be taken over any more."""
    net = Net()
    state = optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5).state_dict()
    with pytest.warns(UserWarning, match="no product will decay"):
        optimizer = FrobeniusDecay(optim.SGD(net.parameters(), lr=0.1), net.products())
    with pytest.raises(ValueError, match="wrap it again"):
        optimizer.load_state_dict(state)


# --- torch.distributed.checkpoint ---------------------------------------------------------------


@pytest.mark.covers("P39")
@EACH
def test_distributed_checkpoints_initialize_nothing_but_zeros(make):
    """Its dummy step (zero gradients, lr 0) leaves weights and the factors' moments alone."""
    net = Net()
    optimizer = wrap(make, net)
    before = values(net)
    get_optimizer_state_dict(net, optimizer)
    assert_identical(values(net), before)
    moments = [
        entry
        for factor in net.factors()
        for key, entry in optimizer.state[factor].items()
        if key not in ("step", "sum")
    ]
    assert not any(bool(moment.any()) for moment in moments)


@pytest.mark.covers("P39")
@EACH
def test_distributed_checkpoints_restore(make):
    """get_optimizer_state_dict and set_optimizer_state_dict carry λ and the moments."""
    straight = Net()
    train(straight, wrap(make, straight), 5)
    net, other = Net(), Net()
    optimizer, resumed = wrap(make, net), wrap(make, other)
    train(net, optimizer, 3)
    state = get_optimizer_state_dict(net, optimizer)
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, resumed, copy.deepcopy(state))
    assert [g["frobenius_decay"] for g in resumed.param_groups] == [0.0, LAMBDA]
    train(other, resumed, 2)
    assert_identical(values(other), values(straight))


# --- copies -------------------------------------------------------------------------------------


@EACH
@DTYPES
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_model_and_optimizer_go_on_alike(make, dtype, duplicate):
    """A copy of both trains its own copy of the model, as the original does its own."""
    net = Net(dtype)
    optimizer = wrap(make, net)
    train(net, optimizer, 2)
    other, twin = duplicate((net, optimizer))
    before = values(other)
    train(net, optimizer, 3)
    assert_identical(values(other), before)
    train(other, twin, 3)
    assert_identical(values(other), values(net))
    assert all(a is b for a, b in zip(twin.products[0].params, (other.U, other.V), strict=True))


def test_a_copy_of_a_factorized_model_and_its_optimizer():
    """Also with the products of torch's parametrizations."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    factorize(model, rank=2)
    optimizer = FrobeniusDecay(BASES["SGD"](model.parameters()), model)
    other, twin = copy.deepcopy((model, optimizer))
    before = values(model)
    other(torch.ones(1, 8)).sum().backward()
    twin.step()
    assert_identical(values(model), before)
    assert not torch.equal(other[0].parametrizations.weight.original0, before[next(iter(before))])


def test_pickling_the_optimizer_does_not_take_the_model_along():
    """Only parameters, groups and products are in there."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    factorize(model, rank=2)
    optimizer = FrobeniusDecay(BASES["SGD"](model.parameters()), model)
    copied = pickle.loads(pickle.dumps(optimizer))
    assert_identical(copied.state_dict(), optimizer.state_dict())
    copied.step()


# --- parameters that others replace -------------------------------------------------------------


@pytest.mark.covers("P40")
@EACH
def test_swapped_parameters_decay(make):
    """Accelerate and FSDP2 put other Parameter objects into modules and groups."""
    net, twin = Net(), Net()
    optimizer, untouched = wrap(make, net), wrap(make, twin)
    train(net, optimizer, 2)
    train(twin, untouched, 2)
    swapped = {p: nn.Parameter(p.detach().clone()) for p in net.parameters()}
    for name, param in list(net.named_parameters()):
        setattr(net, name, swapped[param])
    for group in optimizer.param_groups:
        group["params"] = [swapped[param] for param in group["params"]]
    for old, new in swapped.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
    train(net, optimizer, 2)
    train(twin, untouched, 2)
    assert_identical(values(net), values(twin))


@pytest.mark.covers("P40")
def test_a_factor_replaced_in_the_model_only_is_named():
    """If the optimizer trains a parameter that the model has lost, the next step says so."""
    net = Net()
    optimizer = wrap(BASES["SGD"], net)
    train(net, optimizer, 1)
    net.U = nn.Parameter(net.U.detach().clone())
    with pytest.raises(RuntimeError, match=r"factor 0 \(U\) of 'first'"):
        train(net, optimizer, 1)


@pytest.mark.covers("C24")
def test_moved_parameters_decay():
    """Module.to changes the storage under the same Parameter."""
    net, twin = Net(torch.float32), Net(torch.float32)
    optimizer = wrap(BASES["SGD"], net)
    net.double()
    net.x = net.x.double()
    train(net, optimizer)
    train(twin, wrap(BASES["SGD"], twin))
    torch.testing.assert_close(net.U, twin.U.double(), rtol=1e-5, atol=1e-6)
