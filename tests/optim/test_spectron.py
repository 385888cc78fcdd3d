"""Spectron: the published rule, its bound, and what it shares with the wrapper."""

import copy
import pickle

import pytest
import torch
from cases import PRODUCTS, seeded
from optim_cases import Net, assert_identical, values
from torch import nn, optim
from torch.optim._muon import _zeropower_via_newtonschulz

import frobdecay
from frobdecay import FrobeniusDecay, Product, Spectron
from frobdecay.optim.spectral.spectron import orthogonalizers

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def polar(momentum, steps=5):
    """Newton–Schulz as it is written: on the matrix, in its dtype."""
    a, b, c = COEFFICIENTS
    X = momentum / momentum.norm()
    for _ in range(steps):
        gram = X.mT @ X
        X = X @ (a * torch.eye(len(gram), dtype=X.dtype) + b * gram + c * gram @ gram)
    return X


def pull(params, seed=0):
    """Random gradients."""
    generator = seeded(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(64, 8), (9, 9), (20, 30), (5, 1)])
def test_directions_are_those_of_muon(shape):
    """Through the Gram: torch's own function up to its bfloat16, the formula to rounding."""
    M = torch.randn(shape, generator=seeded(0), dtype=torch.float64)
    found = M @ orthogonalizers(M.mT @ M)
    torch.testing.assert_close(found, polar(M), rtol=1e-6, atol=1e-8)
    theirs = _zeropower_via_newtonschulz(M.float(), COEFFICIENTS, 5, 1e-7)
    assert (found - theirs.double()).norm() < 0.04 * found.norm()
    assert orthogonalizers(torch.zeros(2, 3, 3)).isfinite().all()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_steps_are_the_published_ones(scale, nesterov):
    """ρ = η/(‖U‖ + ‖V‖ + 1), of both factors; r = 1, where the norms are exact."""
    U, V = (
        nn.Parameter(torch.randn(n, 1, generator=seeded(n), dtype=torch.float64)) for n in (6, 9)
    )
    plain = [t.detach().clone() for t in (U, V)]
    optimizer = Spectron(Product.of(U, V, scale=scale), lr=0.2, weight_decay=0.1, nesterov=nesterov)
    means = [torch.zeros_like(t) for t in plain]
    for step in range(3):
        pull([U, V], step)
        rho = 0.2 / scale / (plain[0].norm() + plain[1].norm() + 1)
        for k, factor in enumerate((U, V)):
            means[k] = 0.95 * means[k] + 0.05 * factor.grad
            ahead = 0.05 * factor.grad + 0.95 * means[k] if nesterov else means[k]
            plain[k] = (1 - 0.2 * 0.1) * plain[k] - rho * polar(ahead)
        optimizer.step()
        for factor, expected in zip((U, V), plain, strict=True):
            torch.testing.assert_close(factor.detach(), expected)


@pytest.mark.parametrize(
    "name", ["pair", "scaled", "deep", "batched", "batched deep", "packed heads"]
)
def test_a_step_is_about_as_long_as_lr_and_no_longer_where_it_is_bounded(name):
    """Singular values of the directions are 1.2 at most; the wrapper's bound has no such slack."""
    for wrapped, most in ((False, 1.2**3 * 0.3), (True, 0.3 * (1 + 1e-6))):
        torch.manual_seed(0)
        product = PRODUCTS[name](torch.float64)
        optimizer = Spectron(product, lr=0.3)
        if wrapped:
            optimizer = FrobeniusDecay(optimizer, product, decay=0.0, bound=1.0)
        for seed in range(3):
            before = product.materialize().detach().clone()
            pull({id(p): p for p in product.params}.values(), seed)
            optimizer.step()
            step = torch.linalg.matrix_norm(product.materialize().detach() - before, 2).max()
            assert 0.02 < step.item() <= most


def test_what_has_no_gradient_stays_and_is_not_counted():
    """A frozen factor, or one that the loss did not reach: ρ is then η over the other's norm."""
    U = nn.Parameter(torch.ones(6, 1, dtype=torch.float64))
    V = nn.Parameter(torch.ones(4, 1, dtype=torch.float64))
    optimizer = Spectron(Product.of(U, V), lr=0.3)
    U.grad = torch.ones_like(U)
    optimizer.step()
    assert torch.equal(V, torch.ones_like(V))
    expected = torch.ones_like(U) - 0.3 / 2 * polar(torch.ones_like(U))
    torch.testing.assert_close(U.detach(), expected)


def test_what_was_frozen_at_construction_trains_later():
    """Its gradients are zeroed, and it is stepped once it has some."""
    U, V = nn.Parameter(torch.ones(6, 1)), nn.Parameter(torch.ones(4, 1), requires_grad=False)
    optimizer = Spectron(Product.of(U, V), lr=0.3)
    U.grad = torch.ones_like(U)
    optimizer.step()
    assert torch.equal(V, torch.ones_like(V))
    V.requires_grad_(True)
    V.grad = torch.ones_like(V)
    optimizer.step()
    assert (V < 1).all()
    optimizer.zero_grad()
    assert V.grad is None


def test_it_learns_and_is_wrapped_for_decay():
    """Decoupled, by its own group's rate; the weight decay of the factors is taken over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    frobdecay.factorize(model, rank=6)
    optimizer = FrobeniusDecay(Spectron(model, lr=0.1, weight_decay=0.02), model, bound=1.0)
    assert "auto (decoupled)" in repr(optimizer)
    assert optimizer.param_groups[0]["frobenius_decay"] == 0.02
    x = torch.randn(64, 16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step(lambda loss=loss: loss)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_it_resumes_bit_for_bit(way):
    """Momentum is all that it keeps."""
    net = Net()
    optimizer = Spectron(net.products(), lr=0.1)

    def steps(net, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            net.loss().backward()
            optimizer.step()
        return values(net)

    steps(net, optimizer)
    if way == "state_dict":
        again = copy.deepcopy(net)
        resumed = Spectron(again.products(), lr=9.0)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        both = (net, optimizer)
        copied = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
        again, resumed = copied
    assert_identical(steps(net, optimizer), steps(again, resumed))


@pytest.mark.parametrize("size", [1e10, 1e19, 1e25, 1e37])
def test_gradients_that_explode_leave_numbers(size):
    """The direction of a momentum that is too large for its Gram is left out."""
    generator = seeded(0)
    U, V = (nn.Parameter(torch.randn(n, 3, generator=generator)) for n in (8, 7))
    optimizer = Spectron(Product.of(U, V), lr=0.3)
    before = (U @ V.T).detach()
    for factor in (U, V):
        factor.grad = size * torch.randn(factor.shape, generator=generator)
    optimizer.step()
    assert torch.linalg.matrix_norm((U @ V.T).detach() - before, 2) <= 1.2**3 * 0.3
    U.grad = V.grad = None
    U.grad = torch.full_like(U, torch.nan)
    optimizer.step()
    assert U.isnan().any()


def test_refused():
    """What is no matrix, half precision, other groups, options out of their range."""
    product = PRODUCTS["pair"](torch.float64)
    for options in ({"lr": -1.0}, {"momentum": 1.0}, {"ns_steps": 0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Spectron(product, **options)
    with pytest.raises(ValueError, match=r"chain of matrices.*; leave it to another optimizer"):
        Spectron(PRODUCTS["tucker"](torch.float64))
    with pytest.raises(TypeError, match=r"expected factors in float32 or float64, got torch.bf"):
        Spectron(PRODUCTS["pair"](torch.bfloat16))
    with pytest.raises(ValueError, match="another param group"):
        Spectron(product).add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="without any"):
        Spectron(nn.Linear(3, 3))
    optimizer = Spectron(product)
    before = [param.detach().clone() for param in product.params]
    pull(product.params)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert_identical([*product.params], before)


def test_factors_that_are_in_half_precision_later_are_refused():
    """As model.bfloat16() makes them; nothing is changed."""
    product = PRODUCTS["pair"](torch.float32)
    optimizer = Spectron(product)
    for param in product.params:
        param.data = param.data.bfloat16()
        param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=r"expected factors in float32 or float64, got torch.bf"):
        optimizer.step()
    assert not optimizer.state


def test_its_group_is_not_divided():
    """Where some of its factors would keep their weight decay; without, there is no need to."""
    net = Net()
    with pytest.raises(ValueError, match=r"group 0 of Spectron, got both: it steps in one"):
        FrobeniusDecay(Spectron(net.products(), weight_decay=0.1), net.products()[:1])
    optimizer = FrobeniusDecay(Spectron(net.products()), net.products()[:1], decay=0.1)
    net.loss().backward()
    optimizer.step()


def test_schedulers_take_it():
    """It is a torch optimizer."""
    product = PRODUCTS["pair"](torch.float64)
    optimizer = Spectron(product, lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    pull(product.params)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
