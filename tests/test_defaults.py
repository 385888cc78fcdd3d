"""The default device and dtype are for tensors that somebody makes anew, not for a model's."""

import ast
import copy
import functools
import pathlib
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import frobdecay
from frobdecay import CP, Flambe, FrobeniusDecay, LowRank, TensorTrain, Tucker, factorize
from frobdecay.algebra.spectral import INITS
from frobdecay.diagnostics import measure

PACKAGE = pathlib.Path(frobdecay.__file__).parent

# Functions of torch that make a tensor; those with "_like" take after one.
FACTORIES = {"arange", "as_tensor", "empty", "empty_strided", "eye", "from_numpy", "full"}
FACTORIES |= {"Generator", "hann_window", "linspace", "logspace", "ones", "rand", "randint"}
FACTORIES |= {"randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "zeros", "Tensor"}
TYPED = FACTORIES - {"Generator", "as_tensor", "from_numpy", "randint", "randperm"}


def _factories():
    """Each call in the package that makes a tensor out of nothing."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.startswith("torch.") and called.removeprefix("torch.") in FACTORIES:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", called[6:], node
            elif called.startswith("nn.") and hasattr(getattr(nn, called[3:], None), "forward"):
                wants = "device" in getattr(nn, called[3:]).__init__.__code__.co_varnames
                if wants:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", called, node


def test_every_tensor_says_where_it_is_and_of_which_dtype():
    """``torch.set_default_device`` and ``set_default_dtype`` reach no tensor of the package."""
    lacking = []
    for place, name, call in _factories():
        given = {keyword.arg for keyword in call.keywords}
        wanted = {"device"} | ({"dtype"} if name in TYPED else set())
        if missing := wanted - given:
            lacking.append(f"{place}: {ast.unparse(call)} without {sorted(missing)}")
    assert not lacking
    assert len(list(_factories())) > 10


@contextmanager
def defaults(which):
    """A default of torch's; "meta" stands for a GPU, where tensors of the CPU cannot go."""
    dtype = torch.get_default_dtype()
    if which == "device":
        torch.set_default_device("meta")
    elif which != "context":
        torch.set_default_dtype(getattr(torch, which))
    try:
        with torch.device("meta") if which == "context" else nullcontext():
            yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


LIKE = {"device": "cpu", "dtype": torch.float32}


def _model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, **LIKE), nn.Flatten(), nn.Linear(8 * 16, 12, **LIKE), nn.ReLU(),
        nn.Linear(12, 12, **LIKE), nn.Linear(12, 12, **LIKE),
    )  # fmt: skip


KINDS = [
    *(functools.partial(LowRank, init=init) for init in INITS),
    functools.partial(LowRank, depth=1),
    Tucker, functools.partial(Tucker, init="hooi"), TensorTrain, CP,
    *(functools.partial(kind, pattern="flat") for kind in (Tucker, TensorTrain, CP)),
    *(functools.partial(kind, init="matched") for kind in (Tucker, TensorTrain, CP)),
]  # fmt: skip


def _kind(kind):
    words = getattr(kind, "keywords", {})
    return " ".join([getattr(kind, "func", kind).__name__, *map(str, words.values())])


def _train(model, optimizer, x):
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _life(kind, dtype=torch.float32):
    """What one does with a model, from factorizing it to taking it apart; its last weights."""
    model = _model().to(dtype)
    x = torch.linspace(-1, 1, 2 * 3 * 6 * 6, **LIKE).view(2, 3, 6, 6).to(dtype)
    dense = copy.deepcopy(model.state_dict())
    plan = frobdecay.plan_ranks(model, ratio=0.6, parametrization=kind)
    assert plan.ranks
    factorize(model, rank=0.5, parametrization=kind)
    model[4].weight = dense["4.weight"]
    found = frobdecay.products(model)
    measure(found, lr=0.1)
    frobdecay.penalty(found, 0.1).item()
    [frobdecay.product_norm(product).item() for product in found]
    frobdecay.add_penalty_grad_(found, 0.1)
    # Unfused, torch 2.11 counts its steps on the default device.
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    optimizer = FrobeniusDecay(base, model)
    _train(model, optimizer, x)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(model, Flambe(model.parameters(), model, lr=1e-3, weight_decay=0.1), x)
    matrices = getattr(kind, "func", kind) is LowRank
    if matrices:
        frobdecay.balance_(found)
    model.load_state_dict(dense)
    frobdecay.load_dense_(model, dense)
    model[2].reset_parameters()
    model.load_state_dict(dense)
    merged = frobdecay.merge(copy.deepcopy(model))
    unrolled = copy.deepcopy(model)
    if matrices:
        frobdecay.unroll(unrolled)
    for result in (model, merged, unrolled):
        assert {(p.device.type, p.dtype) for p in result.parameters()} == {("cpu", dtype)}
        assert result(x).shape == (2, 12)
    return [p.detach() for p in merged.parameters()]


CASES = [("device", kind) for kind in KINDS] + [("float64", kind) for kind in KINDS[-6:]]
CASES += [(which, LowRank) for which in ("context", "bfloat16", "float16")]


@functools.cache
def _expected(kind, dtype):
    return _life(kind, dtype)


@pytest.mark.filterwarnings("ignore:alternating least squares")
@pytest.mark.parametrize(
    ("which", "kind"), CASES, ids=lambda x: x if isinstance(x, str) else _kind(x)
)
def test_nothing_depends_on_the_defaults(which, kind):
    """A whole life of a model, with each default and without: the same weights."""
    expected = _expected(kind, torch.float32)
    with defaults(which):
        found = _life(kind)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", ["device", "float16"])
def test_nothing_depends_on_the_defaults_in_half_precision(which):
    """Nor does rounding at random."""
    expected = _expected(LowRank, torch.bfloat16)
    with defaults(which):
        found = _life(LowRank, torch.bfloat16)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", ["device", "context", "float64"])
def test_files_do_not_depend_on_the_defaults(which, tmp_path):
    """A file fills a model where it is."""
    pytest.importorskip("safetensors")
    model, fresh = _model(), _model()
    with defaults(which):
        factorize(model, rank=2)
        frobdecay.save_factorized(model, tmp_path / "model.safetensors")
        frobdecay.load_factorized(fresh, tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
