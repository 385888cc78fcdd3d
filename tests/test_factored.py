"""The lazily materialized weight equals the dense one, and is dense only when it has to be."""

import copy
import io
import operator
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from frobdecay.factored import FORMS, FactoredTensor
from frobdecay.forms.cost import Cost, factors_cheaper, force
from frobdecay.forms.product_tensor import ProductTensor
from frobdecay.matricize import Matricization

# --------------------------------------------------------------------------- makers


class Factored(nn.Module):
    """The least parametrization that returns a FactoredTensor."""

    def __init__(self, rank=4, pattern=None, depth=0, **axes):
        super().__init__()
        self.rank, self.pattern, self.depth, self.axes = rank, pattern, depth, axes

    def right_inverse(self, W):
        """Factors by the singular value decomposition."""
        default = {2: "o i -> o i", 4: "o i kh kw -> (o kh) (i kw)"}
        view = Matricization.of(self.pattern or default[W.ndim], tuple(W.shape), self.axes)
        self.view = view
        P, s, Q = torch.linalg.svd(view.matrix(W.detach()), full_matrices=False)
        root = s[..., None, : self.rank].sqrt()
        U = (P[..., : self.rank] * root).contiguous()
        V = (Q[..., : self.rank, :].mT * root).contiguous()
        eye = torch.eye(U.shape[-1], dtype=W.dtype).expand(*view.batch, -1, -1)
        return U, *(eye.clone() for _ in range(self.depth)), V

    def forward(self, *factors):
        """The weight, lazily."""
        return FactoredTensor(factors, self.view)


def factored(module, name="weight", **options):
    """The module with one of its parameters factored."""
    parametrize.register_parametrization(module, name, Factored(**options), unsafe=True)
    return module


def weight(pattern, shape, rank=2, depth=0, dtype=torch.float64, **axes):
    """A factored weight of random leaf factors."""
    view = Matricization.of(pattern, tuple(shape), axes)
    *batch, m, n = view.matrix_shape
    sides = [(m, rank), *[(rank, rank)] * depth, (n, rank)]
    return FactoredTensor(
        [torch.randn(*batch, *s, dtype=dtype, requires_grad=True) for s in sides], view
    )


def dense_of(W):
    """The dense twin, computed here from the factors."""
    U, *inner, V = W.factors
    for M in inner:
        U = U @ M
    return W.matricization.tensor(U @ V.mT).contiguous()


def leaf(*shape, dtype=torch.float64):
    """A random tensor that gets a gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def tensors(value):
    """Tensors in a value, factored ones multiplied out."""
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return [dense_of(value) if isinstance(value, ProductTensor) else value]


def forbidden(self):
    """In place of materialize."""
    raise AssertionError("the dense weight was formed")


def assert_equal_dense(call, W, *inputs, allowed=False, rtol=1e-8, atol=1e-9):
    """``call`` gives the same value and gradients with the factors as with the dense weight."""
    wanted = [t for t in (*W.factors, *inputs) if t.requires_grad]
    results = []
    for twin in (W, dense_of(W)):
        with pytest.MonkeyPatch.context() as patch, force(True):
            if twin is W and not allowed:
                patch.setattr(ProductTensor, "materialize", forbidden)
            outs = tensors(call(twin, *inputs))
        torch.manual_seed(1)
        seeds = [torch.randn(o.shape, dtype=o.dtype) for o in outs]
        grads = torch.autograd.grad(outs, wanted, seeds, allow_unused=True)
        grads = [
            torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)
        ]
        results.append((outs, grads))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert a.is_contiguous() >= b.is_contiguous(), "a view of the output would fail"
    for mine, theirs in zip(*results, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# --------------------------------------------------------------------------- forms

MATRIX_PATTERNS = [
    ("o i -> o i", (6, 5), {}),
    ("o i -> i o", (6, 5), {}),
    ("(b o) i -> b o i", (6, 5), {"b": 3}),
    ("o (b i) -> b o i", (5, 6), {"b": 2}),
    ("(b o) i -> b i o", (6, 5), {"b": 2}),
    ("(a o) i -> (a o) i", (6, 5), {"a": 2}),
]


def _input(function, W, *batch):
    n = W.shape[1] if function is F.linear else W.shape[0]
    return leaf(*batch, n)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 1, 3)])
@pytest.mark.parametrize(("pattern", "shape", "axes"), MATRIX_PATTERNS)
def test_linear_equals_dense(pattern, shape, axes, batch, depth):
    """F.linear runs on the factors for every matrix pattern, blocks included."""
    W = weight(pattern, shape, depth=depth, **axes)
    assert_equal_dense(lambda W, x, b: F.linear(x, W, b), W, leaf(*batch, shape[1]), leaf(shape[0]))
    assert_equal_dense(lambda W, x: F.linear(x, weight=W), W, leaf(*batch, shape[1]))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("pattern", "shape", "axes"), MATRIX_PATTERNS)
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_from_the_left_equals_dense(pattern, shape, axes, batch, transposed):
    """Products with W and W.T from the left run on the factors."""
    W = weight(pattern, shape, depth=1, **axes)
    turn = (lambda W: W.T) if transposed else (lambda W: W)
    x = leaf(*batch, shape[transposed])
    assert_equal_dense(lambda W, x: x @ turn(W), W, x)
    assert_equal_dense(lambda W, x: torch.matmul(x, other=turn(W)), W, x)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 5, 3)])
@pytest.mark.parametrize("pattern", ["o i -> o i", "o i -> i o", "o (a i) -> o (a i)"])
def test_matmul_from_the_right_equals_dense(pattern, shape):
    """W @ x runs on the factors, for vectors, matrices and batches."""
    W = weight(pattern, (6, 5), depth=1, **({"a": 1} if "a" in pattern else {}))
    assert_equal_dense(lambda W, x: W @ x, W, leaf(*shape))
    assert_equal_dense(lambda W, x: W.matmul(x), W, leaf(*shape))


MATRIX_CALLS = {
    "mm": lambda W, x: torch.mm(x, W.t()),
    "mm left": lambda W, x: W.mm(x.T),
    "mv": lambda W, x: torch.mv(W, x[0]),
    "Tensor.mv": lambda W, x: W.mv(x[0]),
    "rmatmul": lambda W, x: W.T.__rmatmul__(x),
    "addmm": lambda W, x: torch.addmm(torch.ones(6, dtype=x.dtype), x, W.T),
    "addmm beta": lambda W, x: torch.addmm(x[:, :1], x, W.mT, beta=0.5, alpha=2),
    "addmm left": lambda W, x: torch.addmm(x[:1, :3], W, x.T, beta=0.5, alpha=2),
    "Tensor.addmm": lambda W, x: x[:, :1].addmm(x, W.T),
    "two weights": lambda W, x: W @ W.T @ x[:, :1].expand(3, 2).reshape(6, 1),
}


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("pattern", ["o i -> o i", "o i -> i o"])
@pytest.mark.parametrize("name", MATRIX_CALLS)
def test_matrix_functions_equal_dense(name, pattern, depth):
    """mm, mv, addmm and the operators run on the factors, on either side."""
    W = weight(pattern, (6, 5), depth=depth)
    x = leaf(3, 5)
    if name == "two weights":
        x = leaf(3, 5)
    assert_equal_dense(MATRIX_CALLS[name], W, x, allowed=name == "two weights")


@pytest.mark.parametrize("pattern", ["b o i -> b o i", "b o i -> b i o"])
def test_batched_matmul_equals_dense(pattern):
    """A stack of weights multiplies a stack of inputs on the factors."""
    W = weight(pattern, (2, 6, 5), depth=1)
    assert_equal_dense(lambda W, x: torch.bmm(x, W.mT), W, leaf(2, 3, 5))
    assert_equal_dense(lambda W, x: W.bmm(x), W, leaf(2, 5, 3))
    assert_equal_dense(lambda W, x: x @ W.transpose(1, 2), W, leaf(4, 1, 3, 5))


@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("pattern", ["n d -> n d", "n d -> d n"])
def test_embedding_equals_dense(pattern, depth, padding_idx):
    """F.embedding gathers rows of U; the padding row gives no gradient to any factor."""
    W = weight(pattern, (7, 5), depth=depth)
    ids = torch.tensor([[0, 2, 6], [2, 2, 1]])
    assert_equal_dense(lambda W: F.embedding(ids, W, padding_idx), W)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("pattern", ["n d -> n d", "n d -> d n"])
def test_embedding_bag_equals_dense(pattern, mode):
    """F.embedding_bag sums rows of U, weighted, of ragged bags, without the padding."""
    W = weight(pattern, (7, 5), depth=1)
    ids, offsets = torch.tensor([0, 2, 6, 2, 2, 1]), torch.tensor([0, 2, 2, 5])
    assert_equal_dense(lambda W: F.embedding_bag(ids, W, offsets, mode=mode, padding_idx=2), W)
    if mode == "sum":
        call = lambda W, s: F.embedding_bag(ids, W, offsets, mode=mode, per_sample_weights=s)  # noqa: E731
        assert_equal_dense(call, W, leaf(6))


@pytest.mark.parametrize(
    "pattern",
    [
        "o i j -> o (i j)",
        "o i j -> (o i) j",
        "o i j -> (i o) j",
        "o i j -> (o j) i",
        "o i j -> (j i) o",
        "o i j -> j (o i)",
    ],
)
def test_bilinear_equals_dense(pattern):
    """F.bilinear runs on the factors whichever axes share one."""
    W = weight(pattern, (4, 3, 5), depth=1)
    call = lambda W, x, y, b: F.bilinear(x, y, W, b)  # noqa: E731
    assert_equal_dense(call, W, leaf(2, 6, 3), leaf(2, 6, 5), leaf(4))


CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@st.composite
def convolutions(draw, transposed):
    """A convolution: pattern, weight's shape, axes, options."""
    dims = draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    batched = draw(st.sampled_from(["none", "groups", "more", "other"]))
    per = lambda low, high: draw(  # noqa: E731
        st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * dims))
    )
    zero, one = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    options = {"stride": per(1, 3), "padding": per(0, 1), "dilation": per(1, 2), "groups": groups}
    if transposed:
        options["output_padding"] = 0
        if draw(st.booleans()):
            options |= {"stride": 2, "output_padding": 1}
    elif draw(st.booleans()):
        options["padding"] = draw(st.sampled_from(["same", "valid"]))
        options["stride"] = 1 if options["padding"] == "same" else options["stride"]
    names = [f"k{d}" for d in range(dims)]
    in_rows = [draw(st.booleans()) for _ in names]
    flip = draw(st.booleans())
    rows = " ".join(["a", *(n for n, held in zip(names, in_rows, strict=True) if held)])
    columns = " ".join(["c", *(n for n, held in zip(names, in_rows, strict=True) if not held)])
    if flip:
        rows, columns = columns, rows
    shape = [groups * zero * 2, one, *kernel]
    axes, batch, left = {}, "", ["a", "c"]
    if batched in ("groups", "more"):
        batch, axes = "b ", {"b": groups * (2 if batched == "more" else 1)}
        left[0] = "(b a)"
    elif batched == "other" and groups == 1:
        batch, axes, left[1] = "b ", {"b": 2}, "(b c)"
        shape[1] *= 2
    pattern = f"{' '.join(left + names)} -> {batch}({rows}) ({columns})"
    return pattern, shape, axes, options


def _check_convolution(functions, transposed, case, unbatched):
    pattern, shape, axes, options = case
    W = weight(pattern, shape, depth=len(shape) % 2, **axes)
    dims, groups = len(shape) - 2, options["groups"]
    channels = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    x = leaf(*([] if unbatched else [2]), channels[0], *[6, 7, 5][:dims])
    assert_equal_dense(lambda W, x, b: functions[dims](x, W, b, **options), W, x, leaf(channels[1]))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(convolutions(transposed=False), st.booleans())
def test_convolution_equals_dense(case, unbatched):
    """Two thin convolutions equal the dense one for every option, pattern and grouping."""
    _check_convolution(CONVS, False, case, unbatched)


@given(convolutions(transposed=True), st.booleans())
def test_transposed_convolution_equals_dense(case, unbatched):
    """So do two thin transposed convolutions."""
    _check_convolution(TRANSPOSED, True, case, unbatched)


@pytest.mark.parametrize(
    "pattern",
    ["o i kh kw -> (o i) (kh kw)", "o i kh kw -> kh (o kw) i", "o i (a kh) kw -> (o a) (i kh kw)"],
)
def test_pattern_without_a_form_is_materialized(pattern):
    """A pattern that two convolutions cannot follow gives the dense result."""
    W = weight(pattern, (4, 3, 2, 2), **({"a": 2} if "a" in pattern else {}))
    assert_equal_dense(lambda W, x: F.conv2d(x, W), W, leaf(2, 3, 5, 5), allowed=True)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes_equal_dense(mode, padding, monkeypatch):
    """A layer that pads by itself before it convolves needs nothing of ours."""
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, dtype=torch.float64)
    twin = copy.deepcopy(conv)
    factored(conv, rank=99)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    with force(True):
        torch.testing.assert_close(conv(x), twin(x))


@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 3, 1), (4, 6, 1, 3), (6, 6, 1, 1)])
@pytest.mark.parametrize("choice", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_keeps_the_memory_format(function, shape, choice, layout):
    """A channels_last input gives a channels_last output, any other does not (defect D18)."""
    W = weight("a c kh kw -> (a kh) (c kw)", shape, dtype=torch.float32)
    channels = shape[0] if function is F.conv_transpose2d else shape[1]
    x = torch.randn(2, channels, 8, 8).to(memory_format=layout)
    with force(choice):
        assert function(x, W).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("pattern", ["e o i -> e o i", "e i o -> e o i", "e (a o) i -> e o (a i)"])
@pytest.mark.parametrize("index", [1, -1, torch.tensor(2), torch.tensor([2, 0, 2])])
def test_matrices_picked_from_a_batch_stay_factored(pattern, index):
    """An expert, or several, out of the stack of all: no other is formed."""
    W = weight(pattern, (3, 4, 6), depth=1, **({"a": 2} if "a" in pattern else {}))
    assert isinstance(W[index], FactoredTensor)
    assert_equal_dense(lambda W: W[index], W)


@pytest.mark.parametrize("index", [(0, 1), slice(0, 2), True, torch.tensor([True, False, True])])
def test_other_indices_give_the_dense_values(index):
    """What is no number of a matrix is looked up in the dense tensor."""
    W = weight("e o i -> e o i", (3, 4, 6))
    torch.testing.assert_close(W[index], dense_of(W)[index])


@pytest.mark.parametrize("pattern", ["e i o -> e i o", "e i o -> e o i"])
def test_grouped_products_equal_dense(pattern):
    """Rows in groups, each with its own expert, at a rank that the kernel's rows allow."""
    W = weight(pattern, (3, 8, 12), rank=4, depth=1, dtype=torch.float32)
    offs = torch.tensor([2, 2, 7], dtype=torch.int32)
    call = lambda W, x: F.grouped_mm(x, W, offs=offs)  # noqa: E731
    assert_equal_dense(call, W, leaf(7, 8, dtype=torch.float32), rtol=1e-4, atol=1e-4)


def test_grouped_products_at_other_ranks_are_materialized():
    """The kernel wants rows of a multiple of 16 bytes, so not rank 3."""
    W = weight("e i o -> e i o", (3, 8, 12), rank=3, dtype=torch.float32)
    offs = torch.tensor([2, 2, 7], dtype=torch.int32)
    call = lambda W, x: F.grouped_mm(x, W, offs=offs)  # noqa: E731
    assert_equal_dense(call, W, leaf(7, 8, dtype=torch.float32), allowed=True)


def test_every_form_is_tested():
    """The functions that these tests call on factors are all that the table has."""
    shape_forms = set(SHAPE_CALLS)
    called = {
        F.linear, F.embedding, F.embedding_bag, F.bilinear, F.multi_head_attention_forward,
        torch._cudnn_rnn_flatten_weight, *CONVS.values(), *TRANSPOSED.values(),
        torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__,
        torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv, torch.addmm, Tensor.addmm,
        torch._grouped_mm, Tensor.__getitem__,
    }  # fmt: skip
    assert {f for f in FORMS if f not in called} == shape_forms


# --------------------------------------------------------------------------- shape and dtype


def _require_grad(W):
    if isinstance(W, ProductTensor):  # the dense twin is no leaf and would refuse
        W.requires_grad = True
    return W


SHAPE_CALLS = {
    Tensor.T.__get__: lambda W: W.T,
    Tensor.mT.__get__: lambda W: W.mT,
    Tensor.H.__get__: lambda W: W.H,
    Tensor.mH.__get__: lambda W: W.mH,
    Tensor.adjoint: lambda W: W.adjoint(),
    Tensor.t: lambda W: W.t(),
    torch.t: torch.t,
    torch.transpose: lambda W: torch.transpose(W, 0, -1),
    Tensor.transpose: lambda W: W.transpose(dim0=-2, dim1=1),
    torch.swapaxes: lambda W: torch.swapaxes(W, axis0=0, axis1=1),
    Tensor.swapaxes: lambda W: W.swapaxes(0, 1),
    torch.swapdims: lambda W: torch.swapdims(W, 0, 1),
    Tensor.swapdims: lambda W: W.swapdims(0, 1),
    Tensor.permute: lambda W: W.permute(-1, 0),
    torch.permute: lambda W: torch.permute(W, dims=(1, 0)),
    Tensor.data.__get__: lambda W: W.data,
    Tensor.detach: lambda W: W.detach(),
    torch.detach: torch.detach,
    Tensor.contiguous: lambda W: W.contiguous(),
    Tensor.requires_grad_: lambda W: W.requires_grad_(),
    Tensor.requires_grad.__get__: lambda W: (W, W.requires_grad)[0],
    Tensor.requires_grad.__set__: lambda W: _require_grad(W),
    Tensor.is_leaf.__get__: lambda W: (W, W.is_leaf)[0],
    Tensor.to: lambda W: W.to(torch.float32, copy=True),
    Tensor.type: lambda W: W.type(torch.float32),
    Tensor.type_as: lambda W: W.type_as(torch.zeros(1)),
    Tensor.cpu: lambda W: W.cpu(),
    Tensor.float: lambda W: W.float(),
    Tensor.double: lambda W: W.double(),
    Tensor.half: lambda W: W.half().double(),
    Tensor.bfloat16: lambda W: W.bfloat16().double(),
    Tensor.split: lambda W: W.split([2, 4]),
    torch.split: lambda W: torch.split(W, 3, dim=0),
    Tensor.chunk: lambda W: W.chunk(3),
    torch.chunk: lambda W: torch.chunk(W, 2, dim=-2),
}
NEW = {
    Tensor.new_empty: lambda W: W.new_empty(3),
    Tensor.new_zeros: lambda W: W.new_zeros(2, 3),
    Tensor.new_ones: lambda W: W.new_ones((2,)),
    Tensor.new_full: lambda W: W.new_full((2,), 3.0),
    Tensor.new_tensor: lambda W: W.new_tensor([1.0, 2.0]),
    Tensor.new_empty_strided: lambda W: W.new_empty_strided((2, 3), (3, 1)),
    torch.empty_like: torch.empty_like,
    torch.zeros_like: torch.zeros_like,
    torch.ones_like: lambda W: torch.ones_like(W, dtype=torch.float32),
    torch.full_like: lambda W: torch.full_like(W, 2.0),
    torch.rand_like: torch.rand_like,
    torch.randn_like: torch.randn_like,
}
SHAPE_CALLS |= {**NEW, Tensor.cuda: None}


@pytest.mark.parametrize("pattern", ["o i -> o i", "o i -> i o", "(b o) i -> b o i"])
@pytest.mark.parametrize("name", [f for f in SHAPE_CALLS if f not in NEW and SHAPE_CALLS[f]])
def test_shape_functions_stay_factored(name, pattern):
    """Transposes, conversions and splits give factored weights of the right values."""
    W = weight(pattern, (6, 5), depth=1, **({"b": 3} if "b" in pattern else {}))
    if pattern.startswith("(b") and name in (torch.split, torch.chunk):
        pytest.skip("splits inside a block are materialized")
    half = name in (Tensor.half, Tensor.bfloat16)
    result, theirs = SHAPE_CALLS[name](W), tensors(SHAPE_CALLS[name](dense_of(W)))
    parts = result if type(result) is tuple else [result]
    assert all(isinstance(part, FactoredTensor) for part in parts)
    for mine, other in zip(tensors(parts), theirs, strict=True):
        tolerance = 0.2 if half else 1e-5
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NEW)
def test_new_tensors_take_the_metadata(name, monkeypatch):
    """new_* and *_like read nothing but shape, dtype and device."""
    W = weight("o i -> o i", (6, 5))
    twin = NEW[name](dense_of(W).detach())
    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    ours = NEW[name](W)
    assert type(ours) is Tensor
    assert (ours.shape, ours.stride(), ours.dtype) == (twin.shape, twin.stride(), twin.dtype)


METADATA_CALLS = [
    lambda W: W.shape, lambda W: W.size(), lambda W: W.size(-1), lambda W: W.dtype,
    lambda W: W.device, lambda W: W.ndim, lambda W: W.dim(), lambda W: W.numel(), len,
    lambda W: W.stride(), lambda W: W.is_contiguous(), lambda W: W.is_cuda, lambda W: W.layout,
    lambda W: W.is_floating_point(), lambda W: W.element_size(), lambda W: W.is_sparse,
    lambda W: W.requires_grad, lambda W: W.is_leaf, lambda W: W.nelement(), torch.numel,
    lambda W: torch.is_tensor(W), torch.is_floating_point, lambda W: W.is_complex(),
    lambda W: W.storage_offset(), lambda W: W.type(), lambda W: W.get_device(),
]  # fmt: skip


@pytest.mark.parametrize("call", METADATA_CALLS)
def test_metadata_is_not_materialized(call, monkeypatch):
    """Shape, dtype, device and their like equal the dense tensor's and form nothing."""
    W = weight("o i k -> (o k) i", (4, 3, 2), depth=1)
    expected = call(dense_of(W))
    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    assert call(W) == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_casts_of_the_product_are_not_casts_of_the_factors(dtype):
    """A dtype that products are not formed in casts the dense tensor."""
    W = weight("o i -> o i", (6, 5))
    ours, theirs = W.to(dtype), dense_of(W).to(dtype)
    torch.testing.assert_close(ours.to(torch.complex64), theirs.to(torch.complex64))


def test_another_tensor_takes_the_weights_dtype(monkeypatch):
    """x.to(W) and x.type_as(W) form nothing."""
    W = weight("o i -> o i", (6, 5))
    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    assert torch.zeros(2).to(W).dtype == torch.zeros(2).type_as(W).dtype == torch.float64


# --------------------------------------------------------------------------- all other functions


DENSE_CALLS = {
    "mul": lambda W: W * 2,
    "norm": lambda W: torch.linalg.norm(W),
    "view": lambda W: W.view(-1),
    "index": lambda W: W[1:3],
    "cat": lambda W: torch.cat([W, W]),
    "einsum": lambda W: torch.einsum("ab,cb->ac", W, W),
    "iteration": lambda W: sum(row.sum() for row in W),
    "clone": lambda W: W.clone(),
    "into another": lambda W: torch.zeros(6, 5, dtype=W.dtype).add_(W),
    "split in a block": lambda W: W.split([1, 5]),
    "max of a bag": lambda W: F.embedding_bag(torch.tensor([[0, 1]]), W, mode="max"),
    "scaled embedding": lambda W: F.embedding(torch.tensor([0, 0]), W, None, None, 2.0, True),
}


@pytest.mark.parametrize("name", DENSE_CALLS)
def test_any_other_function_gets_the_dense_tensor(name):
    """What has no form works as on a dense weight, gradients included."""
    W = weight("(b o) i -> b o i", (6, 5), b=3)
    assert_equal_dense(DENSE_CALLS[name], W, allowed=True)


def test_the_dense_tensor_is_formed_once(monkeypatch):
    """Any number of dense uses of one access form the product once."""
    W = weight("o i -> o i", (6, 5))
    assert W.materialize() is W.materialize()
    count = []
    original = Matricization.tensor
    monkeypatch.setattr(Matricization, "tensor", lambda *a: (count.append(1), original(*a))[1])
    fresh = W.like(W.factors)
    (fresh * 2 + fresh.view(6, 5)).sum().backward()
    assert len(count) == 1


@pytest.mark.parametrize("write", ["factor", "dense", "grad mode"])
def test_a_kept_dense_tensor_is_never_stale(write):
    """Writing to a factor, to the result, or changing the grad mode forms it again."""
    W = weight("o i -> o i", (6, 5))
    with torch.no_grad():
        W.materialize()
        if write == "factor":
            W.factors[0].mul_(2)
        if write == "dense":
            W.materialize().zero_()
    again = W.materialize() if write == "grad mode" else W.detach().materialize()
    assert again.requires_grad == (write == "grad mode")
    torch.testing.assert_close(W.materialize(), dense_of(W))


def test_materialize_keeps_the_reported_dtype_under_autocast():
    """The dense weight under autocast has the dtype that the weight reports."""
    W = weight("o i -> o i", (6, 5), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert W.materialize().dtype == W.dtype == torch.float32


def test_inference_tensors_are_never_kept():
    """Writes to inference tensors leave no trace, so nothing is kept of them."""
    with torch.inference_mode():
        W = weight("o i -> o i", (6, 5)).detach()
        W = W.like([f.clone() for f in W.factors])
        before = W.materialize().clone()
        W.factors[0].mul_(2)
        torch.testing.assert_close(W.materialize(), 2 * before)


# --------------------------------------------------------------------------- writes are refused

WRITES = {
    "add_": lambda W: W.add_(1),
    "mul_": lambda W: W.mul_(2),
    "copy_": lambda W: W.copy_(torch.zeros(6, 5)),
    "+=": lambda W: operator.iadd(W, 1),
    "**=": lambda W: operator.ipow(W, 2),
    "setitem": lambda W: operator.setitem(W, 0, 0),
    "data +=": lambda W: operator.iadd(W.data, 1),
    "data.copy_": lambda W: W.data.copy_(torch.zeros(6, 5)),
    "data =": lambda W: setattr(W, "data", torch.zeros(6, 5)),
    "grad =": lambda W: setattr(W, "grad", torch.zeros(6, 5)),
    "row": lambda W: W[0].zero_(),
    "data row": lambda W: W.data[0].zero_(),
    "view": lambda W: W.view(-1).fill_(1),
    "view of a view": lambda W: W.view(-1)[:3].fill_(1),
    "slice of a view": lambda W: operator.setitem(W.view(-1), 0, 1),
    "chunk": lambda W: W.chunk(2)[0].zero_(),
    "unbind": lambda W: W.unbind()[0].zero_(),
    "transpose": lambda W: W.T.zero_(),
    "out": lambda W: torch.add(torch.ones(6, 5), 1, out=W),
    "out mm": lambda W: torch.mm(torch.ones(6, 2), torch.ones(2, 5), out=W),
    "foreach": lambda W: torch._foreach_add_([W], 1),
    "init.normal_": nn.init.normal_,
    "init.zeros_": nn.init.zeros_,
    "init.constant_": lambda W: nn.init.constant_(W, 1.0),
    "init.kaiming_uniform_": nn.init.kaiming_uniform_,
    "init.xavier_normal_": nn.init.xavier_normal_,
    "init.trunc_normal_": nn.init.trunc_normal_,
    "init.orthogonal_": nn.init.orthogonal_,
    "init.eye_": nn.init.eye_,
    "init.sparse_": lambda W: nn.init.sparse_(W, 0.5),
    "init of a chunk": lambda W: nn.init.orthogonal_(W.chunk(2)[0]),
    "requires_grad_": lambda W: W.requires_grad_(False),
    "requires_grad =": lambda W: setattr(W, "requires_grad", False),
    "detach_": lambda W: W.detach_(),
    "resize_": lambda W: W.resize_(3),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_write_raises(name, grad):
    """A write that would be lost with this access raises and says what to do instead."""
    layer = factored(nn.Linear(5, 6, dtype=torch.float64))
    before = layer.weight.clone()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"module\.weight = W"):
        WRITES[name](layer.weight)
    torch.testing.assert_close(layer.weight.clone(), before)


@pytest.mark.parametrize("name", ["retain_grad", "register_post_accumulate_grad_hook"])
def test_hooks_on_the_weights_gradient_raise(name):
    """The gradient of the weight is never formed, so nothing may wait for it."""
    arguments = () if name == "retain_grad" else (print,)
    with pytest.raises(RuntimeError, match="goes to its factors"):
        getattr(weight("o i -> o i", (6, 5)), name)(*arguments)


def test_a_hook_on_the_weights_gradient_warns():
    """A hook that never runs is told so, and can be removed."""
    with pytest.warns(UserWarning, match="never runs"):
        handle = weight("o i -> o i", (6, 5)).register_hook(print)
    handle.remove()


def test_flops_are_counted_on_the_factors():
    """The counter of torch sees the two products."""
    layer, x = factored(nn.Linear(64, 64), rank=4), torch.randn(10, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * 10 * 4 * (64 + 64)


@pytest.mark.filterwarnings("ignore:a hook on the gradient")
def test_tools_that_follow_modules_run():
    """A tool that hooks onto what every module returns does not fail in training."""
    layer = factored(nn.Linear(64, 64), rank=4)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(10, 64)).sum().backward()
    assert counter.get_total_flops() > 0


def test_a_weight_made_under_no_grad_is_a_constant():
    """As any result, a weight that was accessed under no_grad trains nothing later."""
    layer = factored(nn.Linear(5, 6))
    with torch.no_grad():
        frozen = layer.weight
    assert not frozen.requires_grad
    assert not F.linear(torch.randn(2, 5), frozen).requires_grad


def test_a_clone_can_be_written_to():
    """A clone is a plain tensor of its own."""
    layer = factored(nn.Linear(5, 6))
    before = layer.weight.clone()
    copied = layer.weight.detach().clone()
    assert type(copied) is Tensor
    copied.zero_()
    torch.testing.assert_close(layer.weight.clone(), before)


def test_assignment_factorizes_again():
    """module.weight = W, which the errors recommend, works."""
    layer = factored(nn.Linear(5, 6), rank=99)
    W = torch.randn(6, 5)
    layer.weight = W
    torch.testing.assert_close(layer.weight.materialize(), W)


@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag])
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}])
def test_embedding_options_that_cannot_be_honoured_raise(function, option):
    """Rescaling rows in place, and sparse gradients, are refused with the reason."""
    with pytest.raises(RuntimeError, match=next(iter(option))):
        function(torch.tensor([[1]]), weight("n d -> n d", (7, 5)), **option)


BAD = {
    "one factor": (lambda W: W.factors[:1], "at least two factors"),
    "rank": (lambda W: (W.factors[0], W.factors[1][:, :1]), "factor 1"),
    "rows": (lambda W: (W.factors[0][:3], W.factors[1]), "factor 0"),
    "dtype": (lambda W: (W.factors[0], W.factors[1].float()), "float32"),
    "dimensions": (lambda W: (W.factors[0][0, 0], W.factors[1]), "factor 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_factors_that_do_not_chain_raise(name):
    """A factor of another shape or dtype is named."""
    W = weight("o i -> o i", (6, 5))
    with pytest.raises(ValueError, match=BAD[name][1]):
        FactoredTensor(BAD[name][0](W), W.matricization)


def test_an_operator_below_autograd_raises():
    """What bypasses the interception reads no storage: it raises."""
    W = weight("o i -> o i", (6, 5))
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(RuntimeError, match="below autograd"),
    ):
        W + 1


# --------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("rows", "rank", "wins"),
    [(1, 8, True), (10**6, 8, True), (10**6, 31, True), (10**6, 33, False), (1, 33, True),
     (1, 64, True), (64, 64, True), (65, 64, False)],
)  # fmt: skip
def test_the_cheaper_way_is_chosen(rows, rank, wins):
    """On a square weight the factors win below half rank, and above it for few rows."""
    n = 64
    cost = Cost(dense=n * n, factored=2 * n * rank, once=n * n * rank)
    assert factors_cheaper(lambda: rows, lambda: cost) is wins


def test_the_choice_is_followed(monkeypatch):
    """A high rank materializes for many rows and not for one."""
    W = weight("o i -> o i", (8, 8), rank=8)
    F.linear(torch.zeros(100, 8, dtype=torch.float64), W)
    assert W._memo is not None
    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    F.linear(torch.zeros(1, 8, dtype=torch.float64), W)


def test_more_function_calls_count_against_the_factors():
    """A form that calls more functions has to save more."""
    cost = Cost(dense=100, factored=50, once=10)
    assert factors_cheaper(lambda: 10, lambda: cost)
    assert not factors_cheaper(lambda: 10, lambda: cost._replace(calls=1))
    assert factors_cheaper(lambda: 10**6, lambda: cost._replace(calls=1))


# --------------------------------------------------------------------------- with the rest of torch


def network(dtype=torch.float32):
    """A linear and a convolutional layer, factored."""
    return nn.Sequential(
        factored(nn.Conv2d(3, 8, 3, padding=1, dtype=dtype), rank=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        factored(nn.Linear(32, 5, dtype=dtype), rank=2, depth=1),
    )


def gradients_of(model, output):
    """The output's sum and its gradient for every parameter."""
    grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    return [output, *grads]


def assert_same(ours, theirs, **tolerance):
    """Two lists of tensors are close."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def compiler():
    """A compiler without remains of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")
def test_compiles_without_graph_breaks(backend, compiler):
    """torch.compile(fullgraph=True) gives the eager values and gradients."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(gradients_of(model, compiled(x)), gradients_of(model, model(x)))


@pytest.mark.parametrize("rank", [2, 16])
def test_dynamic_shapes_compile_once(rank, compiler):
    """A changing batch size neither breaks the graph nor compiles it again."""
    layer = factored(nn.Linear(16, 16), rank=rank)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 7, 200):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("use", ["mul", "matmul", "embedding", "convert", "metadata", "split"])
def test_functions_of_the_weight_compile(use, compiler):
    """Fallbacks, transposes, conversions and metadata trace without a graph break."""
    layer = factored(nn.Linear(6, 6, dtype=torch.float64), rank=2)
    functions = {
        "mul": lambda x: (layer.weight * 2 + layer.weight.view(6, 6)) @ x.T,
        "matmul": lambda x: x @ layer.weight.T @ layer.weight,
        "embedding": lambda x: F.embedding(torch.tensor([1, 2]), layer.weight, padding_idx=1) @ x.T,
        "convert": lambda x: F.linear(x.float(), layer.weight.to(torch.float32)),
        "metadata": lambda x: x.reshape(-1, layer.weight.shape[1]) * layer.weight.requires_grad,
        "split": lambda x: sum(F.linear(x, part) for part in layer.weight.chunk(2)),
    }
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(functions[use], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), functions[use](x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(functions[use](x).sum(), x)
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_export_is_two_products(strict, dynamic):
    """The exported graph of a layer holds two products and no dense weight."""
    layer, x = factored(nn.Linear(16, 8), rank=4), torch.randn(5, 16)
    shapes = ({0: torch.export.Dim("rows")},) if dynamic else None
    program = torch.export.export(layer, (x,), strict=strict, dynamic_shapes=shapes)
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.matmul.default", "aten.linear.default"]
    x = torch.randn(9, 16) if dynamic else x
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("rank", [2, 24])
def test_convolutions_export_with_a_dynamic_batch(strict, rank):
    """Also where the factors lose, the choice puts no guard on the batch."""
    conv = factored(nn.Conv2d(8, 8, 3), rank=rank)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(
        conv, (torch.randn(4, 8, 6, 6),), strict=strict, dynamic_shapes=shapes
    )
    x = torch.randn(7, 8, 6, 6)
    torch.testing.assert_close(program.module()(x), conv(x))


OUTSIDE = {
    "linear": lambda x, w: F.linear(x, w),
    "several": lambda x, w: x @ w.mT + w.sum(),
    "split": lambda x, w: x @ (w.chunk(2)[1] * 2).T + w.shape[1],
    "views": lambda x, w: x @ w.view(6, 5)[:3].T * w.requires_grad,
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's, of a view
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_weight_made_outside_of_a_compiled_function(name, grad, compiler):
    """As an argument of a compiled function it breaks the graph and gives the right gradients."""
    layer, x = factored(nn.Linear(5, 6, bias=False)), torch.randn(2, 5)
    compiled = torch.compile(OUTSIDE[name], backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            ours, theirs = (f(x, layer.weight) for f in (compiled, OUTSIDE[name]))
            torch.testing.assert_close(ours, theirs)
    if grad:
        assert_same(gradients_of(layer, ours), gradients_of(layer, theirs))


def test_a_weight_may_cross_a_graph_break(compiler):
    """Accessed before a graph break and used after it, the weight still trains its factors."""
    layer, x = factored(nn.Linear(5, 6, bias=False)), torch.randn(2, 5)

    def broken(x):
        weight = layer.weight
        x = x * 2
        torch._dynamo.graph_break()
        return F.linear(x, weight)

    compiled = torch.compile(broken, backend="aot_eager")
    assert_same(gradients_of(layer, compiled(x)), gradients_of(layer, broken(x)))


def test_a_write_in_a_compiled_function_raises(compiler):
    """Writes are refused while a graph is traced, too."""
    layer = factored(nn.Linear(5, 6))
    compiled = torch.compile(lambda: layer.weight.add_(1), backend="eager")
    with pytest.raises(Exception, match=r"module\.weight = W"):
        compiled()


@pytest.mark.parametrize("inside", [True, False])
def test_cached_around_and_inside_a_compiled_function(inside, compiler):
    """parametrize.cached() and torch.compile give the gradients of plain calls."""
    layer, x = factored(nn.Linear(5, 6)), torch.randn(2, 5)

    def twice(x):
        with parametrize.cached() if inside else nullcontext():
            return layer(x) + layer(x)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    with nullcontext() if inside else parametrize.cached():
        ours = gradients_of(layer, compiled(x))
        assert_same(ours, gradients_of(layer, 2 * layer(x)))


def test_two_compiled_calls_share_a_cached_weight(compiler):
    """The second call within cached() is given the weight of the first."""
    layer, x = factored(nn.Linear(5, 6)), torch.randn(2, 5)
    compiled = torch.compile(layer, backend="aot_eager")
    with parametrize.cached():
        ours = gradients_of(layer, compiled(x) + compiled(x))
    assert_same(ours, gradients_of(layer, 2 * layer(x)))


def test_cached_forms_the_product_once():
    """One instance, one dense tensor within cached()."""
    layer = factored(nn.Linear(5, 6))
    with parametrize.cached():
        assert layer.weight is layer.weight
        assert (layer.weight * 2 / 2).shape == layer.weight.materialize().shape
    assert layer.weight is not layer.weight


def test_cached_sees_a_step_of_the_optimizer():
    """A factor changed in place within cached() is not answered with the dense tensor of before."""
    layer = factored(nn.Linear(5, 6))
    with parametrize.cached():
        before = layer.weight + 0
        layer.weight.sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert not torch.allclose(layer.weight + 0, before)


@pytest.mark.parametrize("choice", [True, False])
def test_autocast_equals_the_dense_layers(choice):
    """The output's dtype is autocast's; the parameters' gradients are float32."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    with force(choice), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    with force(choice):
        reference = model(x)
    torch.testing.assert_close(out.float(), reference, rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 for g in gradients_of(model, out)[1:])


@pytest.mark.parametrize("choice", [True, False])
def test_functional_call_and_per_sample_gradients(choice):
    """vmap(grad(functional_call)) equals a loop over samples."""
    model, x = network(torch.float64), torch.randn(3, 1, 3, 6, 6, dtype=torch.float64)
    params = {k: v.detach() for k, v in model.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    with force(choice):
        ours = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
        theirs = [gradients_of(model, model(sample))[1:] for sample in x]
    for i, name in enumerate(params):
        torch.testing.assert_close(ours[name], torch.stack([grads[i] for grads in theirs]))


def test_stacked_models_run_under_vmap():
    """An ensemble of factored layers, its factors stacked, runs under vmap."""
    layers = [factored(nn.Linear(5, 6, dtype=torch.float64)) for _ in range(3)]
    names = [name for name, _ in layers[0].named_parameters()]
    params = {n: torch.stack([layer.get_parameter(n) for layer in layers]) for n in names}
    x = torch.randn(2, 5, dtype=torch.float64)
    ours = torch.func.vmap(lambda p: torch.func.functional_call(layers[0], p, (x,)))(params)
    torch.testing.assert_close(ours, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("choice", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, choice):
    """Both kinds of checkpoint recompute the same."""
    model = network()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    with force(choice):
        out = checkpoint(model, x, use_reentrant=reentrant)
        out.square().sum().backward()
        ours = [p.grad for p in model.parameters()]
        assert_same(ours, gradients_of(model, model(x))[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_follows_the_factors():
    """A traced model is not frozen to the dense weight of the trace."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    traced = torch.jit.trace(model, (x,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(traced(x), model(x))


# --------------------------------------------------------------------------- modules of torch


def attention(pattern, **axes):
    """An attention layer with all its projections factored, and its dense twin."""
    ours = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    factored(ours, "in_proj_weight", rank=3, pattern=pattern, **axes)
    factored(ours.out_proj, rank=3)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.in_proj_weight.clone())
        theirs.out_proj.weight.copy_(ours.out_proj.weight.clone())
    return ours, theirs


@pytest.mark.parametrize(("pattern", "axes"), [("o i -> o i", {}), ("(b o) i -> b o i", {"b": 3})])
@pytest.mark.parametrize("inputs", ["self", "memory", "three"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_runs_on_the_factors(pattern, axes, inputs, train, grad, monkeypatch):
    """nn.MultiheadAttention equals its dense twin in every mode and forms no weight."""
    ours, theirs = attention(pattern, **axes)
    q, k, v = (torch.randn(2, n, 8, dtype=torch.float64) for n in (3, 5, 5))
    arguments = {"self": (q, q, q), "memory": (q, k, k), "three": (q, k, v)}[inputs]
    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    with force(True), torch.set_grad_enabled(grad):
        for mine, other in zip(
            ours.train(train)(*arguments), theirs.train(train)(*arguments), strict=True
        ):
            torch.testing.assert_close(mine, other)


def test_attention_uses_the_functions_torch_uses_now(monkeypatch):
    """A replacement of scaled_dot_product_attention is seen."""
    ours, _ = attention("o i -> o i")
    q, called = torch.randn(2, 3, 8, dtype=torch.float64), []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: (called.append(1), original(*a, **k))[1]
    )
    ours(q, q, q, need_weights=False)
    assert called


def test_attention_compiles(compiler):
    """Attention on the factors is one graph."""
    ours, theirs = attention("(b o) i -> b o i", b=3)
    q = torch.randn(2, 3, 8, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, q, q)[0], theirs(q, q, q)[0])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_transformer_layer_equals_dense(train, grad):
    """nn.TransformerEncoderLayer gives the same on its slow and its fast path."""
    ours = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    factored(ours.self_attn, "in_proj_weight", rank=99)
    factored(ours.self_attn.out_proj, rank=99)
    factored(ours.linear1, rank=99)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours.train(train)(x), theirs.train(train)(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("blocks", [True, False])
def test_recurrent_layers_never_use_a_stale_weight(kind, blocks):
    """A recurrent layer follows its factors: values, gradients, training steps and copies."""
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    options = {"pattern": "(b o) i -> b o i", "b": gates} if blocks else {}
    ours = kind(5, 6, num_layers=2, batch_first=True, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    names = [n for n, _ in ours.named_parameters() if n.startswith("weight")]
    for name in names[:3]:
        factored(ours, name, rank=99, **options)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    ours(x)[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    before = ours(x)[0]
    with torch.no_grad():
        ours.parametrizations[names[0]].original0.mul_(2)
        getattr(theirs, names[0]).mul_(2)
    assert not torch.allclose(ours(x)[0], before)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    torch.testing.assert_close(copy.deepcopy(ours)(x)[0], theirs(x)[0])
    torch.testing.assert_close(ours.half().double()(x)[0], theirs(x)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_recurrent_layers_compile(kind, compiler):
    """A compiled recurrent layer, which breaks the graph, follows its factors."""
    layer = kind(5, 6, batch_first=True)
    factored(layer, "weight_ih_l0")
    x = torch.randn(2, 4, 5)
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        assert_same(gradients_of(layer, compiled(x)[0]), gradients_of(layer, layer(x)[0]))


# --------------------------------------------------------------------------- copies and averages


def test_a_copied_model_has_its_own_factors():
    """A deep copy is an equal model that shares nothing, also after a forward."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    model(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.allclose(twin(x), model(x))


def test_a_copied_weight_refers_to_the_copied_factors():
    """A weight deep-copied together with its factors keeps referring to them, without the memo."""
    W = weight("o i -> o i", (6, 5))
    W.materialize()
    factors, twin = copy.deepcopy((list(W.factors), W))
    assert all(a is b for a, b in zip(factors, twin.factors, strict=True))
    assert twin._memo is None
    torch.testing.assert_close(copy.copy(W).materialize(), dense_of(W))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_weight_is_stored_as_its_factors(how):
    """Pickle and torch.save keep the factors."""
    W = weight("(b o) i -> b o i", (6, 5), depth=1, b=3)
    stream = io.BytesIO()
    (pickle.dump if how == "pickle" else torch.save)(W, stream)
    stream.seek(0)
    back = pickle.load(stream) if how == "pickle" else torch.load(stream, weights_only=False)
    assert type(back) is FactoredTensor
    torch.testing.assert_close(back.materialize(), dense_of(W))


def test_loading_weights_only_names_what_it_needs():
    """torch.load(weights_only=True) refuses the class, by name."""
    stream = io.BytesIO()
    torch.save(weight("o i -> o i", (6, 5)), stream)
    stream.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="FactoredTensor"):
        torch.load(stream, weights_only=True)


@pytest.mark.parametrize("average", [None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)])
def test_averaged_models_average_the_factors(average):
    """AveragedModel, plain and EMA, runs and follows."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(x), model(x))


def test_distributed_data_parallel_takes_the_factors(tmp_path):
    """DDP registers the factors and gives their gradients."""
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, x = network(), torch.randn(2, 3, 6, 6)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(x).square().sum().backward()
        ours = [p.grad for p in model.parameters()]
        assert_same(ours, gradients_of(model, model(x))[1:])
    finally:
        torch.distributed.destroy_process_group()


def test_the_representation_names_the_product():
    """The repr tells shape, rank and pattern and forms nothing."""
    W = weight("(b o) i -> b o i", (6, 5), depth=1, b=3)
    assert repr(W) == (
        "FactoredTensor(shape=(6, 5), rank=2, pattern='(b o) i -> b o i', dtype=torch.float64, "
        "factors=3, requires_grad=True)"
    )
    assert W._memo is None


def test_an_optimizer_refuses_the_weight():
    """The factors are to be trained; the weight is no leaf."""
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([factored(nn.Linear(5, 6)).weight])


def test_it_is_a_tensor():
    """Code that asks for a torch.Tensor accepts the weight."""
    W = weight("o i -> o i", (6, 5))
    assert isinstance(W, Tensor)
    assert torch.is_tensor(W)
    assert not isinstance(W, nn.Parameter)


def test_the_gradient_of_the_weight_is_none():
    """.grad is None, as of any tensor that is no leaf; backward reaches the factors."""
    W = weight("o i -> o i", (6, 5))
    assert W.grad is None
    W.backward(torch.ones(6, 5, dtype=torch.float64))
    assert all(f.grad is not None for f in W.factors)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_factor_stays_a_constant(frozen):
    """The other factor gets its gradient; the weight still requires one."""
    layer = factored(nn.Linear(5, 6))
    factors = list(layer.parametrizations.weight.parameters())
    factors[frozen].requires_grad_(False)
    assert layer.weight.requires_grad
    layer(torch.randn(2, 5)).sum().backward()
    assert [f.grad is None for f in factors] == [frozen == 0, frozen == 1]


def test_numpy_reads_the_dense_values():
    """A detached weight converts to an array."""
    W = weight("o i -> o i", (6, 5))
    torch.testing.assert_close(torch.from_numpy(W.detach().numpy().copy()), dense_of(W).detach())
