"""The functions that run on the factors of a lazily materialized weight equal the dense ones."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from factored_cases import assert_equal_dense, dense_of, factored, forbidden, leaf, tensors, weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.forms.cost import force
from frobdecay.weights.forms.table import FORMS
from frobdecay.weights.product_tensor import ProductTensor

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


@pytest.mark.covers("C1")
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


STACKED = {
    "view": lambda W: W.view(-1, 3, 5),
    "view, a tuple": lambda W: W.view((2, 3, -1)),
    "reshape": lambda W: W.reshape(2, 3, 5),
    "as it is": lambda W: W.view(6, 5).view(2, -1, 5),
}


@pytest.mark.parametrize("pattern", ["(b o) i -> b o i", "(b i) o -> b o i"])
@pytest.mark.parametrize("name", STACKED)
def test_matrices_below_each_other_are_seen_as_a_stack(name, pattern):
    """As experts are kept in one matrix, and one of them is multiplied."""
    W = weight(pattern, (6, 5), b=2)
    assert_equal_dense(lambda W, x: x @ STACKED[name](W)[1].T, W, leaf(4, 5))
    assert_equal_dense(lambda W, x: x @ STACKED[name](W)[torch.tensor(0)], W, leaf(4, 3))


def test_other_views_of_a_stack_are_of_the_dense_weight():
    """Whatever is no stack of the factors' matrices."""
    for shape in ((3, 2, 5), (-1,), (30,), (1, 6, 5), (6, -1, 5)):
        W = weight("(b o) i -> b o i", (6, 5), b=2)
        assert_equal_dense(lambda W, x, shape=shape: W.view(shape) * x, W, leaf(1), allowed=True)


@pytest.mark.covers("C5")
@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("pattern", ["n d -> n d", "n d -> d n"])
def test_embedding_equals_dense(pattern, depth, padding_idx):
    """F.embedding gathers rows of U; the padding row gives no gradient to any factor."""
    W = weight(pattern, (7, 5), depth=depth)
    ids = torch.tensor([[0, 2, 6], [2, 2, 1]])
    assert_equal_dense(lambda W: F.embedding(ids, W, padding_idx), W)


@pytest.mark.covers("C5")
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


@pytest.mark.covers("C2")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(convolutions(transposed=False), st.booleans())
def test_convolution_equals_dense(case, unbatched):
    """Two thin convolutions equal the dense one for every option, pattern and grouping."""
    _check_convolution(CONVS, False, case, unbatched)


@pytest.mark.covers("C3")
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


@pytest.mark.covers("C3")
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


@pytest.mark.parametrize("pattern", ["o i kh kw -> (o kh) (i kw)", "o i kh kw -> o (i kh kw)"])
@pytest.mark.parametrize("size", [(2, 2), (4, 1), (4, 2), (4, 4)])
def test_half_precision_to_one_column_is_right(pattern, size):
    """Where torch's own is not, on CPUs with AMX, forward from 85 channels on, and backward."""
    conv = nn.Conv2d(256, 64, 3, stride=2, padding=1, bias=False)
    conv = factored(conv, pattern=pattern, rank=96)
    x = torch.randn(2, 256, *size).bfloat16().float()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        conv, x = conv.to(dtype), x.to(dtype).requires_grad_()
        with force(True):
            out = conv(x)
        out.backward(torch.ones_like(out))
        found.append([out, x.grad, *(p.grad for p in conv.parameters())])
        conv.zero_grad()
        x = x.detach()
    for mine, expected in zip(*found, strict=True):
        assert (mine.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.covers("D18")
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
        torch._grouped_mm, Tensor.__getitem__, Tensor.view, Tensor.reshape,
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
