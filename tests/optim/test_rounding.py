"""Stochastic rounding: exact in expectation, never beyond the neighbours, reproducible."""

import copy
import math
import pickle

import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st

from frobdecay.optim.rounding import StochasticRounder, round_stochastically

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALF
def test_numbers_of_the_dtype_stay(dtype):
    """Every bit pattern, subnormal, infinite or NaN, is rounded to itself."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(
        round_stochastically(exact.float(), dtype), exact, rtol=0, atol=0, equal_nan=True
    )


@HALF
@given(data=st.data())
def test_the_result_is_a_neighbour(dtype, data):
    """Rounding goes to one of the two nearest numbers of the dtype."""
    bound = float(torch.finfo(torch.float16).max)
    x = data.draw(st.floats(-bound, bound, width=32))
    exact = torch.full((32,), x)
    rounded = round_stochastically(exact, dtype).double()
    nearest = exact[:1].to(dtype)
    steps = [torch.nextafter(nearest, torch.full_like(nearest, s)) for s in (-math.inf, math.inf)]
    low, high = (step.double().item() for step in steps)
    assert bool(((rounded >= low) & (rounded <= high)).all())
    assert bool(((rounded - x).abs() <= (high - low)).all())


@HALF
@pytest.mark.parametrize("x", [1.0007, -3.3, 1e-3, -6e4])
def test_the_expectation_is_exact(dtype, x):
    """The mean of many roundings is within five standard errors."""
    exact = torch.full((20_000,), x)
    rounded = round_stochastically(exact, dtype, seeded(0)).double()
    spread = rounded.std() / len(exact) ** 0.5
    assert abs(rounded.mean() - exact[0].double()) <= 5 * spread + abs(x) * 1e-7


def test_batches_round_like_the_whole():
    """Many tensors, of two dtypes, are each rounded once; the increments are consumed."""
    rounder = StochasticRounder()
    tensors = [torch.ones(3, k, dtype=d) for k in (1, 2) for d in (torch.bfloat16, torch.float16)]
    rounder.add_(tensors, [torch.full(t.shape, 0.5) for t in tensors])
    assert all(bool((tensor == 1.5).all()) for tensor in tensors)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda rounder: pickle.loads(pickle.dumps(rounder)),
        lambda rounder: loaded(rounder.state_dict()),
    ],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_copies_continue_the_stream(duplicate):
    """The random stream goes on where it was."""
    rounder = StochasticRounder()
    increment = torch.full((100,), 1e-3)
    rounder.add_([torch.ones(100, dtype=torch.bfloat16)], [increment.clone()])
    twin = duplicate(rounder)
    found = [torch.ones(100, dtype=torch.bfloat16) for _ in range(2)]
    for which, tensor in zip((rounder, twin), found, strict=True):
        which.add_([tensor], [increment.clone()])
    assert torch.equal(*found)
    assert len(found[0].unique()) == 2


def loaded(state):
    """A new rounder with that state."""
    rounder = StochasticRounder()
    rounder.load_state_dict(state)
    return rounder
