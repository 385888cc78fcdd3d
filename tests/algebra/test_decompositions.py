"""HOSVD, HOOI, TT-SVD, alternating least squares: errors, balance, determinism, refusals."""

import itertools
import warnings
from math import prod

import pytest
import torch
from closeness import normal
from hypothesis import given
from hypothesis import strategies as st

from frobdecay.algebra import network
from frobdecay.algebra.decompositions import (
    cp_als,
    hooi,
    hosvd,
    tt_svd,
    unfold,
)
from frobdecay.algebra.spectral import spectral_init
from frobdecay.algebra.tensorize import train_ranks, tucker_ranks
from frobdecay.product.product import Product

sizes = st.lists(st.integers(1, 6), min_size=2, max_size=5)


def tucker(tensor, ranks, how=hosvd):
    """The product of a Tucker decomposition."""
    pairs = enumerate(zip(ranks, tensor.shape, strict=True))
    whole = tuple(k for k, (r, n) in pairs if r == n)
    return Product.of(*how(tensor, ranks), structure=network.tucker(tensor.ndim, whole))


def train(tensor, ranks):
    """The product of a tensor train."""
    return Product.of(*tt_svd(tensor, ranks), batch=0)


def polyadic(tensor, rank, **options):
    """The product of a CP decomposition."""
    return Product.of(*cp_als(tensor, rank, **options), structure=network.cp(tensor.ndim))


DECOMPOSITIONS = {
    "hosvd": lambda W: tucker(W, tucker_ranks(0.5, W.shape)),
    "hooi": lambda W: tucker(W, tucker_ranks(0.5, W.shape), hooi),
    "tt_svd": lambda W: train(W, train_ranks(0.5, W.shape)),
    "cp_als": lambda W: polyadic(W, 2),
}
ALL = pytest.mark.parametrize("decompose", DECOMPOSITIONS.values(), ids=DECOMPOSITIONS)


def error(tensor, product):
    """‖W − Ŵ‖_F / ‖W‖_F."""
    return float((tensor - product.materialize().detach()).norm() / tensor.norm())


def tails(tensor, ranks):
    """Σσ² that each mode's own truncation leaves out, relative to ‖W‖²."""
    spectra = [torch.linalg.svdvals(unfold(tensor, k)) for k in range(tensor.ndim)]
    left = [float(s[r:].square().sum()) for s, r in zip(spectra, ranks, strict=True)]
    return [value / float(tensor.square().sum()) for value in left]


@pytest.mark.covers("C19")
@given(sizes, st.integers(0, 100))
def test_full_ranks_are_exact(dims, seed):
    """At the largest ranks that fit, Tucker and train are the tensor itself."""
    tensor = normal(tuple(dims), seed)
    assert error(tensor, tucker(tensor, tucker_ranks(1.0, dims))) < 1e-12
    assert error(tensor, train(tensor, train_ranks(10**6, dims))) < 1e-11


@pytest.mark.covers("C19")
@given(sizes, st.floats(0.1, 0.9), st.integers(0, 100))
def test_tucker_errors_are_between_their_bounds(dims, share, seed):
    """Largest tail ≤ HOOI ≤ HOSVD ≤ sum of tails: of the squared errors."""
    tensor = normal(tuple(dims), seed)
    ranks = tucker_ranks(share, dims)
    left = tails(tensor, ranks)
    first, better = (error(tensor, tucker(tensor, ranks, how)) ** 2 for how in (hosvd, hooi))
    assert max(left) - 1e-12 <= better <= first + 1e-12
    assert first <= sum(left) + 1e-12


@pytest.mark.covers("C19")
@given(sizes, st.floats(0.1, 0.9), st.integers(0, 100))
def test_train_errors_are_between_their_bounds(dims, share, seed):
    """At least the largest bond's tail, at most the sum of all."""
    tensor = normal(tuple(dims), seed)
    ranks = train_ranks(share, dims)
    spectra = [
        torch.linalg.svdvals(tensor.reshape(prod(dims[: k + 1]), -1)) for k in range(len(ranks))
    ]
    left = [float(s[r:].square().sum()) for s, r in zip(spectra, ranks, strict=True)]
    squared = error(tensor, train(tensor, ranks)) ** 2 * float(tensor.square().sum())
    assert max(left) - 1e-10 <= squared <= sum(left) + 1e-10


@given(sizes, st.floats(0.1, 1.0), st.integers(0, 100))
def test_bonds_are_balanced(dims, share, seed):
    """At every bond the Gram of the left equals that of the right, and is diagonal."""
    tensor = normal(tuple(dims), seed)
    cores = train(tensor, train_ranks(share, dims)).views()
    left, right = [cores[0].mT @ cores[0]], [cores[-1].mT @ cores[-1]]
    for core in cores[1:-1]:
        left.append((core.mT @ left[-1] @ core).sum(0))
    for core in cores[-2:0:-1]:
        right.append((core @ right[-1] @ core.mT).sum(0))
    for one, other in zip(left, right[::-1], strict=True):
        assert torch.allclose(one, other, atol=1e-10 * float(one.norm()))
        assert torch.allclose(one, one.diag().diag(), atol=1e-10 * float(one.norm()))


@pytest.mark.parametrize("decompose", [tt_svd, lambda W, r: hosvd(W, (r[0], r[0]))])
def test_of_a_matrix_it_is_the_truncated_svd(decompose):
    """At d = 2 the error is the smallest there is (Eckart–Young)."""
    tensor = normal((9, 7))
    best = Product.of(*spectral_init(tensor, 3))
    factors = decompose(tensor, (3,))
    found = Product.of(*factors, structure=network.tucker(2)) if len(factors) == 3 else None
    found = found or Product.of(*factors)
    assert error(tensor, found) == pytest.approx(error(tensor, best), rel=1e-12)


def test_of_a_matrix_the_train_is_the_spectral_initialization():
    """The same U and V: balanced, with the same signs."""
    tensor = normal((9, 7))
    for found, expected in zip(tt_svd(tensor, (3,)), spectral_init(tensor, 3), strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


def test_tucker_factors_are_orthonormal():
    """U_kᵀU_k = I: the core has the scale, and the norm."""
    tensor = normal((6, 5, 4))
    for how in (hosvd, hooi):
        core, *factors = how(tensor, (3, 5, 2))
        assert [tuple(U.shape) for U in factors] == [(6, 3), (4, 2)]  # a whole mode has none
        for U in factors:
            assert torch.allclose(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype), atol=1e-12)
        product = Product.of(core, *factors, structure=network.tucker(3, [1]))
        assert torch.allclose(core.norm(), product.materialize().norm())


@pytest.mark.covers("C19")
def test_cp_finds_the_terms_of_a_cp_tensor():
    """A tensor of r terms comes back, to the tolerance's order."""
    terms = [normal((n, 3), n) for n in (7, 6, 5)]
    tensor = Product.of(*terms, structure=network.cp(3)).materialize()
    assert error(tensor, polyadic(tensor, 3, tolerance=1e-12, sweeps=3000)) < 1e-6


@given(st.integers(1, 9), st.integers(0, 100))
def test_cp_terms_are_balanced(rank, seed):
    """All columns of a term have one norm, so that the Grams have equal diagonals."""
    tensor = normal((5, 4, 3), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        factors = cp_als(tensor, rank)
    for one, other in itertools.pairwise([U.norm(dim=0) for U in factors]):
        assert torch.allclose(one, other, rtol=1e-10)
        assert float(one.min()) > 0


def test_more_sweeps_never_raise_the_error():
    """Each update is a least-squares optimum."""
    tensor = normal((8, 6, 5))
    errors = []
    for sweeps in (1, 2, 5, 20):
        with pytest.warns(RuntimeWarning, match=f"did not converge in {sweeps} sweeps"):
            errors.append(error(tensor, polyadic(tensor, 4, sweeps=sweeps, tolerance=0)))
    assert errors == sorted(errors, reverse=True)


def rank_one():
    """A float32 tensor of one term."""
    return torch.einsum("i,j,k->ijk", torch.randn(6), torch.randn(5), torch.randn(4))


@pytest.mark.covers("C8", "D3")
@pytest.mark.parametrize("kind", ["tt", "cp"])
def test_no_column_is_dead(kind):
    """Above the tensor's own rank no factor's column gets zero gradients (D3)."""
    weight = rank_one()
    factors = tt_svd(weight, (3, 3)) if kind == "tt" else cp_als(weight, 3)
    leaves = [f.requires_grad_() for f in factors]
    structure = {} if kind == "tt" else {"structure": network.cp(len(leaves))}
    product = Product.of(*leaves, batch=0, **structure)
    assert error(weight, product) < 1e-5
    (product.materialize() * torch.randn(6, 5, 4)).sum().backward()
    columns = torch.stack([leaf.grad.flatten(0, -2).norm(dim=0) for leaf in leaves])
    assert float(columns.amax(0).min()) > 0


@ALL
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtype_is_kept_and_rounds_once(decompose, dtype):
    """Computed in float64: what a narrower dtype adds is its own rounding."""
    tensor = normal((6, 5, 4)).to(dtype)
    product = decompose(tensor)
    assert {param.dtype for param in product.params} == {dtype}
    wide = decompose(tensor.double())
    assert error(tensor.double(), product) <= error(tensor.double(), wide) + 4 * (
        torch.finfo(dtype).eps
    )


@ALL
def test_the_same_tensor_gives_the_same_factors(decompose):
    """No draw from the global generator, which is left as it was."""
    tensor = normal((6, 5, 4))
    state = torch.get_rng_state()
    first = decompose(tensor)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    for one, other in zip(first.params, decompose(tensor).params, strict=True):
        assert torch.equal(one, other)


@ALL
def test_factors_are_contiguous_and_of_their_own(decompose):
    """Parameters that frameworks can shard, and the tensor is not changed."""
    tensor = normal((6, 5, 4))
    before = tensor.clone()
    for param in decompose(tensor).params:
        assert param.is_contiguous()
        param.zero_()
    assert torch.equal(tensor, before)


@ALL
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing_but_the_scale(decompose, scale):
    """Tiny and huge float32 tensors neither underflow nor overflow."""
    tensor = normal((6, 5, 4)).float()
    expected = error(tensor.double(), decompose(tensor.double()))
    factors = decompose(tensor * scale)
    wide = Product.of(*[p.double() for p in factors.params], structure=factors.structure, batch=0)
    assert error(tensor.double() * scale, wide) == pytest.approx(expected, rel=1e-3)


@ALL
@pytest.mark.parametrize(
    ("tensor", "kind", "message"),
    [
        (torch.zeros(3, 3, 3), ValueError, "is zero, and its factors would be zero"),
        (torch.full((3, 3, 3), float("nan")), ValueError, "finite, got NaN"),
        (torch.ones(3, 3, 3).int(), TypeError, "dense real floating-point"),
        (torch.empty(3, 3, 3, device="meta"), TypeError, "meta device"),
        (torch.ones(3, 0, 3), ValueError, "without empty dimensions"),
    ],
)
def test_bad_tensors_are_refused(decompose, tensor, kind, message):
    """Before anything is computed, with what to do."""
    with pytest.raises(kind, match=message):
        decompose(tensor)


# --- ranks ----------------------------------------------------------------------------------------


@given(sizes, st.one_of(st.integers(1, 40), st.floats(0.01, 3)))
def test_one_rank_is_cut_down_to_what_fits(dims, rank):
    """What comes out fits: given back rank by rank it is accepted and unchanged."""
    for rule in (tucker_ranks, train_ranks):
        found = rule(rank, dims)
        assert rule(found, dims) == found
        assert all(r >= 1 for r in found)


@pytest.mark.covers("C19")
@pytest.mark.parametrize(
    ("rule", "rank", "dims", "expected"),
    [
        (tucker_ranks, 0.211, (32, 32, 25), (7, 7, 5)),  # the research code's settings
        (train_ranks, 0.234, (32, 32, 25), (7, 6)),
        (tucker_ranks, (4, None, 2.0), (8, 9, 5), None),
        (tucker_ranks, (4, None, 1.0), (8, 6, 5), (4, 6, 5)),
        (tucker_ranks, 64, (64, 3, 9), (27, 3, 9)),
        (train_ranks, 64, (4, 5, 6, 7), (4, 20, 7)),
        (train_ranks, (4, 21, 7), (4, 5, 6, 7), None),
        (train_ranks, (4, 20), (4, 5, 6, 7), None),
        (tucker_ranks, (30, 3, 9), (64, 3, 9), None),
    ],
)
def test_rank_rules(rule, rank, dims, expected):
    """The paper's fractions; whole modes; what does not fit is an error that says what does."""
    if expected is not None:
        assert rule(rank, dims) == expected
        return
    with pytest.raises(ValueError, match=r"expected (\d ranks|Tucker|tensor train)"):
        rule(rank, dims)
