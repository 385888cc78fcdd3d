"""Tucker and CP: norm and gradients from Grams, against autograd on the dense tensor."""

import pickle
from math import prod

import pytest
import torch
from cases import PRODUCTS, Sizes, bare
from closeness import TOLERANCE, close, exact, normal
from hypothesis import given
from hypothesis import strategies as st

from frobdecay import FrobeniusDecay, balance_, penalty, product_norm
from frobdecay.algebra.stars import (
    CP,
    TUCKER,
    Tucker,
    by_growth,
    cp_sides,
    mode_product,
    narrowest,
    tucker_dense,
    tucker_sides,
    unfold,
)
from frobdecay.product.product import Product, gradients, squared_norm

STARS = [name for name in PRODUCTS if name.startswith(("tucker", "cp"))]
sizes = st.integers(1, 5)


def letters(count):
    """Names for the modes of an einsum."""
    return "abcde"[:count], "vwxyz"[:count]


def by_hand(structure, tensors):
    """The dense tensor as its definition, one einsum."""
    if structure == CP:
        outer, _ = letters(len(tensors))
        terms = ",".join(f"{a}r" for a in outer)
        return torch.einsum(f"{terms}->{outer}", *tensors)
    core, *factors = tensors
    outer, inner = letters(core.ndim)
    held = structure.modes(core.ndim)
    terms = ",".join(f"{outer[m]}{inner[m]}" for m in held)
    kept = "".join(inner[m] if m in held else outer[m] for m in range(core.ndim))
    return torch.einsum(f"{','.join(filter(None, [kept, terms]))}->{outer}", core, *factors)


@st.composite
def stars(draw):
    """A star of order 2 to 5 with any sizes, ranks (above them, too), whole modes and scale."""
    order, seed = draw(st.integers(2, 5)), draw(st.integers(0, 1000))
    dims = [draw(sizes) for _ in range(order)]
    scale = draw(st.sampled_from([1.0, 0.25, 2.0]))
    if draw(st.booleans()):
        r = draw(st.integers(1, 7))
        structure, shapes = CP, [(n, r) for n in dims]
    else:
        whole = tuple(k for k in range(order) if draw(st.integers(0, 3)) == 0)
        ranks = [n if k in whole else draw(sizes) for k, n in enumerate(dims)]
        held = [(n, r) for k, (n, r) in enumerate(zip(dims, ranks, strict=True)) if k not in whole]
        structure, shapes = Tucker(whole), [tuple(ranks), *held]
    tensors = [normal(shape, seed + k).requires_grad_() for k, shape in enumerate(shapes)]
    return Product.of(*tensors, structure=structure, scale=scale)


@given(stars())
def test_materialize_is_the_definition(product):
    """The dense tensor is the sum over all ranks, times the scale."""
    dense = product.scale * by_hand(product.structure, product.params)
    assert tuple(dense.shape) == product.shape
    assert close(product.materialize(), dense, 1e-12)


@pytest.mark.covers("C19")
@given(stars())
def test_gradients_agree_with_autograd(product):
    """Value and gradient of every factor are the dense tensor's, in float64 to 1e-10."""
    value, expected = exact(product)
    assert close(0.5 * squared_norm(product), value, 1e-10)
    for gradient, autograd in zip(gradients(product), expected, strict=True):
        assert close(gradient, autograd, 1e-10)


@given(stars())
def test_euler_identity(product):
    """⟨C, ∇_C ½‖W‖²⟩ = ‖W‖² for every factor: W is linear in each."""
    for param, gradient in zip(product.params, gradients(product), strict=True):
        assert close((param * gradient).sum(), squared_norm(product), 1e-10)


@given(stars())
def test_penalty_backward_is_the_gradient(product):
    """Autograd through the Gram formula gives the closed form."""
    penalty(product, 0.2).backward()
    for param, gradient in zip(product.params, gradients(product), strict=True):
        assert close(param.grad, 0.2 * gradient, 1e-10)


@pytest.mark.parametrize("name", STARS)
def test_coefficients_are_the_factors_own(name):
    """Each factor's gradient has its coefficient, a number or a tensor, and None has none."""
    product = PRODUCTS[name](torch.float64)
    plain = product.structure.gradients(product.views(), 0, [1.0] * len(product.factors))
    for k in range(len(plain)):
        coefs = [None] * len(plain)
        coefs[k] = torch.tensor(0.3, dtype=torch.float64)
        found = product.structure.gradients(product.views(), 0, coefs)
        assert [g is None for g in found] == [j != k for j in range(len(plain))]
        assert close(found[k], 0.3 * plain[k], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tucker", "cp"])
def test_half_precision_accumulates_in_float32(name, dtype):
    """Squares beyond float16's largest number add up, and gradients are float32."""
    product = PRODUCTS[name](dtype)
    with torch.no_grad():
        product.params[0].mul_(100)
        product.params[1].mul_(100)
    value, expected = exact(product)
    assert float(value) > 65504
    assert close(0.5 * squared_norm(product), value, TOLERANCE[dtype])
    for gradient, wanted in zip(gradients(product), expected, strict=True):
        assert gradient.dtype == torch.float32
        assert close(gradient, wanted, TOLERANCE[dtype])


@pytest.mark.covers("C19")
@pytest.mark.parametrize(
    "product",
    [
        bare((4, 4, 4), (300, 4), (200, 4), (250, 4), structure=TUCKER)(torch.float32),
        bare((4, 4, 9), (300, 4), (200, 4), structure=Tucker((2,)))(torch.float32),
        bare((300, 6), (200, 6), (250, 6), structure=CP)(torch.float32),
    ],
    ids=["tucker", "tucker-2", "cp"],
)
def test_the_tensor_is_never_formed(product):
    """Value, gradient and backward pass allocate nothing larger than the largest factor."""
    with Sizes() as seen:
        gradients(product)
        penalty(product, 0.1).backward()
    assert max(seen.seen) <= max(param.numel() for param in product.params)
    assert prod(product.shape) > 100 * max(seen.seen)


@given(stars(), st.data())
def test_cut_in_two_it_is_a_matrix_product(product, data):
    """L Rᵀ is the unfolding after any number of modes, and its rank the smaller side's."""
    views, dense = product.views(), product.materialize() / product.scale
    cut = data.draw(st.integers(1, dense.ndim - 1))
    if product.structure == CP:
        L, R = cp_sides(views, cut)
        assert L.shape[1] == views[0].shape[1]
    else:
        held = dict(zip(product.structure.modes(dense.ndim), views[1:], strict=True))
        L, R = tucker_sides(views[0], held, cut)
        assert L.shape[1] == min(prod(views[0].shape[:cut]), prod(views[0].shape[cut:]))
        assert close(tucker_dense(views[0], held), dense, 1e-12)
    assert close(L @ R.mT, dense.reshape(L.shape[0], -1), 1e-12)


def test_mode_products_and_unfoldings():
    """Along a mode: that of the matrix with the unfolding."""
    tensor, matrix = normal((3, 4, 5)), normal((2, 4), 1)
    assert close(unfold(mode_product(tensor, matrix, 1), 1), matrix @ unfold(tensor, 1), 1e-14)


def test_the_narrowest_cut():
    """Least rank first, then least entries of both sides."""
    assert narrowest((9, 9, 9, 9), (5, 3, 4)) == 2
    assert narrowest((32, 16, 9), (4, 4)) == 1


@pytest.mark.parametrize(
    ("structure", "shapes"),
    [
        (TUCKER, [(2, 3), (4, 2)]),
        (TUCKER, [(2, 3), (4, 2), (5, 2)]),
        (TUCKER, [(2,), (4, 2)]),
        (TUCKER, [(2, 3), (4, 2), (5, 3, 1)]),
        (Tucker((2,)), [(2, 3), (4, 2), (5, 3)]),
        (Tucker((0,)), [(2, 3), (4, 2)]),
        (CP, [(4, 2)]),
        (CP, [(4, 2), (5, 3)]),
        (CP, [(4, 2), (5, 2, 1)]),
    ],
)
def test_factors_that_do_not_fit_are_refused(structure, shapes):
    """The message names the product, what was expected, and the shapes."""
    with pytest.raises(ValueError, match=r"layer\.weight: expected, without batch axes.*got"):
        Product.of(*map(torch.ones, shapes), structure=structure, name="layer.weight")


def test_batches_are_refused():
    """A star has no batch axes."""
    with pytest.raises(ValueError, match="without batch axes"):
        Product.of(torch.ones(2, 3, 1), torch.ones(2, 3, 1), structure=CP, batch=1)


@pytest.mark.parametrize("name", STARS)
def test_balancing_is_refused(name):
    """It is a chain's; the product is named."""
    product = PRODUCTS[name](torch.float64)
    with pytest.raises(ValueError, match="product: expected a chain of factors"):
        balance_(product)


def test_structures_are_values():
    """Equal where they mean the same, hashable, and copies are equal to the original."""
    assert Tucker((1,)) == Tucker((1,)) != TUCKER
    assert len({Tucker((1,)), Tucker((1,)), TUCKER, CP}) == 3
    assert pickle.loads(pickle.dumps(CP)) == CP


@pytest.mark.covers("D1")
@pytest.mark.parametrize("name", STARS)
def test_frobenius_decay_shrinks_the_norm(name):
    """Steps of decay alone lower ‖W‖ and follow the dense tensor's own penalty (D1)."""
    product = PRODUCTS[name](torch.float64)
    optimizer = FrobeniusDecay(torch.optim.SGD(product.params, lr=1e-3), [product], decay=1.0)
    before = product_norm(product).detach()
    for param in product.params:
        param.grad = torch.zeros_like(param)
    _, expected = exact(product)
    old = [param.detach().clone() for param in product.params]
    optimizer.step()
    for param, was, gradient in zip(product.params, old, expected, strict=True):
        assert close(was - param.detach(), 1e-3 * gradient, 1e-8)
    assert product_norm(product).detach() < before


def test_what_grows_least_is_multiplied_first():
    """Modes by n_k / r_k: a core stays small for as long as it can."""
    sizes = {0: (9, 2), 1: (8, 8), 2: (6, 3)}
    factors = {mode: torch.ones(size) for mode, size in sizes.items()}
    assert list(by_growth(factors)) == [1, 2, 0]
