"""What must work or be refused: on modules of every kind, and around factorized models."""

import copy
import inspect
import io
import pickle
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from refused_weights import FATAL, REFUSED
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import frobdecay
from frobdecay import CP, LowRank, TensorTrain, Tucker, factorize, merge
from frobdecay.algebra.decompositions import cp_als, hooi, hosvd, tt_svd

KINDS = pytest.mark.parametrize("kind", [CP, TensorTrain, Tucker])
ALL_KINDS = pytest.mark.parametrize("kind", [CP, LowRank, TensorTrain, Tucker])


def unchanged(model):
    """Whether nothing of the model is parametrized."""
    return not any(map(parametrize.is_parametrized, model.modules()))


# --- tensors --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("case", REFUSED)
def test_tensors_take_no_weight_that_matrices_do_not(kind, case):
    """Modules whose forward, hooks or format cannot take factors: named, an error."""
    make, reason = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=rf"(?s)bad\.weight.*{reason}"):
        factorize(model, rank=2, include="bad", parametrization=kind)
    assert frobdecay.products(model) == []


@KINDS
@pytest.mark.parametrize("case", FATAL)
def test_tensors_need_numbers(kind, case):
    """NaN, lazy and meta weights, swept in or not."""
    make, message = FATAL[case]
    model = make()
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        factorize(model, rank=2, parametrization=kind)
    assert unchanged(model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_parameters_are_left_or_refused_by_name(layout):
    """They have no strides; what is beside them is factorized."""

    def make():
        model = nn.Sequential(nn.Linear(8, 8), nn.Module())
        rows = torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(5, 8)], layout=layout)
        model[1].rows = nn.Parameter(rows)
        return model

    model = make()
    assert factorize(model, rank=2).ranks == {"0.weight": 2}
    with pytest.raises(ValueError, match=r"1\.rows cannot be factorized: .*(nested|NestedTensor)"):
        factorize(make(), rank=2, include=["0", "1.rows"])
    assert isinstance(merge(model)[0].weight, nn.Parameter)


@KINDS
@pytest.mark.parametrize("pattern", ["o i kh kw -> o i (kh kw)", "o -> o 1"])
def test_patterns_of_another_order_are_refused(kind, pattern):
    """A pattern for tensors that the model has not: with the weights there are."""
    model = nn.Sequential(nn.Linear(12, 10))
    with pytest.raises(ValueError, match=r"0\.weight"):
        factorize(model, rank=2, include="0", parametrization=partial(kind, pattern=pattern))
    assert unchanged(model)


@pytest.mark.parametrize(("decompose", "ranks"), [(hosvd, (1,)), (tt_svd, ()), (cp_als, 1)])
def test_vectors_have_no_decomposition(decompose, ranks):
    """Nor have numbers."""
    for tensor in (torch.ones(4), torch.tensor(2.0)):
        with pytest.raises(ValueError, match=r"got \(4?,?\)"):
            decompose(tensor, ranks)


@pytest.mark.parametrize(
    ("decompose", "ranks", "message"),
    [
        (hosvd, (1, 1), "expected 3 ranks, one for each mode of 3×4×5"),
        (hooi, (1, 1, 1, 1), "expected 3 ranks, one for each mode of 3×4×5"),
        (hosvd, (4, 4, 4), "expected Tucker ranks that fit 3×4×5"),
        (tt_svd, (1,), "expected 2 ranks, one for each bond"),
        (tt_svd, (1, 1, 1), "expected 2 ranks, one for each bond"),
        (tt_svd, (9, 9), "expected tensor train ranks that fit 3×4×5"),
        (cp_als, 0, "rank above 0"),
    ],
)
def test_decompositions_refuse_ranks_that_do_not_fit(decompose, ranks, message):
    """Too few, too many and too large, with what fits."""
    with pytest.raises(ValueError, match=message):
        decompose(torch.randn(3, 4, 5), ranks)


@pytest.mark.filterwarnings("error")
def test_als_that_does_not_converge_says_so_before_anything_changed():
    """A warning, which as an error leaves the model dense."""
    model = nn.Sequential(nn.Linear(12, 10))
    impatient = partial(CP, init=partial(cp_als, sweeps=1, tolerance=0.0))
    with pytest.raises(RuntimeWarning, match="did not converge in 1 sweeps"):
        factorize(model, rank=2, parametrization=impatient)
    assert unchanged(model)


def test_a_decomposition_that_fails_names_the_weight(monkeypatch):
    """An error with the module's name, and the model as it was."""

    def failing(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    model = nn.Sequential(nn.Linear(27, 27))
    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(RuntimeError, match=r"^0\.weight: did not converge"):
        factorize(model, rank=2, parametrization=CP)
    assert unchanged(model)


# --- around factorized models ---------------------------------------------------------------------


@pytest.mark.covers("P15")
def test_a_module_that_cannot_be_pickled_says_what_can():
    """The error names the state_dict and our files; the merged module pickles."""
    layer = nn.Linear(6, 4)
    factorize(layer, rank=2)
    for save in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(RuntimeError, match=r"state_dict.*save_factorized.*unroll or merge"):
            save(layer)
    twin = pickle.loads(pickle.dumps(merge(layer)))
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("act", [partial(factorize, rank=2), merge, frobdecay.unroll])
def test_the_verbs_work_in_place_and_say_so(act):
    """In their first lines, with what to do for a copy, which leaves the model as it was."""
    text = inspect.getdoc(getattr(act, "func", act))
    assert "in place" in text.partition("\n")[0]
    assert "``copy.deepcopy(model)``" in text
    model = nn.Sequential(nn.Linear(6, 4))
    if act in (merge, frobdecay.unroll):
        factorize(model, rank=2)
    before = list(model.state_dict())
    act(copied := copy.deepcopy(model))
    assert list(model.state_dict()) == before != list(copied.state_dict())


@pytest.mark.covers("P8")
def test_the_dense_weight_is_let_go():
    """Nothing keeps it alive beside its factors."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    dense = [weakref.ref(model[i].weight) for i in range(3)]
    factorize(model, rank=2)
    assert [ref() for ref in dense] == [None] * 3


@pytest.mark.covers("P21")
def test_freezing_goes_through_the_module_before_and_after():
    """``requires_grad_`` of the module reaches the factors; of the weight, it is refused."""
    before, after = nn.Linear(6, 4), nn.Linear(6, 4)
    before.requires_grad_(False)
    factorize(before, rank=2)
    factorize(after, rank=2)
    with pytest.raises(RuntimeError, match=r"freeze .* the\s+factors themselves"):
        after.weight.requires_grad_(False)
    after.requires_grad_(False)
    assert not [p for layer in (before, after) for p in layer.parameters() if p.requires_grad]


@pytest.mark.covers("P23")
def test_factorizing_while_compiling_changes_nothing():
    """A whole graph cannot hold it: torch's error, and a dense model."""
    model = nn.Sequential(nn.Linear(6, 4))

    def run(x):
        factorize(model, rank=2)
        return model(x)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(torch.randn(3, 6))
    assert unchanged(model)


@pytest.mark.covers("C18")
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_merged_layer_can_be_factorized_at_another_rank(rank):
    """Again with the smallest error there is, whatever the first rank was."""
    layer = nn.Linear(12, 10, dtype=torch.float64)
    factorize(layer, rank=4)
    dense = merge(layer).weight.detach().clone()
    factorize(layer, rank=rank)
    error = (layer.weight.materialize() - dense).norm().detach()
    tail = torch.linalg.svdvals(dense)[rank:].norm()
    torch.testing.assert_close(error, tail, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", [CP, LowRank, TensorTrain, Tucker])
def test_a_forward_of_ones_own_computes(kind):
    """Whatever it does with its weight is right, if not cheap."""

    class Own(nn.Linear):
        def forward(self, x):
            return torch.einsum("bi,oi->bo", x, self.weight.abs().view(4, 6)) + self.weight.sum()

    layer = Own(6, 4, bias=False)
    factorize(layer, rank=2, parametrization=kind)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), merge(layer)(x), rtol=1e-5, atol=1e-6)


class Packed(torch.Tensor):
    """A weight format of somebody else."""


def _written(value):
    def write(layer):
        layer.weight = value

    return write


def _dual(layer):
    with forward_ad.dual_level():
        layer.weight = forward_ad.make_dual(torch.ones(4, 6), torch.ones(4, 6))


MERGE = "merge or unroll"
# What is done to a factorized layer -> the error, and what it says.
OTHERS = {
    "number": (_written(3), TypeError, f"Linear.weight, got a int; {MERGE}"),
    "None": (_written(None), TypeError, "Linear.weight, got a NoneType"),
    "registered None": (
        lambda layer: layer.register_parameter("weight", None), TypeError, "got a NoneType"),
    "packed": (
        _written(nn.Parameter(torch.ones(4, 6).as_subclass(Packed))), TypeError,
        f"plain nn.Parameter for the factorized Linear.weight, got a Packed; {MERGE}"),
    "shape": (_written(nn.Parameter(torch.ones(6, 4))), ValueError, "Linear.weight: .*merge first"),
    "dtype": (_written(torch.ones(4, 6).double()), ValueError, "expected a weight of torch.flo"),
    "gradient": (_written(torch.ones(4, 6, requires_grad=True)), ValueError, "without a graph"),
    "functional call": (
        lambda layer: torch.func.functional_call(
            layer, {"weight": torch.ones(4, 6, requires_grad=True)}, torch.ones(2, 6)),
        ValueError, "Linear.weight: .*functional_call the factors by their own names"),
    "functional call of a weight": (
        lambda layer: torch.func.functional_call(
            layer, {"weight": torch.ones(4, 6)}, torch.ones(2, 6)),
        ValueError, "Linear.weight: .*functional_call the factors by their own names"),
    "functional call without a graph": (
        torch.no_grad()(lambda layer: torch.func.functional_call(
            layer, {"weight": nn.Parameter(torch.ones(4, 6))}, torch.ones(2, 6))),
        ValueError, "Linear.weight: .*functional_call the factors by their own names"),
    "tangent": (_dual, ValueError, "without a graph"),
    "script": (torch.jit.script, RuntimeError, "got a factorized Linear.*unroll.*torch.export"),
    "integers": (_written(torch.ones(4, 6).int()), TypeError, "Linear.weight: .* convert it"),
    "meta": (_written(torch.ones(4, 6, device="meta")), TypeError, "Linear.weight: .* meta device"),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5), TypeError,
        f"parameter 'weight_orig' of a Linear in its own right, but its weight .*; {MERGE}"),
    "global pruning": (
        lambda layer: prune.global_unstructured(
            [(layer, "weight")], prune.L1Unstructured, amount=0.5), TypeError, MERGE),
    "a parameter inside": (
        lambda layer: layer.register_parameter("parametrizations.weight.original0", None),
        TypeError, f"{MERGE} .*ColwiseFactored and RowwiseFactored"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("case", OTHERS)
@ALL_KINDS
def test_what_products_cannot_be_given_is_refused(kind, case):
    """Named, with what to do; the layer computes what it did."""
    act, error, message = OTHERS[case]
    layer, x = nn.Linear(6, 4), torch.ones(2, 6)
    factorize(layer, rank=2, parametrization=kind)
    expected, before = layer(x), copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=f"(?s){message}"):
        act(layer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("parameter", [True, False])
@ALL_KINDS
def test_an_assigned_weight_is_factorized(kind, parameter, requires_grad):
    """A parameter as a tensor; the factors stay the objects that an optimizer has."""
    layer, twin = (nn.Sequential(nn.Linear(6, 4)) for _ in range(2))
    factorize(layer, rank=2, parametrization=kind)
    factors = [*layer.parameters()]
    weight = torch.linspace(-1, 1, 24).sin().view(4, 6)
    twin[0].weight = nn.Parameter(weight)
    factorize(twin, rank=2, parametrization=kind)
    layer[0].weight = nn.Parameter(weight, requires_grad) if parameter else weight
    x = torch.eye(6)
    one, other = (model(x) - model[0].bias for model in (layer, twin))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(one is other for one, other in zip(layer.parameters(), factors, strict=True))
    trained = {p.requires_grad for p in layer[0].parametrizations.parameters()}
    assert trained == {requires_grad or not parameter}


@pytest.mark.parametrize(
    ("make", "norm", "fuse"),
    [
        (lambda: nn.Linear(6, 4), nn.BatchNorm1d, nn.utils.fuse_linear_bn_eval),
        (lambda: nn.Conv2d(6, 4, 1), nn.BatchNorm2d, nn.utils.fuse_conv_bn_eval),
    ],
)
def test_normalizations_are_fused_into_factors(make, norm, fuse):
    """Scaled rows have the same rank."""
    layer, after = make().eval(), norm(4).eval()
    nn.init.uniform_(after.running_var, 0.5, 2)
    factorize(layer, rank=2)
    x = torch.randn(3, 6, *[2] * (layer.weight.ndim - 2))
    fused = fuse(layer, after)
    torch.testing.assert_close(fused(x), after(layer(x)), rtol=1e-4, atol=1e-5)
    assert len(frobdecay.products(fused)) == 1


# --- in contexts ----------------------------------------------------------------------------------

CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast(torch.get_default_device().type, torch.bfloat16),
    "device": lambda: torch.device("cpu"),
}
W = torch.linspace(-1, 1, 24).sin().view(4, 6)
DENSE = {f"{i}.weight": w for i, w in enumerate((W, W.T.contiguous(), W.T.contiguous()))}
DENSE |= {f"{i}.bias": torch.zeros(n) for i, n in enumerate((4, 6, 6))}


def copied():
    """A state_dict of one's own."""
    with torch.inference_mode(False):
        return {name: tensor.clone() for name, tensor in DENSE.items()}


def _assigns(model):
    model[0].weight = W


# What changes a model -> whether it works on a factorized one.
ACTS = {
    "factorize": (lambda model: factorize(model, rank=2), False),
    "untie": (lambda model: factorize(model, rank=2, on_tied="untie"), False),
    "merge": (merge, True),
    "unroll": (frobdecay.unroll, True),
    "assign": (_assigns, True),
    "load": (lambda model: model.load_state_dict(copied()), True),
    "load assigned": (lambda model: model.load_state_dict(copied(), assign=True), True),
    "load_dense_": (lambda model: frobdecay.load_dense_(model, DENSE), True),
    "balance_": (lambda model: frobdecay.balance_(frobdecay.products(model)), True),
}


def _changed(act, context):
    """A model after an act in a context."""
    run, factored = ACTS[act]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 6))
    if factored:
        factorize(model, rank=2)
    elif act == "untie":
        model[2].weight = model[1].weight
    with context():
        run(model)
    return model


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("act", ACTS)
def test_contexts_of_the_caller_leave_parameters_that_train(act, context):
    """The numbers are those of the act outside, and the first step of an optimizer works."""
    model, expected = (_changed(act, each) for each in (CONTEXTS[context], nullcontext))
    for (name, one), (other_name, other) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == other_name
        assert (type(one), one.requires_grad, one.is_inference()) == (nn.Parameter, True, False)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model[1](model[0](torch.ones(3, 6))) + model[2](torch.ones(3, 4))).sum().backward()
    optimizer.step()
    assert not torch.equal(next(model.parameters()), next(expected.parameters()))


def _inside_grad(run, model):
    torch.func.grad(lambda x: (run(model), x.sum())[1])(torch.ones(3))


def _inside_fake(run, model):
    with FakeTensorMode():
        run(model)


@pytest.mark.parametrize("act", ["factorize", "merge", "unroll", "load_dense_"])
@pytest.mark.parametrize(
    ("inside", "where"), [(_inside_fake, "mode of FakeTensors"), (_inside_grad, "torch.func")]
)
def test_contexts_without_numbers_are_refused(act, inside, where):
    """Under modes whose tensors hold none, and in transformed functions: nothing was changed."""
    run, factored = ACTS[act]
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 6))
    if factored:
        factorize(model, rank=2)
    before = [(id(module), type(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match=rf"cannot \w+ a model inside of .*{where}"):
        inside(run, model)
    assert [(id(module), type(module)) for module in model.modules()] == before
