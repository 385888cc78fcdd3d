"""The gradient of a factored weight reaches its factors wherever the weight goes."""

import copy
import io
import os
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from factored_cases import assert_same, dense_of, factored, weight
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.lowrank import LowRank
from frobdecay.weights.tensors import CP, TensorTrain, Tucker


def _linear(**options):
    return factored(nn.Linear(5, 6, bias=False, dtype=torch.float64), **options)


def _made(layer, made, name="weight"):
    parametrize.register_parametrization(layer, name, made)
    return layer


def _conv():
    return nn.Conv2d(4, 6, 3, bias=False, dtype=torch.float64)


PRODUCTS = {
    "plain": lambda: _linear(rank=2),
    "deep": lambda: _linear(rank=2, depth=2),
    "conv": lambda: factored(_conv(), rank=2, depth=1),
    "heads": lambda: _linear(rank=2, pattern="(h d) e -> h d e", h=3),
    "packed": lambda: factored(
        nn.MultiheadAttention(4, 2, dtype=torch.float64),
        "in_proj_weight", rank=2, depth=1, pattern="(b o) i -> b o i", b=3,
    ),
    "LowRank": lambda: _made(_linear_dense(), LowRank(2, depth=1)),
    "Tucker": lambda: _made(_conv(), Tucker((3, 3, 5))),
    "TensorTrain": lambda: _made(_conv(), TensorTrain(2)),
    "CP": lambda: _made(_conv(), CP(3)),
    "flat CP": lambda: _made(_linear_dense(), CP(2)),
}  # fmt: skip


def _linear_dense():
    return nn.Linear(6, 8, bias=False, dtype=torch.float64)


def _read(layer):
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight


def _dense(layer):
    """The same weight by torch alone."""
    value = _read(layer)
    return dense_of(value) if isinstance(value, FactoredTensor) else value


class OldStyle(torch.autograd.Function):
    """A product in the style of old, whose backward reads the weight."""

    @staticmethod
    def forward(ctx, x, w):
        """Multiply."""
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        """Both gradients."""
        x, w = ctx.saved_tensors
        return (grad * w).sum(), x * grad


class NewStyle(torch.autograd.Function):
    """The same with ``setup_context``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        """Multiply."""
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep both."""
        ctx.save_for_backward(*inputs)

    backward = OldStyle.backward


class StraightThrough(torch.autograd.Function):
    """Signs forward, the gradient as it is backward."""

    @staticmethod
    def forward(ctx, w):
        """Signs."""
        return w.sign()

    @staticmethod
    def backward(ctx, grad):
        """The gradient, scaled."""
        return grad * 3


_scripted = torch.jit.CompilationUnit("def f(w):\n    return w.flatten().cumsum(0)\n").f


def _below(call):
    def run(w):
        with torch._C.DisableTorchFunctionSubclass():
            return call(w)

    return run


def _vjp(w):
    out, pull = torch.func.vjp(lambda v: v.square(), w)
    return out + pull(out)[0]


def _nested_checkpoint(inner, outer, w):
    within = lambda v: checkpoint(lambda u: u.exp() * u, v, use_reentrant=inner)  # noqa: E731
    return checkpoint(within, w, use_reentrant=outer)


two = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
WAYS = {
    "old style": lambda w: OldStyle.apply(two, w),
    "new style": lambda w: NewStyle.apply(two, w),
    "straight through": StraightThrough.apply,
    "straight through detach": lambda w: w * 2 + (w.sign() - w * 2).detach(),
    "twice": lambda w: StraightThrough.apply(w) + OldStyle.apply(two, w) + w,
    "of a transpose": lambda w: OldStyle.apply(two, w.mT),
    "of a cast": lambda w: OldStyle.apply(two.float(), w.float()).double(),
    "scripted": _scripted,
    "checkpoint": lambda w: checkpoint(lambda v: v.exp() * v, w, use_reentrant=False),
    "reentrant checkpoint": lambda w: checkpoint(lambda v: v.exp() * v, w, use_reentrant=True),
    **{
        f"nested checkpoint {inner} {outer}": partial(_nested_checkpoint, inner, outer)
        for inner in (True, False)
        for outer in (True, False)
    },
    "vjp": _vjp,
    "func.grad": lambda w: torch.func.grad(lambda v: v.pow(3).sum())(w),
    "vmap": lambda w: torch.func.vmap(lambda row: row.square())(w),
    "vmap inside": lambda w: torch.func.vmap(lambda t: t * (w * w).sum())(two.detach().expand(3)),
    "jacrev": lambda w: torch.func.jacrev(lambda v: v.square().sum())(w),
    "jvp": lambda w: torch.func.jvp(lambda v: v.square(), (w,), (torch.ones_like(w),))[1],
    "multiply below": _below(lambda w: w * w),
    "transpose below": _below(lambda w: w.transpose(0, 1) * 2),
    "view below": _below(lambda w: w.reshape(-1)[3:]),
    "split below": _below(lambda w: w.split(2)[1]),
    "stack below": _below(lambda w: torch.stack([w, w.detach() * 2, w])),
    "cast below": _below(lambda w: w.float().double()),
    "autocast below": _below(lambda w: torch.linalg.vector_norm(w) * w),
}


def _gradients(layer, call):
    layer.zero_grad()
    out = call()
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # within torch's jvp
def test_every_way_out_gives_the_factors_their_gradients(way, product):
    """What never asks ``__torch_function__`` still gives values and gradients of the dense."""
    torch.manual_seed(0)
    layer = PRODUCTS[product]()
    ours = _gradients(layer, lambda: WAYS[way](_read(layer)))
    theirs = _gradients(layer, lambda: WAYS[way](_dense(layer)))
    assert len(ours) == len(theirs) > 2
    single = {"rtol": 1e-5, "atol": 1e-5} if "cast" in way else {}
    assert_same(ours, theirs, **single)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # within torch
def test_dual_tensors_of_the_weight_and_of_factors(product, inside):
    """Forward mode: a dual weight is dense, and a dual factor's tangent goes through the weight."""
    torch.manual_seed(0)
    layer = PRODUCTS[product]()
    before = _read(layer)
    tangent = torch.randn(before.shape, dtype=before.dtype)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(_read(layer) if inside else before, tangent)
        found = forward_ad.unpack_dual(dual * dual)
        wanted = 2 * _dense(layer) * tangent
        torch.testing.assert_close(found.tangent, wanted)
        name, U = next((n, p) for n, p in layer.named_parameters() if "original" in n)
        moved = forward_ad.make_dual(U.detach(), torch.ones_like(U))
        out = torch.func.functional_call(Squared(layer), {f"layer.{name}": moved}, ())
        found = forward_ad.unpack_dual(out).tangent
    (wanted,) = torch.autograd.grad(_read(layer).square().sum(), U)
    torch.testing.assert_close(found, wanted.sum())


class Squared(nn.Module):
    """The squared norm of a layer's weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        """Sum of squares."""
        return _read(self.layer).square().sum()


@pytest.mark.parametrize("way", ["old style", "new style", "straight through"])
@pytest.mark.filterwarnings("ignore")
def test_a_function_in_compiled_code(way):
    """A compiled Function's weight trains its factors, as its only trainable input too."""
    torch._dynamo.reset()
    layer, x = _linear(), torch.randn(3, 5, dtype=torch.float64)
    call = lambda x: F.linear(x, WAYS[way](layer.weight))  # noqa: E731
    ours = _gradients(layer, lambda: torch.compile(call, backend="aot_eager")(x))
    assert_same(ours, _gradients(layer, lambda: F.linear(x, WAYS[way](_dense(layer)))))
    torch._dynamo.reset()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_factor_gets_none_below_autograd(frozen):
    """The others get theirs."""
    layer = _linear(depth=1)
    factors = list(layer.parameters())
    factors[frozen].requires_grad_(False)
    ours = _gradients(layer, lambda: StraightThrough.apply(layer.weight))
    assert factors[frozen].grad is None
    assert_same(ours, _gradients(layer, lambda: StraightThrough.apply(_dense(layer))))


@pytest.mark.parametrize("product", ["plain", "deep", "conv", "heads", "Tucker"])
def test_gradients_of_gradients(product):
    """The dense weight's gradient is differentiable, twice and three times."""
    layer, found = PRODUCTS[product](), []
    for read in (lambda: _read(layer) * 1, lambda: _dense(layer)):
        parameters, value = list(layer.parameters()), read().pow(3).sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, parameters, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        found.append([value.detach(), *(g.detach() for g in grads)])
    assert_same(*found)


def test_a_weight_that_torch_keeps_detached_stays_in_the_graph():
    """What hooks keep of a saved weight is put back into the graph, and is used from there."""
    layer, found = _linear(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t)
    for w in (layer.weight, _dense(layer)):
        with hooks:
            out = OldStyle.apply(two, w)
        kept = out.grad_fn.saved_tensors[1]
        assert kept.requires_grad
        assert not kept.is_leaf
        value = F.linear(kept[:, :5], kept).square().sum() + out.sum()
        found.append(torch.autograd.grad(value, list(layer.parameters()), create_graph=True))
    assert_same(*found)


def test_a_factor_changed_before_the_backward_pass_raises():
    """As torch does for what it has saved."""
    layer = _linear()
    out = layer.weight * 2
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_is_saved_for_the_dense_weight():
    """Hooks on saved tensors, as of a checkpoint, see the same with and without the memo."""
    W, packed = weight("o i -> o i", (6, 5)), []
    x = torch.randn(3, 5, dtype=torch.float64)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t)
    with hooks:
        (x @ (W * 2).mT).sum()
        first = len(packed)
        (x @ (W * 2).mT).sum()
    assert len(packed) == 2 * first


class Reads(nn.Module):
    """Reads a table's weight outside of a checkpointed function and uses it inside."""

    def __init__(self, how):
        super().__init__()
        self.table, self.layer, self.how = nn.Embedding(16, 8), nn.Linear(8, 8), how

    def inside(self, x, table):
        """Use the weight as a factored and as a dense one."""
        return torch.tanh(self.layer(x)) @ (table * 2).mT + F.linear(x, table)

    def forward(self, x, run):
        """Call ``inside`` through ``run``."""
        if self.how == "cached":
            with parametrize.cached():
                return run(lambda x: self.inside(x, self.table.weight), x)
        table = self.table.weight
        if self.how == "read twice":
            table.sum()
        if self.how == "closure":
            return run(lambda x: self.inside(x, table), x)
        out = run(self.inside, x, table)
        return out + run(self.inside, x + 1, table) if self.how == "two layers" else out


@pytest.mark.parametrize("how", ["argument", "two layers", "closure", "cached", "read twice"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_weight_read_outside_of_a_checkpoint(how, reentrant):
    """Whatever was formed outside, the recomputation saves the same and gives the gradients."""
    model, x = Reads(how), torch.randn(3, 8, requires_grad=True)
    factored(model.table)
    factored(model.layer)
    run = lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)  # noqa: E731
    theirs = _gradients(model, lambda: model(x, lambda f, *a: f(*a)))
    ours = _gradients(model, lambda: model(x, run))
    assert_same(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_a_transform_forms_does_not_outlive_it():
    """The dense tensor formed inside of a function transform is not given to anybody outside."""
    W = weight("o i -> o i", (6, 5))

    def constant(t):
        with torch.no_grad():
            return (W * t.detach()).sum() + t

    torch.func.grad(constant)(two.detach())
    with torch.no_grad():
        assert not torch._C._functorch.is_functorch_wrapped_tensor(W.materialize())
        torch.testing.assert_close(W * 1, dense_of(W))


# --------------------------------------------------------------------------- other tensors


class Plain(Tensor):
    """A subclass that overrides nothing."""


class Strict(Tensor):
    """A subclass that takes no other tensors than its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """As any, if there are no others."""
        if not all(issubclass(kind, (cls, nn.Parameter)) for kind in types):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


def _nested(layout, *parts):
    return torch.nested.nested_tensor(list(parts), layout=layout)


def _rows(*sizes):
    return [torch.randn(n, 8) for n in sizes]


INPUTS = {
    "jagged": (nn.Linear, lambda: _nested(torch.jagged, *_rows(3, 5))),
    "jagged, 4 dimensions": (
        nn.Linear, lambda: _nested(torch.jagged, torch.randn(3, 2, 8), torch.randn(5, 2, 8)),
    ),
    "strided": (nn.Linear, lambda: _nested(torch.strided, *_rows(3, 5))),
    "jagged ids": (
        nn.Embedding, lambda: _nested(torch.jagged, torch.arange(3), torch.tensor([1, 7]))
    ),
    "jagged bags": (
        nn.EmbeddingBag, lambda: _nested(torch.jagged, torch.arange(3), torch.tensor([1, 7]))
    ),
    "sparse": (nn.Linear, lambda: _rows(3)[0].relu().to_sparse()),
    "compressed": (nn.Linear, lambda: _rows(3)[0].relu().to_sparse_csr()),
    "oneDNN": (nn.Linear, lambda: _rows(3)[0].to_mkldnn()),
    "plain subclass": (nn.Linear, lambda: _rows(3)[0].as_subclass(Plain)),
    "strict subclass": (nn.Linear, lambda: _rows(3)[0].as_subclass(Strict)),
    "buffer": (nn.Linear, lambda: nn.Buffer(_rows(3)[0])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR tensor")
@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_are_no_plain_tensors(name, rank):
    """Equal to the dense layer, forward and backward, whoever's interception runs first."""
    kind, make = INPUTS[name]
    layer, x = factored(kind(8, 8), rank=rank, depth=1), make()
    parameters, found = list(layer.parametrizations.weight.parameters()), []
    twin = kind(8, 8)
    twin.load_state_dict({"weight": layer.weight}, strict=False)
    if kind is nn.Linear:
        twin.bias = layer.bias
    for module in (layer, twin):
        out = module(x)
        out = out.to_dense() if out.is_mkldnn else out
        out = torch.cat(out.unbind()) if out.is_nested else out.as_subclass(Tensor)
        out.square().sum().backward()
        found.append(out.detach())
    wanted = torch.autograd.grad(dense_of(layer.weight), parameters, twin.weight.grad)
    ours = [found[0], *(p.grad for p in parameters)]
    assert_same(ours, [found[1], *wanted], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- detached weights


def test_a_detached_weight_may_gather_its_own_gradient():
    """``W.detach().requires_grad_()`` is a leaf with a dense gradient; the factors get none."""
    layer, x = _linear(), torch.randn(3, 5, dtype=torch.float64)
    for again in (lambda w: w, copy.deepcopy):
        W = again(layer.weight.detach().requires_grad_())
        assert W.is_leaf
        assert W.requires_grad
        F.linear(x, W.t().t()).square().sum().backward()
        D = dense_of(layer.weight).detach().requires_grad_()
        F.linear(x, D).square().sum().backward()
        torch.testing.assert_close(W.grad, D.grad)
    assert all(p.grad is None for p in layer.parameters())
    assert not W.requires_grad_(False).requires_grad


def test_a_formed_view_may_be_a_leaf():
    """So may what was cut from the dense tensor; writes to it stay refused."""
    view = weight("o i -> o i", (6, 5))[:4].detach().requires_grad_()
    view.square().sum().backward()
    torch.testing.assert_close(view.grad, 2 * view.detach() + 0)
    with pytest.raises(RuntimeError, match=r"module\.weight = W"):
        view.detach().zero_()


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "cut",
    [lambda W: W, lambda W: W[:4], lambda W: W.view(-1)[:24].view(4, 6), lambda W: W.detach(),
     lambda W: W.data, lambda W: W.t(), lambda W: W.float()],
)  # fmt: skip
def test_a_parameter_of_a_weight_is_a_dense_copy(cut, grad, requires_grad):
    """``nn.Parameter(W)`` keeps the numbers, trains and can be written to."""
    layer = _linear()
    with torch.set_grad_enabled(grad):
        kept = nn.Parameter(cut(layer.weight), requires_grad=requires_grad)
    assert type(kept) is nn.Parameter
    assert kept.is_leaf
    assert kept.requires_grad is requires_grad
    torch.testing.assert_close(kept.detach(), cut(dense_of(layer.weight)).detach())
    with torch.no_grad():
        kept.zero_()
    assert layer.weight.norm() > 0


# --------------------------------------------------------------------------- out through C++


def _set_data(b, w):
    b.weight.data = w


def _set(b, w):
    with torch.no_grad():
        b.weight.set_(w)


def _assign(b, w):
    b.load_state_dict({"weight": w}, assign=True)


INTO = {
    "data": _set_data,
    "set_": _set,
    "swap_tensors": lambda b, w: torch.utils.swap_tensors(b.weight, w),
    "parameter": lambda b, w: setattr(b, "weight", nn.Parameter(w, requires_grad=False)),
    "copy_": lambda b, w: b.weight.data.copy_(w),
    "load": lambda b, w: b.load_state_dict({"weight": w}),
    "assign": _assign,
}


def _pointer(w):
    with torch._C.DisableTorchFunctionSubclass():
        return w.data_ptr()


def _capsule(w):
    return torch.from_dlpack(torch._C._to_dlpack(w))


def _stored(w):
    stream = io.BytesIO()
    torch.save(w, stream)
    stream.seek(0)
    return torch.load(stream)


OUT = {
    "data_ptr": lambda w: w.t().data_ptr() and w,
    "pointer below": _pointer,
    "capsule": _capsule,
    "dlpack": torch.from_dlpack,
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "list": lambda w: torch.tensor(w.tolist(), dtype=w.dtype),
    "storage": lambda w: torch.empty(0, dtype=w.dtype).set_(w.untyped_storage(), 0, (6, 5)),
    "save": _stored,
    "share_memory_": lambda w: w.share_memory_(),
    "as_subclass": lambda w: w.as_subclass(Tensor),
    "make_subclass": lambda w: Tensor._make_subclass(Tensor, w),
    "as_strided": lambda w: w.as_strided((6, 5), (5, 1)),
}
MODES = {"grad": torch.enable_grad, "no": torch.no_grad, "inference": torch.inference_mode}
LEAVING = {
    "W": lambda W: W,
    "data": lambda W: W.data,
    "detach": lambda W: W.detach(),
    "transpose": lambda W: W.t().t(),
    "float": lambda W: W.float().double(),
    "slice": lambda W: W[:],
}


def _forked(call):
    """What a call returns in a process of its own, or the signal that it died of."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            os.write(writing, call().encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        told = stream.read().decode()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else told


def _into(leave, into, mode):
    with mode():
        return _put(leave, into)


def _put(leave, into):
    layer, b = _linear(), nn.Linear(5, 6, bias=False, dtype=torch.float64)
    before, dense = b.weight.detach().clone(), dense_of(layer.weight).detach()
    try:
        into(b, leave(layer.weight).detach() if into is _set else leave(layer.weight))
    except (RuntimeError, TypeError):
        assert torch.equal(b.weight.detach(), before)
        return "refused"
    torch.testing.assert_close(b.weight.detach() + 0, dense)
    torch.testing.assert_close(b(torch.eye(5, dtype=torch.float64)).t(), dense)
    torch.testing.assert_close(torch.tensor(b.weight.tolist(), dtype=dense.dtype), dense)
    return "dense"


def _out(leave, out, mode):
    layer = _linear()
    dense = dense_of(layer.weight).detach()
    with mode():
        try:
            found = out(leave(layer.weight).detach())
        except (RuntimeError, TypeError, BufferError):
            return "refused"
    if isinstance(found, Tensor):
        torch.testing.assert_close(found.detach() + 0, dense)
        torch.testing.assert_close(torch.tensor(found.tolist(), dtype=dense.dtype), dense)
    return "dense"


@pytest.mark.cpu("a child of fork has no GPU")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore")
def test_no_way_through_cpp_reads_memory_that_is_not_there():
    """Into another tensor, to a pointer, an array or a file: dense, or refused, never a signal."""
    calls = {
        f"{into} {leave} {mode}": lambda i=INTO[into], w=LEAVING[leave], m=MODES[mode]: _into(
            w, i, m
        )
        for into in INTO
        for leave in LEAVING
        for mode in MODES
    }
    calls |= {
        f"{out} {leave} {mode}": lambda o=OUT[out], w=LEAVING[leave], m=MODES[mode]: _out(w, o, m)
        for out in OUT
        for leave in LEAVING
        for mode in MODES
    }
    told = _forked(lambda: "\n".join(f"{name}: {call()}" for name, call in calls.items()))
    lines = dict(line.split(": ", 1) for line in told.splitlines())
    assert set(lines.values()) == {"dense", "refused"}, told
    assert lines.keys() == calls.keys()
    for mode in MODES:
        dense = lines[f"data data {mode}"], lines[f"save W {mode}"], lines[f"numpy detach {mode}"]
        assert set(dense) == {"dense"}, mode
        refused = (f"data W {mode}", f"pointer below W {mode}", f"capsule W {mode}")
        assert {lines[name] for name in refused} == {"refused"}, mode
