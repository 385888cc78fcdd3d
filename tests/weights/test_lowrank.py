"""LowRank on every kind of layer: exact at full rank, the same function, the same gradients."""

import copy
import functools

import pytest
import torch
from closeness import TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import frobdecay
from frobdecay import CP, TensorTrain, Tucker
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge, unroll
from frobdecay.product.find import products
from frobdecay.product.holding import VERSION
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.lowrank import LowRank

# torch's own remark, on dense convolutions too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

FULL = 1.0  # as a rank: that of the matrix


def _call(layer, x):
    """The output of any layer, recurrent ones and attention included."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer(*x)[0]
    out = layer(*x) if isinstance(x, tuple) else layer(x)
    return out[0] if isinstance(out, tuple) else out


def _double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _padded():
    layer = nn.Embedding(9, 5, padding_idx=2)
    nn.init.normal_(layer.weight)  # the padding row too
    return layer


LAYERS = {
    "large linear": (lambda: nn.Linear(64, 48), lambda: _double(32, 64)),
    "large embedding": (lambda: nn.Embedding(99, 40), lambda: torch.arange(0, 99, 3)),
    "large bilinear": (lambda: nn.Bilinear(8, 8, 24), lambda: (_double(9, 8), _double(9, 8))),
    "linear": (lambda: nn.Linear(6, 4), lambda: _double(3, 6)),
    "linear without bias": (lambda: nn.Linear(4, 7, bias=False), lambda: _double(2, 5, 4)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: (_double(2, 3), _double(2, 4))),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.tensor([[1, 8], [0, 1]])),
    "embedding with padding": (_padded, lambda: torch.tensor([[1, 8], [0, 2]])),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 5), lambda: torch.tensor([[1, 8], [0, 1]])),
    "rnn": (lambda: nn.RNN(5, 4, 2, bidirectional=True), lambda: _double(3, 2, 5)),
    "lstm": (lambda: nn.LSTM(5, 6, 2, proj_size=3), lambda: _double(3, 2, 5)),
    "gru": (lambda: nn.GRU(5, 4, batch_first=True), lambda: _double(3, 2, 5)),
    "rnn cell": (lambda: nn.RNNCell(5, 4), lambda: _double(3, 5)),
    "lstm cell": (lambda: nn.LSTMCell(5, 4), lambda: _double(3, 5)),
    "gru cell": (lambda: nn.GRUCell(5, 4), lambda: _double(3, 5)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda: (_double(3, 2, 8),) * 3),
    "attention with other keys": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
        lambda: (_double(3, 2, 8), _double(4, 2, 6), _double(4, 2, 5)),
    ),
}


@st.composite
def convolutions(draw):
    """A convolution with random options, the exact names of its weights, and an input."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    # The large sizes are computed in factored form, the small ones materialized.
    i, o = (groups * draw(st.sampled_from([1, 2, 3, 24])) for _ in range(2))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    stride = [draw(st.integers(1, 2)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    options = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if draw(st.booleans()):
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        extra = [min(e, 1) for e in extra]
        layer = TRANSPOSED[dims](
            i, o, kernel, stride=stride, padding=padding, output_padding=extra, **options
        )
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if draw(st.booleans()):
            stride, padding = [1] * dims, draw(st.sampled_from(["same", "valid"]))
        layer = CONVS[dims](
            i, o, kernel, stride=stride, padding=padding, padding_mode=mode, **options
        )
    return layer.double(), _double(2, i, *[6 + k for k in range(dims)])


PATTERNS = st.sampled_from(["spatial", "channel"])


def _assert_same_function(one, other, x):
    """Equal outputs, and equal gradients at the bias, for a random scalar of the output."""
    a, b = _call(one, x), _call(other, x)
    torch.testing.assert_close(a, b, rtol=TOLERANCE[torch.float64], atol=1e-10)


@pytest.mark.covers("C2", "C3", "D2", "D17")
@given(case=convolutions(), pattern=PATTERNS, depth=st.integers(0, 2))
def test_full_rank_convolution_is_the_dense_one_D2_D17(case, pattern, depth):
    """The matricization and its inverse are the same map, whatever the options (D2, D17)."""
    layer, x = case
    dense = copy.deepcopy(layer)
    factorize(
        layer,
        rank=FULL,
        include="weight",
        parametrization=functools.partial(LowRank, pattern=pattern, depth=depth),
    )
    _assert_same_function(layer, dense, x)
    merge(layer)
    torch.testing.assert_close(layer.weight, dense.weight, rtol=1e-10, atol=1e-12)


@given(case=convolutions(), pattern=PATTERNS, depth=st.integers(0, 2))
def test_unrolled_convolution_is_the_factorized_one(case, pattern, depth):
    """Two plain convolutions have the strides, paddings and groups where they belong."""
    layer, x = case
    factorize(
        layer,
        rank=2,
        include="weight",
        parametrization=functools.partial(LowRank, pattern=pattern, depth=depth),
    )
    expected = layer(x)
    chain = unroll(layer)
    assert len(chain) == depth + 2
    assert all(type(link).__module__.startswith("torch.nn") for link in chain)
    torch.testing.assert_close(chain(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.covers("C2")
@given(case=convolutions(), pattern=PATTERNS)
def test_gradients_through_a_convolution_are_those_of_the_product(case, pattern):
    """Factors and input get the gradients that forming the weight would give them."""
    layer, x = case
    x.requires_grad_()
    factorize(
        layer, rank=2, include="weight", parametrization=functools.partial(LowRank, pattern=pattern)
    )
    _assert_gradients_of_the_product(layer, x)


def _assert_gradients_of_the_product(layer, x):
    """Compare with functional_call on the dense weight, differentiated by hand."""
    factors = [p for product in products(layer) for p in product.params]
    inputs = [t for t in (x if isinstance(x, tuple) else (x,)) if t.requires_grad]
    out = _call(layer, x)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), [*factors, *inputs], allow_unused=True)
    reference = merge(copy.deepcopy(layer))
    names = [product.name for product in products(layer)]
    formed = _formed(layer)
    dense = dict(reference.named_parameters())
    leaves = {**dense, **{n: w.detach().requires_grad_() for n, w in formed.items()}}
    again = torch.func.functional_call(reference, leaves, _arguments(x))
    again = again[0] if isinstance(again, tuple) else again
    loss = (again * weight).sum()
    at = torch.autograd.grad(loss, [*(leaves[n] for n in names), *inputs])
    chained = torch.autograd.grad([formed[n] for n in names], factors, at[: len(names)])
    for one, other in zip(got, [*chained, *at[len(names) :]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def _arguments(x):
    return x if isinstance(x, tuple) else (x,)


def _formed(layer):
    """Dense name -> dense weight, differentiable in the factors."""
    out = {}
    for path, module in layer.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                out[f"{path}.{name}".lstrip(".")] = getattr(module, name).materialize()
    return out


@pytest.mark.covers("C1", "D17")
@pytest.mark.parametrize("kind", LAYERS)
def test_full_rank_layer_is_the_dense_one(kind):
    """Every supported layer computes with its factors what it computed with its weights."""
    make, example = LAYERS[kind]
    layer, x = make().double(), example()
    dense = copy.deepcopy(layer)
    factorize(layer, rank=FULL)
    _assert_same_function(layer, dense, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_merge_restores_the_layer(kind):
    """Merged, a layer has its class, its keys in their order, and its numbers again."""
    make, _ = LAYERS[kind]
    layer = make().double()
    dense = copy.deepcopy(layer)
    factorize(layer, rank=FULL)
    merge(layer)
    assert type(layer) is type(dense)
    assert list(layer.state_dict()) == list(dense.state_dict())
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.covers("C1")
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_product(kind):
    """Factors get the gradients that forming the weight would give them."""
    make, example = LAYERS[kind]
    layer = make().double()
    factorize(layer, rank=2)
    _assert_gradients_of_the_product(layer, example())


@pytest.mark.covers("D25")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_copy_works_after_a_forward_D25(kind):
    """No graph tensor stays behind on a module, so deepcopy works and is apart (D25)."""
    make, example = LAYERS[kind]
    layer, x = make().double(), example()
    factorize(layer, rank=2)
    out = _call(layer, x)
    clone = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    torch.testing.assert_close(_call(clone, x), out)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_recurrent_layers_never_use_stale_weights(kind):
    """A write to a factor shows in the next forward, in training, after merge, after .float()."""
    make, example = LAYERS[kind]
    layer, x = make().double(), example()
    factorize(layer, rank=2)
    before = _call(layer, x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    after = _call(layer, x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(_call(merge(copy.deepcopy(layer)), x), after)
    layer.float()
    torch.testing.assert_close(_call(layer, x.float()).double(), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_recurrent_layers_after_merge_follow_their_weights(kind):
    """The merged layer's own list of weights is its new parameters."""
    make, example = LAYERS[kind]
    layer, x = make().double(), example()
    factorize(layer, rank=2)
    merge(layer)
    assert {id(p) for p in layer._flat_weights} == {id(p) for p in layer.parameters()}
    before = _call(layer, x)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    assert not torch.allclose(before, _call(layer, x))


class Tagger(nn.Module):
    """A recurrent layer inside a model."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        """Tag every step."""
        return self.head(self.lstm(x)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_recurrent_layers_run_in_compiled_models():
    """torch.compile steps over them; the factors get the same gradients."""
    model, x = Tagger().double(), _double(3, 2, 5)
    factorize(model, rank=2)
    grads = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="eager")
    again = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    torch._dynamo.reset()
    torch.testing.assert_close(again, grads)


@pytest.mark.covers("D19")
def test_functional_call_sees_the_factors_of_recurrent_layers_D19():
    """Parameters given from outside are the ones used (D19)."""
    layer, x = nn.LSTM(5, 4).double(), _double(3, 2, 5)
    factorize(layer, rank=2)
    zero = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    out, _ = torch.func.functional_call(layer, zero, (x,))
    assert not out.any()


@pytest.mark.parametrize("kind", ["linear", "embedding with padding", "linear without bias"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_unrolled_layer_is_the_factorized_one(kind, depth):
    """Chains of plain layers compute the same, of the same parameters."""
    make, example = LAYERS[kind]
    layer, x = make().double(), example()
    factorize(layer, rank=3, parametrization=functools.partial(LowRank, depth=depth))
    expected, count = layer(x), sum(p.numel() for p in layer.parameters())
    chain = unroll(layer)
    torch.testing.assert_close(chain(x), expected)
    assert sum(p.numel() for p in chain.parameters()) == count


@pytest.mark.covers("C7", "P6")
@given(m=st.integers(1, 8), n=st.integers(1, 8), rank=st.integers(1, 10), depth=st.integers(0, 2))
def test_spectral_initialization_is_optimal_through_a_module(m, n, rank, depth):
    """The error is that of the best matrix of this rank (Eckart and Young)."""
    layer = nn.Linear(n, m).double()
    tail = torch.linalg.svdvals(layer.weight.detach())[rank:].square().sum().sqrt()
    dense = layer.weight.detach().clone()
    plan = factorize(layer, rank=rank, parametrization=functools.partial(LowRank, depth=depth))
    error = torch.linalg.norm(dense - layer.weight.materialize())
    torch.testing.assert_close(error, tail, rtol=1e-6, atol=1e-12)
    assert plan.rows[0].error == pytest.approx(float(tail / torch.linalg.norm(dense)), abs=1e-9)


@pytest.mark.covers("C7", "D2")
@given(case=convolutions(), pattern=PATTERNS)
def test_spectral_initialization_of_convolutions_is_optimal_D2(case, pattern):
    """The error of a convolution is optimal for the map that the forward uses (D2)."""
    layer, _ = case
    dense = layer.weight.detach().clone()
    factorize(
        layer, rank=1, include="weight", parametrization=functools.partial(LowRank, pattern=pattern)
    )
    view = layer.parametrizations.weight[0].matricization
    tail = torch.linalg.svdvals(view.matrix(dense))[..., 1:].square().sum().sqrt()
    error = torch.linalg.norm(dense - layer.weight.materialize())
    torch.testing.assert_close(error, tail, rtol=1e-6, atol=1e-10)


@pytest.mark.covers("C8", "D3")
def test_overcomplete_convolution_has_no_dead_direction_D3():
    """Wider than full rank, every column of every factor gets a gradient (D3)."""
    layer = nn.Conv2d(2, 6, 3).double()
    factorize(layer, rank=3.0)
    layer(_double(2, 2, 7, 7)).square().sum().backward()
    for factor in layer.parametrizations.weight.parameters():
        assert (factor.grad.norm(dim=-2) > 1e-6).all()


@pytest.mark.covers("D14", "P16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_have_dtype_and_are_accurate_D14(dtype):
    """Half precision is decomposed in higher precision and comes back as it was (D14)."""
    layer = nn.Linear(12, 10).to(dtype)
    dense = layer.weight.detach().clone()
    factorize(layer, rank=FULL)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(
        layer.weight.materialize(), dense, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.covers("D16")
def test_the_same_weight_gives_the_same_factors_D16():
    """Signs are fixed and nothing is random (D16)."""
    one, other = nn.Linear(12, 10), nn.Linear(12, 10)
    other.load_state_dict(one.state_dict())
    state = torch.get_rng_state()
    factorize(one, rank=4)
    factorize(other, rank=4)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.covers("D18")
def test_channels_last_activations_stay_channels_last_D18():
    """No forced copy into another memory format (D18)."""
    layer = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)
    factorize(layer, rank=2)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.covers("C3", "D17")
def test_padding_mode_is_not_ignored_D17():
    """A circular convolution wraps around: shifting its input shifts its output (D17)."""
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular").double()
    factorize(layer, rank=2)
    x = _double(1, 3, 6, 6)
    torch.testing.assert_close(layer(x.roll(2, -1)), layer(x).roll(2, -1))


def test_assignment_factorizes_again():
    """``module.weight = W`` gives the factors of W at the rank that was chosen."""
    layer = nn.Linear(8, 6)
    factorize(layer, rank=3)
    W = torch.randn(6, 3) @ torch.randn(3, 8)
    held = [id(p) for p in layer.parameters()]
    layer.weight = W
    torch.testing.assert_close(layer.weight.materialize(), W, rtol=1e-4, atol=1e-4)
    assert [id(p) for p in layer.parameters()] == held


ZEROS = {
    "Linear": (lambda: nn.Linear(8, 6), torch.zeros(6, 8)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), torch.zeros(6, 4, 3, 3)),
    "groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), torch.zeros(6, 4, 3, 3)),
    "one group": (
        lambda: nn.Conv2d(8, 6, 3, groups=2),
        torch.cat([torch.ones(3, 4, 3, 3), torch.zeros(3, 4, 3, 3)]),
    ),
}
DERIVED = {
    **{name: functools.partial(LowRank, init=name) for name in ("spectral", "randomized")},
    "matched": functools.partial(LowRank, init="matched"),
    "deep": functools.partial(LowRank, depth=1),
    **{kind.__name__: kind for kind in (Tucker, TensorTrain, CP)},
    **{f"matched {k.__name__}": functools.partial(k, init="matched") for k in (Tucker, CP)},
}


@pytest.mark.filterwarnings("ignore:alternating least squares")
@pytest.mark.parametrize("make", DERIVED.values(), ids=DERIVED)
@pytest.mark.parametrize("case", ZEROS)
def test_zeros_never_become_factors(case, make):
    """One rule, however they come: factorized, assigned, loaded; nothing was changed then."""
    build, zeros = ZEROS[case]
    matrices = getattr(make, "func", make) is LowRank
    if case == "one group" and not matrices:
        return  # a tensor as a whole is not zero
    layer = build()
    factorize(layer, rank=2, parametrization=make)
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=r"zero.* never train"):
        layer.weight = zeros
    with pytest.raises((ValueError, RuntimeError), match=r"zero.* never train"):
        layer.load_state_dict({"weight": zeros, "bias": layer.bias})
    with pytest.raises(ValueError, match=r"weight.*zero.* never train"):
        frobdecay.load_dense_(layer, {"weight": zeros, "bias": layer.bias})
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))
    dense = build()
    dense.weight = nn.Parameter(zeros)
    with pytest.raises(ValueError, match=r"weight cannot be factorized: zero.* never train"):
        factorize(dense, rank=2, include="weight", parametrization=make)
    model = nn.Sequential(dense, nn.Linear(6, 6))
    assert "never train" in factorize(model, rank=2, parametrization=make).rows[0].reason


def test_initializations_that_do_not_look_at_the_weight_take_zeros():
    """Drawn factors train, whatever they replace; what somebody's own does is theirs to know."""

    def ones(weight, rank, *, depth):
        return weight.new_ones(len(weight), rank), weight.new_ones(weight.shape[1], rank)

    for init in ("kaiming", ones):
        layer = nn.Linear(8, 6)
        nn.init.zeros_(layer.weight)
        factorize(layer, rank=2, init=init)
        layer.weight = torch.zeros(6, 8)
        assert all(bool(p.any()) for p in layer.parametrizations.parameters())


def test_assignment_of_another_shape_is_refused():
    """The rank was chosen for one shape."""
    layer = nn.Linear(8, 6)
    factorize(layer, rank=3)
    with pytest.raises(ValueError, match="expected a weight of shape"):
        layer.weight = torch.randn(6, 9)


@pytest.mark.covers("P16")
def test_not_implemented_never_escapes_right_inverse():
    """Parametrize would take it for a missing inverse and go on without factors."""

    def half_svd(weight, rank, *, depth):
        raise NotImplementedError("not for half")

    layer = nn.Linear(8, 6)
    with pytest.raises(RuntimeError, match="initialization"):
        parametrize.register_parametrization(layer, "weight", LowRank(2, init=half_svd))
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 2), (6, 4, 3, 2, 2)])
def test_lowrank_registers_by_itself_on_a_tensor_of_any_shape(shape):
    """Without ``factorize``, the pattern follows the number of dimensions."""
    module = nn.Module()
    module.table = nn.Parameter(torch.randn(shape))
    dense = module.table.detach().clone()
    parametrize.register_parametrization(module, "table", LowRank(FULL))
    assert isinstance(module.table, FactoredTensor)
    torch.testing.assert_close(module.table.materialize(), dense, rtol=1e-4, atol=1e-5)
    assert [p.name for p in products(module)] == ["table"]


def test_materialized_lets_torch_remove_the_parametrization():
    """Torch's own way back works with the flag that merge uses."""
    layer = nn.Linear(8, 6)
    parametrize.register_parametrization(layer, "weight", LowRank(FULL))
    layer.parametrizations.weight[0].materialized = True
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert type(layer.weight) is nn.Parameter


def test_version_moves_when_a_weight_is_factorized():
    """An optimizer built earlier can notice; a mere assignment does not count."""
    layer, before = nn.Linear(8, 6), VERSION.value
    parametrize.register_parametrization(layer, "weight", LowRank(2))
    after = VERSION.value
    layer.weight = torch.randn(6, 8)
    assert before < after == VERSION.value


def test_factors_are_tall_and_contiguous():
    """FSDP2 refuses parameters that are not contiguous; tall factors shard on dimension 0."""
    layer = nn.Conv2d(4, 8, 3, groups=2)
    factorize(layer, rank=3)
    shapes = [tuple(p.shape) for p in layer.parametrizations.weight.parameters()]
    assert shapes == [(2, 12, 3), (2, 6, 3)]
    assert all(p.is_contiguous() for p in layer.parametrizations.weight.parameters())


@pytest.mark.covers("P12")
def test_attention_blocks_have_their_own_factors():
    """Queries, keys and values do not share a row space."""
    layer = nn.MultiheadAttention(8, 2)
    dense = layer.in_proj_weight.detach().clone()
    factorize(layer, rank=2, include="in_proj_weight")
    formed = layer.in_proj_weight.materialize()
    for block, original in zip(formed.chunk(3), dense.chunk(3), strict=True):
        tail = torch.linalg.svdvals(original)[2:].square().sum().sqrt()
        torch.testing.assert_close(torch.linalg.norm(block - original), tail, rtol=1e-4, atol=0)


def test_printing_shows_the_factors():
    """A printed model says what each weight became."""
    layer = nn.Linear(8, 6)
    factorize(layer, rank=2)
    assert "6×2 · 8×2" in repr(layer)
