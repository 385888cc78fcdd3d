"""Spectral initialization: optimal, balanced, deterministic, in every shape, dtype and rank."""

import copy
import dataclasses
import json
from fractions import Fraction

import pytest
import torch
from cases import PRODUCTS, Sizes, bare, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from frobdecay import CP, LowRank, TensorTrain, Tucker, factorize, plan_ranks
from frobdecay.algebra import svd
from frobdecay.algebra.spectral import (
    INITS,
    kaiming_init,
    matched_init,
    plain_rank,
    randomized_init,
    resolve_init,
    resolve_rank,
    spectral_init,
)
from frobdecay.product.balance import balance_
from frobdecay.product.product import Product, product_norm

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@st.composite
def weights(draw):
    """A float64 matrix or batch of matrices, with a decaying, flat or deficient spectrum."""
    m, n, seed = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(0, 1000))
    batch = draw(st.lists(st.integers(1, 3), max_size=1))
    generator = seeded(seed)
    W = torch.randn(*batch, m, n, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        W = W * 10.0 ** -torch.arange(n, dtype=torch.float64).clamp_max(6)
    if draw(st.booleans()):
        W[..., n // 2 :] = W[..., :1]  # repeated columns: rank deficient
    return W * 10.0 ** draw(st.integers(-6, 6))


def best_error(W, r):
    """‖W − W_r‖_F of the best rank-r approximation (Eckart–Young), in float64."""
    return torch.linalg.svdvals(W.double())[..., r:].square().sum().sqrt()


@pytest.mark.covers("C7")
@given(weights(), st.integers(1, 20))
def test_error_is_the_smallest_possible(W, r):
    """‖W − UVᵀ‖_F equals the tail of the singular values; exact from full rank on."""
    U, V = spectral_init(W, r)
    error = (W - U @ V.mT).norm()
    assert error <= best_error(W, r) + 1e-10 * W.norm()


@given(weights(), st.integers(1, 20))
def test_factors_are_balanced(W, r):
    """UᵀU = VᵀV, also where r exceeds the rank."""
    U, V = spectral_init(W, r)
    assert (U.mT @ U - V.mT @ V).norm() <= 1e-10 * W.norm()


@pytest.mark.covers("C8", "D3")
@given(weights(), st.integers(1, 20))
def test_no_column_is_zero(W, r):
    """No dead directions where r exceeds the number of singular values (D3)."""
    U, V = spectral_init(W, r)
    for factor in (U, V):
        assert (factor.norm(dim=-2) > 0).all()


@pytest.mark.covers("C26")
@given(weights(), st.integers(1, 20))
def test_half_the_sum_of_squares_is_the_nuclear_norm(W, r):
    """(‖U‖² + ‖V‖²)/2 = ‖UVᵀ‖_*: the bound is tight for balanced factors (T1)."""
    U, V = spectral_init(W, r)
    nuclear = torch.linalg.svdvals(U @ V.mT).sum()
    assert abs(0.5 * (U.square().sum() + V.square().sum()) - nuclear) <= 1e-8 * nuclear


@pytest.mark.covers("C7", "D14", "D15")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (3, 9, 5), (2, 2, 5, 9), (1, 7), (7, 1), (1, 1)])
def test_every_dtype_and_shape(dtype, shape):
    """Optimal in every float dtype, without warnings; dtype and contiguity are kept (D14, D15)."""
    W = torch.randn(shape).to(dtype)
    r = min(3, *shape[-2:])
    U, V = spectral_init(W, r)
    assert U.dtype == V.dtype == dtype
    assert U.is_contiguous()
    assert V.is_contiguous()
    error = (W.double() - U.double() @ V.double().mT).norm()
    assert error <= best_error(W, r) + DTYPES[dtype] * W.double().norm()


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_memory_layout_does_not_matter(layout):
    """Non-contiguous weights give the factors of their contiguous copy."""
    base = torch.randn(12, 10)
    W = {"transposed": base.T, "strided": base[::2, ::3], "expanded": base[:1].expand(6, 10)}[
        layout
    ]
    for found, expected in zip(spectral_init(W, 2), spectral_init(W.contiguous(), 2), strict=True):
        assert torch.equal(found, expected)


def refused(*_):
    """In the place of a route that must not be taken."""
    raise AssertionError("another route was taken")


@pytest.mark.cpu("taken there only")
@pytest.mark.covers("D15")
@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (2, 90, 60)], ids=str)
def test_the_float32_route_is_as_exact_as_float64(monkeypatch, shape):
    """On a flat spectrum at low rank it is taken: optimal, balanced, equal to the reference."""
    W = torch.randn(shape)
    with monkeypatch.context() as patch:
        patch.setattr(svd, "svd_by_gram", refused)
        U, V = spectral_init(W, 12)
    monkeypatch.setattr(svd, "_in_float32", lambda *_: None)
    reference = spectral_init(W, 12)
    products = [u.double() @ v.double().mT for u, v in ((U, V), reference)]
    assert (products[0] - products[1]).norm() <= 1e-5 * W.norm()
    tail = torch.linalg.svdvals(W.double())[..., 12:].square().sum().sqrt()
    assert (W - products[0]).norm() <= tail * (1 + 1e-6)
    assert (U.mT @ U - V.mT @ V).norm() <= 1e-5 * W.norm()


@pytest.mark.parametrize("r", [12, 40], ids=["steep", "over half"])
def test_the_float32_route_refuses_what_it_cannot_resolve(monkeypatch, r):
    """A steep spectrum, or more than half of the rank, goes through float64."""
    W = torch.randn(90, 60) @ torch.diag(10.0 ** -torch.arange(60).clamp_max(20).float())
    seen = []
    exact = svd.svd_by_gram
    monkeypatch.setattr(svd, "svd_by_gram", lambda *args: seen.append(1) or exact(*args))
    spectral_init(W, r)
    assert seen


@pytest.mark.covers("D16")
def test_signs_are_fixed():
    """The same weight gives the same factors: V's columns have a positive largest entry (D16)."""
    W = torch.randn(8, 6)
    first, second = spectral_init(W, 4), spectral_init(W.clone(), 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    V = first[1]
    assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()


def test_global_random_state_is_untouched():
    """Spectral initialization is deterministic and draws no random numbers."""
    state = torch.get_rng_state()
    spectral_init(torch.randn(6, 6, generator=seeded(1)), 9)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_source_weight_is_not_changed_and_not_part_of_a_graph():
    """Factors are new leaves' values: no graph, no sharing of memory."""
    W = nn.Parameter(torch.randn(4, 4))
    before = W.detach().clone()
    U, V = spectral_init(W, 4)
    assert not U.requires_grad
    U.zero_()
    V.zero_()
    assert torch.equal(W.detach(), before)


@pytest.mark.parametrize("depth", [1, 2])
def test_inner_factors_are_the_identity(depth):
    """A deep factorization starts with M = I, batched like the ends."""
    factors = spectral_init(torch.randn(3, 6, 5), 4, depth=depth)
    assert len(factors) == depth + 2
    for M in factors[1:-1]:
        assert torch.equal(M, torch.eye(4).expand(3, 4, 4))
        assert M.is_contiguous()


def test_a_zero_weight_gives_zero_factors():
    """The best factorization of nothing is nothing, without NaN."""
    U, V = spectral_init(torch.zeros(4, 3), 2)
    assert not U.any()
    assert not V.any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_magnitudes_neither_overflow_nor_underflow(scale):
    """The Gram inside squares the weight; it is scaled to unit size before."""
    W = torch.randn(6, 5) * scale
    U, V = spectral_init(W, 5)
    assert torch.allclose(U @ V.T, W, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.covers("C26", "P5")
def test_si_never_lengthens():
    """‖W_r x‖ ≤ ‖W x‖ for every x: SI = P_r P_rᵀ W is a projection (T2)."""
    W = torch.randn(20, 30, dtype=torch.float64)
    U, V = spectral_init(W, 7)
    x = torch.randn(30, 100, dtype=torch.float64)
    assert ((U @ (V.T @ x)).norm(dim=0) <= (W @ x).norm(dim=0) + 1e-12).all()


def spectrum(m, n, values):
    """A float32 matrix with given singular values."""
    P, Q = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64)).Q for size in (m, n))
    return ((P * values.double()) @ Q.T).float()


SPECTRA = {
    "flat": torch.linspace(2, 1, 60),
    "falling": torch.arange(1, 61) ** -1.0,
    "steep": 10.0 ** -torch.linspace(0, 6, 60),
    "clustered": torch.cat([torch.ones(20), torch.full((40,), 0.999)]),
    "deficient": torch.cat([torch.linspace(2, 1, 10), torch.zeros(50)]),
}


@pytest.mark.parametrize("r", [1, 15, 30, 31])
@pytest.mark.parametrize("name", SPECTRA)
def test_float32_is_optimal_and_balanced_on_every_spectrum(name, r):
    """Relative 1e-5 of the best error, UᵀU = VᵀV to float32's rounding, by either route."""
    W = spectrum(80, 60, SPECTRA[name])
    U, V = (factor.double() for factor in spectral_init(W, r))
    error, best = (W.double() - U @ V.T).norm(), best_error(W, r)
    assert error <= best * (1 + 1e-5) + 1e-7 * W.double().norm()
    assert (U.T @ U - V.T @ V).norm() <= 1e-6 * (U.T @ U).norm()


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_lower_matmul_precision_does_not_reach_the_factors(precision):
    """What the user allows matrix products in training is not enough for an initialization."""
    W = spectrum(80, 60, SPECTRA["flat"])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        U, V = (factor.double() for factor in spectral_init(W, 15))
    finally:
        torch.set_float32_matmul_precision(before)
    assert (W.double() - U @ V.T).norm() <= best_error(W, 15) * (1 + 1e-5)


@pytest.mark.covers("D15")
@pytest.mark.parametrize("name", ["falling", "steep", "deficient"])
def test_randomized_is_near_the_best_where_singular_values_fall(name):
    """Within a percent of the best error, balanced, and the same every time."""
    W = spectrum(80, 60, SPECTRA[name])
    state = torch.get_rng_state()
    first, second = randomized_init(W, 15), randomized_init(W, 15)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    U, V = (factor.double() for factor in first)
    assert (W.double() - U @ V.T).norm() <= best_error(W, 15) * 1.01 + 1e-6 * W.double().norm()
    assert (U.T @ U - V.T @ V).norm() <= 1e-5 * (U.T @ U).norm()


@pytest.mark.covers("C10", "D7")
def test_kaiming_is_the_papers_non_spectral_baseline():
    """Entries of the product have variance 4/n, from the weight's own n (D7)."""
    U, V = kaiming_init(torch.ones(600, 500), 100)
    assert (U @ V.T).var().item() == pytest.approx(4 / 500, rel=0.1)


def test_kaiming_draws_each_factor_as_a_layer():
    """U ~ N(0, 2/r) and V ~ N(0, 2/n)."""
    U, V = kaiming_init(torch.ones(2000, 500), 20)
    assert U.var().item() == pytest.approx(2 / 20, rel=0.1)
    assert V.var().item() == pytest.approx(2 / 500, rel=0.1)


@pytest.mark.covers("C10", "D7")
def test_matched_keeps_the_weights_mean_square():
    """Entries of the product have the dense weight's mean square."""
    W = torch.randn(600, 500) * 0.03
    U, V = matched_init(W, 100)
    assert (U @ V.T).var().item() == pytest.approx(0.03**2, rel=0.1)


@pytest.mark.covers("C10", "D9")
@pytest.mark.parametrize("name", INITS)
def test_every_init_gives_the_same_shapes(name):
    """Entries of the table can stand for each other, and are found by name (D9)."""
    W = torch.randn(2, 6, 5, dtype=torch.float64)
    shapes = [f.shape for f in resolve_init(name)(W, 3, depth=1)]
    assert shapes == [(2, 6, 3), (2, 3, 3), (2, 5, 3)]
    assert {f.dtype for f in resolve_init(name)(W, 3, depth=1)} == {torch.float64}


@pytest.mark.parametrize(
    ("weight", "rank", "error", "message"),
    [
        (torch.ones(4, 3), 0, ValueError, "rank above 0, got 0"),
        (torch.ones(4, 3), -2, ValueError, "rank above 0"),
        (torch.ones(4, 3), 0.0, ValueError, "rank above 0"),
        (torch.ones(4, 3), float("nan"), ValueError, "rank above 0, got nan"),
        (torch.ones(4, 3), float("inf"), ValueError, "rank above 0, got inf"),
        (torch.ones(4, 3), True, TypeError, "rank as int or as float"),
        (torch.ones(4, 3), "3", TypeError, "rank as int or as float"),
        (torch.full((4, 3), float("nan")), 2, ValueError, "initialize it first"),
        (torch.tensor([[1.0, float("inf")]]), 1, ValueError, "finite"),
        (torch.ones(4), 2, ValueError, "a matrix"),
        (torch.ones(0, 3), 2, ValueError, "without empty dimensions"),
        (torch.ones(4, 3).long(), 2, TypeError, "real floating-point"),
        (torch.ones(4, 3).to(torch.cfloat), 2, TypeError, "real floating-point"),
        (torch.ones(4, 3).to(torch.float8_e5m2), 2, TypeError, "float8_e5m2.*convert it first"),
        (torch.ones(4, 3), torch.tensor(True), TypeError, "rank as int or as float"),
        (torch.ones(4, 3), torch.tensor([2]), TypeError, "rank as int or as float"),
        (torch.ones(4, 3), 2j, TypeError, "rank as int or as float"),
        (torch.ones(4, 3), None, TypeError, "rank as int or as float"),
        (torch.ones(4, 3), torch.tensor(0), ValueError, "rank above 0"),
        (torch.ones(4, 3).to_sparse(), 2, TypeError, "dense"),
        (torch.ones(4, 3, device="meta"), 2, TypeError, "meta device"),
    ],
)
def test_wrong_weights_and_ranks_are_refused(weight, rank, error, message):
    """What cannot be factorized is refused with what was expected."""
    with pytest.raises(error, match=message):
        spectral_init(weight, rank)


@pytest.mark.covers("D9")
def test_wrong_init_and_depth_are_refused():
    """An unknown init lists the known ones; depth counts inner factors."""
    with pytest.raises(ValueError, match="'kaiming', 'matched', 'randomized', 'spectral'"):
        resolve_init("svd")
    with pytest.raises(ValueError, match="depth to be at least 0, got -1"):
        spectral_init(torch.ones(2, 2), 1, depth=-1)
    with pytest.raises(TypeError, match="number of inner factors, got True"):
        spectral_init(torch.ones(2, 2), 1, depth=True)


@pytest.mark.parametrize(
    ("rank", "m", "n", "expected"),
    [
        (3, 8, 4, 3),
        (9, 8, 4, 9),
        (0.5, 8, 4, 2),
        (1.0, 8, 4, 4),
        (3.0, 8, 4, 12),
        (0.01, 8, 4, 1),
        (0.2, 9, 20, 2),
    ],
)
def test_ranks_are_numbers_or_fractions_of_the_smaller_side(rank, m, n, expected):
    """A float is a fraction of min(m, n), never below 1 (D27: of the same side for all layers)."""
    assert resolve_rank(rank, m, n) == expected


class Count:
    """What counts, and says so."""

    def __index__(self):
        """Three."""
        return 3


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(torch.tensor(3), 3), (torch.tensor(0.5), 2), (Fraction(1, 2), 2), (Count(), 3)],
)
def test_ranks_may_be_numbers_of_others(rank, expected):
    """What counts is a number of columns, every other real number a fraction; saved as plain."""
    assert resolve_rank(rank, 8, 4) == expected
    for kind in (LowRank, Tucker, TensorTrain, CP):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4))
        plan = factorize(model, rank={"0": rank, "1": 0.5}, parametrization=kind)
        assert plan.ranks["0.weight"] == kind(plain_rank(rank)).resolve((4, 8))
        assert json.loads(json.dumps(model[0].parametrizations.weight[0].config()))
    assert factorize(nn.Conv2d(8, 8, 3), rank=[rank, None, rank], parametrization=Tucker).ranks


def test_ranks_may_be_numpys():
    """As a search over ranks gives them; not its bools and arrays."""
    np = pytest.importorskip("numpy")
    for count in (np.int64(3), np.uint8(3), np.array(3)):
        assert plan_ranks(nn.Linear(8, 8), rank=count).ranks == {"weight": 3}
        assert type(LowRank(count).rank) is int
    for fraction in (np.float32(0.5), np.float64(0.5), np.array(0.5), np.float16(0.5)):
        assert plan_ranks(nn.Linear(8, 8), rank=fraction).ranks == {"weight": 4}
    for wrong in (np.bool_(True), np.array([2]), np.array([2, 3]), np.array(True), np.str_("8")):
        with pytest.raises(TypeError, match="rank as int or as float"):
            plan_ranks(nn.Linear(8, 8), rank=wrong)


BALANCEABLE = ["pair", "scaled", "rank one", "full rank", "wide", "one row", "deep", "batched"]
BALANCEABLE += ["batched deep", "grouped queries", "packed heads"]


@pytest.mark.covers("C9")
@pytest.mark.parametrize("kind", BALANCEABLE)
def test_balancing_keeps_the_product_and_balances(kind):
    """The product stays, the ends' Grams become equal, inner factors the identity."""
    product = PRODUCTS[kind](torch.float64)
    with torch.no_grad():
        product.params[0].mul_(30)
    before = product.materialize().detach()
    balance_([product, dataclasses.replace(product, name="again")])  # once
    after = product.materialize().detach()
    assert torch.allclose(after, before, rtol=1e-9, atol=1e-9)
    views = product.views()
    ends = [view.flatten(product.batch, -2) for view in (views[0], views[-1])]
    assert torch.allclose(ends[0].mT @ ends[0], ends[1].mT @ ends[1], atol=1e-9)


@pytest.mark.covers("C9")
def test_balancing_equals_spectral_initialization_of_the_product():
    """At the product's own rank, balancing gives what SI of the dense product gives."""
    product = bare((9, 3), (7, 3))(torch.float64)
    expected = spectral_init(product.materialize().detach(), 3)
    balance_(product)
    for found, wanted in zip(product.params, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-10)


@pytest.mark.covers("C9", "D21")
def test_balancing_never_forms_the_dense_product():
    """The largest tensor inside is a factor's size: no SVD of an m×n matrix (D21)."""
    product = bare((3000, 2), (2000, 2))(torch.float32)
    with Sizes() as sizes:
        balance_(product)
    assert max(sizes.seen) <= 6000


def frozen():
    """A product with a frozen factor."""
    product = PRODUCTS["pair"](torch.float32)
    product.params[0].requires_grad_(False)
    return [product]


def shared():
    """Two products with a common factor."""
    U = nn.Parameter(torch.randn(5, 2))
    return [Product.of(U, torch.randn(4, 2), name=name) for name in ("a", "b")]


def zero():
    """A product that is zero, as LoRA's is at the start."""
    return [Product.of(torch.zeros(5, 2), torch.randn(4, 2), name="lora")]


def broken():
    """A product with NaN."""
    return [Product.of(torch.full((5, 2), float("nan")), torch.randn(4, 2))]


def oblong():
    """A chain whose inner factor is not square."""
    return [bare((5, 2), (2, 3), (4, 3))(torch.float32)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (frozen, "is frozen"),
        (shared, r"b \(tensor\) is also a factor of a"),
        (zero, "lora: the product is zero"),
        (broken, "not finite"),
        (oblong, "square inner factors"),
    ],
)
def test_balancing_refuses_before_it_writes(make, message):
    """A product that cannot be balanced is named, and no product is changed."""
    products = [PRODUCTS["pair"](torch.float32), *make()]
    before = copy.deepcopy([product.params for product in products])
    with pytest.raises(ValueError, match=message):
        balance_(products)
    for product, old in zip(products, before, strict=True):
        for p, o in zip(product.params, old, strict=True):
            assert torch.equal(p.nan_to_num(7), o.nan_to_num(7))


def test_balancing_keeps_half_precision():
    """bf16 factors are balanced in float64 and rounded once."""
    product = bare((9, 3), (7, 3))(torch.bfloat16)
    before = product_norm(product)
    balance_(product)
    assert product.params[0].dtype == torch.bfloat16
    assert product_norm(product).item() == pytest.approx(before.item(), rel=2e-2)
