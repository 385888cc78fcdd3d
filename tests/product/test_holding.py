"""Modules that forward attributes: each weight is seen once, at the module that holds it."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

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
    """Merged: the classes, keys and outputs of the dense model; a copy is untouched."""
    model, names = make[0](), make[1]
    dense = copy.deepcopy(model)
    factorize(model, rank=1.0, include=names)
    twin = copy.deepcopy(model)
    merge(model)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [type(module) for module in model.modules()] == [type(m) for m in dense.modules()]
    close(model(X), dense(X))
    assert list(map(type, dense.modules())) == list(map(type, merge(copy.deepcopy(twin)).modules()))
    assert [product.name for product in products(twin)] == names
    close(twin(X), dense(X))


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


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_copy_of_a_wrapper_is_a_wrapper(wrapper):
    """copy.deepcopy asks for a method, and wrappers would answer with that of the module inside."""
    wrap, names = WRAPPERS[wrapper]
    wrapped = wrap(nn.Linear(6, 6))
    factorize(wrapped, rank=2, include=names)
    twin = copy.deepcopy(wrapped)
    assert type(twin).__name__ == type(wrapped).__name__
    close(twin(X), wrapped(X))
    merge(wrapped)
    assert [product.name for product in products(twin)] == names


def test_a_shallow_copy_shares_the_factors():
    """As of any module."""
    layer = nn.Linear(6, 6)
    factorize(layer, rank=2)
    assert copy.copy(layer).parametrizations is layer.parametrizations


# --- a parameter in the place of a factorized weight --------------------------------------------


@pytest.mark.parametrize("assign", [setattr, lambda m, name, p: m.register_parameter(name, p)])
@pytest.mark.parametrize("trained", [True, False])
def test_an_assigned_parameter_is_factorized(assign, trained):
    """The factors stay the parameters, and require a gradient if the new weight does."""
    layer = nn.Linear(6, 6)
    factorize(layer, rank=6)
    before = [id(parameter) for parameter in layer.parameters()]
    weight = nn.Parameter(torch.randn(6, 6), requires_grad=trained)
    assign(layer, "weight", weight)
    assert torch.allclose(layer.weight, weight, atol=1e-5)
    assert [id(parameter) for parameter in layer.parameters()] == before
    factors = layer.parametrizations.weight.parameters()
    assert [factor.requires_grad for factor in factors] == [trained] * 2
    layer.bias = nn.Parameter(torch.ones(6))  # others are what they were
    assert bool((layer.bias == 1).all())


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (nn.Parameter(torch.randn(5, 6)), ValueError),
        (nn.Parameter(torch.zeros(6)), ValueError),
    ],
    ids=["another shape", "a vector"],
)
def test_what_cannot_be_factorized_is_not_assigned(value, error):
    """The weight is named, and nothing has changed."""
    layer = nn.Linear(6, 6)
    factorize(layer, rank=2)
    before = layer.weight.materialize()
    with pytest.raises(error, match=r"Linear\.weight"):
        layer.weight = value
    assert torch.equal(layer.weight.materialize(), before)


def test_a_deleted_weight_takes_its_factors_along():
    """As of any parameter; what is registered then is dense, in this module alone."""
    layer = nn.Linear(6, 6)
    factorize(layer, rank=2)
    twin = copy.deepcopy(layer)
    weight = layer.weight.materialize().detach()
    with pytest.warns(UserWarning, match=r"Linear\.weight is deleted, and its factors with it"):
        del layer.weight
    layer.weight = nn.Parameter(weight)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["bias", "weight"]
    x = torch.randn(3, 6)
    assert torch.allclose(layer(x), twin(x), atol=1e-5)
    assert len(products(twin)) == 1


def test_a_factor_leads_to_its_module():
    """Also where its name lacks ".weight", as tools write it that look for the module."""
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    factorize(model, rank=2)
    for part in (model, copy.deepcopy(model)):
        name, _ = next(iter(part.named_parameters()))
        assert part.get_submodule(name.replace(".weight", "")) is part[0]
    with pytest.raises(AttributeError):
        model[0].parametrizations.bias  # noqa: B018
    with pytest.raises(AttributeError):
        model[0].parametrizations.weight.original  # noqa: B018


@pytest.mark.parametrize(
    "tool",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
        lambda layer: setattr(layer, "weight", nn.Buffer(X[:, :3]).as_subclass(Packed)),
        lambda layer: layer.register_parameter("bias", sharded()),
    ],
    ids=["pruning", "weight_norm", "orthogonal", "quantization", "tensor parallel"],
)
def test_tools_for_dense_layers_are_refused(tool):
    """They say what to do first, and nothing has changed."""
    layer = nn.Linear(6, 6)
    factorize(layer, rank=2)
    before, expected = list(layer.state_dict()), layer(X)
    with pytest.raises((TypeError, ValueError), match="merge or unroll"):
        tool(layer)
    assert list(layer.state_dict()) == before
    assert torch.equal(layer(X), expected)


class Packed(nn.Parameter):
    """As quantized weights are."""


def sharded():
    """What ``ColwiseParallel`` registers."""
    parameter = nn.Parameter(torch.randn(6))
    parameter.device_mesh = None
    return parameter


def test_a_norm_on_top_of_factors_works():
    """A parametrization that takes one weight; it is no product then."""
    layer = nn.Linear(6, 6)
    factorize(layer, rank=2)
    nn.utils.parametrizations.spectral_norm(layer)
    assert torch.linalg.matrix_norm(layer.weight, ord=2) < 1.1
    with pytest.raises(ValueError, match="on top of LowRank"):
        products(layer)
