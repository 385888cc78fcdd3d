"""Modules that forward attributes: each weight is seen once, at the module that holds it."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import frobdecay
from frobdecay import factorize, merge, plan_ranks, products, unroll


class Forwarding(nn.Module):
    """A wrapper that has what the module inside has, as many packages write it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        """What it lacks, of the module inside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        """What the module inside does."""
        return self.inner(x)


class Weighted(Forwarding):
    """It has a matrix of its own, too, called as the inner one's is."""

    def __init__(self, inner):
        nn.Module.__init__(self)
        self.weight, self.other = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.inner = inner

    def forward(self, x):
        """Three linear maps."""
        return self.inner(x) @ self.weight.T @ self.other.T


# How a layer is wrapped -> the names of its weights.
WRAPPERS = {
    "forwarding": (Forwarding, ["inner.weight"]),
    "twice": (lambda layer: Forwarding(Forwarding(layer)), ["inner.inner.weight"]),
    "with weights": (Weighted, ["weight", "other", "inner.weight"]),
    "compiled": (lambda layer: torch.compile(layer, backend="eager"), ["weight"]),
    "checkpointed": (checkpoint_wrapper, ["weight"]),
    "data parallel": (nn.DataParallel, ["weight"]),
}


@pytest.fixture(params=[True, False], ids=["root", "inside"])
def make(request, wrapper):
    """A function that makes a wrapped layer, alone or in a model, and the names of its weights."""
    wrap, names = WRAPPERS[wrapper]

    def made():
        torch.manual_seed(0)
        layer = wrap(nn.Linear(6, 6))
        return layer if request.param else nn.Sequential(layer)

    return made, names if request.param else [f"0.{name}" for name in names]


EVERY = pytest.mark.parametrize("wrapper", WRAPPERS)
X = torch.linspace(-1, 1, 18).view(3, 6)


def close(one, other):
    """Equal to rounding."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@EVERY
def test_weights_are_found_where_they_are(make):
    """By the plan, as products, by the optimizer, and by a second plan."""
    model, names = make[0](), make[1]
    dense = model(X)
    assert list(plan_ranks(model, rank=2, include=names).ranks) == names
    assert list(factorize(model, rank=1.0, include=names).ranks) == names
    assert [product.name for product in products(model)] == names
    close(model(X), dense)
    base = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    optimizer = frobdecay.FrobeniusDecay(base, model)
    assert [product.name for product in optimizer.products] == names
    model(X).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=f"{names[-1]} cannot .* already factorized"):
        plan_ranks(model, rank=2, include=names[-1])


@EVERY
def test_weights_go_back_where_they_were(make):
    """Merged: the classes, keys and outputs of the dense model."""
    model, names = make[0](), make[1]
    dense = copy.deepcopy(model)
    factorize(model, rank=1.0, include=names)
    merge(model)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [type(module) for module in model.modules()] == [type(m) for m in dense.modules()]
    close(model(X), dense(X))


@EVERY
def test_only_layers_are_unrolled(make):
    """The chain takes the layer's place inside of the wrapper, which then runs the chain."""
    model, (*own, name) = make[0](), make[1]
    factorize(model, rank=2, include=name)
    expected = model(X)
    unroll(model)
    assert not own or type(model.get_parameter(own[0])) is nn.Parameter
    assert not [key for key in model.state_dict() if "parametrizations" in key]
    close(model(X), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model(X).any()


@EVERY
def test_saved_factors_come_back(make, tmp_path, wrapper):
    """Into a dense wrapped model; replicas have a model inside that can be saved."""
    model, names = make[0](), make[1]
    factorize(model, rank=2, include=names)
    if wrapper == "data parallel":
        with pytest.raises(ValueError, match=r"is a DataParallel.* take its \.module"):
            frobdecay.save_factorized(model, tmp_path / "model.safetensors")
        return
    frobdecay.save_factorized(model, tmp_path / "model.safetensors")
    again = frobdecay.load_factorized(make[0](), tmp_path / "model.safetensors")
    assert [product.name for product in products(again)] == names
    close(again(X), model(X))


def test_an_error_leaves_a_wrapper_as_it_was():
    """Its class, too, of which a blind copy was made."""
    model = Weighted(nn.Linear(6, 6))
    factorize(model, rank=2, include="inner")
    before, kind = model(X), type(model)

    def failing(weight, rank, *, depth):
        raise ValueError("no")

    with pytest.raises(ValueError, match="other: no"):
        factorize(model, rank=2, include="other", init=failing)
    assert type(model) is kind
    close(model(X), before)
