"""Flambe without products is the LAMB of other packages; with them it takes theirs further."""

import pytest
import torch
from closeness import gradients
from torch import Tensor, nn

from frobdecay import Flambe, FrobeniusDecay
from frobdecay.product.product import Product

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

pytestmark = pytest.mark.integration(row="LAMB (pytorch_optimizer)")


class Pair(nn.Module):
    """A product U Vᵀ and a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.U, self.V, self.bias = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            for shape in ((6, 2), (5, 2), (6,))
        )
        self.x = torch.randn(7, 5, generator=generator, dtype=torch.float64)

    def product(self) -> Product:
        """The one product."""
        return Product.of(self.U, self.V)

    def loss(self) -> Tensor:
        """A smooth loss."""
        return torch.tanh(self.x @ self.V @ self.U.T + self.bias).square().mean()


def run(net: Pair, optimizer, steps: int = 5) -> list[Tensor]:
    """Train, and return the parameters."""
    for _ in range(steps):
        net.zero_grad()
        net.loss().backward()
        optimizer.step()
    return [param.detach().clone() for param in net.parameters()]


@pytest.mark.integration(column="plain LAMB")
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("foreach", [True, False])
def test_plain_lamb_agrees(decay, foreach):
    """With its decay in the ratio, no bias correction of any kind, and norms below its bound of 10.

    It adds ε to ‖u‖ as well, so that agreement is up to ε.
    """
    ours, theirs = Pair(), Pair()
    common = {"lr": 0.01, "weight_decay": decay, "eps": 1e-12}
    other = pytorch_optimizer.Lamb(
        theirs.parameters(),
        **common,
        weight_decouple=False,
        adam_debias=True,
        foreach=foreach,
    )
    expected = run(theirs, other)
    found = run(ours, Flambe(ours.parameters(), bias_correction=False, **common))
    for mine, their in zip(found, expected, strict=True):
        assert torch.allclose(mine, their, rtol=1e-9, atol=1e-9)


@pytest.mark.integration(column="Frobenius decay")
@pytest.mark.parametrize("mode", ["auto", "decoupled"])
def test_frobenius_decay_around_it_is_outside_of_the_ratio(mode):
    """The first step is theirs from the factors minus lr·λ·∇½‖W‖², with the same gradients."""
    ours, theirs = Pair(), Pair()
    penalties = gradients(ours.product())
    theirs.loss().backward()
    with torch.no_grad():
        for factor, penalty in zip((theirs.U, theirs.V), penalties, strict=True):
            factor -= 0.01 * 0.1 * penalty
    pytorch_optimizer.Lamb(theirs.parameters(), lr=0.01).step()
    base = pytorch_optimizer.Lamb(ours.parameters(), lr=0.01, weight_decay=0.1)
    found = run(ours, FrobeniusDecay(base, ours.product(), mode=mode), 1)
    for mine, their in zip(found[:2], (theirs.U, theirs.V), strict=True):
        assert torch.allclose(mine, their)
