"""What a user may get wrong without an error is noticed: once, and never where nothing is wrong."""

import copy
import pickle
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from optim_cases import Net
from torch import nn, optim

import frobdecay
from frobdecay import FrobeniusDecay, FrobeniusDecayFactory, Product
from frobdecay.optim.division import Halves
from frobdecay.product import replaced

NOTHING = "no product will decay: λ is taken over from the factors' weight_decay"
STEPPED = "was stepped that a FrobeniusDecay was put around"
REPLACED = "in the model no longer.*build the optimizer after that"


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def _backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()


# --- λ = 0 that nobody asked for ------------------------------------------------------------------


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adam, optim.RMSprop])
def test_a_decay_of_zero_that_is_taken_over_is_said(cls):
    """Most optimizers have no weight decay by default; the warning is the user's line."""
    net = Net()
    with pytest.warns(
        UserWarning, match=rf"{NOTHING}, which in this {cls.__name__} is 0; "
    ) as said:
        FrobeniusDecay(cls(net.parameters(), lr=0.1), net.products())
    assert said[0].filename == __file__


def test_a_decay_of_zero_from_training_arguments_is_said():
    """In those of transformers it is the default."""
    model = _model()
    frobdecay.factorize(model, rank=2)
    args = SimpleNamespace(weight_decay=0.0, learning_rate=0.1)
    with pytest.warns(UserWarning, match=NOTHING):
        FrobeniusDecayFactory()(model, args=args, optimizer=optim.SGD)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: FrobeniusDecay(optim.SGD(net.parameters(), lr=0.1), net.products(), decay=0),
        lambda net: FrobeniusDecay(
            optim.SGD([
                {"params": [net.U, net.V]},
                {"params": [net.P, net.Q], "weight_decay": 0.1},
                {"params": net.others()},
            ], lr=0.1), net.products()),
        lambda net: FrobeniusDecay(
            optim.SGD([{"params": list(net.parameters()), "frobenius_decay": 0.0}], lr=0.1),
            net.products()),
        lambda net: FrobeniusDecay(
            optim.SGD(net.others(), lr=0.1),
            Product.of(net.U.requires_grad_(False), net.V.requires_grad_(False)), decay=0.1),
    ],
    ids=["given", "for some", "own option", "frozen"],
)  # fmt: skip
def test_a_decay_of_zero_that_is_meant_is_not(wrap):
    """Given, in the group's own option, or for some of the factors only."""
    wrap(Net())


# --- λ in a group without factors -----------------------------------------------------------------


def _divided(net: Net) -> FrobeniusDecay:
    optimizer = FrobeniusDecay(
        optim.SGD(net.parameters(), lr=0.01, weight_decay=0.1), net.products()
    )
    assert [group["frobenius_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    return optimizer


def _step(net: Net, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    net.loss().backward()
    optimizer.step()


def test_a_coefficient_in_a_group_without_factors_is_said():
    """A schedule that writes to the first group reaches no factor."""
    net = Net()
    optimizer = _divided(net)
    optimizer.param_groups[0]["frobenius_decay"] = 0.5
    with pytest.warns(
        UserWarning, match=r"frobenius_decay=0.5 of param group 0 does nothing.*\[1\]"
    ):
        _step(net, optimizer)
    _step(net, optimizer)  # once


def test_a_coefficient_on_an_accelerator_is_not_waited_for():
    """Nothing is said where another group's could be the same."""
    groups = [{"frobenius_decay": number} for number in (0.5, torch.ones((), device="meta"))]
    Halves().check(groups, {1})


def test_a_coefficient_of_all_groups_is_not():
    """A schedule may write the same number to all groups, or scale what is there."""
    net = Net()
    optimizer = _divided(net)
    for coef in (0.2, torch.tensor(0.3)):
        for group in optimizer.param_groups:
            group["frobenius_decay"] = coef
        _step(net, optimizer)


# --- steps past the wrapper -----------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("cls", [optim.SGD, optim.AdamW])
def test_a_step_past_the_wrapper_is_said(cls, kept):
    """Whether the wrapper still exists or was dropped: the factors have no weight decay left."""
    net = Net()
    base = cls(net.parameters(), lr=0.01, weight_decay=0.1)
    wrapped = FrobeniusDecay(base, net.products())
    _step(net, wrapped)
    if not kept:
        del wrapped
    with pytest.warns(UserWarning, match=f"{cls.__name__} {STEPPED}") as said:
        _step(net, base)
    assert said[0].filename == __file__
    _step(net, base)  # once


def test_a_step_past_a_copy_of_the_wrapper_is_said():
    """Hooks are not copied; this one is there again."""
    net = Net()
    optimizer = FrobeniusDecay(
        optim.SGD(net.parameters(), lr=0.01, weight_decay=0.1), net.products()
    )
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for group in copied.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        copied.step()
        with pytest.warns(UserWarning, match=STEPPED):
            copied.optimizer.step()
    _step(net, optimizer)


def _scheduled(net, optimizer):
    schedule = optim.lr_scheduler.StepLR(optimizer, 1)
    _step(net, optimizer)
    schedule.step()
    _step(net, optimizer)


def _scaled(net, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(net.loss()).backward()
        scaler.step(optimizer)
        scaler.update()


def _closed(net, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = net.loss()
        loss.backward()
        return loss

    optimizer.step(closure)


def _failed(net, optimizer):
    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    _step(net, optimizer)


def _again(net, optimizer):
    _step(net, FrobeniusDecay(optimizer.optimizer, net.products()))
    _step(net, optimizer)


def _without_decay(net, optimizer):
    for group in optimizer.param_groups:
        group["frobenius_decay"] = 0.0
    _step(net, optimizer.optimizer)


def _without_rate(net, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _step(net, optimizer.optimizer)


USES = {
    use.__name__: (optim.SGD, use)
    for use in (_step, _scheduled, _scaled, _closed, _failed, _again, _without_decay, _without_rate)
}
USES["line search"] = (optim.LBFGS, _closed)


@pytest.mark.parametrize("name", USES)
def test_steps_by_whatever_drives_the_wrapper_are_not(name):
    """Schedulers, scalers, closures, a second wrapper; nor one that would not have decayed."""
    (cls, use), net = USES[name], Net()
    use(net, FrobeniusDecay(cls(net.parameters(), lr=0.01), net.products(), decay=0.1))


# --- optimizers that were built too early ---------------------------------------------------------


def _factorized(model):
    frobdecay.factorize(model, rank=2)
    return model


CHANGES = {
    "factorize": (_model, _factorized),
    "merge": (lambda: _factorized(_model()), frobdecay.merge),
    "unroll": (lambda: _factorized(_model()), frobdecay.unroll),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_optimizer_of_parameters_that_are_gone_is_told(change):
    """It would train what is left of the model, and fail at nothing."""
    make, act = CHANGES[change]
    model = make()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    _backward(model)
    optimizer.step()
    optimizer.zero_grad()
    act(model)
    _backward(model)
    with pytest.warns(UserWarning, match=f"SGD holds [24] parameters that are {REPLACED}") as said:
        optimizer.step()
    assert said[0].filename == __file__
    optimizer.step()  # once
    fresh = optim.SGD(model.parameters(), lr=0.1)
    fresh.step()


@pytest.mark.parametrize("stale_first", [True, False])
@pytest.mark.parametrize("apart", [True, False], ids=["two models", "one layer"])
def test_one_of_two_optimizers_that_was_not_rebuilt_is_told(stale_first, apart):
    """Of every weight it is known what took its place: what the other holds does not excuse it."""
    model = nn.ModuleDict({"G": _model(), "D": _model()}) if apart else nn.LSTM(6, 6)

    def held(words):
        word = words[0] if apart else words[1]
        return [param for name, param in model.named_parameters() if word in name]

    stale = optim.SGD(held(("D.", "hh")), lr=0.1)
    frobdecay.factorize(model, rank=2)
    fresh = optim.SGD(held(("G.", "ih")), lr=0.1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for optimizer in ([stale, fresh] if stale_first else [fresh, stale]) * 2:
            optimizer.step()
    (told,) = said
    assert re.search(f"holds {2 if apart else 1} parameters that are {REPLACED}", str(told.message))


def test_optimizers_that_have_nothing_to_do_with_it_pay_next_to_nothing(monkeypatch):
    """One look, linear in what is remembered; none afterwards, until more is replaced."""
    calls = []
    monkeypatch.setattr(replaced, "id", lambda one: calls.append(one) or id(one), raising=False)
    count = 60
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
    dense = list(model.parameters())  # somebody keeps them
    frobdecay.factorize(model, rank=1)
    optimizer = optim.SGD([nn.Parameter(torch.ones(2)) for _ in range(3)], lr=0.1)
    looks = []
    for _ in range(3):
        calls.clear()
        optimizer.step()
        looks.append(len(calls))
    assert 0 < looks[0] < 10 * count
    assert looks[1:] == [0, 0]
    optimizer.add_param_group({"params": dense[0]})
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.warns(UserWarning, match=f"holds 1 parameters that are {REPLACED}"):
        optimizer.step()


def _added(model):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    _factorized(model)
    factors = [p for product in frobdecay.products(model) for p in product.params]
    optimizer.add_param_group({"params": factors})
    return optimizer


def _pretrained(model):
    before = optim.SGD(model.parameters(), lr=0.1)
    _backward(model)
    before.step()
    _factorized(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.before = before
    return optimizer


def _shared(model):
    """A teacher with the same parameters goes on training."""
    teacher = copy.copy(model[0])
    teacher._parameters = dict(teacher._parameters)
    optimizer = optim.SGD(teacher.parameters(), lr=0.1)
    _factorized(model)
    teacher(torch.ones(2, 6)).sum().backward()
    return optimizer


def _frozen(model):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    _factorized(model.requires_grad_(False))
    model[2].bias.requires_grad_(True)
    return optimizer


def _failing(model):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected"):
        frobdecay.factorize(model, rank=2, init=lambda weight, rank, *, depth: (weight,))
    return optimizer


def _elsewhere(model):
    _factorized(copy.deepcopy(model))
    frobdecay.merge(_factorized(copy.deepcopy(model)))
    return optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "make", [_added, _pretrained, _shared, _frozen, _failing, _elsewhere], ids=lambda f: f.__name__
)
def test_an_optimizer_that_trains_what_it_should_is_not(make):
    """Factors that were added to it, new ones, others' parameters, frozen ones, none at all."""
    model = _model()
    dense = list(model.parameters())  # somebody keeps them
    optimizer = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _backward(model) if make is not _shared else _teach(optimizer)
            optimizer.step()
    del dense


def _teach(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
