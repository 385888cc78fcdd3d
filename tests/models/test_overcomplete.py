"""Deep and wide layers: trained merged, as one convolution, and collapsed exactly."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge
from frobdecay.models.ranks import plan_ranks
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.weights.lowrank import LowRank

RANKS = pytest.mark.parametrize("rank", [1.0, 3.0, 9.0])
DEPTHS = pytest.mark.parametrize("depth", [0, 1, 3])

LAYERS = {
    "linear": (lambda: nn.Linear(12, 16), (4, 9, 12)),
    "conv1d": (lambda: nn.Conv1d(8, 8, 3, padding=1), (4, 8, 20)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (4, 8, 9, 9)),
    "conv2d, strided": (lambda: nn.Conv2d(8, 16, 3, 2, 1, bias=False), (4, 8, 18, 18)),
    "conv2d, few channels": (lambda: nn.Conv2d(3, 8, 3, padding=1), (4, 3, 9, 9)),
    "conv2d, 1×1": (lambda: nn.Conv2d(16, 8, 1), (4, 16, 9, 9)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2), (4, 8, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3, padding=1), (4, 8, 9, 9)),
}
CONVOLUTIONS = [name for name in LAYERS if name != "linear"]


def overcomplete(name, rank, depth):
    """The dense layer, its over-complete twin, and an input; in float64."""
    make, shape = LAYERS[name]
    dense = make().double()
    layer = copy.deepcopy(dense)
    factorize(layer, rank=rank, parametrization=partial(LowRank, depth=depth))
    return dense, layer, torch.randn(shape, dtype=torch.float64)


def perturbed(layer):
    """The layer with all factors moved, as after training."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return layer


class Convolutions(TorchDispatchMode):
    """Shapes of the kernels of all convolutions that run."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note a convolution, forward only."""
        if func is torch.ops.aten.convolution.default:
            self.kernels.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.covers("C2", "C4")
@RANKS
@DEPTHS
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_one_convolution_runs(name, rank, depth):
    """The factors are multiplied and the dense kernel convolves once, whatever their number."""
    dense, layer, x = overcomplete(name, rank, depth)
    with Convolutions() as seen:
        layer(x).sum().backward()
    assert seen.kernels == [tuple(dense.weight.shape)]


@pytest.mark.covers("C4")
@RANKS
@DEPTHS
@pytest.mark.parametrize("name", LAYERS)
def test_it_starts_as_the_dense_layer(name, rank, depth):
    """No rank is cut, and every inner factor is the identity."""
    dense, layer, x = overcomplete(name, rank, depth)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-10, atol=1e-10)
    _, *inner, _ = layer.parametrizations.weight.parameters()
    assert len(inner) == depth
    for M in inner:
        assert torch.equal(M, torch.eye(M.shape[-1]).to(M).expand_as(M))


@pytest.mark.covers("C4", "C18")
@RANKS
@DEPTHS
@pytest.mark.parametrize("name", LAYERS)
def test_it_collapses_exactly(name, rank, depth):
    """Merged after its factors moved: the same function, of the dense layer's class and size."""
    dense, layer, x = overcomplete(name, rank, depth)
    expected = perturbed(layer)(x)
    merged = merge(layer)
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)
    assert type(merged) is type(dense)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (merged, dense)]
    assert shapes[0] == shapes[1]


@pytest.mark.covers("C4")
@RANKS
@DEPTHS
def test_its_size_is_that_of_the_factors(rank, depth):
    """As the plan says: r (m + n) + d·r² numbers, more than the dense m·n."""
    layer = nn.Linear(12, 16, bias=False)
    plan = plan_ranks(layer, rank=rank, parametrization=partial(LowRank, depth=depth))
    factorize(layer, rank=plan, parametrization=partial(LowRank, depth=depth))
    r = round(rank * 12)
    assert plan.after == sum(p.numel() for p in layer.parameters()) == r * 28 + depth * r * r
    assert plan.ratio > 1


@pytest.mark.covers("C4", "C8")
@RANKS
@DEPTHS
def test_it_trains(rank, depth):
    """The loss falls by half, every factor moves, and the collapsed network is the trained one."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 4),
    )  # fmt: skip
    factorize(model, rank=rank, parametrization=partial(LowRank, depth=depth))
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    optimizer = FrobeniusDecay(base, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "original" in n}
    x, labels = torch.randn(16, 3, 4, 4), torch.arange(16) % 4
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert len(before) == 2 * (depth + 2)
    assert not [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    model.eval()
    torch.testing.assert_close(merge(copy.deepcopy(model))(x), model(x), rtol=1e-4, atol=1e-4)
