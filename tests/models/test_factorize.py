"""Selecting, factorizing, finding, merging and unrolling, on whole models."""

import collections
import copy
import functools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge, unroll
from frobdecay.models.ranks import plan_ranks
from frobdecay.models.surgery import transaction
from frobdecay.product import find
from frobdecay.product.factor import Factor
from frobdecay.product.find import products, register_products
from frobdecay.product.holding import VERSION
from frobdecay.product.product import Product
from frobdecay.weights.lowrank import LowRank


class Block(nn.Module):
    """A residual block as everybody writes it, with its shortcut in a Sequential."""

    def __init__(self, i, o):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.downsample = nn.Sequential(nn.Conv2d(i, o, 1), nn.BatchNorm2d(o))

    def forward(self, x):
        """Two convolutions and a shortcut."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 8))
        self.layer2 = nn.Sequential(Block(8, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        """Classify images."""
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


class Text(nn.Module):
    """Embedding, recurrent layer, attention, encoder layer, and a table of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.table = nn.Parameter(torch.randn(6, 8))
        self.head = nn.Linear(8, 6)

    def forward(self, ids):
        """Encode token ids."""
        x, _ = self.lstm(self.embed(ids))
        return self.head(self.encoder(x)) @ self.table


MODELS = {
    "resnet": (ResNet, lambda: torch.randn(2, 3, 8, 8, dtype=torch.float64)),
    "text": (Text, lambda: torch.randint(0, 20, (2, 5))),
}

CONVS = [
    f"layer{k}.{c}.weight"
    for k in ("1.0", "1.1", "2.0")
    for c in ("conv1", "conv2", "downsample.0")
]


@pytest.mark.covers("C16")
@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("fc", ["fc.weight"]),
        ("fc.weight", ["fc.weight"]),
        ("layer1.0", CONVS[:3]),
        ("layer?.*.conv1", [CONVS[0], CONVS[3], CONVS[6]]),
        ("*conv2.weight", [CONVS[1], CONVS[4], CONVS[7]]),
        (re.compile(r"layer1\.\d\.conv[12]"), [CONVS[0], CONVS[1], CONVS[3], CONVS[4]]),
        (re.compile(r"^layer2\.0\.conv1\.weight$"), [CONVS[6]]),
        (nn.Linear, ["fc.weight"]),
        (Block, CONVS),
        (lambda name, module: module is not None and name.endswith("fc.weight"), ["fc.weight"]),
        (["fc", "layer2.0.conv?"], [CONVS[6], CONVS[7], "fc.weight"]),
        (None, ["conv1.weight", *CONVS, "fc.weight"]),
    ],
    ids=["module", "parameter", "container", "glob", "glob of parameter", "regex", "anchored regex",
         "type", "container type", "predicate", "list", "default"],
)  # fmt: skip
def test_include_takes_what_the_selector_says(include, expected):
    """Names, globs, regular expressions, types, predicates and lists of them."""
    assert list(factorize(ResNet(), rank=2, include=include).ranks) == expected


@pytest.mark.covers("C16", "D6")
@pytest.mark.parametrize(
    "exclude", ["fc", "f?", re.compile("f."), nn.Linear, lambda n, m: n == "fc.weight", ["fc"]]
)
def test_exclude_leaves_out_what_the_selector_says(exclude):
    """The same grammar, the opposite effect; what was left out is listed."""
    plan = factorize(ResNet(), rank=2, exclude=exclude)
    assert "fc.weight" not in plan.ranks
    assert [row.name for row in plan.rows if row.reason == "excluded"] == ["fc.weight"]


def test_exclude_may_name_what_is_never_factorized():
    """Somebody who excludes norms or biases has made no mistake."""
    assert factorize(ResNet(), rank=2, exclude=["*.bias", nn.BatchNorm2d]).ranks


def test_many_names_are_looked_up():
    """Each takes as long as one alone, and means what a predicate for all of them does."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(400)))
    names = [f"{i}.weight" for i in range(0, 400, 2)]
    listed = plan_ranks(model, rank=2, include=names)
    assert list(listed.ranks) == list(
        plan_ranks(model, rank=2, exclude=re.compile("\\d*[13579]")).ranks
    )
    rest = plan_ranks(model, rank=2, exclude=[str(i) for i in range(1, 400, 2)])
    assert rest.ranks == listed.ranks


@pytest.mark.parametrize("include", ["table", "t?ble", re.compile("tab.*"), Text])
def test_parameters_of_other_modules_are_taken_where_they_are_spelled(include):
    """By name, by a pattern that means the parameter, or by the type of the module."""
    assert "table" in factorize(Text(), rank=2, include=include).ranks


@pytest.mark.parametrize("include", ["*", re.compile(".*"), None, nn.Module])
def test_parameters_of_other_modules_are_not_swept_in(include):
    """A table of biases is no weight only because everything was asked for."""
    plan = factorize(Text(), rank=2, include=include)
    assert ("table" in plan.ranks) == (include is nn.Module)
    assert "head.weight" in plan.ranks


class Odd(nn.Module):
    """Parameters of every number of dimensions, in places that no table knows."""

    def __init__(self):
        super().__init__()
        self.matrix, self.experts = (
            nn.Parameter(torch.randn(6, 4)),
            nn.Parameter(torch.randn(2, 6, 4)),
        )
        self.listed = nn.ParameterList([torch.randn(6, 4), torch.randn(4)])
        self.keyed = nn.ParameterDict({"a": torch.randn(1, 6, 4, 2)})
        self.norm = nn.LayerNorm((6, 4))
        self.known, self.vector = nn.Linear(6, 4), nn.Parameter(torch.randn(6))
        self.register_buffer("buffer", torch.randn(6, 4))


ODD = ["matrix", "experts", "listed.0", "keyed.a", "norm.weight", "norm.bias", "known.weight"]


@pytest.mark.parametrize(
    ("include", "listed"),
    [
        (None, ODD),
        ("*", ODD),
        (re.compile("odd.*"), ODD),
        ("odd.k*", ["keyed.a", "known.weight"]),
        (["odd.matrix", "odd.known"], ["matrix", "known.weight"]),
        (nn.Linear, ["known.weight"]),
        (lambda name, module: True, ["known.weight"]),
    ],
    ids=["default", "glob", "regex", "some", "named", "other type", "predicate"],
)
@pytest.mark.parametrize("act", [factorize, plan_ranks])
def test_every_matrix_is_in_the_plan(act, include, listed):
    """Factorized, or with the reason and what to do; vectors and buffers are none."""
    plan = act(nn.ModuleDict({"odd": Odd()}), rank=2, include=include)
    rows = {row.name.removeprefix("odd."): row for row in plan.rows}
    assert sorted(rows) == sorted(listed)
    for name, row in rows.items():
        assert (row.rank is None) == bool(row.reason)
        if row.rank is None:
            assert "a module type without a default; name it" in row.reason
            assert ("with a pattern" in row.reason) == (name in ("experts", "keyed.a"))
    assert plan.before == sum(p.numel() for p in Odd().parameters())


def test_a_stack_of_matrices_is_factorized_by_pattern():
    """Expert stacks: three dimensions of an unknown module, read as a batch."""
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(torch.randn(4, 6, 8))
    make = functools.partial(LowRank, pattern="e o i -> e o i")
    plan = factorize(model, rank=2, include="*.up", parametrization=make)
    assert plan.rows[0].matrix == (4, 6, 8)
    assert [p.shape for p in products(model)] == [(4, 6, 8)]


def test_a_pattern_is_for_weights_with_its_dimensions():
    """The others keep their default, so one call serves a whole model."""
    make = functools.partial(LowRank, pattern="o i kh kw -> o (i kh kw)", depth=1)
    plan = factorize(ResNet(), rank=2, parametrization=make)
    matrices = {row.name: row.matrix for row in plan.rows}
    assert matrices["conv1.weight"] == (8, 27)
    assert matrices["fc.weight"] == (10, 16)


@pytest.mark.covers("C18")
@pytest.mark.parametrize("kind", MODELS)
def test_merge_is_exact_at_full_rank_D23(kind):
    """The same outputs, the original classes, keys in the original order (D23)."""
    make, example = MODELS[kind]
    model, x = make().double().eval(), example()
    dense = copy.deepcopy(model)
    factorize(model, rank=1.0)
    assert merge(model) is model
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-10)


@pytest.mark.covers("C18", "D23")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_merge_computes_the_same(kind, training):
    """At a low rank too, in training and evaluation mode."""
    make, example = MODELS[kind]
    model, x = make().double().train(training), example()
    factorize(model, rank=2)
    expected = model(x)
    merge(model)
    assert all(module.training is training for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.covers("C18", "D23")
def test_unroll_gives_plain_torch_layers_with_the_same_function_D23():
    """No module of ours is left, and no parameter more than the factors (D23)."""
    model = ResNet().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plan = factorize(model, ratio=0.6)
    expected = model(x)
    assert unroll(model) is model
    assert all(type(m).__module__.startswith(("torch.", __name__)) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) == plan.after
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.covers("P15")
def test_unrolled_layers_hold_the_factors_and_know_nothing_of_us():
    """No bytes more than the factors have, and a pickle that loads without this package."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Embedding(32, 32), nn.Conv2d(32, 32, 3))
    factorize(model, rank=4, parametrization=functools.partial(LowRank, depth=1))
    size = sum(p.nbytes for p in model.parameters())
    unroll(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == size
    assert b"frobdecay" not in pickle.dumps(model)


def test_unroll_after_merging_what_cannot_be_a_chain():
    """The error lists what to merge; afterwards it works."""
    model, ids = Text().double(), torch.randint(0, 20, (2, 5))
    factorize(model, rank=2)
    with pytest.raises(ValueError, match=r"(?s)lstm.weight_ih_l0.*encoder.self_attn.*merge") as e:
        unroll(model)
    names = re.findall(r"\n  ([\w.]+):", str(e.value))
    expected = model(ids)
    unroll(merge(model, include=names))
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-10)
    assert isinstance(model.embed, nn.Sequential)
    assert model.embed[0].padding_idx == 0
    assert model.eval()(ids).shape == expected.shape


@pytest.mark.parametrize("act", [merge, unroll])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_way_back_keeps_the_state(act, frozen):
    """Dtype, device, training mode and requires_grad; a frozen weight stays a parameter."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)).half().eval()
    model[0].weight.requires_grad_(not frozen)
    factorize(model, rank=2)
    assert all(p.requires_grad is not frozen for p in model[0].parametrizations.weight.parameters())
    act(model)
    weights = [p for n, p in model[0].named_parameters() if n.endswith("weight")]
    assert weights
    assert all(p.requires_grad is not frozen for p in weights)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("act", [merge, unroll])
def test_the_way_back_keeps_hooks(act):
    """They fire afterwards too, and their handles still remove them."""
    model, calls = nn.Sequential(nn.Linear(4, 4)), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    factorize(model, rank=2)
    act(model)(torch.randn(1, 4))
    handle.remove()
    model(torch.randn(1, 4))
    assert len(calls) == 1


def test_the_root_itself_can_be_a_layer():
    """Factorized and merged in place; unrolling returns another module."""
    layer, x = nn.Linear(6, 4).double(), torch.randn(2, 6, dtype=torch.float64)
    factorize(layer, rank=2)
    assert [p.name for p in products(layer)] == ["weight"]
    expected, chain = layer(x), unroll(layer)
    torch.testing.assert_close(chain(x), expected)
    assert type(merge(layer)) is nn.Linear


@pytest.mark.covers("C16", "D10")
def test_siblings_in_a_container_survive_D10():
    """The batch norm beside ``downsample.0`` stays where it was (D10)."""
    model = ResNet()
    norm = model.layer1[0].downsample[1]
    factorize(model, rank=2)
    assert model.layer1[0].downsample[1] is norm
    unroll(model)
    assert model.layer1[0].downsample[1] is norm


@pytest.mark.covers("C16")
def test_a_shared_module_is_factorized_once():
    """It is one product with one name, and stays shared on the way back."""
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    plan = factorize(model, rank=2, include="b.0")
    assert list(plan.ranks) == ["a.weight"]
    assert [p.name for p in products(model)] == ["a.weight"]
    unroll(model)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], nn.Sequential)


@pytest.mark.covers("C5", "C16", "P19")
def test_tied_weights_are_left_dense_and_listed():
    """Two modules go on sharing what they shared."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, 6), "head": nn.Linear(6, 9)})
    model["head"].weight = model["embed"].weight
    model["other"] = nn.Linear(6, 6)
    plan = factorize(model, rank=2)
    assert list(plan.ranks) == ["other.weight"]
    assert "tied to head.weight" in plan.rows[0].reason
    assert model["head"].weight is model["embed"].weight


def _tied():
    """An embedding whose weight the head has too, and something between."""
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20))
    model[2].weight = model[0].weight
    return model


@pytest.mark.covers("C5")
@pytest.mark.parametrize(
    ("include", "copies"), [(None, 1), ("0", 1), (["0", "2"], 1), (["1", "2"], 1)]
)
def test_untied_weights_get_a_copy_of_their_own(include, copies):
    """All but the last of a tie add parameters to the model, and the plan counts them."""
    model, ids = _tied(), torch.arange(20)
    expected, before = model(ids), sum(p.numel() for p in model.parameters())
    dry = plan_ranks(model, rank=16, include=include, on_tied="untie")
    plan = factorize(model, rank=16, include=include, on_tied="untie")
    assert plan.before == before + copies * 320
    assert (dry.before, dry.after) == (plan.before, plan.after)
    assert plan.after == sum(p.numel() for p in model.parameters())
    assert {row.reason for row in plan.rows if row.name != "1.weight"} <= {
        "untied from 2.weight",
        "untied from 0.weight",
    }
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    assert "untied from" in str(plan)


def test_what_stays_dense_stays_tied():
    """A copy of it would cost its parameters and change nothing; the budget has no copies in it."""
    model = _tied().append(nn.Linear(20, 400))
    before = sum(p.numel() for p in model.parameters())
    plan = factorize(model, ratio=0.96, on_tied="untie")
    assert model[0].weight is model[2].weight
    remarks = {row.name: row.reason for row in plan.rows}
    assert remarks["0.weight"] == "kept dense: the first layer; stays tied to 2.weight"
    assert "untied" not in str(plan)
    assert (plan.before, plan.after) == (before, sum(p.numel() for p in model.parameters()))


def test_the_rest_of_a_tie_stays_tied():
    """Of three, one gets factors of its own, and the plan says so when it is made, too."""
    model = _tied().append(nn.Linear(16, 20))
    model[3].weight = model[0].weight
    rule = {"rank": {"3": 4}, "include": ["0", "2", "3"], "on_tied": "untie"}
    dry = plan_ranks(model, **rule)
    plan = factorize(model, rank=dry, on_tied="untie", include=["0", "2", "3"])
    assert plan.ranks == dry.ranks == {"3.weight": 4}
    assert model[0].weight is model[2].weight
    assert plan.before == sum(p.numel() for p in _tied().parameters()) + 20 * 16 + 20
    assert plan.after == dry.after == sum(p.numel() for p in model.parameters())


@pytest.mark.covers("P19")
def test_ties_can_be_errors():
    """Also where nobody named the weight; what is excluded may be tied."""
    model = _tied()
    with pytest.raises(ValueError, match=r"0\.weight cannot be factorized: tied to 2\.weight"):
        factorize(model, rank=2, on_tied="error")
    assert factorize(model, rank=2, on_tied="error", exclude=["0", "2"]).ranks == {"1.weight": 2}


def test_an_error_leaves_ties_as_they_were():
    """Untying is part of the transaction."""
    model = _tied()

    def failing(weight, rank, *, depth):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        factorize(model, rank=2, on_tied="untie", init=failing)
    assert model[0].weight is model[2].weight


def test_a_transaction_undoes_every_change():
    """Attributes, tables and the class of a module, and its lists of factors, on any exception."""

    class Other(nn.Linear):
        """Another class."""

    plain, ours = nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 5))
    factorize(ours, rank=2)
    lists = ours[0].parametrizations
    plain.number = 1
    before = [dict(vars(m)) for m in (plain, ours[0], lists)]
    tables = [dict(m._parameters) for m in (plain, ours[0], lists["weight"])]
    version = VERSION.value

    def change():
        plain.number, plain.more = 2, 3
        del plain.bias
        plain.register_buffer("running", torch.ones(1))
        plain.__class__ = Other
        lists.note = "changed"
        parametrize.remove_parametrizations(ours[0], "weight")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), transaction([plain, ours[0], plain]):
        change()
    assert [dict(vars(m)) for m in (plain, ours[0], lists)] == before
    assert [dict(m._parameters) for m in (plain, ours[0], lists["weight"])] == tables
    assert type(plain) is nn.Linear
    assert parametrize.is_parametrized(ours[0], "weight")
    assert VERSION.value > version
    assert not plain._buffers


def test_types_of_other_packages_are_known_by_name():
    """A weight that is stored in × out: U has the outputs' rows; it unrolls to linear layers."""

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    model, x = nn.Sequential(Conv1D()), torch.randn(4, 6)
    plan = factorize(model, rank=2)
    assert plan.rows[0].matrix == (9, 6)
    expected = model(x)
    unrolled = unroll(model)
    assert [type(m) for m in unrolled[0]] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(unrolled(x), expected)


class Peeks(nn.Module):
    """Reads its layer's weight, in a method that forward calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        """Two layers, one after a conversion."""
        return self.other(self._converted(self.inner(x)))

    def _converted(self, x):
        return x.to(self.inner.weight.dtype)

    def reset(self):
        """Nothing that forward does."""
        nn.init.zeros_(self.other.weight)


@pytest.mark.parametrize(
    ("wrap", "name"), [(lambda m: m, "inner"), (lambda m: nn.Sequential(m), "0.inner")]
)
def test_layers_whose_weight_is_read_from_outside_are_not_unrolled(wrap, name):
    """A chain has no weight to read; the reason names who reads it."""
    model = wrap(Peeks())
    factorize(model, rank=2)
    message = rf"{name}\.weight: its Peeks reads inner\.weight"
    with pytest.raises(ValueError, match=message) as error:
        unroll(model)
    assert "other" not in str(error.value)


def test_overlapping_memory_is_tied_too():
    """A view of another weight would silently stop following it."""
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach()[:])
    assert list(factorize(model, rank=2).ranks) == ["c.weight"]


def test_copies_do_not_share_their_class():
    """Torch lets copies share one; merging or factorizing one must not break the other."""
    model, x = nn.LSTM(6, 6), torch.randn(2, 1, 6)
    factorize(model, rank=2, include="weight_ih_l0")
    expected, _ = model(x)
    clone = copy.deepcopy(model)
    factorize(clone, rank=2, include="weight_hh_l0")
    merge(clone)
    torch.testing.assert_close(model(x)[0], expected)
    assert type(clone) is nn.LSTM


def test_partial_merge_keeps_the_rest_factorized():
    """Merging one of two weights of a module leaves the other a product."""
    model = nn.GRU(6, 6)
    keys = list(model.state_dict())
    factorize(model, rank=2)
    merge(model, include="weight_ih_l0")
    assert [p.name for p in products(model)] == ["weight_hh_l0"]
    merge(model, exclude="weight_ih_l0")
    assert list(model.state_dict()) == keys


def test_state_dict_keys_are_those_of_parametrize():
    """U, M, V are original0, original1, … and nothing of ours is stored."""
    layer = nn.Linear(6, 4)
    factorize(layer, rank=2, parametrization=functools.partial(LowRank, depth=1))
    keys = [f"parametrizations.weight.original{i}" for i in range(3)]
    assert list(layer.state_dict()) == ["bias", *keys]


def test_state_dict_keys_of_merge_without_factorize():
    """A parametrization that the user registered goes back to the usual place."""
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", LowRank(2))
    assert list(merge(layer).state_dict()) == ["weight", "bias"]


@pytest.mark.covers("D20")
def test_products_are_in_module_order_and_follow_their_parameters_D20():
    """A replaced parameter is the product's parameter at the next look (D20)."""
    model = ResNet()
    plan = factorize(model, rank=2)
    found = products(model)
    assert [p.name for p in found] == list(plan.ranks)
    fresh = nn.Parameter(torch.ones_like(found[0].params[0]))
    model.conv1.parametrizations.weight.original0 = fresh
    assert found[0].params[0] is fresh


def test_a_product_is_the_weight():
    """Materialized, it is what the module reads, in matrix form."""
    model = nn.Conv2d(4, 6, 3, groups=2).double()
    factorize(model, rank=2)
    (product,) = products(model)
    view = model.parametrizations.weight[0].matricization
    torch.testing.assert_close(view.tensor(product.materialize()), model.weight.materialize())


class Pair(nn.Module):
    """Somebody's own low-rank layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 6, bias=False), nn.Linear(5, 2, bias=False)


class Heir(Pair):
    pass


def _pair(module, name, label="pair"):
    yield Product(
        f"{name}.{label}",
        (Factor(module.up, "weight"), Factor(module.down, "weight", "r n -> n r")),
    )


@pytest.fixture
def providers(monkeypatch):
    """Registrations of one test do not reach the next."""
    for table in ("_USERS", "_OWN"):
        monkeypatch.setattr(find, table, {})


@pytest.mark.parametrize("key", [Pair, f"{Pair.__module__}.Pair"], ids=["type", "name"])
@pytest.mark.parametrize("kind", [Pair, Heir])
def test_providers_are_found_by_type_or_name_and_inherited(providers, key, kind):
    """By class or by qualified name; subclasses inherit."""
    register_products(key)(_pair)
    model = nn.Sequential(nn.Linear(3, 3), kind())
    assert [(p.name, p.shape) for p in products(model)] == [("1.pair", (6, 5))]


def test_a_users_provider_wins_over_ours(providers):
    """Also where ours is for a nearer class."""
    find._OWN[Heir] = functools.partial(_pair, label="ours")
    register_products(Pair)(functools.partial(_pair, label="theirs"))
    assert [p.name for p in products(nn.Sequential(Heir()))] == ["0.theirs"]


def test_provided_and_factorized_products_are_listed_once(providers):
    """A provider that yields a factorized weight again does not double its decay."""

    @register_products(nn.Linear)
    def linear(module, name):
        if parametrize.is_parametrized(module):
            held = module.parametrizations.weight
            yield held[0].product("theirs", held)

    model = nn.Sequential(nn.Linear(6, 4))
    factorize(model, rank=2)
    assert [p.name for p in products(model)] == ["theirs"]


def test_a_provider_has_to_yield_products(providers):
    """Anything else is named at once, not in a backend later."""
    register_products(Pair)(lambda module, name: [module.up])
    with pytest.raises(TypeError, match=r"expected .* to yield Product"):
        products(Pair())


def test_subclasses_of_linear_are_linear():
    """Third-party layers keep their own forward and get factors."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nn.Sequential(Scaled(6, 4)).double(), torch.randn(2, 6, dtype=torch.float64)
    expected = model(x)
    factorize(model, rank=1.0)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="Scaled reads its weight itself"):
        unroll(model)


def test_compiled_models_have_the_names_of_the_model():
    """The wrapper's prefix is no part of a name, so plans fit both."""
    model = nn.Sequential(collections.OrderedDict(fc=nn.Linear(6, 4)))
    compiled = torch.compile(model, backend="eager")
    assert list(factorize(compiled, rank=2, include="fc").ranks) == ["fc.weight"]
    assert [p.name for p in products(compiled)] == ["fc.weight"]
    assert compiled(torch.randn(2, 6)).shape == (2, 4)


def test_products_are_found_behind_data_parallel():
    """Names are those of the model inside."""
    model = nn.Sequential(nn.Linear(6, 4))
    factorize(model, rank=2)
    assert [p.name for p in products(nn.DataParallel(model))] == ["0.weight"]


@pytest.mark.covers("D19")
def test_functional_call_uses_the_given_parameters_D19():
    """Factors are parameters of the module tree, bias included (D19)."""
    model = nn.Conv2d(3, 4, 3).double()
    factorize(model, rank=2)
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    assert not torch.func.functional_call(model, zero, (x,)).any()


@pytest.mark.covers("D22")
def test_writes_by_an_optimizer_reach_the_weight_D22():
    """Nothing holds an old copy of a factor (D22)."""
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    factorize(layer, rank=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer(x)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer(x))
    held = layer.parametrizations.weight
    torch.testing.assert_close(layer.weight.materialize(), held.original0 @ held.original1.T)


class UnusualError(ValueError):
    """An error that is not made of a message."""

    def __init__(self, code, place):
        super().__init__(f"error {code} at {place}")


def test_an_error_of_any_type_gets_the_name_of_the_weight():
    """It is raised again as it is, not made again of a message alone."""

    def failing(weight, rank, *, depth):
        raise UnusualError(3, "home")

    with pytest.raises(UnusualError, match=r"^0\.weight: error 3 at home$"):
        factorize(nn.Sequential(nn.Linear(6, 4)), rank=2, init=failing)


class Counted(dict):
    """A module's children, which count how often one goes through them."""

    passes = 0

    def items(self):
        """Of a walk."""
        self.passes += 1
        return super().items()

    def values(self):
        """Of a walk, too."""
        self.passes += 1
        return super().values()


@pytest.mark.parametrize("act", [factorize, plan_ranks])
@pytest.mark.parametrize("rule", [{"rank": 2}, {"rank": {"1": 2, "2.*": 1}}, {"ratio": 0.5}])
@pytest.mark.parametrize("options", [{}, {"include": ["1", "2.*"]}, {"on_tied": "untie"}])
def test_a_model_is_walked_twice_at_most(act, rule, options):
    """Once for its names, once to count its parameters: in a large model both take a while."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tied = nn.Embedding(12, 12)
    tied.weight = nn.Parameter(torch.randn(12, 12))
    model = nn.Sequential(tied, nn.Linear(12, 12), nn.TransformerEncoder(layer, 2))
    model[1].weight = tied.weight if options.get("on_tied") else model[1].weight
    parts = [model, *model, model[2].layers[1]]
    for module in parts:
        module._modules = Counted(module._modules)
    act(model, **rule, **options)
    assert [module._modules.passes for module in parts] == [2] * len(parts)
