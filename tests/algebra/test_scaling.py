"""Weights of any magnitude and length: powers of two, norms, errors, every initialization."""

import collections
import functools
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import frobdecay
from frobdecay import CP, Flambe, LowRank, TensorTrain, Tucker, factorize
from frobdecay.algebra import scaling
from frobdecay.algebra.scaling import (
    exponents,
    relative_distance,
    root_mean_square,
    shortened,
    times_power,
)
from frobdecay.algebra.shifted import Shifted
from frobdecay.algebra.spectral import INITS
from frobdecay.product.product import Product, product_norm

# --- powers of two --------------------------------------------------------------------------------


@given(st.integers(-1060, 1010), st.floats(0.5, 1, exclude_max=True))
def test_powers_of_two_are_exact(power, mantissa):
    """There and back: of float64 down to its denormal numbers, whose digits are few already."""
    number = torch.tensor([math.ldexp(mantissa, power)], dtype=torch.float64)
    found = exponents(number, (0,))
    unit = times_power(number, -found)
    assert 0.5 <= float(unit) < 1
    assert float(unit) == math.ldexp(float(number), -int(found))
    assert torch.equal(times_power(unit, found), number)


@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_exponents_have_whole_shares(multiple):
    """The largest entry ends up below 1, and above the share's last power."""
    numbers = torch.tensor([[0.3, -7.0], [0.0, 0.0], [-1.0, 2**-149]])
    found = exponents(numbers, (1,), multiple)
    assert not (found % multiple).any()
    largest = times_power(numbers, -found).abs().amax(1)
    assert ((largest < 1) & ((largest >= 2.0**-multiple) | (largest == 0))).all()


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "vector", "scalar"])
def test_root_mean_square(dtype, layout, monkeypatch):
    """To float64's digits, in pieces, of any layout and magnitude."""
    monkeypatch.setattr(scaling, "BLOCK", 100)
    base = torch.randn(37, 23).to(dtype)
    tensor = {
        "contiguous": base, "transposed": base.T, "strided": base[::2, ::3],
        "vector": base[0], "scalar": base[0, 0],
    }[layout]  # fmt: skip
    for scale in (1.0, float(torch.finfo(dtype).max) / 8, float(torch.finfo(dtype).tiny)):
        wanted = (tensor.double() * scale).to(dtype).double() / scale
        found = root_mean_square((tensor.double() * scale).to(dtype)) / scale
        assert found == pytest.approx(float(wanted.square().mean().sqrt()), rel=1e-12)
    assert root_mean_square(torch.zeros(3, 2)) == root_mean_square(torch.zeros(0, 2)) == 0


def test_a_shortened_tensor_has_the_same_norm(monkeypatch):
    """Also where rows do not divide it, of a transposed tensor, in another dtype."""
    monkeypatch.setattr(scaling, "ROW", 7)
    monkeypatch.setattr(scaling, "LONG", 20)
    for tensor in (
        torch.randn(20, 31),
        torch.randn(31, 20).T,
        torch.randn(5),
        torch.randn(6, 9, 4),
    ):
        short = shortened(tensor)
        assert short.numel() <= 20
        assert torch.allclose(short.norm(), tensor.norm())
    half = torch.randn(20, 31).bfloat16()
    assert shortened(half, torch.float32).norm().item() == pytest.approx(float(half.float().norm()))
    leaf = torch.randn(20, 31, requires_grad=True)
    shortened(leaf).norm().backward()
    assert torch.allclose(leaf.grad, leaf.detach() / leaf.detach().norm())


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relative_distance(dtype, depth, monkeypatch):
    """As computed whole, in float64, whatever the blocks; of factors, and of a dense matrix."""
    monkeypatch.setattr(scaling, "BLOCK", 60)
    W, U, V = (torch.randn(2, *s, dtype=torch.float64).to(dtype) for s in ((9, 7), (9, 3), (7, 3)))
    M = [torch.randn(2, 3, 3).to(dtype)] * depth
    near = U.double()
    for inner in M:
        near = near @ inner.double()
    near = near @ V.double().mT
    wanted = float((W.double() - near).norm() / W.double().norm())
    assert relative_distance(W, [U, *M, V]) == pytest.approx(wanted, rel=1e-6)
    assert relative_distance(W, [near]) == pytest.approx(wanted, rel=1e-2)
    assert relative_distance(torch.zeros(2, 2), [torch.zeros(2, 2)]) == 0
    assert relative_distance(torch.zeros(2, 2), [torch.ones(2, 2)]) == math.inf


NORM_OPS = ("norm", "linalg_vector_norm", "_foreach_norm", "linalg_matrix_norm", "dist")


class Lengths(TorchDispatchMode):
    """How many numbers each norm in float32 adds up at the most."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Look at what is summed, then go on."""
        kwargs = kwargs or {}
        if func.name().split("::")[1].split(".")[0] in NORM_OPS:
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
            for tensor in tensors:
                dims = range(tensor.ndim) if dim is None else dim
                if kwargs.get("dtype", tensor.dtype) not in (torch.float64, None):
                    self.seen.append(math.prod(tensor.shape[d] for d in dims))
        return func(*args, **kwargs)


def _factorized(init="spectral", kind=LowRank):
    model = nn.Sequential(nn.Linear(40, 50), nn.Embedding(60, 30))
    factorize(model, rank=3, init=init, parametrization=kind)
    return model


def _flambe():
    model = _factorized()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    Flambe(model.parameters(), model, lr=0.1).step()


def _shifted():
    factors = torch.randn(40, 50), torch.randn(40, 2), torch.randn(50, 2)
    product_norm(Product.of(*factors, structure=Shifted((0.5,)), batch=0))


NORMS = {
    "factorize": _factorized,
    "matched": lambda: _factorized("matched"),
    "randomized": lambda: _factorized("randomized"),
    "tucker": lambda: _factorized(kind=Tucker),
    "train": lambda: _factorized(kind=TensorTrain),
    "cp": lambda: _factorized(kind=CP),
    "load_dense_": lambda: frobdecay.load_dense_(
        _factorized(),
        nn.Sequential(nn.Linear(40, 50), nn.Embedding(60, 30)).state_dict(),
    ),
    "flambe": _flambe,
    "shifted": _shifted,
    "measure": lambda: frobdecay.diagnostics.measure(frobdecay.products(_factorized())),
    "balance_": lambda: frobdecay.balance_(frobdecay.products(_factorized())),
    "norm": lambda: [product_norm(p) for p in frobdecay.products(_factorized(kind=CP))],
}


@pytest.mark.parametrize("what", NORMS)
def test_no_norm_adds_up_a_long_tensor_in_float32(what, monkeypatch):
    """Torch's own adds in float32, off by percents from some ten million entries on."""
    for name in ("ROW", "LONG"):
        monkeypatch.setattr(scaling, name, 64)
    with Lengths() as lengths:
        NORMS[what]()
    assert max(lengths.seen, default=0) <= 64


# --- extremes -------------------------------------------------------------------------------------

DTYPES = {
    torch.float64: [-1060, -660, 660, 1010],
    torch.float32: [-140, -100, 83, 120],
    torch.bfloat16: [-125, 120],
    torch.float16: [-17, 15],
}
EXTREMES = [(dtype, power) for dtype, powers in DTYPES.items() for power in powers]
MAKERS = {
    **{name: functools.partial(LowRank, init=name) for name in ("spectral", "randomized")},
    "deep": functools.partial(LowRank, depth=1),
    "tucker": Tucker,
    "hooi": functools.partial(Tucker, init="hooi"),
    "train": TensorTrain,
    "cp": CP,
    "flat tucker": functools.partial(Tucker, pattern="flat"),
    "flat train": functools.partial(TensorTrain, pattern="flat"),
    "flat cp": functools.partial(CP, pattern="flat"),
}


def _weight():
    """Of nearly rank 3, with entries up to 1."""
    W = torch.einsum("or,ir,kr->oik", *(torch.randn(n, 3, dtype=torch.float64) for n in (8, 6, 4)))
    W = W + 0.2 * torch.randn_like(W)
    return W / W.abs().max() * (1 - 2**-7)


@pytest.mark.filterwarnings("ignore:alternating least squares")
@pytest.mark.parametrize(("dtype", "power"), EXTREMES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_every_decomposition_works_at_every_magnitude(name, dtype, power):
    """The error that the same numbers have at unit size, and the plan says it."""
    W = times_power(_weight(), torch.tensor(power)).to(dtype)
    unit = times_power(W.double(), torch.tensor(-power))
    plans = []
    for weight in (unit, W):
        layer = nn.Conv1d(6, 8, 4, bias=False)
        layer.weight = nn.Parameter(weight.clone())
        plans.append(factorize(layer, rank=2, parametrization=MAKERS[name]).rows[0].error)
        factors = [p.detach().double() for p in layer.parameters()]
        assert all(bool(f.isfinite().all() and f.any()) for f in factors)
    info = torch.finfo(dtype)
    tolerance = 8 * max(info.eps, info.tiny * info.eps / 2.0**power) + 1e-6
    assert plans[0] == pytest.approx(plans[1], rel=tolerance, abs=tolerance)
    assert 0.01 < plans[1] < 0.8


@pytest.mark.parametrize(("dtype", "power"), EXTREMES, ids=str)
@pytest.mark.parametrize("kind", [LowRank, Tucker, TensorTrain, CP])
def test_matched_has_the_mean_square_at_every_magnitude(kind, dtype, power):
    """Gaussian factors neither vanish nor overflow."""
    W = times_power(_weight(), torch.tensor(power)).to(dtype)
    layer = nn.Conv1d(6, 8, 4, bias=False)
    layer.weight = nn.Parameter(W)
    factorize(layer, rank=3, parametrization=kind, init="matched")
    shrunk = 2.0 ** -(power // len(factors := list(layer.parameters())))
    sizes = [float((f.detach().double() * shrunk).square().mean().sqrt()) for f in factors]
    assert all(0.01 < size < 20 for size in sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*MAKERS, *INITS])
def test_the_largest_numbers_stay_finite(name, dtype):
    """Singular values and cores exceed the entries, and what the dtype can hold."""
    W = torch.full((16, 12, 9), float(torch.finfo(dtype).max), dtype=dtype)
    layer = nn.Conv1d(12, 16, 9, bias=False)
    layer.weight = nn.Parameter(W)
    kind = MAKERS.get(name) or functools.partial(LowRank, init=name)
    factorize(layer, rank=2, parametrization=kind)
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


def test_matrices_of_a_batch_have_magnitudes_of_their_own():
    """In one weight, and in one stack of equal shapes."""
    scales = torch.tensor([1e-30, 1.0, 1e30]).view(3, 1, 1)
    W = torch.randn(3, 8, 6) * scales
    for U, V, single in zip(*frobdecay.spectral_init(W, 6), W, strict=True):
        assert relative_distance(single, [U, V]) < 1e-6
    model = nn.Sequential(*(nn.Linear(6, 8) for _ in range(3)))
    for layer, single in zip(model, W, strict=True):
        layer.weight = nn.Parameter(single.clone())
    assert all(row.error < 1e-6 for row in factorize(model, rank=6).rows)


@pytest.mark.parametrize("powers", [(-600, -300), (600, 300), (-900, 900), (-1000, 400)])
def test_balancing_at_every_magnitude(powers):
    """Factors whose Grams float64 cannot hold, of a product that it can."""
    U, V = torch.randn(6, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    wanted = U @ V.T
    U, V = (times_power(f, torch.tensor(p)) for f, p in zip((U, V), powers, strict=True))
    frobdecay.balance_(Product.of(U, V))
    half = torch.tensor(-sum(powers) // 2)
    left, right = times_power(U, half), times_power(V, half)
    assert torch.allclose(left @ right.T, wanted, rtol=1e-9)
    assert torch.allclose(left.T @ left, right.T @ right, rtol=1e-9)


# --- memory ---------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """How many bytes all tensors that operations return take at once, at the most."""

    def __init__(self, *before):
        super().__init__()
        self.counts, self.now, self.peak = collections.Counter(), 0, 0
        for tensor in before:
            self._watch(tensor)

    def _watch(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.now += 0 if self.counts[key] else size
        self.counts[key] += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key, size):
        self.counts[key] -= 1
        self.now -= 0 if self.counts[key] else size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Call, and count what comes out."""
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor)
        return out


@pytest.mark.parametrize("steep", [False, True], ids=["flat", "steep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(512, 128), (128, 512)], ids=str)
def test_the_peak_is_three_weights_and_a_gram(shape, dtype, steep, monkeypatch):
    """By either route, of a weight that is far longer than wide, in blocks that are small to it."""
    monkeypatch.setattr(scaling, "BLOCK", 1 << 10)
    falling = 10.0 ** -(6 * torch.arange(shape[1]) / shape[1])
    layer = nn.Linear(*reversed(shape), bias=False)
    W = torch.randn(shape) * (falling if steep else 1.0)
    layer.weight = nn.Parameter(W.to(dtype))
    dense = layer.weight.data
    size, gram = dense.numel() * dense.itemsize, 4 * min(shape) ** 2
    with Live(dense) as live:
        factorize(layer, rank=32)
    assert size < live.peak <= 3 * size + gram
