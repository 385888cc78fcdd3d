"""The lazily materialized weight equals the dense one, and is dense only when it has to be."""

import copy
import functools
import io
import operator
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from factored_cases import (
    assert_equal_dense,
    assert_same,
    dense_of,
    factored,
    forbidden,
    gradients_of,
    network,
    weight,
)
from gloo import run
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed._tools.mod_tracker import ModTracker
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from frobdecay.algebra.reading import Matricization
from frobdecay.weights import product_tensor
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.forms.cost import factors_cheaper
from frobdecay.weights.forms.matrix import matrix
from frobdecay.weights.product_tensor import ProductTensor

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


@pytest.mark.covers("P11")
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


@pytest.mark.covers("P11")
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
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
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


@torch.library.custom_op("frobdecay_tests::doubled", mutates_args={"w"})
def _doubled(w: Tensor) -> None:
    w.mul_(2)


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
    "inplace": lambda W: F.relu(W, inplace=True),
    "inplace module": lambda W: nn.Dropout(inplace=True)(W),
    "inplace row": lambda W: F.silu(W[0], inplace=True),
    "own operator": lambda W: _doubled(W),
    "own operator of a row": lambda W: _doubled(W[0]),
    "own overloads": lambda W: torch.ops.frobdecay_tests.doubled(W),
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


@pytest.mark.covers("P17")
@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_write_raises(name, grad):
    """A write that would be lost with this access raises and says what to do instead."""
    layer = factored(nn.Linear(5, 6, dtype=torch.float64))
    before = layer.weight.clone()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"module\.weight = W"):
        WRITES[name](layer.weight)
    torch.testing.assert_close(layer.weight.clone(), before)


@pytest.mark.cpu("numpy reads no other memory")
def test_an_array_of_the_weight_is_read_only():
    """A write to numpy's array over the formed weight would be lost as well."""
    W = weight("o i -> o i", (6, 5)).detach()
    for array in (W.numpy(), np.asarray(W), W[:2].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("name", ["retain_grad", "register_post_accumulate_grad_hook"])
def test_hooks_on_the_weights_gradient_raise(name):
    """The gradient of the weight is never formed, so nothing may wait for it."""
    arguments = () if name == "retain_grad" else (print,)
    with pytest.raises(RuntimeError, match="goes to its factors"):
        getattr(weight("o i -> o i", (6, 5)), name)(*arguments)


@pytest.mark.parametrize("others", [False, True])
def test_a_backward_pass_into_the_weight_raises(others):
    """It would go nowhere: each access of the weight is another tensor."""
    layer = factored(nn.Linear(5, 6), rank=2)
    inputs = [layer.weight, *([layer.bias] if others else [])]
    for backward in (Tensor.backward, torch.autograd.backward):
        with pytest.raises(RuntimeError, match=r"backward\(inputs=.*Use the factors"):
            backward(layer(torch.ones(2, 5)).sum(), inputs=inputs)
    assert all(param.grad is None for param in layer.parameters())
    layer(torch.ones(2, 5)).sum().backward(inputs=list(layer.parametrizations.parameters()))
    assert all(param.grad is not None for param in layer.parametrizations.parameters())


def test_a_hook_on_the_weights_gradient_warns():
    """A hook that never runs is told so, and can be removed."""
    made = weight("o i -> o i", (6, 5))
    for hook in (made.register_hook, lambda fn: register_multi_grad_hook([made], fn)):
        with pytest.warns(UserWarning, match="never runs") as told:
            hook(print).remove()
        assert told[0].filename == __file__


def test_flops_are_counted_on_the_factors():
    """The counter of torch sees the two products."""
    layer, x = factored(nn.Linear(64, 64), rank=4), torch.randn(10, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * 10 * 4 * (64 + 64)


TRACKERS = {
    "flops": functools.partial(FlopCounterMode, display=False),
    "modules": ModuleTracker,
    "distributed modules": ModTracker,
    "profiler": functools.partial(torch.profiler.profile, with_modules=True),
}


@pytest.mark.parametrize("name", TRACKERS)
def test_torchs_tools_that_follow_modules_run(name):
    """Though they hook onto what every module returns; a user's own tool is warned."""
    layer = factored(nn.Linear(64, 64), rank=4)
    with TRACKERS[name]() as tool:
        layer(torch.randn(10, 64)).sum().backward()
    assert name != "flops" or tool.get_total_flops() == 2 * 10 * 4 * (64 + 64) * 2 + 2 * 4 * 64 * 10
    hook = nn.modules.module.register_module_forward_hook(
        lambda _, __, y: y.register_hook(print) and None
    )
    with hook, pytest.warns(UserWarning, match="never runs"):
        layer.weight  # noqa: B018


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


def test_an_operator_below_autograd_gets_the_dense_numbers():
    """What passes by the interception is recorded for the weight, a function of its factors."""
    W, below = weight("o i -> o i", (6, 5)), torch._C.DisableTorchFunctionSubclass
    with below():
        (W.T * 2).square().sum().backward()
    for factor, wanted in zip(
        W.factors, torch.autograd.grad(4 * dense_of(W).square().sum(), W.factors), strict=True
    ):
        torch.testing.assert_close(factor.grad, wanted)
    for write in (lambda: W.add_(1), lambda: torch.add(torch.ones(6, 5), 1, out=W.detach())):
        with below(), pytest.raises(RuntimeError, match=r"module\.weight = W"):
            write()


# --------------------------------------------------------------------------- the choice


@pytest.mark.covers("C2", "P10")
@pytest.mark.parametrize(
    ("rows", "rank", "wins"),
    [(1, 8, True), (10**6, 8, True), (10**6, 31, True), (10**6, 33, False), (1, 33, True),
     (1, 64, True), (64, 64, True), (65, 64, False)],
)  # fmt: skip
def test_the_cheaper_way_is_chosen(rows, rank, wins):
    """On a square weight the factors win below half rank, and above it for few rows."""
    n = 64
    cost = {"dense": n * n, "factored": 2 * n * rank, "once": n * n * rank}
    assert factors_cheaper(lambda: rows, **cost) is wins


@pytest.mark.covers("C2", "D23")
def test_the_choice_is_followed(monkeypatch):
    """A high rank materializes for many rows and not for one."""
    W = weight("o i -> o i", (8, 8), rank=8)
    F.linear(torch.zeros(100, 8, dtype=torch.float64), W)
    assert W._memo is not None
    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    F.linear(torch.zeros(1, 8, dtype=torch.float64), W)


@pytest.mark.parametrize("pattern", ["o i -> o i", "o i -> i o", "(b o) i -> b o i"])
@pytest.mark.parametrize(("rank", "depth"), [(2, 0), (3, 0), (4, 0), (2, 1)])
def test_the_way_that_needs_no_choice_is_the_chosen_one(pattern, rank, depth):
    """Of square weights, whose factors look alike whichever way they are read."""
    axes = {"b": 2} if "b" in pattern else {}
    W = weight(pattern, (6, 6), rank=rank, depth=depth, **axes)
    assert W.direct == (pattern == "o i -> o i" and depth == 0 and rank <= 3)
    assert not W.direct or matrix(W).cheaper(lambda: 10**9)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, W), x @ W.materialize().mT)


@pytest.mark.parametrize(("gradients", "most"), [(True, 5), (False, 4)])
def test_few_functions_are_called_on_the_way_to_the_factors(gradients, most):
    """Between a layer and the functions of torch that it ends in: most of the time is calls."""
    layer, ours = nn.Linear(8, 8), []
    factored(layer, rank=2)

    def note(frame, event, _):
        if event == "call" and "frobdecay" in frame.f_globals.get("__name__", ""):
            ours.append(frame.f_code.co_name)

    x = torch.randn(1, 8)
    with torch.set_grad_enabled(gradients):
        layer(x)
        sys.setprofile(note)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
    assert 3 <= len(ours) <= most, ours


def test_more_function_calls_count_against_the_factors():
    """A form that calls more functions has to save more."""
    cost = {"dense": 100, "factored": 50, "once": 10}
    assert factors_cheaper(lambda: 10, **cost)
    assert not factors_cheaper(lambda: 10, **cost, calls=1)
    assert factors_cheaper(lambda: 10**6, **cost, calls=1)


# --------------------------------------------------------------------------- copies and averages


@pytest.mark.covers("P15")
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
@pytest.mark.parametrize(
    "kept", [lambda W: W, lambda W: W.detach(), lambda W: W.data, lambda W: W[:4]]
)
def test_a_weight_is_stored_as_the_dense_tensor(how, kept):
    """Pickle and torch.save keep numbers that the default torch.load reads."""
    W = weight("(b o) i -> b o i", (6, 5), depth=1, b=3)
    stream = io.BytesIO()
    (pickle.dump if how == "pickle" else torch.save)(kept(W.detach()), stream)
    stream.seek(0)
    back = pickle.load(stream) if how == "pickle" else torch.load(stream)
    assert type(back) is Tensor
    torch.testing.assert_close(back, kept(dense_of(W)).detach())


@pytest.mark.covers("P15")
@pytest.mark.parametrize("average", [None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)])
def test_averaged_models_average_the_factors(average):
    """AveragedModel, plain and EMA, runs and follows."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(x), model(x))


def parallel(rank, world):
    """Gradients in ``DistributedDataParallel``, and without."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    nn.parallel.DistributedDataParallel(model)(x).square().sum().backward()
    return [p.grad for p in model.parameters()], gradients_of(model, model(x))[1:]


@pytest.mark.covers("P24")
def test_distributed_data_parallel_takes_the_factors():
    """DDP registers the factors and gives their gradients."""
    assert_same(*run(parallel, 1)[0])


@pytest.mark.cpu("elsewhere the device is in it, as in those of all tensors")
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
    with pytest.warns(UserWarning, match="not a leaf"):
        assert W.grad is None
    W.backward(torch.ones(6, 5, dtype=torch.float64))
    assert all(f.grad is not None for f in W.factors)


@pytest.mark.covers("P21")
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_factor_stays_a_constant(frozen):
    """The other factor gets its gradient; the weight still requires one."""
    layer = factored(nn.Linear(5, 6))
    factors = list(layer.parametrizations.weight.parameters())
    factors[frozen].requires_grad_(False)
    assert layer.weight.requires_grad
    layer(torch.randn(2, 5)).sum().backward()
    assert [f.grad is None for f in factors] == [frozen == 0, frozen == 1]


class _Noted(FactoredTensor):
    """A weight of a class of its own."""

    def materialize(self):
        """Note it."""
        self.noted = True
        return super().materialize()


def test_a_class_of_ones_own_forms_its_dense_tensor_itself():
    """Whichever function asks for it."""
    W = weight("o i -> o i", (6, 5))
    own = _Noted(W.factors, W.matricization)
    torch.testing.assert_close(own * 2, W * 2)
    assert own.noted


class _Detaching(Tensor):
    """A factor of a class of its own."""

    def detach(self):
        """Note it."""
        made = super().detach()
        made.noted = True
        return made


def test_a_factor_of_ones_own_detaches_itself():
    """Where the weight is made without a graph."""
    W = weight("o i -> o i", (6, 5))
    with torch.no_grad():
        own = FactoredTensor([f.as_subclass(_Detaching) for f in W.factors], W.matricization)
    assert all(f.noted for f in own.factors)


@pytest.mark.parametrize("made", [lambda W: W, lambda W: W[1:]])
def test_the_protocol_takes_names(made):
    """Other classes of tensors may pass on what they are asked for by name."""
    W = made(weight("o i -> o i", (6, 5)))
    ours = type(W).__torch_function__(torch.sum, (type(W),), args=(W,), kwargs={})
    torch.testing.assert_close(ours, W.sum())


@pytest.mark.parametrize("entries", [4095, 4096, 4097])
def test_what_is_kept_of_weights_looks_is_bounded(entries, monkeypatch):
    """Also where two threads have added an entry at once."""
    known = dict.fromkeys(range(entries))
    monkeypatch.setattr(product_tensor, "_known", known)
    W = weight("o i -> o i", (6, 5))
    assert len(known) == (entries + 1 if entries < 4096 else 1)
    torch.testing.assert_close(W.materialize(), dense_of(W))


@pytest.mark.cpu("numpy reads no other memory")
def test_numpy_reads_the_dense_values():
    """A detached weight converts to an array."""
    W = weight("o i -> o i", (6, 5))
    torch.testing.assert_close(torch.from_numpy(W.detach().numpy().copy()), dense_of(W).detach())
