"""Stochastic rounding: exact in expectation, never beyond the neighbours, reproducible."""

import copy
import math
import pickle

import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frobdecay import FrobeniusDecay, Product
from frobdecay.gradient import flat
from frobdecay.optim.rounding import Increments, StochasticRounder, round_stochastically

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALF
def test_numbers_of_the_dtype_stay(dtype):
    """Every bit pattern, subnormal, infinite or NaN, is rounded to itself."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(
        round_stochastically(exact.float(), dtype), exact, rtol=0, atol=0, equal_nan=True
    )


@HALF
def test_nothing_infinite_or_undefined_becomes_finite(dtype):
    """Infinities keep their signs; NaNs stay, with all bits set as CUDA makes them."""
    bits = torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, -1, -0x00800000], dtype=torch.int32)
    exact = bits.view(torch.float32).repeat(100, 1)
    found = round_stochastically(exact, dtype).float()
    wanted = torch.tensor([math.inf, math.nan, math.nan, math.nan, -math.inf]).expand(100, 5)
    torch.testing.assert_close(found, wanted, equal_nan=True)


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


def of_many_layouts(dtype):
    """Tensors of odd, empty and no shapes, transposed, and with gaps; some shapes twice."""
    shapes = [(3,), (), (5, 3), (0, 4), (3,), (5, 3)]
    tensors = [torch.full(shape, float(k)) for k, shape in enumerate(shapes)]
    tensors += [torch.full((4, 7), 8.0).T, torch.full((6, 9), 9.0)[:, ::2]]
    return [tensor.to(dtype) for tensor in tensors[:-1]] + [tensors[-1].to(dtype)[:, ::2]]


@HALF
@pytest.mark.parametrize("entries", [1 << 22, 10], ids=["one batch", "batches"])
def test_every_tensor_gets_its_own_increment(dtype, entries, monkeypatch):
    """However tensors lie in memory, and however many are rounded at once."""
    monkeypatch.setattr(flat, "_BATCH", entries)
    tensors = of_many_layouts(dtype)
    wanted = [tensor.float() + 2.0**k for k, tensor in enumerate(tensors)]
    StochasticRounder().add_(tensors, [torch.full(t.shape, 2.0**k) for k, t in enumerate(tensors)])
    for found, expected in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_increments_lie_like_their_parameters(dtype):
    """Zeros of the parameters' strides, aligned for wide accesses, one for a parameter."""
    params, increments = of_many_layouts(dtype), Increments(flat.Batched())
    buffers = increments.of([*params, params[0]])
    assert buffers[-1] is buffers[0] is increments.of(params[:1])[0]
    for param, buffer in zip(params, buffers, strict=False):
        alike = torch.zeros_like(param, dtype=torch.promote_types(dtype, torch.float32))
        assert (buffer.stride(), buffer.dtype) == (alike.stride(), alike.dtype)
        torch.testing.assert_close(buffer, alike)
        assert buffer.data_ptr() % 16 == 0
    for k, buffer in enumerate(buffers[:-1]):
        buffer.fill_(k + 1)
    assert all(bool((buffer == k + 1).all()) for k, buffer in enumerate(buffers[:-1]))


class Calls(TorchDispatchMode):
    """Notes the operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note the operator and run it."""
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("late", [False, True], ids=["beside", "after a closure"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_step_calls_as_many_operators_for_many_factors_as_for_few(dtype, mode, late):
    """Each is a launch on a GPU, which takes longer than a factor's arithmetic."""
    seen = []
    for pairs in (2, 9):
        factors = [nn.Parameter(torch.ones(6, 2, dtype=dtype)) for _ in range(2 * pairs)]
        for factor in factors:
            factor.grad = torch.ones_like(factor)
        products = [Product.of(*factors[k : k + 2]) for k in range(0, 2 * pairs, 2)]
        base = torch.optim.SGD(factors, lr=0.1, foreach=True)
        optimizer = FrobeniusDecay(base, products, decay=0.1, mode=mode)
        arguments = (lambda: None,) if late else ()
        for _ in range(2):  # after which stability is looked at rarely
            optimizer.step(*arguments)
        with Calls() as calls:
            optimizer.step(*arguments)
        seen.append(calls.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) < 60


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


def test_where_tensors_are_in_a_buffer_is_found_out_once(monkeypatch):
    """For two lists a step, the buffers and what they are added to; anew where one is another."""
    divided = []
    real = flat.batches
    monkeypatch.setattr(flat, "batches", lambda tensors: divided.append(1) or real(tensors))
    factors = [nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16)) for _ in range(4)]
    products = [Product.of(*factors[:2]), Product.of(*factors[2:])]
    base = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.1)
    optimizer = FrobeniusDecay(base, products)

    def step():
        for factor in factors:
            factor.grad = torch.zeros_like(factor)
        optimizer.step()
        return len(divided)

    assert [step() for _ in range(3)] == [2, 2, 2]
    factors[3].requires_grad_(False)
    optimizer.zero_grad()
    for factor in factors[:3]:
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    assert len(divided) == 4
