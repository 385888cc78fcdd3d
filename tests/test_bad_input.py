"""A table of wrong inputs: what is raised, that it names the culprit, that nothing changed."""

import copy
import functools
import re

import pytest
import torch
from refused_weights import FATAL, REFUSED, Net
from torch import nn
from torch.nn.utils import parametrize

import frobdecay
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge, unroll
from frobdecay.models.ranks import plan_ranks
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.find import products, register_products
from frobdecay.weights.lowrank import LowRank


def _experts():
    module = nn.Module()
    module.up = nn.Parameter(torch.randn(2, 6, 6))
    return module


# Wrong arguments -> (keyword arguments, error, message).
ARGUMENTS = {
    "no rank": ({}, ValueError, "exactly one of.* of plan_ranks alone, energy=, got none"),
    "rank and ratio": ({"rank": 2, "ratio": 0.5}, ValueError, "got ratio= and rank=;"),
    "rank 0": ({"rank": 0}, ValueError, "rank above 0, got 0"),
    "rank negative": ({"rank": -3}, ValueError, "rank above 0, got -3"),
    "rank NaN": ({"rank": float("nan")}, ValueError, "rank above 0, got nan"),
    "rank infinite": ({"rank": float("inf")}, ValueError, "rank above 0, got inf"),
    "rank beyond memory": ({"rank": 10**30}, ValueError, "above 0, got 1000.*no tensor is as"),
    "rank share beyond it": ({"rank": 1e30}, ValueError, r"above 0, got 1e\+30, and no tensor"),
    "rank bool": ({"rank": True}, TypeError, "rank as int"),
    "rank text": ({"rank": "8"}, TypeError, "rank as int"),
    "rank of a layer 0": ({"rank": {"bad": 0}}, ValueError, r"rank\['bad'\].*above 0"),
    "rank of no layer": ({"rank": {"bda": 2}}, ValueError, "rank='bda' matches nothing.*bad"),
    "rank of no glob": ({"rank": {"zz*": 2}}, ValueError, r"rank='zz\*' matches nothing"),
    "rank of no type": ({"rank": {nn.LSTM: 2}}, ValueError, "rank=LSTM matches no module"),
    "rank of a number": ({"rank": {3: 2}}, TypeError, "expected the keys of rank to be a name"),
    "rank of no included layer": (
        {"rank": {"bda": 2}, "include": "bad"}, ValueError, "rank='bda' matches nothing"),
    "rank for another layer": (
        {"rank": {"first": 2}, "include": "bad"}, ValueError, "no weight to factorize"),
    "rank of nothing": ({"rank": {}}, ValueError, "no weight to factorize"),
    "ratio 0": ({"ratio": 0.0}, ValueError, "ratio above 0"),
    "ratio negative": ({"ratio": -0.1}, ValueError, "ratio above 0"),
    "ratio NaN": ({"ratio": float("nan")}, ValueError, "ratio above 0"),
    "ratio 1": ({"ratio": 1.0}, ValueError, "below 1.*rank="),
    "ratio above 1": ({"ratio": 3.0}, ValueError, "below 1.*rank="),
    "ratio text": ({"ratio": "0.1"}, TypeError, "ratio as a float"),
    "ratio too small": ({"ratio": 0.01}, ValueError, r"attainable are 0\.\d+ to 1"),
    "include typo": ({"rank": 2, "include": "frist"}, ValueError, "near matches: first"),
    "include nothing like it": ({"rank": 2, "include": "xyz"}, ValueError, "names are.*first"),
    "include glob": ({"rank": 2, "include": "conv*"}, ValueError, "'conv\\*' matches nothing"),
    "include regex": (
        {"rank": 2, "include": re.compile("fir")}, ValueError, "matches nothing.*first"),
    "include type": ({"rank": 2, "include": nn.LSTM}, ValueError, "LSTM matches no module"),
    "include module": (
        {"rank": 2, "include": nn.Linear(2, 2)}, TypeError, "include to be a name.*Linear"),
    "exclude module of two inputs": (
        {"rank": 2, "exclude": [nn.Bilinear(2, 2, 2)]}, TypeError, "exclude to be a name.*Bilin"),
    "include predicate": (
        {"rank": 2, "include": lambda name, module: False}, ValueError, "nothing; it is called"),
    "include number": ({"rank": 2, "include": 3}, TypeError, "expected include"),
    "include list": ({"rank": 2, "include": ["bad", 3]}, TypeError, "got 3"),
    "include empty": ({"rank": 2, "include": []}, ValueError, "no weight to factorize"),
    "include vector": ({"rank": 2, "include": "bad.bias"}, ValueError, "bad.bias.*two dimensions"),
    "one of a list": ({"rank": 2, "include": ["bad", "nope"]}, ValueError, "'nope'"),
    "exclude typo": ({"rank": 2, "exclude": "lsat"}, ValueError, "exclude='lsat'.*last"),
    "exclude everything": ({"rank": 2, "exclude": "*"}, ValueError, "no weight to factorize"),
    "exclude number": ({"rank": 2, "exclude": 3}, TypeError, "expected exclude"),
    "init": ({"rank": 2, "init": "he"}, ValueError, "spectral"),
    "instance": ({"rank": 2, "parametrization": LowRank(2)}, TypeError, "functools.partial"),
    "not a parametrization": (
        {"rank": 2, "parametrization": lambda rank, **_: nn.ReLU()}, TypeError, "right_inverse"),
    "factory without options": (
        {"rank": 2, "parametrization": lambda rank: LowRank(rank)}, TypeError, "pattern=, axes="),
    "depth": (
        {"rank": 2, "parametrization": functools.partial(LowRank, depth=-1)}, ValueError, "depth"),
    "pattern for no weight": (
        {"rank": 2, "parametrization": functools.partial(LowRank, pattern="a b c -> a (b c)")},
        ValueError, "3 dimensions.*no chosen weight"),
    "pattern that is none": (
        {"rank": 2, "parametrization": functools.partial(LowRank, pattern="o i -> (o i)"),
         "include": "bad"}, ValueError, "bad.weight.*pattern"),
    "pattern that does not fit": (
        {"rank": 2, "include": "bad", "parametrization": functools.partial(
            LowRank, pattern="(g o) i -> g o i", axes={"g": 4})},
        ValueError, "bad.weight.*does not fit"),
}  # fmt: skip


def _fingerprint(model):
    """Everything that must not change: objects, classes, order, attributes."""
    return [
        (path, id(module), type(module), sorted(vars(module)),
         [(name, id(p)) for name, p in module._parameters.items()],
         list(module._buffers), [(name, id(m)) for name, m in module._modules.items()])
        for path, module in model.named_modules()
    ]  # fmt: skip


def _bytes(model):
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not _unreadable(value)
    }


def _unreadable(value):
    odd = value.layout != torch.strided or value.is_quantized
    return odd or value.is_meta or nn.parameter.is_lazy(value)


def _raw(value):
    return value.reshape(-1).view(torch.uint8)  # NaN equals itself


def _assert_raises_and_changes_nothing(act, model, error, message):
    before, values = _fingerprint(model), _bytes(model)
    with pytest.raises(error, match=f"(?s){message}"):
        act(model)
    assert _fingerprint(model) == before
    after = _bytes(model)
    assert list(after) == list(values)
    for name, value in values.items():
        assert torch.equal(_raw(after[name]), _raw(value))


@pytest.mark.parametrize("case", REFUSED)
def test_a_named_weight_that_cannot_be_factorized_is_an_error(case):
    """The message names the module and the reason, and no other weight was touched."""
    make, reason = REFUSED[case]
    include = ["first", "bad"] if case != "tied" else "bad"
    _assert_raises_and_changes_nothing(
        lambda model: factorize(model, rank=2, include=include),
        make(), ValueError, f"bad.weight cannot be factorized.*{reason}")  # fmt: skip


@pytest.mark.covers("D29")
@pytest.mark.parametrize("case", REFUSED)
def test_a_weight_that_cannot_be_factorized_is_listed_by_default(case):
    """The rest of the model is factorized; the plan says why this one is not."""
    make, reason = REFUSED[case]
    plan = factorize(make(), rank=2)
    assert "last.weight" in plan.ranks
    listed = {row.name: row.reason for row in plan.rows}
    assert reason in listed["bad.weight"]
    assert reason in str(plan)


@pytest.mark.covers("D16", "P6", "P18")
@pytest.mark.parametrize("case", FATAL)
@pytest.mark.parametrize("include", [None, "bad", "*"])
def test_weights_without_numbers_are_an_error(case, include):
    """Swept in or named: such a model is not ready."""
    make, message = FATAL[case]
    _assert_raises_and_changes_nothing(
        lambda model: factorize(model, rank=2, include=include), make(), ValueError, message
    )


@pytest.mark.covers("D8")
@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments(case):
    """Each is refused at once, says what was expected, and leaves the model alone."""
    arguments, error, message = ARGUMENTS[case]
    _assert_raises_and_changes_nothing(
        lambda model: factorize(model, **arguments), Net(), error, message
    )


@pytest.mark.parametrize("case", [k for k, v in ARGUMENTS.items() if "init" not in v[0]])
def test_wrong_arguments_of_a_plan(case):
    """The dry run refuses what the run refuses."""
    arguments, error, message = ARGUMENTS[case]
    _assert_raises_and_changes_nothing(
        lambda model: plan_ranks(model, **arguments), Net(), error, message
    )


def test_a_rank_is_not_taken_for_a_ratio():
    """A number without a name says neither which one it is."""
    for act in (factorize, plan_ranks):
        _assert_raises_and_changes_nothing(
            lambda model, act=act: act(model, 0.25), Net(), TypeError, "positional argument"
        )


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.1, float("nan")])
def test_wrong_energy(energy):
    """A share is above 0 and at most 1."""
    with pytest.raises(ValueError, match="energy above 0"):
        plan_ranks(Net(), energy=energy)


def test_a_stack_of_matrices_needs_a_pattern():
    """Three dimensions of an unknown module can be read in many ways."""
    _assert_raises_and_changes_nothing(
        lambda model: factorize(model, rank=2, include="bad.up"),
        Net(_experts()), ValueError, "bad.up.*3 dimensions.*pattern")  # fmt: skip


@pytest.mark.covers("C16")
@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM, nn.MultiheadAttention])
def test_an_error_half_way_leaves_everything_as_it_was(kind):
    """The first weights are already factors when the last one fails."""
    module = kind(6, 6) if kind is not nn.MultiheadAttention else kind(6, 2)
    model = Net(module)
    calls = []

    def init(weight, rank, *, depth):
        calls.append(weight.shape)
        if len(calls) == 3:
            raise ValueError("no more")
        return weight.new_ones(*weight.shape[:-1], rank), weight.new_ones(weight.shape[-1], rank)

    if kind is nn.MultiheadAttention:
        factorize(model, rank=2, include="first")
    _assert_raises_and_changes_nothing(
        lambda model: factorize(model, rank=2, init=init), model, ValueError,
        "(last|bad).*: (no more|expected the initialization)")  # fmt: skip
    assert calls


def test_an_error_half_way_leaves_other_products_as_they_were():
    """A module of which one weight is factorized already keeps that one, and its class."""
    model = nn.LSTM(6, 6)
    factorize(model, rank=2, include="weight_ih_l0")
    clone = copy.deepcopy(model)

    def init(weight, rank, *, depth):
        raise ValueError("no")

    _assert_raises_and_changes_nothing(
        lambda model: factorize(model, rank=2, init=init), model, ValueError, "weight_hh_l0: no"
    )
    x = torch.randn(3, 1, 6)
    torch.testing.assert_close(model(x)[0], clone(x)[0])


def test_interrupts_are_rolled_back_too():
    """Ctrl-C in a long decomposition leaves a model that works."""

    def init(weight, rank, *, depth):
        raise KeyboardInterrupt

    _assert_raises_and_changes_nothing(
        lambda model: factorize(model, rank=2, init=init), Net(), KeyboardInterrupt, ""
    )


@pytest.mark.covers("P24")
@pytest.mark.usefixtures("alone")
def test_data_parallel_wrappers_are_refused():
    """They would go on reducing the gradients of parameters that are gone."""
    model = Net()
    factorize(model, rank=2, include="first")
    wrapped = nn.parallel.DistributedDataParallel(model)
    for act in (lambda m: factorize(m, rank=2), merge, unroll):
        _assert_raises_and_changes_nothing(
            act, wrapped, ValueError, "DistributedDataParallel.*before wrapping"
        )
    assert [p.name for p in products(wrapped)] == ["first.weight"]


@pytest.mark.cpu("its mesh is of CPUs")
@pytest.mark.covers("P26")
@pytest.mark.usefixtures("alone")
def test_sharded_weights_are_refused():
    """Sharded weights are refused by name where whole ones are needed, half sharded ones by all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = Net()
    model.bad.weight = nn.Parameter(distribute_tensor(model.bad.weight.detach(), mesh))
    with pytest.raises(ValueError, match=r"bad.weight.*DTensor.*before fully_shard"):
        factorize(model, rank=2, include="bad")
    assert "DTensor" in str(factorize(model, rank=2))
    held = model.first.parametrizations.weight
    held.original0 = nn.Parameter(distribute_tensor(held.original0.detach(), mesh))
    with pytest.raises(ValueError, match=r"first.weight.*DTensor.*before merging"):
        merge(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"first.weight.*expected a DTensor"):
        FrobeniusDecay(base, model)


@pytest.mark.covers("P18")
@pytest.mark.parametrize("act", [merge, unroll])
def test_factors_on_the_meta_device_are_refused_on_the_way_back(act):
    """There is nothing to multiply."""
    model = Net()
    factorize(model, rank=2)
    _assert_raises_and_changes_nothing(act, model.to("meta"), ValueError, "first.weight.*meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"include": "lst"}, "last"), ({"include": "last"}, "no factorized weight.*first.weight"),
     ({"exclude": "nope"}, "matches nothing")],
)  # fmt: skip
def test_wrong_arguments_of_merge(arguments, message):
    """Selectors that match nothing, or nothing factorized."""
    model = Net()
    factorize(model, rank=2, include="first")
    _assert_raises_and_changes_nothing(
        lambda model: merge(model, **arguments), model, ValueError, message
    )


class Doubled(nn.Module):
    """Another parametrization, on top."""

    def forward(self, weight):
        """Parametrize."""
        return 2 * weight

    def right_inverse(self, weight):
        """Invert that."""
        return weight / 2


def test_a_parametrization_on_top_of_a_product_is_refused():
    """The weight is then not the product, and its decay would not be the weight's."""
    model = Net()
    factorize(model, rank=2, include="bad")
    parametrize.register_parametrization(model.bad, "weight", Doubled(), unsafe=True)
    for act in (products, unroll):
        _assert_raises_and_changes_nothing(act, model, ValueError, "bad.weight.*other|on top")


@pytest.mark.parametrize("pattern", ["o i -> i o", "(b o) i -> b o i"])
def test_patterns_that_are_no_chain_are_named_by_unroll(pattern):
    """Every such layer is listed before anything was changed."""
    model = Net()
    axes = {"b": 2} if "b" in pattern else None
    factorize(model, rank=2, parametrization=functools.partial(LowRank, pattern=pattern, axes=axes))
    _assert_raises_and_changes_nothing(unroll, model, ValueError, "first.weight.*bad.weight.*merge")


@pytest.mark.parametrize("rank", [0, -1, float("nan")])
def test_wrong_ranks_of_a_parametrization(rank):
    """Refused when it is made, not when it is registered."""
    with pytest.raises(ValueError, match="rank above 0"):
        LowRank(rank)


@pytest.mark.parametrize("key", [3, "Linear", None])
def test_wrong_keys_of_a_provider(key):
    """A class, or its full name."""
    with pytest.raises(TypeError, match="class or 'package"):
        register_products(key)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_sizes_of_one_work(shape):
    """They are matrices like others."""
    model = nn.Linear(*shape)
    dense = model.weight.detach().clone()
    factorize(model, rank=1)
    torch.testing.assert_close(merge(model).weight.detach(), dense)


def _traced():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Linear(6, 6), torch.ones(1, 6))


NO_MODELS = {
    "function": (lambda x: x, "a function"),
    "list": ([nn.Linear(3, 3)], "a list"),
    "state_dict": (nn.Linear(3, 3).state_dict(), "a OrderedDict"),
    "class": (nn.Linear, "the class Linear"),
    "None": (None, "a NoneType"),
    "name": ("model", "a str"),
    "parameter": (nn.Parameter(torch.ones(3, 3)), "a Parameter"),
    "scripted": (
        _traced(),
        "a TopLevelTracedModule; do this before scripting or tracing it"),
}  # fmt: skip
OF_MODELS = {
    "factorize": lambda model: factorize(model, rank=2),
    "plan_ranks": lambda model: plan_ranks(model, rank=2),
    "merge": merge,
    "unroll": unroll,
    "products": products,
    "save_factorized": lambda model: frobdecay.save_factorized(model, "nowhere"),
    "load_factorized": lambda model: frobdecay.load_factorized(model, "nowhere"),
    "load_dense_": lambda model: frobdecay.load_dense_(model, {}),
}
OF_PRODUCTS = {
    "balance_": frobdecay.balance_,
    "penalty": lambda found: frobdecay.penalty(found, 0.1),
    "add_penalty_grad_": lambda found: frobdecay.add_penalty_grad_(found, 0.1),
    "product_norm": frobdecay.product_norm,
    "measure": frobdecay.diagnostics.measure,
    "explain": frobdecay.explain,
    "FrobeniusDecay": lambda found: FrobeniusDecay(
        torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), found),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_MODELS)
@pytest.mark.parametrize("function", OF_MODELS)
def test_what_is_no_model_is_refused_by_its_type(function, case):
    """By every function that takes one."""
    value, said = NO_MODELS[case]
    with pytest.raises(TypeError, match=f"expected a torch.nn.Module, got {said}"):
        OF_MODELS[function](value)


def test_a_bottleneck_written_by_hand_is_told_how_to_be_known():
    """It needs no factorize, but to be registered."""
    model = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(
        ValueError, match=r"without any: .*bottleneck.*register_products.*Product.o"
    ):
        FrobeniusDecay(base, model)


@pytest.mark.parametrize("case", [name for name in NO_MODELS if name != "scripted"])
@pytest.mark.parametrize("function", OF_PRODUCTS)
def test_what_are_no_products_is_refused_by_its_type(function, case):
    """By every function that takes them."""
    with pytest.raises(TypeError, match=r"expected (one Product|Product records|a model)"):
        OF_PRODUCTS[function](NO_MODELS[case][0])


def test_scripted_modules_inside_of_a_model_are_left_alone():
    """Their weights are part of their code."""
    model = nn.Sequential(nn.Linear(6, 6), _traced())
    x = torch.ones(1, 6)
    expected = model(x)
    assert list(factorize(model, rank=1.0).ranks) == ["0.weight"]
    assert len(products(model)) == 1
    torch.testing.assert_close(unroll(model)(x), expected, rtol=1e-4, atol=1e-5)
