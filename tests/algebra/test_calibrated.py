"""Calibrated initialization: optimal for the outputs of any inputs, and spectral for C = I."""

import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st

from frobdecay.algebra.calibrated.moment import Frequencies, Moment
from frobdecay.algebra.calibrated.truncation import Metric
from frobdecay.algebra.spectral import spectral_init

WIDE = {"rtol": 1e-8, "atol": 1e-8}


@st.composite
def problems(draw, most=9):
    """W (*batch, m, n), the second moment of N inputs, at most of rank N, and a rank r."""
    m, n = draw(st.integers(1, most)), draw(st.integers(1, most))
    count, r = draw(st.integers(1, 2 * most)), draw(st.integers(1, min(m, n)))
    batch = draw(st.lists(st.integers(1, 3), max_size=1))
    generator = seeded(draw(st.integers(0, 1000)))

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    X = normal(*batch, n, count)
    return normal(*batch, m, n), X @ X.mT / count, r


def lost(W, C, factors):
    """E‖(W − UVᵀ)x‖²."""
    rest = W - factors[0] @ factors[-1].mT
    return (rest @ C @ rest.mT).diagonal(dim1=-2, dim2=-1).sum()


@given(problems())
def test_the_outputs_error_is_the_smallest_there_is(problem):
    """That of the truncated W L, by inputs or by outputs; and balanced."""
    W, C, r = problem
    values, vectors = torch.linalg.eigh(C)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    s = torch.linalg.svdvals(W @ root)
    best, total = s[..., r:].square().sum(), s.square().sum()
    for metric in (Metric(C, "inputs"), Metric(W @ C @ W.mT, "outputs")):
        U, V = metric.factors(W, r).factors
        torch.testing.assert_close(lost(W, C, (U, V)), best, rtol=1e-8, atol=1e-9 * float(total))
        torch.testing.assert_close(U.mT @ U, V.mT @ V, **WIDE)
        assert metric.factors(W, r).error == pytest.approx(float(best / total) ** 0.5, abs=1e-6)
        spectrum = metric.spectrum(W)[..., : s.shape[-1]]
        torch.testing.assert_close(spectrum, s, rtol=1e-6, atol=1e-5 * float(s.max()))


@given(problems(most=4), st.integers(0, 100))
def test_no_other_factors_are_better(problem, seed):
    """Nor those that a descent from anywhere finds."""
    W, C, r = problem
    generator = seeded(seed)
    ends = [
        torch.randn(*W.shape[:-2], k, r, dtype=W.dtype, generator=generator) for k in W.shape[-2:]
    ]
    U, V = (end.requires_grad_() for end in ends)
    optimizer = torch.optim.LBFGS([U, V], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = lost(W, C, (U, V))
        loss.backward()
        return loss

    optimizer.step(closure)
    ours = lost(W, C, Metric(C, "inputs").factors(W, r).factors)
    assert ours <= lost(W, C, (U, V)) + 1e-8


@given(problems(), st.floats(0, 1))
def test_plain_factors_are_never_better_on_the_data(problem, shrink):
    """However much of the plain metric is added."""
    W, C, r = problem
    ours = lost(W, C, Metric(C, "inputs", shrink=shrink).factors(W, r).factors)
    assert ours <= lost(W, C, spectral_init(W, r)) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("of", ["inputs", "outputs"])
def test_tall_weights_of_any_condition_are_truncated_best(smallest, of):
    """Also those whose columns no Cholesky decomposition separates."""
    generator = seeded(3)
    P, Q = (torch.linalg.qr(torch.randn(k, 6, generator=generator))[0] for k in (40, 6))
    W = (P * torch.logspace(0, -1, 6).index_fill(0, torch.tensor([4, 5]), smallest)) @ Q.mT
    X = torch.randn(6, 90, generator=generator).double()
    C, wide = X @ X.mT / 90, W.double()
    s = torch.linalg.svdvals(wide @ torch.linalg.cholesky(C))
    for r in (2, 5):
        metric = Metric(C if of == "inputs" else wide @ C @ wide.mT, of)
        found = metric.factors(W, r)
        U, V = (factor.double() for factor in found.factors)
        torch.testing.assert_close(
            lost(wide, C, (U, V)).sqrt(), s[r:].norm(), rtol=1e-4, atol=1e-6 * float(s[0])
        )
        assert found.error == pytest.approx(float(s[r:].norm() / s.norm()), rel=1e-4, abs=2e-7)
        torch.testing.assert_close(U.mT @ U, V.mT @ V, rtol=1e-4, atol=1e-6)


@given(problems(), st.integers(0, 3))
def test_inputs_all_alike_give_the_spectral_factors(problem, depth):
    """C = I, and λ = 1 for any C; also where the data says nothing, and overcomplete."""
    W, C, r = problem
    eye = torch.eye(W.shape[-1], dtype=W.dtype)
    for rank in (r, min(W.shape[-2:]) + 2):
        expected = spectral_init(W, rank, depth=depth)
        for metric in (
            Metric(eye, "inputs"),
            Metric(C, "inputs", shrink=1.0),
            Metric(0 * C, "inputs"),
        ):
            found = metric.factors(W, rank, depth=depth).factors
            torch.testing.assert_close(
                found[0] @ found[-1].mT, expected[0] @ expected[-1].mT, **WIDE
            )
            assert [f.shape for f in found] == [f.shape for f in expected]
            assert all(f.is_contiguous() for f in found)


@given(problems(), st.integers(0, 100))
def test_an_invertible_change_of_the_input_changes_nothing(problem, seed):
    """With x → A x and W → W A⁻¹: the layer's function is the same, and so is its truncation's."""
    W, C, r = problem
    A = torch.randn(C.shape[-2:], dtype=W.dtype, generator=seeded(seed))
    A = A + 4 * torch.eye(len(A), dtype=W.dtype)
    turned = W @ torch.linalg.inv(A)
    U, V = Metric(C, "inputs").factors(W, r).factors
    u, v = Metric(A @ C @ A.mT, "inputs").factors(turned, r).factors
    one, other = lost(W, C, (U, V)), lost(turned, A @ C @ A.mT, (u, v))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@given(problems())
def test_the_bias_restores_the_mean(problem):
    """The affine optimum: C about the mean, and b + (W − UVᵀ)μ."""
    W, C, r = problem
    mean = torch.ones(*W.shape[:-2], W.shape[-1], dtype=W.dtype)
    through = (W @ mean.unsqueeze(-1)).squeeze(-1)
    (U, V), _, shift, _ = Metric(C, "inputs", mean=mean).factors(W, r)
    kept = (U @ (V.mT @ mean.unsqueeze(-1))).squeeze(-1)
    torch.testing.assert_close(kept + shift, through, **WIDE)
    other = Metric(W @ C @ W.mT, "outputs", mean=through).factors(W, r).shift
    torch.testing.assert_close(other, shift, rtol=1e-5, atol=1e-5)


def test_rows_that_are_looked_up_count_as_often():
    """An embedding: the error is weighted by frequency."""
    W = torch.randn(9, 4, dtype=torch.float64, generator=seeded(0))
    often = torch.tensor([5.0, 0, 1, 0, 9, 1, 0, 2, 3], dtype=torch.float64)
    weighted = often.sqrt().unsqueeze(-1)
    found = Metric(often, "rows").factors(W, 2)
    U, V = found.factors
    s = torch.linalg.svdvals(weighted * W)
    torch.testing.assert_close((weighted * (W - U @ V.mT)).norm(), s[2:].norm())
    assert found.error == pytest.approx(float(s[2:].norm() / s.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_factors_have_the_weights_dtype_and_scale(dtype, scale):
    """Whatever the size of the weight and of the inputs."""
    W = (torch.randn(12, 20, generator=seeded(1)) * scale).to(dtype)
    X = torch.randn(50, 20, generator=seeded(2), dtype=torch.float64) * 1e6
    U, V = Metric(X.mT @ X, "inputs").factors(W, 12).factors
    assert U.dtype == V.dtype == dtype
    torch.testing.assert_close((U @ V.mT).double(), W.double(), rtol=0.05, atol=0.05 * scale)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 100))
def test_moments_are_those_of_all_rows(size, count, seed):
    """Batch by batch, in float64 sums, of which half of the blocks are computed."""
    rows = torch.randn(count, size, generator=seeded(seed))
    moment = Moment((), size, torch.float64, "cpu")
    for part in rows.split(7):
        moment.add(part)
    wide = rows.double()
    torch.testing.assert_close(moment.full(), wide.mT @ wide, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moment.first, wide.sum(0), rtol=1e-5, atol=1e-5)
    assert moment.count == count


def test_frequencies_are_counts():
    """Of indices of any shape."""
    held = Frequencies(5, "cpu")
    held.add(torch.tensor([[0, 4], [4, 2]]))
    assert held.second.tolist() == [1, 0, 1, 0, 2]
    assert held.count == 4
