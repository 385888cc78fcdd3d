"""split_param_groups and FrobeniusDecayFactory: the groups of a model."""

import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import frobdecay
from frobdecay import FrobeniusDecay, FrobeniusDecayFactory, split_param_groups


class Net(nn.Module):
    """Dense and factorized weights, norms of one and two dimensions, a token, a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm((3, 8)), nn.Linear(8, 8))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)

    def forward(self, x):
        """Three tokens."""
        return self.head(self.body(self.embed(x) + self.token))


@pytest.fixture
def net():
    """With the last body layer factorized."""
    net = Net()
    frobdecay.factorize(net, rank=2, include="body.2")
    return net


U, V = (f"body.2.parametrizations.weight.original{k}" for k in (0, 1))
SMALL = ["body.0.bias", "body.1.weight", "body.1.bias", "body.2.bias", "head.bias"]


def names(groups: list) -> list:
    """λ and names of every group."""
    return [(group["weight_decay"], *group["param_names"]) for group in groups]


@pytest.mark.covers("C15")
def test_dense_weights_the_rest_and_factors(net):
    """Norms of any dimension, biases and vectors do not decay; factors are apart."""
    assert names(split_param_groups(net, 0.1)) == [
        (0.1, "token", "embed.weight", "body.0.weight"),
        (0.0, *SMALL),
        (0.1, U, V),
    ]


@pytest.mark.covers("C15")
def test_every_trainable_parameter_is_in_one_group(net):
    """Shared ones once, frozen ones never; the parameters are the model's own."""
    held = [id(p) for group in split_param_groups(net, 0.1) for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in net.parameters() if p.requires_grad})


def test_again_is_the_same(net):
    """Nothing is changed, so a second call, also after wrapping, finds the same groups."""
    first = split_param_groups(net, 0.1)
    FrobeniusDecay(torch.optim.AdamW(split_param_groups(net, 0.1)), net)
    second = split_param_groups(net, 0.1)
    assert names(first) == names(second)
    for one, other in zip(first, second, strict=True):
        assert [*map(id, one["params"])] == [*map(id, other["params"])]


@pytest.mark.covers("C15", "D6")
def test_factors_are_told_by_identity(net):
    """Parameters that only look like factors by name, and products of other modules."""
    net.body[0].register_parameter("original0", nn.Parameter(torch.randn(4, 4)))
    product = frobdecay.Product(
        "mine", (frobdecay.Factor(net.body[0], "weight"), frobdecay.Factor(net.embed, "weight"))
    )

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

    @frobdecay.register_products(Holder)
    def of(module, name):
        yield product

    groups = split_param_groups(Holder(), 0.1)
    assert names(groups)[0] == (0.1, "net.token", "net.body.0.original0")
    factors = {"net.embed.weight", "net.body.0.weight", f"net.{U}", f"net.{V}"}
    assert set(names(groups)[2][1:]) == factors


def test_a_model_without_products_has_two_groups():
    """Nobody has to factorize."""
    assert names(split_param_groups(nn.Linear(3, 2), 0.1)) == [(0.1, "weight"), (0.0, "bias")]


@pytest.mark.parametrize(
    ("no_decay", "moved"),
    [
        ("token", ["token"]),
        ("body.2.weight", [U, V]),
        ("body.2", [U, V]),
        (U, [U]),
        ("*.0.weight", ["body.0.weight"]),
        (["token", re.compile(r"body\..\.weight")], ["token", "body.0.weight", U, V]),
        (nn.Embedding, ["embed.weight"]),
        ("head.weight", ["embed.weight"]),
        (lambda name, param: name == "body.2.weight", [U, V]),
    ],
)
def test_no_decay_takes_names_patterns_and_types(net, no_decay, moved):
    """Factors too, by their own names, the dense weight's or the module's; shared ones by any."""
    groups = split_param_groups(net, 0.1, no_decay=no_decay)
    spared = {name for λ, *held in names(groups) if λ == 0 for name in held}
    assert spared == {*SMALL, *moved}


@pytest.mark.parametrize("inside", [False, True])
def test_a_modules_own_list_is_honoured(net, inside):
    """As timm's models have it; names that the model lacks do not matter."""
    net.no_weight_decay = lambda: {"token", "body.2.weight", "dist_token"}
    model = nn.Sequential(net) if inside else net
    *_, (λ, *spared) = names(split_param_groups(model, 0.1))
    assert λ == 0.0
    assert {"token", U, V} < {name.removeprefix("0.") for name in spared}


@pytest.mark.covers("D8")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(2, 2), 0.1, "wieght"), ValueError, "'wieght' matches no parameter.*weight"),
        ((nn.Linear(2, 2), 0.1, nn.Conv2d), ValueError, "Conv2d matches no module"),
        ((nn.Linear(2, 2), 0.1, [3]), TypeError, "expected no_decay to be a name, .*got 3"),
        ((nn.Linear(2, 2), -0.1, ()), ValueError, "weight_decay"),
        (([nn.Parameter(torch.ones(1))], 0.1, ()), TypeError, "expected a model, got a list"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, error, message):
    """Names, λ and models."""
    model, decay, no_decay = arguments
    with pytest.raises(error, match=message):
        split_param_groups(model, decay, no_decay=no_decay)


@pytest.mark.parametrize("decay", [-0.1, float("nan")])
def test_a_lambda_of_products_that_is_none_is_refused(net, decay):
    """As the weight decay is: a plain optimizer would not look at it."""
    with pytest.raises(ValueError, match="expected decay to be finite"):
        split_param_groups(net, 0.1, decay=decay)


def test_the_wrapper_takes_the_groups_as_they_are(net):
    """No group is divided, λ is the factors' weight decay, and names stay for messages."""
    optimizer = FrobeniusDecay(torch.optim.AdamW(split_param_groups(net, 0.1)), net)
    found = [(g["weight_decay"], g["frobenius_decay"]) for g in optimizer.param_groups]
    assert found == [(0.1, 0.0), (0.0, 0.0), (0.0, 0.1)]
    assert optimizer.param_groups[2]["param_names"] == [U, V]


def test_the_groups_train_like_one(net):
    """The steps are those of an optimizer over the same parameters, divided by the wrapper."""
    other = Net()
    frobdecay.factorize(other, rank=2, include="body.2")
    other.load_state_dict(net.state_dict())
    dense = [p for n, p in other.named_parameters() if n not in SMALL and p.requires_grad]
    small = [p for n, p in other.named_parameters() if n in SMALL]
    base = torch.optim.AdamW([{"params": dense}, {"params": small, "weight_decay": 0.0}])
    pairs = [
        (net, FrobeniusDecay(torch.optim.AdamW(split_param_groups(net, 1e-2)), net)),
        (other, FrobeniusDecay(base, other)),
    ]
    x = torch.arange(6).reshape(2, 3)
    for model, optimizer in pairs:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.covers("P43")
@pytest.mark.usefixtures("alone")
def test_meshes_are_kept_apart():
    """Parameters on a device mesh and plain ones cannot be updated by one fused call."""
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[0].weight = nn.Parameter(distribute_tensor(torch.ones(3, 3), mesh))
    assert names(split_param_groups(model, 0.1)) == [(0.1, "0.weight"), (0.1, "1.weight")]


def test_the_factory_builds_it_all(net):
    """Groups, optimizer with its options, wrapper with its own."""
    optimizer = FrobeniusDecayFactory()(
        net,
        optimizer=torch.optim.SGD,
        lr=0.5,
        weight_decay=0.1,
        no_decay="token",
        decay=0.2,
        bound=3.0,
    )
    assert [g.get("step_bound") for g in optimizer.param_groups] == [None, None, 3.0]
    found = [(g["lr"], g["weight_decay"], g["frobenius_decay"]) for g in optimizer.param_groups]
    assert found == [(0.5, 0.1, 0.0), (0.5, 0.0, 0.0), (0.5, 0.0, 0.2)]
    assert "token" in optimizer.param_groups[1]["param_names"]


def test_factors_that_shall_not_decay_do_not_by_a_lambda_of_their_own():
    """``no_decay`` goes before ``decay``."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    frobdecay.factorize(net, rank=2)
    optimizer = FrobeniusDecayFactory()(
        net, optimizer=torch.optim.SGD, weight_decay=0.1, no_decay="0.weight", decay=0.2
    )
    decays = {
        name: g["frobenius_decay"] for g in optimizer.param_groups for name in g["param_names"]
    }
    factors = {name: value for name, value in decays.items() if "parametrizations" in name}
    assert list(factors.values()) == [0.0, 0.0, 0.2, 0.2]


def test_the_factory_needs_an_optimizer(net):
    """There is no default that would suit everybody."""
    with pytest.raises(TypeError, match="optimizer="):
        FrobeniusDecayFactory()(net, lr=0.1)
