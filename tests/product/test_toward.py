"""Decay toward a weight: against autograd on the dense difference, in float64; resumed; refused."""

import copy
import io
from unittest.mock import Mock

import pytest
import torch
from cases import PRODUCTS, Sizes
from closeness import gradients
from torch import nn

import frobdecay
from frobdecay import FrobeniusDecay, LowRank, Product, factorize, penalty, products
from frobdecay.algebra.shifted import Shifted
from frobdecay.gradient.accumulate import Accumulator
from frobdecay.product.product import squared_norm
from frobdecay.product.toward import Beside, toward


def moved(parameters, by=0.3):
    """Move every one of them once, as training does."""
    with torch.no_grad():
        for tensor in {id(t): t for t in parameters}.values():
            tensor.add_(torch.randn_like(tensor), alpha=by)


def unlike(found, exact):
    """The relative error in norm."""
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_departure_is_that_of_the_dense_products(name):
    """Norm, gradients and penalty are autograd's through W − W₀, of every kind of product."""
    product = PRODUCTS[name](torch.float64)
    before = product.materialize().detach()
    (departure,) = toward([product], "initial")
    assert squared_norm(departure).detach() == 0
    moved(product.params)
    params = list({id(p): p for p in product.params}.values())
    square = (product.materialize() - before).square().sum()
    exact = torch.autograd.grad(square / 2, params)
    torch.testing.assert_close(squared_norm(departure), square)
    torch.testing.assert_close(departure.materialize(), product.materialize() - before)
    found = {id(p): torch.zeros_like(p) for p in params}
    for parameter, gradient in zip(departure.params, gradients(departure), strict=True):
        found.setdefault(id(parameter), torch.zeros_like(parameter)).add_(gradient)
    through = torch.autograd.grad(penalty(departure, 1.0), params)
    for parameter, other, expected in zip(params, through, exact, strict=True):
        torch.testing.assert_close(found[id(parameter)], expected)
        torch.testing.assert_close(other, expected)
    assert departure.shape == product.shape


def added(found, backend):
    """What an accumulator adds, product by product a coefficient of its own: parameter -> sum."""
    sums = {id(p): torch.zeros_like(p) for q in found for p in q.params}
    targets = [[sums[id(p)] if p.requires_grad else None for p in q.params] for q in found]
    coefs = [[1.0 + k] * len(q.params) for k, q in enumerate(found)]
    Accumulator(found, backend).accumulate(targets, coefs)
    return sums


BACKENDS = pytest.mark.parametrize("backend", ["bucketed", "per_product", "reference", None])


@BACKENDS
@pytest.mark.parametrize("name", PRODUCTS)
def test_many_depart_at_once(name, backend):
    """Together as one by one: autograd's, through each of the dense differences."""
    some = [PRODUCTS[name](torch.float64) for _ in range(3)]
    found, before = toward(some, "initial"), [p.materialize().detach() for p in some]
    moved([p for q in some for p in q.params])
    params = list({id(p): p for q in some for p in q.params}.values())
    squares = [(q.materialize() - w).square().sum() for q, w in zip(some, before, strict=True)]
    weighted = sum((1 + k) * square for k, square in enumerate(squares))
    sums = added(found, backend)
    for p, expected in zip(params, torch.autograd.grad(weighted / 2, params), strict=True):
        torch.testing.assert_close(sums[id(p)], expected)
    torch.testing.assert_close(penalty(found, 2.0), sum(squares))


@BACKENDS
@pytest.mark.parametrize("base", [torch.float64, torch.bfloat16], ids=["same", "in half"])
def test_many_depart_from_dense_weights_at_once(base, backend):
    """Those of one shape."""
    model = nn.Sequential(*(nn.Linear(7, 9) for _ in range(3))).double()
    dense = [layer.weight.detach().to(base).double() for layer in model]
    aim = copy.deepcopy(model).to(base)
    factorize(model, rank=2)
    found = products(model, toward=aim)
    moved(model.parameters())
    params = [p for q in products(model) for p in q.params]
    pairs = zip(model, dense, strict=True)
    squares = [(layer.weight + 0 - w).square().sum() for layer, w in pairs]
    weighted = sum((1 + k) * square for k, square in enumerate(squares))
    sums = added(found, backend)
    for p, expected in zip(params, torch.autograd.grad(weighted / 2, params), strict=True):
        torch.testing.assert_close(sums[id(p)], expected)
    torch.testing.assert_close(penalty(found, 2.0), sum(squares))


def test_the_factors_before_have_gradients_of_their_own():
    """They are the opposite ones; nobody asks for them unless they are trained."""
    tensors = [nn.Parameter(torch.randn(n, 2, dtype=torch.float64)) for n in (5, 4, 5, 4)]
    u, v, u0, v0 = tensors
    (structure,) = {p.structure for p in toward([Product.of(u, v)], "initial")}
    product = Product.of(*tensors, structure=structure)
    exact = torch.autograd.grad((u @ v.T - u0 @ v0.T).square().sum() / 2, tensors)
    for found, expected in zip(gradients(product), exact, strict=True):
        torch.testing.assert_close(found, expected)


def model_of(dtype=torch.float64):
    """A linear layer, a convolution in two readings, an embedding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 32), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(8, 9)
    )
    dense = copy.deepcopy(model.to(dtype))
    factorize(model, rank=2, include=["0", "1"])
    factorize(model, rank=2, include="2", parametrization=lambda rank, **kw: LowRank(
        rank, **{**kw, "pattern": "o i kh kw -> (o kh) (i kw)"}))  # fmt: skip
    return model, dense


@pytest.mark.parametrize("base", [torch.float64, torch.bfloat16], ids=["same", "in half"])
@pytest.mark.parametrize("given", ["model", "state_dict"])
def test_toward_dense_weights(given, base):
    """½‖UVᵀ − W₀‖² by name, in each reading; W₀ may be in half precision."""
    model, dense = model_of()
    dense = dense.to(base)
    found = products(model, toward=dense if given == "model" else dense.state_dict())
    assert [p.name for p in found] == ["0.weight", "1.weight", "2.weight"]
    moved(model.parameters(), 0.1)
    params = [p for q in products(model) for p in q.params]
    own = dense.state_dict()
    square = sum(
        (model.get_submodule(p.name[0]).weight + 0 - own[p.name].double()).square().sum()
        for p in found
    )
    exact = torch.autograd.grad(square / 2, params)
    for p, expected in zip(torch.autograd.grad(penalty(found, 1.0), params), exact, strict=True):
        torch.testing.assert_close(p, expected)
    for p in params:
        p.grad = torch.zeros_like(p)
    frobdecay.add_penalty_grad_(found, 0.5)
    for p, expected in zip(params, exact, strict=True):
        torch.testing.assert_close(p.grad, expected / 2)
    assert all(p.grad is None for q in found for p in q.params if not p.requires_grad)


def test_near_the_start_no_digits_are_lost():
    """In float32, where differences of Grams have none left."""
    u, v = (nn.Parameter(torch.randn(n, 4)) for n in (60, 50))
    (departure,) = toward([Product.of(u, v)], "initial")
    before = [p.detach().double() for p in (u, v)]
    moved([u, v], 1e-5)
    now = [p.detach().double().requires_grad_() for p in (u, v)]
    square = (now[0] @ now[1].T - before[0] @ before[1].T).square().sum()
    exact = torch.autograd.grad(square / 2, now)
    assert unlike(squared_norm(departure), square.detach()) < 1e-5
    for found, expected in zip(gradients(departure)[:2], exact, strict=True):
        assert unlike(found, expected) < 1e-4


def test_nothing_of_the_size_of_the_weight_is_formed():
    """Neither for the step nor for the norm."""
    layer = nn.Linear(96, 64)
    factorize(layer, rank=2)
    found = products(layer, toward="initial")
    optimizer = FrobeniusDecay(torch.optim.SGD(layer.parameters(), lr=0.1), found, decay=0.1)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with Sizes() as sizes:
        optimizer.step()
        squared_norm(found[0])
    assert max(sizes.seen) < 96 * 64


STEPS = {
    "coupled": lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.2),
    "decoupled": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.2),
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_decays_toward_the_initial_weight(kind):
    """It takes the weight decay over, and adds what autograd says where the base would decay."""
    model, _ = model_of()
    found = products(model, toward="initial")
    before = {p.name: p.materialize().detach() for p in products(model)}
    optimizer = FrobeniusDecay(STEPS[kind](model.parameters()), found)
    assert {g["frobenius_decay"] for g in optimizer.param_groups} == {0.0, 0.2}
    moved(model.parameters(), 0.1)
    twin = copy.deepcopy(model)
    params = [p for q in products(twin) for p in q.params]
    others = [p for p in twin.parameters() if all(p is not q for q in params)]
    square = sum((q.materialize() - before[q.name]).square().sum() for q in products(twin))
    slopes = torch.autograd.grad(square / 2, params)
    for p in (*model.parameters(), *twin.parameters()):
        p.grad = torch.ones_like(p)
    if kind == "coupled":
        for p, slope in zip(params, slopes, strict=True):
            p.grad += 0.2 * slope
    base = STEPS[kind]([{"params": params, "weight_decay": 0.0}, {"params": others}])
    optimizer.step()
    base.step()
    if kind == "decoupled":
        with torch.no_grad():
            for p, slope in zip(params, slopes, strict=True):
                p -= 0.1 * 0.2 * slope
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, other)


@pytest.mark.parametrize("kind", ["initial", "dense"])
def test_what_they_decay_toward_goes_where_the_factors_go(kind):
    """To the device that the model is moved to after its products were listed."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 8, dtype=torch.float64, device="cpu"))
    model = copy.deepcopy(dense)
    factorize(model, rank=2)
    found = products(model, toward=kind if kind == "initial" else dense)
    moved(model.parameters())
    expected = penalty(found, 1.0)
    model.to(torch.get_default_device())
    torch.testing.assert_close(penalty(found, 1.0).cpu(), expected.cpu())
    constants = [f.owner for p in found for f in p.factors if isinstance(f.owner, Beside)]
    assert len(constants) == (2 if kind == "initial" else 1)


def test_a_constant_is_moved_once_and_not_to_where_nothing_is_kept():
    """Without an accelerator: to another device it goes, to meta it does not."""
    there, elsewhere, meta = (torch.device(kind) for kind in ("cpu", "cuda:7", "meta"))
    held, factor = Mock(device=there), Mock(param=Mock(device=meta))
    constant = Beside(held, factor)
    assert constant.tensor is held
    factor.param.device = elsewhere
    held.to.return_value.device = elsewhere
    assert constant.tensor is constant.tensor is held.to.return_value
    held.to.assert_called_once_with(elsewhere)


def trained(model, optimizer, steps):
    """Some steps of training."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        (model[0](x).square().sum() + model[3].weight.sum()).backward()
        optimizer.step()


def wrapped(model, kind="initial"):
    """The optimizer of that."""
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1.0)
    return FrobeniusDecay(base, products(model, toward=kind) if kind else model)


def test_training_is_resumed_toward_the_first_weight():
    """The optimizer's state_dict has what the factors were; a file of weights alone can."""
    whole, _ = model_of()
    optimizer = wrapped(whole)
    trained(whole, optimizer, 3)
    file = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), file)
    trained(whole, optimizer, 3)
    file.seek(0)
    state, ours = torch.load(file, weights_only=True)
    again, _ = model_of()
    again.load_state_dict(state)
    resumed = wrapped(again)  # lists factors that were trained already
    resumed.load_state_dict(ours)
    trained(again, resumed, 3)
    for p, other in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, other)


def test_a_copy_of_the_optimizer_keeps_what_the_factors_were():
    """And keeps it apart."""
    model, _ = model_of()
    optimizer = wrapped(model)
    moved(model.parameters())
    twin = copy.deepcopy(optimizer)
    for mine, other in zip(optimizer.products, twin.products, strict=True):
        torch.testing.assert_close(squared_norm(mine), squared_norm(other))
        assert squared_norm(mine) > 0
        ours, theirs = (q.structure.halves(q.params)[1] for q in (mine, other))
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(ours, theirs, strict=True))


def test_checkpoints_of_another_aim():
    """One without initial factors is warned of; one of other products changes nothing."""
    model, _ = model_of()
    optimizer, plain = wrapped(model), wrapped(model, None)
    with pytest.warns(UserWarning, match=r"no initial factors, so 0.weight.*list them before"):
        optimizer.load_state_dict(plain.state_dict())
    other, _ = model_of()
    factorize(other, rank=3, include="3")
    for target, source in ((plain, optimizer), (optimizer, wrapped(other))):
        before = copy.deepcopy(target.state_dict())
        changed = copy.deepcopy(source.state_dict())
        changed["param_groups"] = before["param_groups"]
        with pytest.raises(ValueError, match=r"expected initial factors of the \d products"):
            target.load_state_dict(changed)
        now = target.state_dict()
        for state in (now, before):
            state["frobdecay"] = [held for _, held in state["frobdecay"].get("initial", [])]
        torch.testing.assert_close(now, before)


def refused():
    """What -> (toward, a part of the message)."""
    shape = torch.ones(3, 3)
    return {
        "a word": ("zero", "expected toward to be"),
        "a number": (3, "a table from names to dense weights, or a dense model, got a int"),
        "no such weight": ({"0.weight": torch.ones(32, 24)}, "1.weight: expected its dense weight"),
        "no tensor": ({"0.weight": [1]}, "0.weight: expected its dense weight.*got list"),
        "a shape": ({"0.weight": shape}, r"0.weight: .*shape \(32, 24\), got \(3, 3\)"),
        "NaN": ({"0.weight": torch.full((32, 24), torch.nan)}, "0.weight: .*NaN or infinity in it"),
        "infinity": ({"0.weight": torch.full((32, 24), torch.inf)}, "0.weight: .*NaN or infinity"),
        "integers": ({"0.weight": torch.ones(32, 24).int()}, "0.weight: .*torch.int32"),
    }


@pytest.mark.parametrize("what", refused())
def test_bad_aims_are_refused(what):
    """By name of the product."""
    model, _ = model_of()
    aim, message = refused()[what]
    with pytest.raises((TypeError, ValueError), match=message):
        products(model, toward=aim)


def test_products_without_such_an_aim_are_refused():
    """Sums have a constant part already; dense weights are for pairs that stand for one."""
    tensors = [torch.ones(4, 4), torch.ones(4, 1), torch.ones(4, 1)]
    adapted = Product.of(*tensors, structure=Shifted((1.0,)), name="it")
    with pytest.raises(ValueError, match=r'it: .*shifted.*lora="delta"'):
        toward([adapted], "initial")
    layer = nn.Linear(6, 5)
    dense = {"weight": layer.weight.detach().clone()}
    factorize(layer, rank=2, parametrization=lambda rank, **kw: LowRank(rank, **kw, depth=1))
    with pytest.raises(ValueError, match=r'weight: .*chain of 3 factors.*toward="initial"'):
        products(layer, toward=dense)
    (found,) = products(layer, toward="initial")
    assert len(found.factors) == 6
    with pytest.raises(ValueError, match="bare: expected the product"):
        toward([Product.of(tensors[1], tensors[2], name="bare")], dense)
