"""What the decay does to a product: the laws that follow from its gradient.

With factors U and V, the step η, the coefficient λ and a singular value s of W = U Vᵀ.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from frobdecay.diagnostics import measure
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.product import Product

ETA, LAMBDA = 1e-4, 0.3


def dense(layer):
    """The weight of a layer, factorized or not."""
    return merge(copy.deepcopy(layer)).weight.detach()


def decayed(kind):
    """Singular values, and the direction of W, before and after one step of decay alone."""
    layer = nn.Linear(12, 9, bias=False, dtype=torch.float64)
    if kind != "dense":
        factorize(layer, rank=1.0)
    before = dense(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=ETA, weight_decay=LAMBDA)
    if kind == "frobenius":
        optimizer = FrobeniusDecay(optimizer, layer)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dense(layer)
    turned = (after / after.norm() - before / before.norm()).norm()
    return torch.linalg.svdvals(before), torch.linalg.svdvals(after), float(turned)


@pytest.mark.covers("C26")
@pytest.mark.parametrize(
    ("kind", "law"),
    [
        ("dense", lambda s: s),
        ("factors", lambda s: 2 * s),
        ("frobenius", lambda s: 2 * s**2),
    ],
)
def test_singular_values_shrink_by_the_law(kind, law):
    """−ηλs of a dense weight, −2ηλs by decay of balanced factors, −2ηλs² by that of the product."""
    before, after, _ = decayed(kind)
    torch.testing.assert_close(before - after, ETA * LAMBDA * law(before), rtol=1e-3, atol=1e-12)


@pytest.mark.covers("C26")
def test_only_frobenius_decay_turns_the_weight():
    """Decay of each factor scales W; that of the product flattens its spectrum."""
    assert decayed("dense")[2] < 1e-12
    assert decayed("factors")[2] < 1e-12
    before, after, turned = decayed("frobenius")
    assert turned > 1e-6
    assert after[0] / after[-1] < before[0] / before[-1]


def direction_error(eta):
    """Of one gradient step, against its first-order law with the measured effective step."""
    U, V, target = (torch.randn(n, m, dtype=torch.float64) for n, m in ((8, 3), (6, 3), (8, 6)))
    leaves = [t.clone().requires_grad_() for t in (U, V)]

    def loss(W):
        w = W / W.norm()  # what a normalization behind the layer makes of it
        return (w * target).sum() + (w**3).sum()

    loss(leaves[0] @ leaves[1].mT).backward()
    new = (U - eta * leaves[0].grad) @ (V - eta * leaves[1].grad).mT
    w = (U @ V.mT / (U @ V.mT).norm()).requires_grad_()
    (G,) = torch.autograd.grad(loss(w), w)
    w = w.detach()
    step = G @ V @ V.mT + U @ U.mT @ G
    effective = measure(Product.of(U, V), lr=eta).products[0].effective_step
    expected = w - effective * (step - (w * step).sum() * w)
    return float((new / new.norm() - expected).norm())


@pytest.mark.covers("C22", "C26")
def test_the_effective_step_is_that_of_the_direction():
    """The direction w = W/‖W‖ moves by η/‖W‖² times the projected gradient, to O(η²)."""
    errors = []
    for eta in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(1)
        errors.append(direction_error(eta))
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 50


@pytest.mark.covers("C26")
def test_decay_of_three_factors_bounds_a_schatten_quasi_norm():
    """(‖U‖² + ‖M‖² + ‖V‖²)/2 ≥ 3/2·Σ s^(2/3), with equality for equal shares of each s."""
    U, M, V = (torch.randn(n, m, dtype=torch.float64) for n, m in ((8, 3), (3, 3), (6, 3)))
    P, s, Qt = torch.linalg.svd(U @ M @ V.mT, full_matrices=False)
    P, s, Qt = P[:, :3], s[:3], Qt[:3]
    least = 1.5 * float(s.pow(2 / 3).sum())
    assert measure(Product.of(U, M, V)).products[0].bound > least
    root = s ** (1 / 3)
    even = Product.of(P * root, torch.diag(root), Qt.mT * root)
    assert measure(even).products[0].bound == pytest.approx(least)


@pytest.mark.covers("P5")
@pytest.mark.parametrize(("product", "shrinks"), [(0.5, True), (1.9, True), (2.1, False)])
def test_decay_is_stable_below_two(product, shrinks):
    """A balanced pair is multiplied by 1 − ηλs, so the largest singular value bounds η and λ."""
    layer = nn.Linear(12, 9, bias=False, dtype=torch.float64)
    factorize(layer, rank=1.0)
    before = torch.linalg.matrix_norm(dense(layer), 2)
    rate = product / before.item()
    base = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=rate)
    optimizer = FrobeniusDecay(base, layer)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with nullcontext() if shrinks else pytest.warns(UserWarning, match="a step of decay is 2.1 "):
        optimizer.step()
    assert (torch.linalg.matrix_norm(dense(layer), 2) < before) == shrinks
