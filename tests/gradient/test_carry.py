"""What an optimizer remembers of a dense weight, carried over to its factors."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import frobdecay
from frobdecay.gradient.carry import RULES

DEEP = partial(frobdecay.LowRank, depth=1)
READINGS = {
    "linear": (lambda: nn.Linear(7, 5), {"rank": 3}),
    "deep": (lambda: nn.Linear(7, 5), {"rank": 3, "parametrization": DEEP}),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), {"rank": 5}),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), {"rank": 2}),
    "tucker": (lambda: nn.Conv2d(4, 6, 3), {"rank": 2, "parametrization": frobdecay.Tucker}),
    "cp": (lambda: nn.Conv2d(4, 6, 3), {"rank": 2, "parametrization": frobdecay.CP}),
}
OPTIONS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1},
    "Muon": {"lr": 0.1},
    "RMSprop": {"lr": 0.1, "momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
}


def trained(make, kind, steps=3):
    """A double-precision layer, its optimizer after some steps, and the gradients it saw."""
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    options = OPTIONS.get(kind, {})
    optimizer = getattr(torch.optim, kind)([model[0].weight], **options)
    gradients = []
    for _ in range(steps):
        model[0].weight.grad = torch.randn_like(model[0].weight)
        gradients.append(model[0].weight.grad.clone())
        optimizer.step()
    model[0].weight.grad = None
    return model, optimizer, gradients


def factors_of(model):
    """The factors of the layer, and their gradients of a dense gradient."""
    factors = list(model[0].parametrizations.weight.parameters())

    def backward(gradient):
        return torch.autograd.grad((model[0].weight * gradient).sum(), factors)

    return factors, backward


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_after_it_is_that_of_an_optimizer_that_had_the_factors(
    reading, nesterov, monkeypatch
):
    """SGD's momentum is linear in the gradients: the same step, in float64."""
    make, options = READINGS[reading]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": nesterov}
    monkeypatch.setitem(OPTIONS, "SGD", settings)
    model, optimizer, gradients = trained(make, "SGD")
    frobdecay.factorize(model, **options, include="0", optimizer=optimizer)
    factors, backward = factors_of(model)
    own = [nn.Parameter(factor.detach().clone()) for factor in factors]
    other = torch.optim.SGD(own, **settings)
    for gradient in gradients:  # of the same weight each time: factors that do not move
        for factor, part in zip(own, backward(gradient), strict=True):
            factor.grad = part.clone()
        other.step()
        with torch.no_grad():
            for factor, start in zip(own, factors, strict=True):
                factor.copy_(start)
    last = torch.randn_like(gradients[0])
    for factor, mine, part in zip(own, factors, backward(last), strict=True):
        factor.grad, mine.grad = part.clone(), part.clone()
    other.step()
    optimizer.step()
    for factor, mine in zip(own, factors, strict=True):
        torch.testing.assert_close(mine, factor, rtol=1e-12, atol=1e-12)


def squared_jacobian(made, factors, value):
    """For every entry of every factor the sum of value·(∂W/∂entry)², by brute force."""
    for k, factor in enumerate(factors):
        rest = [f.detach() for f in factors]

        def form(one, rest=rest, k=k):
            rest[k] = one
            return made(*rest) + 0  # dense

        J = torch.autograd.functional.jacobian(form, factor.detach())
        yield torch.tensordot(value, J.square(), dims=value.ndim)


@pytest.mark.parametrize(
    ("kind", "reading"),
    [
        (kind, reading)
        for kind in RULES
        for reading in ("linear", "deep", "convolution", "groups", "cp")
        if kind != "Muon" or reading == "linear"  # for matrices
    ],
)
def test_every_key_is_mapped_by_what_it_is(kind, reading):
    """Momenta exactly; second moments as of uncorrelated entries; steps copied, nothing shared."""
    make, options = READINGS[reading]
    model, optimizer, _ = trained(make, kind)
    dense = model[0].weight
    before = {k: copy.deepcopy(v) for k, v in optimizer.state[dense].items()}
    frobdecay.factorize(model, **options, include="0", optimizer=optimizer)
    factors, backward = factors_of(model)
    assert optimizer.param_groups[0]["params"] == factors
    assert dense not in optimizer.state
    for key, value in before.items():
        rule, found = RULES[kind][key].__name__, [optimizer.state[f][key] for f in factors]
        expected = {
            "_linear": lambda v=value: backward(v),
            "_square": lambda v=value: squared_jacobian(
                model[0].parametrizations.weight[0], factors, v
            ),
            "_copy": lambda v=value: [v] * len(factors),
            "_forget": lambda: [torch.zeros_like(f) for f in factors],
        }[rule]()
        if key in ("exp_avg_sq", "max_exp_avg_sq"):
            least = backward(before["exp_avg"])
            expected = [torch.maximum(e, m.square()) for e, m in zip(expected, least, strict=True)]
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted).detach())
        if all(isinstance(each, torch.Tensor) for each in found):
            assert len({each.data_ptr() for each in found}) == len(found)
            assert not any(each.requires_grad for each in found)
    for factor in factors:
        factor.grad = torch.randn_like(factor)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)


def test_groups_names_hooks_and_schedulers_stay():
    """Factors take the weights' places; what was attached goes on."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    groups = [
        {"params": [("0.weight", model[0].weight), ("2.weight", model[2].weight)], "lr": 0.5},
        {"params": [("0.bias", model[0].bias), ("2.bias", model[2].bias)]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 0.5**k, lambda k: 1.0])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    bias = model[0].bias
    frobdecay.factorize(model, rank=2, include="0", optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
        "2.weight",
    ]
    assert optimizer.param_groups[1]["params"][0] is bias
    model(torch.randn(3, 8)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    assert seen == [1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.1]


def test_it_can_be_wrapped_with_its_scheduler_where_factors_have_a_group():
    """``planned`` gives them one before they exist; otherwise the scheduler is said to be lost."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    plan = frobdecay.plan_ranks(model, rank=2, include="0")
    for planned in (plan.ranks, ()):
        one = copy.deepcopy(model)
        groups = frobdecay.split_param_groups(one, 0.1, planned=planned)
        base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(base, 1, 0.5)
        one(torch.randn(3, 8)).square().mean().backward()
        base.step()
        scheduler.step()
        frobdecay.factorize(one, rank=plan.ranks, optimizer=base)
        if not planned:
            with pytest.raises(ValueError, match="split_param_groups"):
                frobdecay.FrobeniusDecay(base, one)
            continue
        optimizer = frobdecay.FrobeniusDecay(base, one)
        assert {g["frobenius_decay"] for g in optimizer.param_groups} == {0.0, 0.1}
        one(torch.randn(3, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        assert all(group["lr"] == 0.025 for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="planned to name parameters"):
        frobdecay.split_param_groups(model, 0.1, planned=["0.wait"])


def test_several_optimizers_and_weights_that_stay():
    """Each keeps what is its own; a tied weight that one module still has stays, factors behind."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    first = torch.optim.SGD([model[0].weight], lr=0.1, momentum=0.9)
    second = torch.optim.Adam([model[2].weight, model[2].bias])
    for optimizer in (first, second):
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
    tied, momentum = model[0].weight, first.state[model[0].weight]["momentum_buffer"].clone()
    options = {"rank": 2, "include": ["0", "2"], "on_tied": "untie"}
    frobdecay.factorize(model, **options, optimizer=[first, second])
    assert first.param_groups[0]["params"] == [tied, *model[0].parametrizations.weight.parameters()]
    assert torch.equal(first.state[tied]["momentum_buffer"], momentum)
    U, V = model[0].parametrizations.weight.parameters()
    torch.testing.assert_close(first.state[U]["momentum_buffer"], momentum @ V)
    assert len(second.param_groups[0]["params"]) == 3


def test_an_optimizer_that_has_not_stepped_gets_the_factors():
    """With no state, and with a momentum that is None still."""
    for kind in ("SGD", "Adam"):
        model, optimizer, _ = trained(lambda: nn.Linear(6, 4), kind, steps=0)
        frobdecay.factorize(model, rank=2, optimizer=optimizer)
        assert len(optimizer.param_groups[0]["params"]) == 2
        assert not optimizer.state
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["momentum_buffer"] = None
    frobdecay.factorize(model, rank=2, optimizer=optimizer)
    assert [state["momentum_buffer"] for state in optimizer.state.values()] == [None, None]


def test_half_precision_moments_are_mapped_in_float32():
    """And rounded once."""
    model, optimizer, _ = trained(lambda: nn.Linear(64, 48), "SGD")
    model.bfloat16()
    state = optimizer.state[model[0].weight]
    state["momentum_buffer"] = state["momentum_buffer"].bfloat16()
    momentum = state["momentum_buffer"].double()
    frobdecay.factorize(model, rank=16, optimizer=optimizer)
    U, V = model[0].parametrizations.weight.parameters()
    expected = (momentum @ V.double()).bfloat16()
    assert torch.equal(optimizer.state[U]["momentum_buffer"], expected)


def fails(matrix, rank, depth=0):
    """An initialization that does."""
    raise ArithmeticError("no factors today")


BAD = {
    "of another model": (
        lambda m: torch.optim.SGD([nn.Parameter(torch.ones(2))], momentum=0.9),
        {},
        ValueError,
    ),
    "history of all": (lambda m: torch.optim.LBFGS(m.parameters()), {}, ValueError),
    "no optimizer": (lambda m: 3, {}, TypeError),
    "no optimizer in a list": (lambda m: [m], {}, TypeError),
    "unknown": (lambda m: torch.optim.Adamax(m.parameters()), {}, ValueError),
    "derived": (
        lambda m: type("Mine", (torch.optim.SGD,), {})(m.parameters(), momentum=0.9),
        {},
        ValueError,
    ),
    "failing": (
        lambda m: torch.optim.SGD(m.parameters(), momentum=0.9),
        {"init": fails},
        ArithmeticError,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_carried_is_refused_before_anything_changes(case):
    """Model, groups and state stay as they were."""
    make, options, error = BAD[case]
    model = nn.Sequential(nn.Linear(8, 8))
    weight, optimizer = model[0].weight, make(model)
    known = isinstance(optimizer, torch.optim.Optimizer)
    if known:
        x = torch.randn(3, 8)

        def loss():
            optimizer.zero_grad()
            value = model(x).square().mean()
            value.backward()
            return value

        optimizer.step(loss)
        before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error):
        frobdecay.factorize(model, rank=2, optimizer=optimizer, **options)
    assert model[0].weight is weight
    if known:
        assert len(optimizer.param_groups[0]["params"]) == len(before["param_groups"][0]["params"])
        torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_a_pending_gradient_is_carried_over():
    """Half of an accumulated gradient before, half after: the step has both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 8).double()).square().sum().backward()
    dense = model[0].weight.grad.clone()
    frobdecay.factorize(model, rank=2, include="0", optimizer=optimizer)
    U, V = model[0].parametrizations.weight.parameters()
    torch.testing.assert_close(U.grad, dense @ V)
    torch.testing.assert_close(V.grad, dense.T @ U)
    frozen = nn.Sequential(nn.Linear(8, 6)).requires_grad_(False)
    frobdecay.factorize(frozen, rank=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_factors_decay_as_their_weight_did_in_a_second_factorization():
    """λ 0 in the group of a wrapped optimizer was of a group without factors."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    for layer in ("0", "1"):
        frobdecay.factorize(model, rank=2, include=layer, optimizer=base)
        wrapped = frobdecay.FrobeniusDecay(base, model)
    decays = {
        id(p): group["frobenius_decay"] for group in wrapped.param_groups for p in group["params"]
    }
    assert {decays[id(p)] for q in wrapped.products for p in q.params} == {0.5}
    assert {decays[id(layer.bias)] for layer in model} == {0.0}


def test_a_wrapper_is_refused_by_name():
    """Its groups are divided already."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    frobdecay.factorize(model, rank=2, include="0")
    optimizer = frobdecay.FrobeniusDecay(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), model
    )
    with pytest.raises(ValueError, match="the optimizer behind it"):
        frobdecay.factorize(model, rank=2, include="1", optimizer=optimizer)


@pytest.mark.parametrize("kind", ["Adam", "RMSprop"])
def test_the_first_step_after_it_is_no_longer_than_others(kind):
    """Also of entries that were correlated, as those of a mean over few inputs are."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(8, 64)
    options = {"Adam": {}, "RMSprop": {"centered": True}}[kind]
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, **options)

    def step():
        optimizer.zero_grad()
        model(x).sigmoid().mean().backward()
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        after = model.parameters()
        return max(float((p.detach() - b).abs().max()) for p, b in zip(after, before, strict=True))

    usual = max([step() for _ in range(30)][1:])
    frobdecay.factorize(model, rank=16, optimizer=optimizer)
    assert all(step() <= 2 * usual for _ in range(3))


@pytest.mark.parametrize("rank", [4, {"1": 4}])
def test_copies_of_a_shared_weight_are_all_trained(rank):
    """Factorized or dense: each is in the optimizer once, with what the shared one remembered."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    frobdecay.factorize(model, rank=rank, on_tied="untie", optimizer=optimizer)
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert {id(param) for param in optimizer.state} == set(held)
    assert all("exp_avg" in state for state in optimizer.state.values())
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_muon_refuses_factors_that_are_no_matrices():
    """Before its next step would, and with nothing changed."""
    model = nn.MultiheadAttention(32, 4, bias=False)
    optimizer = torch.optim.Muon(model.parameters())
    before = list(model.parameters())
    with pytest.raises(ValueError, match=r"in_proj_weight: expected matrices.*Muon"):
        frobdecay.factorize(model, rank=4, optimizer=optimizer)
    assert list(map(id, model.parameters())) == list(map(id, before))
    assert optimizer.param_groups[0]["params"] == before
