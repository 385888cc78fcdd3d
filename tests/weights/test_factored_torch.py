"""The lazily materialized weight within the rest of torch: compilers, transforms, modules."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from factored_cases import assert_same, factored, forbidden, gradients_of, network
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge
from frobdecay.weights.forms.cost import force
from frobdecay.weights.lowrank import LowRank
from frobdecay.weights.product_tensor import ProductTensor

# --------------------------------------------------------------------------- with the rest of torch


@pytest.fixture
def compiler():
    """A compiler without remains of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.covers("P23")
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
    indices = torch.tensor([1, 2])
    functions = {
        "mul": lambda x: (layer.weight * 2 + layer.weight.view(6, 6)) @ x.T,
        "matmul": lambda x: x @ layer.weight.T @ layer.weight,
        "embedding": lambda x: F.embedding(indices, layer.weight, padding_idx=1) @ x.T,
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


@pytest.mark.covers("P23")
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


@pytest.mark.slow
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


STANCES = ["eager_on_recompile", "force_eager", "fail_on_recompile", "eager_then_compile"]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's, of a view
@pytest.mark.parametrize("stance", STANCES)
def test_stances_of_the_compiler_run(stance, compiler):
    """With what was compiled before, and with a weight that it was not compiled for."""
    x = torch.randn(2, 6)

    def use(W):
        rows = W[1:]  # read-only
        return F.linear(x, W).sum() + (W * 2).sum() + rows.sum() + (rows * W[:-1]).sum()

    compiled = torch.compile(use, backend="eager")
    compiled(factored(nn.Linear(6, 6)).weight)
    with torch.compiler.set_stance(stance):
        for size in (6, 6) if stance == "fail_on_recompile" else (4, 6):
            W = factored(nn.Linear(6, size)).weight
            torch.testing.assert_close(compiled(W), use(W))


@pytest.mark.covers("P17")
def test_a_write_in_a_compiled_function_raises(compiler):
    """Writes are refused while a graph is traced, too."""
    layer = factored(nn.Linear(5, 6))
    compiled = torch.compile(lambda: layer.weight.add_(1), backend="eager")
    with pytest.raises(Exception, match=r"module\.weight = W"):
        compiled()


@pytest.mark.covers("P23")
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


@pytest.mark.covers("D23", "P11")
def test_cached_forms_the_product_once():
    """One instance, one dense tensor within cached()."""
    layer = factored(nn.Linear(5, 6))
    with parametrize.cached():
        assert layer.weight is layer.weight
        assert (layer.weight * 2 / 2).shape == layer.weight.materialize().shape
    assert layer.weight is not layer.weight


@pytest.mark.covers("D22")
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
    with force(choice), torch.autocast(torch.get_default_device().type, torch.bfloat16):
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


@pytest.mark.covers("P23")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_follows_the_factors():
    """A traced model follows its factors and trains them, and nothing warns."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    traced = torch.jit.trace(model, (x,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    x = torch.randn(4, 3, 6, 6)
    assert_same(gradients_of(model, traced(x)), gradients_of(model, model(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_attention_is_traced(blocks):
    """Its packed projection is divided in the trace; torch's own function warns."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    kind = partial(LowRank, pattern="(b o) i -> b o i", axes={"b": blocks})
    factorize(layer, rank=2, parametrization=kind, include="in_proj_weight")
    x = torch.randn(2, 3, 8)
    traced = torch.jit.trace(layer, (x, x, x))
    assert_same(traced(x, x, x), layer(x, x, x), rtol=1e-4, atol=1e-5)


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


@pytest.mark.covers("P11", "P12")
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


@pytest.mark.covers("P12")
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


@pytest.mark.parametrize("include", ["*layers.0.*", "*layers.1.*", "*out_proj", "*1*linear2", None])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_equals_dense(include, grad):
    """Whichever of its layers and projections are factored, with padding, in eval; merged, too."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    encoder = nn.Sequential(nn.TransformerEncoder(layer, 2))
    factorize(encoder, rank=3, include=include)
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    theirs = encoder[0].train()(x, src_key_padding_mask=padding)
    encoder.eval()
    for after in (lambda: None, lambda: merge(encoder)):
        after()
        with torch.set_grad_enabled(grad):
            ours = encoder[0](x, src_key_padding_mask=padding)
        kept = ~padding[:, : ours.shape[1]]
        torch.testing.assert_close(
            ours[kept], theirs[:, : ours.shape[1]][kept], rtol=1e-4, atol=1e-5
        )
    assert encoder[0].use_nested_tensor


@pytest.mark.cpu("its rounded layers are of the CPU")
@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no engine")
@pytest.mark.filterwarnings("ignore:.*(deprecated|quantize_fx|reduce_range|must not run observer)")
def test_quantization_of_traced_graphs_sees_the_weight():
    """torch.fx's observes it and puts rounded layers in place of the factored ones."""
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    factorize(model, rank=4)
    x = torch.randn(64, 16)
    with torch.no_grad():
        observed = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (x,))
        observed(x)
        rounded = quantize_fx.convert_fx(observed)(x)
        assert 0 < (rounded - model(x)).abs().max() < 0.1 * model(x).abs().max()


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
