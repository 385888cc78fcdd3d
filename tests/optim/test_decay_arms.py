"""Decays to compare with: of each factor, scaled by the kept share, none; and sums of losses."""

import copy

import pytest
import torch
from torch import nn

import frobdecay

LAMBDA = 0.1


class Net(nn.Module):
    """A factorized layer between a dense one and a norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.last = nn.Linear(12, 10)


@pytest.fixture
def net():
    """With its plan."""
    model = Net().double()
    return model, frobdecay.factorize(model, rank=3, include="last")


def decayed(model, optimizer):
    """Parameters after a step without gradients of a loss, relative to those before."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {n: (before[n], p.detach()) for n, p in model.named_parameters()}


ARMS = {
    "each factor": lambda plan: 1.0,
    "scaled by the kept share": lambda plan: plan.ratio,
    "none": lambda plan: 0.0,
}


@pytest.mark.covers("C20")
@pytest.mark.parametrize("arm", ARMS)
def test_arms_of_plain_decay_are_one_line(net, arm):
    """The factors' group is the last one: its weight decay is all there is to change."""
    model, plan = net
    groups = frobdecay.split_param_groups(model, LAMBDA)
    groups[-1]["weight_decay"] *= (share := ARMS[arm](plan))
    for name, (old, new) in decayed(model, torch.optim.SGD(groups, lr=1.0)).items():
        rate = LAMBDA if name == "first.weight" else LAMBDA * share if "original" in name else 0.0
        torch.testing.assert_close(new, (1 - rate) * old, rtol=1e-12, atol=1e-12)


@pytest.mark.covers("C20")
def test_the_arm_of_the_product_takes_the_same_groups(net):
    """Around the same groups, the same λ decays the product: U ← U − λ U (VᵀV), likewise V."""
    model, _ = net
    base = torch.optim.SGD(frobdecay.split_param_groups(model, LAMBDA), lr=1.0)
    found = decayed(model, frobdecay.FrobeniusDecay(base, model))
    name = "last.parametrizations.weight.original"
    (U, newU), (V, newV) = found[f"{name}0"], found[f"{name}1"]
    torch.testing.assert_close(newU, U - LAMBDA * U @ (V.mT @ V), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(newV, V - LAMBDA * V @ (U.mT @ U), rtol=1e-12, atol=1e-12)
    old, new = found["first.weight"]
    torch.testing.assert_close(new, (1 - LAMBDA) * old, rtol=1e-12, atol=1e-12)


@pytest.mark.covers("C13")
def test_a_summed_loss_takes_the_count_times_the_coefficient(net):
    """Gradients of a sum, with N·λ, divided by N: those of the mean with λ, for clipping to see."""
    model, _ = net
    twin, x = copy.deepcopy(model), torch.randn(5, 8, dtype=torch.float64)

    def loss(m, reduction):
        out = m.last(m.norm(m.first(x)))
        return nn.functional.mse_loss(out, torch.ones_like(out), reduction=reduction)

    loss(model, "sum").backward()
    count = 5 * 10
    frobdecay.add_penalty_grad_(frobdecay.products(model), LAMBDA * count)
    for parameter in model.parameters():
        parameter.grad /= count
    mean = loss(twin, "mean") + frobdecay.penalty(frobdecay.products(twin), LAMBDA)
    mean.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
