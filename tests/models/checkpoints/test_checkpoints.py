"""Dense and factorized checkpoints, into every kind of model they fit, and refused elsewhere."""

import copy
import functools
import json
import re
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from frobdecay import CP, TensorTrain, Tucker
from frobdecay.models.checkpoints.dense import load_dense_
from frobdecay.models.checkpoints.factorized import load_factorized, save_factorized
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.find import products
from frobdecay.weights import parametrization
from frobdecay.weights.lowrank import LowRank

needs_safetensors = pytest.mark.skipif(
    find_spec("safetensors") is None, reason="safetensors is not installed"
)


class Net(nn.Module):
    """A convolution, a normalization with buffers, a recurrent layer and attention, nested."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        """Classify images."""
        y, _ = self.lstm(self.body(x).flatten(2).mT)
        return self.head(self.attention(y, y, y)[0])


class Tied(nn.Module):
    """An embedding and an output layer with one weight, and a layer between them."""

    def __init__(self, tie=True):
        super().__init__()
        self.embed, self.mid = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 9, bias=False)
        if tie:
            self.out.weight = self.embed.weight


def _factorized(make=Net, rank=2, **options):
    model = make()
    factorize(model, rank=rank, **options)
    return model


def _on_meta(make):
    with torch.device("meta"):
        return make()


def _same(one, other):
    """Bitwise equal state dicts, in the same order, wherever they are."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(
        torch.equal(value.cpu(), b[key].cpu()) and value.dtype == b[key].dtype
        for key, value in a.items()
    )


def _alike(one, other):
    """State dicts with the same keys, shapes and dtypes, of the same weights to rounding.

    Not of the same factors: weights that are decomposed in a batch round otherwise than alone, and
    that can turn the columns of U and V that belong to nearly equal singular values.
    """
    a, b = one.state_dict(), other.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in a.items()] == [
        (k, v.shape, v.dtype) for k, v in b.items()
    ]
    dense = [merge(copy.deepcopy(model)).cpu().state_dict() for model in (one, other)]
    torch.testing.assert_close(*dense)
    return True


# --- dense into factorized ----------------------------------------------------------------------


@pytest.mark.covers("C24", "P13")
@pytest.mark.parametrize("prefix", ["", "outer.inner."])
def test_a_dense_state_dict_loads_into_a_factorized_model(prefix):
    """Strictly, at any nesting: the model is the one that is factorized from those weights."""

    def nested(model):
        for name in reversed(prefix.split(".")[:-1]):
            model = nn.ModuleDict({name: model})
        return model

    dense = nested(Net())
    model = nested(_factorized())
    assert str(model.load_state_dict(dense.state_dict())) == "<All keys matched successfully>"
    factorize(dense, rank=2)
    assert _alike(model, dense)


def test_load_dense_reports_the_error_of_every_weight():
    """The same errors that factorizing the dense model has, and the same model."""
    dense, model = Net(), _factorized()
    parameters = list(model.parameters())
    report = load_dense_(model, dense.state_dict())
    plan = factorize(dense, rank=2)
    assert {(row.name, row.shape, row.matrix, row.rank) for row in report.rows} == {
        (row.name, row.shape, row.matrix, row.rank) for row in plan.rows
    }
    errors = {row.name: row.error for row in plan.rows}
    for row in report.rows:
        assert row.error == pytest.approx(errors[row.name], abs=1e-6)
    assert (report.before, report.after) == (plan.before, plan.after)
    assert _alike(model, dense)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("load", [load_dense_, nn.Module.load_state_dict])
def test_loaded_weights_are_kept_whatever_the_initialization(load):
    """Random initializations are for training from scratch, not for a checkpoint."""
    dense = nn.Linear(8, 6)
    model = _factorized(lambda: nn.Linear(8, 6), 6, init="kaiming")
    load(model, dense.state_dict())
    torch.testing.assert_close(model.weight.materialize(), dense.weight)


def test_an_optimizer_goes_on_after_loading():
    """Parameters are the same objects, so its groups and ours still hold them."""
    model = _factorized()
    optimizer = FrobeniusDecay(torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1), model)
    load_dense_(model, Net().state_dict())
    before = [product.materialize().norm() for product in products(model)]
    model(torch.randn(2, 3, 4, 4)).sum().mul(0).backward()
    optimizer.step()
    after = [product.materialize().norm() for product in products(model)]
    assert all(b < a for a, b in zip(before, after, strict=True))


def test_loading_with_assign():
    """New parameters of the checkpoint's dtype, also where there was nothing but shapes."""
    dense = Net().double()
    model = _factorized().to("meta")
    model.load_state_dict(dense.state_dict(), assign=True)
    factorize(dense, rank=2)
    assert _alike(model, dense)


def test_a_model_in_half_precision_takes_a_float32_checkpoint():
    """The decomposition is the checkpoint's, rounded once."""
    dense = nn.Linear(8, 6)
    model = _factorized(lambda: nn.Linear(8, 6).bfloat16())
    model.load_state_dict(dense.state_dict())
    factorize(dense, rank=2)
    assert _alike(model, dense.bfloat16())


def test_shared_modules_are_loaded():
    """One layer under two names has two entries in a state dict."""
    layer = nn.Linear(6, 6)
    dense = nn.Sequential(layer, layer)
    model = copy.deepcopy(dense)
    factorize(model, rank=3)
    report = load_dense_(model, dense.state_dict())
    assert len(report.rows) == 1
    model.load_state_dict(dense.state_dict())


def _changed(key, value):
    state = Net().state_dict()
    state[key] = value
    return state


def _without(key):
    state = Net().state_dict()
    del state[key]
    return state


# What is wrong -> (state dict, a part of the message).
WRONG_DENSE = {
    "NaN": (lambda: _changed("head.weight", torch.full((5, 6), float("nan"))), "head.weight.*NaN"),
    "zero": (lambda: _changed("head.weight", torch.zeros(5, 6)), "head.weight.*zero.*never train"),
    "shape": (lambda: _changed("head.weight", torch.ones(6, 5)), r"\(5, 6\).*\(6, 5\)"),
    "integers": (lambda: _changed("head.weight", torch.ones(5, 6).int()), "head.weight.*int32"),
    "no tensor": (lambda: _changed("head.weight", 3), "head.weight.*tensor"),
    "missing weight": (lambda: _without("head.weight"), "head.*weight"),
    "missing bias": (lambda: _without("head.bias"), "head.bias"),
    "unexpected": (lambda: _changed("more", torch.ones(2)), "more"),
    "bias of another shape": (lambda: _changed("head.bias", torch.ones(2)), "head.bias"),
    "prefix": (
        lambda: {f"module.{key}": value for key, value in Net().state_dict().items()},
        r"begin with 'module.': load {name.removeprefix\('module.'\)"),
    "prefix of a part": (
        lambda: {f"net.{k}": v for k, v in _changed("cls.weight", torch.ones(2)).items()},
        "begin with 'net.'"),
    "further down": (
        lambda: {"model": Net().state_dict(), "epoch": 3}, r"may be in state_dict\['model'\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_DENSE)
def test_wrong_dense_state_dicts_change_nothing(case):
    """Whatever is wrong is named before the first tensor is written."""
    make, message = WRONG_DENSE[case]
    model = _factorized()
    before = copy.deepcopy(model)
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        load_dense_(model, make())
    assert _same(model, before)


def test_a_state_dict_of_the_model_inside_of_a_wrapper():
    """What to load it into is named."""
    with pytest.raises(ValueError, match=r"names begin with 'net\.': load into model\.net$"):
        load_dense_(nn.ModuleDict({"net": _factorized()}), Net().state_dict())


BUFFERS = {
    "position_ids": lambda: torch.arange(9)[None],
    "attention.bias": lambda: torch.ones(3, 3, dtype=torch.bool),
    "head.num_batches_tracked": lambda: torch.tensor(0),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("key", BUFFERS)
def test_buffers_that_the_model_lacks_are_left_out(key, strict):
    """Checkpoints of other versions of a model have them; the report says so."""
    model, other = _factorized(), _factorized()
    state = Net().state_dict()
    load_dense_(other, state)
    report = load_dense_(model, {**state, key: BUFFERS[key]()}, strict=strict)
    assert _alike(model, other)
    assert [(row.name, row.reason) for row in report.rows if row.rank is None] == [
        (key, "not in the model; left out")
    ]
    assert key in str(report)


@pytest.mark.parametrize("key", ["rotary.inv_freq", "rotary.old.freq"])
def test_buffers_of_numbers_are_left_out_where_the_model_says_so(key):
    """It has an unsaved buffer of that name, or ignores the name as transformers' models do."""
    model = _factorized()
    model.rotary = nn.Module()
    model.rotary.register_buffer("inv_freq", torch.ones(3), persistent=False)
    model._keys_to_ignore_on_load_unexpected = [r"old\.freq$"]
    report = load_dense_(model, {**Net().state_dict(), key: torch.zeros(3)})
    assert [row.name for row in report.rows if row.rank is None] == [key]
    assert torch.equal(model.rotary.inv_freq, torch.ones(3))


@pytest.mark.parametrize("key", ["head.weight", "head.bias", "body.1.running_var"])
def test_loading_what_there_is(key):
    """With ``strict=False``, as torch's: the rest stays as it was, and is listed."""
    model = _factorized()
    before = copy.deepcopy(model)
    state = {**_without(key), "rotary.inv_freq": torch.ones(3)}
    report = load_dense_(model, state, strict=False)
    reasons = {row.name: row.reason for row in report.rows if row.rank is None}
    assert reasons == {
        "rotary.inv_freq": "not in the model; left out", key: "not in the state_dict; as it was"
    }  # fmt: skip
    kept = {
        name.replace("parametrizations.", "").partition(".original")[0]
        for name, value in model.state_dict().items()
        if torch.equal(value, before.state_dict()[name])
    }
    assert kept & {"head.weight", "head.bias"} == {key} & {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match=f"(?s){key}.*strict=False"):
        load_dense_(model, _without(key))
    with pytest.raises(ValueError, match=r"rotary.*strict=False"):
        load_dense_(model, _changed("rotary.inv_freq", torch.ones(3)))


@pytest.mark.parametrize("strict", [True, False])
def test_torchs_own_loading_without_a_weight(strict):
    """Its factors are missing, which is an error or not as of any parameter."""
    model = _factorized()
    before = copy.deepcopy(model)
    if strict:
        with pytest.raises(RuntimeError, match=r"Missing key.*head.*weight\.original0"):
            model.load_state_dict(_without("head.weight"))
    else:
        missing, unexpected = model.load_state_dict(_without("head.weight"), strict=False)
        assert missing == [f"head.parametrizations.weight.original{i}" for i in range(2)]
        assert not unexpected
    for ours, theirs in zip(model.head.parametrizations.parameters(),
                            before.head.parametrizations.parameters(), strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)


class Versioned(nn.Linear):
    _version = 7

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        self.seen = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("include", ["0", "1"])
def test_modules_see_the_version_that_was_saved(include):
    """In the metadata of the state dict, factorized or not."""
    dense = nn.Sequential(Versioned(6, 5), nn.Linear(5, 6))
    model = _factorized(lambda: nn.Sequential(Versioned(6, 5), nn.Linear(5, 6)), include=include)
    load_dense_(model, dense.state_dict())
    assert model[0].seen == 7


@pytest.mark.covers("P13")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", ["NaN", "zero", "shape", "integers"])
def test_torchs_own_loading_names_weights_without_factors(case, strict):
    """They are errors as sizes that differ are, strict or not."""
    make, message = WRONG_DENSE[case]
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        _factorized().load_state_dict(make(), strict=strict)


@pytest.mark.covers("P18")
def test_dense_weights_for_factors_without_numbers_are_refused():
    """On the meta device there is nothing to copy to, and torch only warns."""
    model = _factorized().to("meta")
    with pytest.raises(ValueError, match=r"meta device.*assign=True"):
        load_dense_(model, Net().state_dict())
    with (
        pytest.warns(UserWarning, match="copying from a non-meta parameter"),
        pytest.raises(RuntimeError, match=r"meta device.*assign=True"),
    ):
        model.load_state_dict(Net().state_dict())


# --- factorized state dicts ---------------------------------------------------------------------


def test_a_factorized_state_dict_loads_into_the_same_structure(tmp_path):
    """Through a file that is read with ``weights_only``."""
    one, other = _factorized(), _factorized()
    torch.save(one.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert _same(one, other)


@pytest.mark.covers("D24")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 3}, r"head.weight.*shapes \[\(5, 3\), \(6, 3\)\].*\[\(5, 2\), \(6, 2\)\].*ranks"),
     ({"parametrization": functools.partial(LowRank, depth=1)}, r"\(2, 2\).*load_factorized"),
     ({"parametrization": functools.partial(LowRank, pattern="o i -> i o")}, "read as.*i o")],
)  # fmt: skip
def test_a_factorized_state_dict_of_another_structure_is_refused(options, message, strict):
    """Other ranks, other depths, and patterns whose factors have the same shapes."""
    layer = functools.partial(nn.Linear, 6, 5)
    if "i o" in message:
        layer = functools.partial(nn.Linear, 6, 6)
    state = nn.Sequential()
    state.head = _factorized(layer, **options)
    model = nn.Sequential()
    model.head = _factorized(layer)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        model.load_state_dict(state.state_dict(), strict=strict)


def test_factors_into_a_dense_model():
    """Torch refuses them, unless it was told not to; ours says what to do."""
    state = _factorized().state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*parametrizations\.weight\.original0"):
        Net().load_state_dict(state)
    dropped = Net().load_state_dict(state, strict=False)  # documented: nobody is asked
    assert "head.parametrizations.weight.original0" in dropped.unexpected_keys
    with pytest.raises(ValueError, match=r"dense Net.*factorized, too.*load_factorized"):
        load_dense_(Net(), state)
    with pytest.raises(ValueError, match=r"factorized in the state_dict already.*load_state_dict"):
        load_dense_(_factorized(), state)
    with pytest.raises(ValueError, match=r"dense Net; load it with model\.load_state_dict"):
        load_dense_(Net(), Net().state_dict())
    with pytest.raises(TypeError, match=r"expected a state_dict, got a str; torch\.load"):
        load_dense_(_factorized(), "model.pt")


BIASES = {
    "meta": (lambda bias: bias.to("meta"), "on meta"),
    "sparse": (lambda bias: bias.to_sparse(), "sparse_coo"),
    "complex": (lambda bias: bias + 1j, "complex"),
}


@pytest.mark.parametrize("name", ["head.bias", "head.weight"])
@pytest.mark.parametrize("case", BIASES)
def test_what_cannot_be_copied_is_refused_before_anything_is_changed(case, name):
    """Torch would copy what comes before it, or a part."""
    model, state = _factorized(), Net().state_dict()
    before = copy.deepcopy(model.state_dict())
    change, message = BIASES[case]
    message = message if name == "head.bias" else "head.weight: expected .*(meta device|convert)"
    with pytest.raises((TypeError, ValueError), match=message):
        load_dense_(model, {**state, name: change(state[name])})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_lengths_of_numpy_are_plain_in_files(tmp_path):
    """A record of numbers that only pickle knows could be read by neither loader."""
    halves = functools.partial(
        LowRank, pattern="(g o) i -> g o i", axes={"g": torch.ones(2).numpy().astype("int64").sum()}
    )
    model = nn.Sequential(nn.Linear(6, 4))
    factorize(model, rank=2, parametrization=halves)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    save_factorized(model, tmp_path / "model.safetensors")
    load_factorized(nn.Sequential(nn.Linear(6, 4)), tmp_path / "model.safetensors")


@pytest.mark.covers("P13")
def test_merge_makes_a_checkpoint_that_the_original_class_loads(tmp_path):
    """Keys, order, shapes; no trace of what the factorized class could do."""
    model = _factorized()
    x = torch.randn(2, 3, 4, 4)
    expected = model.eval()(x)
    torch.save(merge(copy.deepcopy(model)).state_dict(), tmp_path / "dense.pt")
    dense = Net().eval()
    dense.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True))
    torch.testing.assert_close(dense(x), expected)
    merged = merge(model)
    assert type(merged.head) is nn.Linear
    assert type(merged.head).reset_parameters is nn.Linear.reset_parameters


def test_a_deep_copy_loads_and_resets_like_its_original():
    """Also after the original was merged."""
    model = _factorized()
    twin = copy.deepcopy(model)
    merge(model)
    twin.load_state_dict(Net().state_dict())
    twin.head.reset_parameters()


# --- reset_parameters ---------------------------------------------------------------------------

RESETS = {
    "linear": lambda: nn.Linear(8, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "embedding": lambda: nn.Embedding(9, 6, padding_idx=0),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "lstm": lambda: nn.LSTM(5, 6, num_layers=2),
    "gru cell": lambda: nn.GRUCell(5, 6),
    "attention": lambda: nn.MultiheadAttention(6, 2),
}


def _reset(model):
    for module in model.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, name):
                getattr(module, name)()


@pytest.mark.covers("C7", "P17")
@pytest.mark.parametrize("rank", [1, 2.0])
@pytest.mark.parametrize("case", RESETS)
def test_reset_parameters_draws_the_dense_weights_and_factorizes_them(case, rank):
    """After ``to_empty``, whatever was in memory: same numbers as resetting, then factorizing."""
    model = _factorized(RESETS[case], rank).to("meta")
    model.to_empty(device=torch.get_default_device())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    parameters, order = list(model.parameters()), list(model.state_dict())
    torch.manual_seed(3)
    _reset(model)
    assert list(model.state_dict()) == order
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    dense = RESETS[case]()
    torch.manual_seed(3)
    _reset(dense)
    factorize(dense, rank=rank)
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_reset_parameters_keeps_the_initialization_that_was_chosen():
    """Kaiming factors are drawn again, not decomposed."""
    model = _factorized(RESETS["linear"], init="kaiming")
    before = copy.deepcopy(model)
    model.reset_parameters()
    assert not any(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )
    assert (model.weight - model.weight.mean()).abs().max() > 0


class Zero(nn.Linear):
    """Starts at zero, as adapters do, but only when asked again."""

    def reset_parameters(self):
        """Draw the first time, then zero."""
        super().reset_parameters()
        if getattr(self, "again", False):
            nn.init.zeros_(self.weight)


class Failing(nn.Linear):
    def reset_parameters(self):
        """Draw the first time, then fail half-way."""
        if getattr(self, "again", False):
            self.weight.data.fill_(1.0)
            raise ArithmeticError("of its own")
        super().reset_parameters()


@pytest.mark.parametrize(
    ("kind", "device", "error", "message"),
    [(nn.Linear, "meta", ValueError, "cannot reset Linear.weight.*meta device.*to_empty"),
     (Zero, "cpu", ValueError, "cannot reset Zero.weight.*zero.*never train"),
     (Failing, "cpu", ArithmeticError, "of its own")],
)  # fmt: skip
def test_resets_that_fail_leave_the_factors(kind, device, error, message):
    """And the class, the parameters and their order."""
    model = _factorized(lambda: kind(6, 5)).to(device)
    model.again = True
    before, keys = copy.deepcopy(model).parametrizations.weight, list(model.state_dict())
    with pytest.raises(error, match=message):
        model.reset_parameters()
    assert list(model.state_dict()) == keys
    after = model.parametrizations.weight
    assert device == "meta" or torch.equal(before.original0, after.original0)
    assert model.weight.shape == (5, 6)


def test_a_reset_beside_another_parametrization_is_refused():
    """It would write into what that one computes."""
    model = _factorized(RESETS["lstm"], include="weight_hh_l0")
    nn.utils.parametrizations.weight_norm(model, "weight_ih_l0")
    with pytest.raises(ValueError, match="other parametrizations"):
        model.reset_parameters()


# --- files --------------------------------------------------------------------------------------

KINDS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(7, 6),
    "lstm": lambda: nn.LSTM(4, 5),
    "attention": lambda: nn.MultiheadAttention(6, 2),
    "norm": lambda: nn.BatchNorm1d(5),
}
STRUCTURES = st.fixed_dictionaries({
    "kinds": st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4),
    "rank": st.sampled_from([1, 2, 0.5, 2.0]),
    "depth": st.integers(0, 2),
    "pattern": st.sampled_from([None, "channel"]),
    "init": st.sampled_from(["spectral", "kaiming", "randomized"]),
    "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
})  # fmt: skip


def _built(kinds, dtype, **_):
    return nn.Sequential(nn.Linear(6, 5), *(KINDS[kind]() for kind in kinds)).to(dtype)


@pytest.mark.covers("C24", "P28")
@needs_safetensors
@given(STRUCTURES)
def test_round_trip(tmp_path_factory, structure):
    """A fresh dense model, also on the meta device, becomes bitwise the one that was saved."""
    path = tmp_path_factory.mktemp("round") / "model.safetensors"
    model = _built(**structure)
    settings = {key: structure[key] for key in ("depth", "pattern")}
    make = functools.partial(LowRank, **settings)
    factorize(model, rank=structure["rank"], parametrization=make, init=structure["init"])
    save_factorized(model, path)
    for fresh in (_built(**structure), _on_meta(functools.partial(_built, **structure))):
        assert load_factorized(fresh, path) is fresh
        assert _same(fresh, model)
        assert not any(tensor.is_meta for tensor in fresh.state_dict().values())
        assert [(p.name, p.shape) for p in products(fresh)] == [
            (p.name, p.shape) for p in products(model)
        ]
        assert fresh[0].parametrizations.weight[0].config() == (
            model[0].parametrizations.weight[0].config()
        )
        assert _same(merge(fresh), merge(copy.deepcopy(model)))


@needs_safetensors
@pytest.mark.parametrize("kind", [LowRank, Tucker, TensorTrain, CP])
def test_nothing_is_decomposed_again(tmp_path, kind, monkeypatch):
    """A file and a state dict hold the factors: how a machine rounds does not matter to them."""
    model, other, fresh = Net(), Net(), Net()
    for one in (model, other):
        factorize(one, rank=2, include=["body", "head"], parametrization=kind)
    save_factorized(model, tmp_path / "model.safetensors")
    for name in ("svd", "eigh", "qr", "pinv", "svdvals", "eigvalsh"):
        monkeypatch.delattr(torch.linalg, name)
    assert _same(load_factorized(fresh, tmp_path / "model.safetensors"), model)
    other.load_state_dict(model.state_dict())
    assert _same(other, model)


@pytest.mark.covers("C24", "D24")
@needs_safetensors
@pytest.mark.parametrize("kind", [Tucker, TensorTrain, CP])
def test_every_kind_makes_the_round_trip(tmp_path, kind):
    """Into a file and back, from a dense checkpoint, and through a reset."""
    model = Net()
    factorize(model, rank=2, include=["body", "head"], parametrization=kind)
    save_factorized(model, tmp_path / "model.safetensors")
    fresh = load_factorized(_on_meta(Net), tmp_path / "model.safetensors")
    assert _same(fresh, model)
    assert _same(merge(copy.deepcopy(fresh)), merge(copy.deepcopy(model)))
    dense = Net()
    report = load_dense_(fresh, dense.state_dict())
    plan = factorize(dense, rank=2, include=["body", "head"], parametrization=kind)
    chosen = [row for row in plan.rows if row.rank is not None]
    assert [(row.name, row.matrix, row.rank) for row in report.rows] == [
        (row.name, row.matrix, row.rank) for row in chosen
    ]
    assert _alike(fresh, dense)
    fresh.head.reset_parameters()
    assert bool(fresh.head.weight.abs().sum() > 0)


def test_a_file_decides_how_a_weight_is_read(tmp_path):
    """Also where the default reading is another one today: that of this kernel once was."""
    layer, path = nn.Conv2d(1, 6, (8, 1)), tmp_path / "model.safetensors"
    once = functools.partial(LowRank, pattern="o i kh kw -> (o kh) (i kw)")
    saved = nn.Sequential(copy.deepcopy(layer))
    factorize(saved, rank=1, parametrization=once)
    save_factorized(saved, path)
    fresh = load_factorized(nn.Sequential(layer), path)
    assert fresh[0].parametrizations.weight.original0.shape == (48, 1)
    assert torch.equal(merge(fresh)[0].weight, merge(saved)[0].weight)


@needs_safetensors
def test_a_loaded_model_is_like_the_saved_one(tmp_path):
    """It computes the same, trains, keeps frozen weights frozen, and loads once more."""
    model = Net()
    model.head.requires_grad_(False)
    factorize(model, rank=2, exclude="attention")
    save_factorized(model, tmp_path / "model.safetensors")
    fresh = _on_meta(Net)
    fresh.head.requires_grad_(False)
    fresh.body[1].num_batches_tracked += 1
    load_factorized(load_factorized(fresh, tmp_path / "model.safetensors"),
                    tmp_path / "model.safetensors")  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fresh.to(x.device).eval()(x), model.eval()(x))
    assert [p.requires_grad for p in fresh.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    fresh(x).sum().backward()
    load_dense_(fresh, Net().state_dict())
    assert list(merge(fresh).state_dict()) == list(Net().state_dict())


@needs_safetensors
def test_the_file_is_an_ordinary_one(tmp_path):
    """Others read it: the state dict's keys and numbers, buffers too, contiguous and unshared."""
    from safetensors.torch import load_file

    model = _factorized()
    model.head.bias = nn.Parameter(torch.randn(10)[::2])
    model.body[0].bias = nn.Parameter(torch.randn(3, 8)[1])
    save_factorized(model, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(model.state_dict())
    assert all(torch.equal(found[key], value.cpu()) for key, value in model.state_dict().items())
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044  # as others' files are


@pytest.mark.covers("P19")
@needs_safetensors
@pytest.mark.parametrize("meta", [False, True])
def test_tied_weights_are_saved_once_and_stay_tied(tmp_path, meta):
    """On any device."""
    from safetensors.torch import load_file

    model = _factorized(Tied)
    save_factorized(model, tmp_path / "model.safetensors")
    assert "out.weight" not in load_file(tmp_path / "model.safetensors")
    fresh = _on_meta(Tied) if meta else Tied()
    load_factorized(fresh, tmp_path / "model.safetensors")
    assert fresh.out.weight is fresh.embed.weight
    assert _same(fresh, model)


@needs_safetensors
@pytest.mark.parametrize("include", ["out", ["out", "embed"]])
def test_ties_that_factorizing_broke_are_broken_again(tmp_path, include):
    """The file has two tensors where the fresh model has one."""
    model = _factorized(Tied, include=include, on_tied="untie")
    save_factorized(model, tmp_path / "model.safetensors")
    assert _same(load_factorized(_on_meta(Tied), tmp_path / "model.safetensors"), model)


@needs_safetensors
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
def test_compiled_models_are_saved_under_the_names_of_their_modules(tmp_path):
    """A wrapper of torch.compile, outside or inside, is no part of the structure."""
    model = _factorized()
    save_factorized(torch.compile(model), tmp_path / "model.safetensors")
    assert _same(load_factorized(Net(), tmp_path / "model.safetensors"), model)
    compiled = torch.compile(Net())
    load_factorized(compiled, tmp_path / "model.safetensors")
    assert _same(compiled._orig_mod, model)


class Extra(Net):
    def get_extra_state(self):
        """Something that is no tensor."""
        return 3

    def set_extra_state(self, state):
        """Take it back."""


class Mask(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(3), persistent=False)


class Odd(LowRank):
    """A parametrization that no file knows."""


def _qint():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)


def _parallel():
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    return nn.Sequential(wrapper)


# What cannot be saved -> (the model, a part of the message).
UNSAVED = {
    "meta": (lambda: _factorized().to("meta"), "meta"),
    "sparse": (lambda: nn.ParameterDict({"s": torch.eye(3).to_sparse()}), "s is no whole.*coo"),
    "quantized": (lambda: nn.ParameterDict({"q": nn.Parameter(_qint(), False)}), "q is .*qint8"),
    "extra state": (Extra, "extra_state"),
    "unknown kind": (lambda: _factorized(parametrization=Odd), "Odd.*KINDS"),
    "data parallel": (_parallel, "DistributedDataParallel"),
}  # fmt: skip


@needs_safetensors
@pytest.mark.parametrize("case", UNSAVED)
def test_what_cannot_be_saved_leaves_the_old_file(tmp_path, case):
    """And nothing beside it."""
    make, message = UNSAVED[case]
    path = tmp_path / "model.safetensors"
    save_factorized(_factorized(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        save_factorized(make(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _edited(path, header=None, drop=(), **tensors):
    """Write a file of ``save_factorized`` again, with other contents."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    structure = json.loads(metadata["frobdecay"])
    if header is not None:
        header(structure)
    content = {k: v for k, v in {**load_file(path), **tensors}.items() if k not in drop}
    save_file(content, path, {"frobdecay": json.dumps(structure)})


def _reworded(path, old, new):
    """Write the file again with another text for its structure."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        text = file.metadata()["frobdecay"]
    assert old in text
    save_file(load_file(path), path, {"frobdecay": text.replace(old, new)})


def _head(**changes):
    return lambda structure: structure["weights"]["head.weight"].update(changes)


def _config(**changes):
    return lambda structure: structure["weights"]["head.weight"]["config"].update(changes)


ORIGINAL = "head.parametrizations.weight.original0"

# What is wrong with a file -> (what is done to it, a part of the message).
WRONG_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "expected a safetensors file.*an empty file"),
    "of torch": (lambda path: torch.save({}, path), "expected a safetensors file.*torch.save"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a whole"),
    "random": (lambda path: path.write_bytes(bytes(range(256)) * 9), "something unknown"),
    "newer": (lambda path: _edited(path, lambda s: s.update(version=2)), "version 2.*up to 1"),
    "no version": (lambda path: _edited(path, lambda s: s.pop("version")), "with a version"),
    "no weights": (lambda path: _edited(path, lambda s: s.update(weights=3)), "table of weights"),
    "no ties": (lambda path: _edited(path, lambda s: s.update(tied=[1])), "table of tied"),
    "unknown kind": (
        lambda path: _edited(path, _head(kind="os.system")), "head.weight.*'os.system'.*LowRank"),
    "no config": (lambda path: _edited(path, _head(config=None)), "head.weight.*config"),
    "no shape": (lambda path: _edited(path, _head(shape=[5, -6])), "head.weight.*shape"),
    "wrong shape": (lambda path: _edited(path, _head(shape=[6, 5])), r"head.weight.*\(6, 5\)"),
    "unknown option": (lambda path: _edited(path, _config(colour=1)), "head.weight.*colour"),
    "wrong pattern": (lambda path: _edited(path, _config(pattern="o -> i")), "head.weight.*o -> i"),
    **{f"pattern {value!r}": (lambda path, v=value: _edited(path, _config(pattern=v)),
                              "head.weight.*expected a pattern") for value in (3, [], True, {})},
    "no end of axes": (lambda path: _edited(path, _config(pattern="o " * 10**5)), "config"),
    "axes": (lambda path: _edited(path, _config(axes=[1])), "head.weight.*LowRank cannot be made"),
    "axis": (lambda path: _edited(path, _config(axes={"o": -5, "i": -6})), "head.weight.*above 0"),
    "half an axis": (lambda path: _edited(path, _config(axes={"o": 2.5})), "head.weight.*an int"),
    "ranks": (lambda path: _edited(path, _config(rank=[2, 2])), "head.weight.*expected a rank"),
    "infinite": (lambda path: _edited(path, _config(rank=1e308)), "head.weight.*rank|infinity"),
    "deep": (lambda path: _edited(path, _config(init=functools.reduce(
        lambda inner, _: [inner], range(300), 1))), "head.weight.*init"),
    "no end of sizes": (lambda path: _edited(path, _head(shape=[5, 6] + [1] * 10**5)), "shape"),
    "unknown init": (lambda path: _edited(path, _config(init="os")), "head.weight.*init"),
    "another rank": (lambda path: _edited(path, _config(rank=3)), r"\(5, 3\).*got \[\(5, 2\)"),
    "a rank beyond memory": (
        lambda path: _edited(path, _config(rank=10**9)), r"\(5, 10{9}\).*got \[\(5, 2\)"),
    "missing": (lambda path: _edited(path, drop=["head.bias"]), "lacks head.bias"),
    "missing factor": (lambda path: _edited(path, drop=[ORIGINAL]), r"head\.weight.*got \[None"),
    "unexpected": (lambda path: _edited(path, more=torch.ones(2)), "does not more"),
    "shape": (lambda path: _edited(path, **{"head.bias": torch.ones(6)}), "head.bias.*float32 6"),
    "dtype": (lambda path: _edited(path, **{ORIGINAL: torch.ones(5, 2).half()}), "head.*float16"),
    "a weight more": (
        lambda path: _edited(path, lambda s: s["weights"].update(
            {"tail.weight": s["weights"]["head.weight"]})), "tail.weight.*does not have"),
    "tied to what is not there": (
        lambda path: _edited(path, lambda s: s["tied"].update({"head.bias": "out.bias"}),
                             drop=["head.bias"]), "head.bias is said to be out.bias, which is not"),
    "tied to what is tied": (
        lambda path: _edited(path, lambda s: s["tied"].update(
            {"head.bias": "body.0.bias", "body.0.bias": "body.1.bias"}),
            drop=["head.bias", "body.0.bias"]), "head.bias is said to be body.0.bias, which is"),
    "tied, though there": (
        lambda path: _edited(path, lambda s: s["tied"].update({"head.bias": "body.1.bias"})),
        "head.bias is said to be body.1.bias, but has its own numbers"),
    "a tie of an unknown name": (
        lambda path: _edited(path, lambda s: s["tied"].update({"tail.bias": "head.bias"})),
        "does not tail.bias"),
    "a name twice": (lambda path: _reworded(path, '"kind"', '"config": 1, "kind"'), "name twice"),
    "tied to another": (
        lambda path: _edited(
            path, lambda s: s["tied"].update({"body.0.bias": "body.1.bias"}),
            drop=["body.0.bias"]), "body.0.bias and body.1.bias are one tensor in it, but two"),
}  # fmt: skip


@pytest.mark.covers("C24")
@needs_safetensors
@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_change_nothing(tmp_path, case):
    """The message names the file and the culprit."""
    damage, message = WRONG_FILES[case]
    path = tmp_path / "model.safetensors"
    save_factorized(_factorized(), path)
    damage(path)
    model = Net()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"(?s)cannot load {re.escape(str(path))}.*{message}"):
        load_factorized(model, path)
    assert _same(model, before)


def _with_table():
    model = Net()
    model.head = nn.Bilinear(2, 3, 5)
    return model


# Which model a good file does not fit -> (the model, a part of the message).
WRONG_MODELS = {
    "other ranks": (lambda: _factorized(rank=3), "rank': 2.*rank': 3.*merge it first"),
    "factorized elsewhere": (lambda: _factorized(lambda: nn.ModuleDict({"x": nn.Linear(6, 5)})),
                             "'x.weight'.*dense.*merge"),
    "another class": (lambda: nn.Linear(6, 5), "does not have"),
    "another layer": (_with_table, r"head.weight.*\(5, 6\).*\(5, 2, 3\)"),
    "another dtype": (lambda: Net().double(), "float32.*float64"),
    "buffers without numbers": (lambda: _on_meta(Mask), "mask.*meta device.*persistent=False"),
    "extra state": (Extra, "extra_state"),
}  # fmt: skip


@needs_safetensors
@pytest.mark.parametrize("case", WRONG_MODELS)
def test_models_that_a_file_does_not_fit_are_left_alone(tmp_path, case):
    """A dense or another model is named, and what to do."""
    make, message = WRONG_MODELS[case]
    save_factorized(_factorized(), tmp_path / "model.safetensors")
    model = make()
    before = list(model.state_dict(keep_vars=True).values())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_factorized(model, tmp_path / "model.safetensors")
    after = list(model.state_dict(keep_vars=True).values())
    assert all(a is b for a, b in zip(before, after, strict=True))


@needs_safetensors
def test_a_weight_has_one_record(tmp_path):
    """A module under two names is one, whichever of its names a file uses."""

    def make():
        model = nn.Sequential(nn.Linear(6, 5))
        model.twin = model[0]
        return model

    def double(structure):
        structure["weights"]["twin.weight"] = structure["weights"]["0.weight"]

    path = tmp_path / "model.safetensors"
    save_factorized(_factorized(make), path)
    _edited(path, double)
    with pytest.raises(ValueError, match=r"both 0\.weight and twin\.weight"):
        load_factorized(make(), path)


@needs_safetensors
@pytest.mark.parametrize("saved", [True, False])
def test_ties_have_to_agree(tmp_path, saved):
    """Two tensors in one's memory would overwrite each other; one in two's would part."""
    model = Tied(tie=saved)
    factorize(model, rank=2, include="mid")
    save_factorized(model, tmp_path / "model.safetensors")
    message = "two in the model; tie them" if saved else "one tensor in the model.*untie"
    with pytest.raises(ValueError, match=message):
        load_factorized(Tied(tie=not saved), tmp_path / "model.safetensors")


@needs_safetensors
def test_an_error_on_the_way_leaves_the_structure(tmp_path, monkeypatch):
    """Registered or not at all."""
    save_factorized(_factorized(), tmp_path / "model.safetensors")

    def fail(model, values):
        raise MemoryError

    monkeypatch.setattr("frobdecay.models.checkpoints.factorized.fill", fail)
    model = Net()
    before = copy.deepcopy(model)
    with pytest.raises(MemoryError):
        load_factorized(model, tmp_path / "model.safetensors")
    assert _same(model, before)
    assert type(model.head) is nn.Linear
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), before.eval()(x))  # what the lstm keeps beside its tables


@needs_safetensors
@pytest.mark.parametrize("where", ["loading", "making", "both"])
def test_models_loaded_under_inference_mode_train(tmp_path, where):
    """Their tensors are ordinary ones, wherever the dense model's came from."""
    save_factorized(_factorized(), tmp_path / "model.safetensors")
    with torch.inference_mode(where != "loading"):
        model = Net()
    with torch.inference_mode(where != "making"):
        load_factorized(model, tmp_path / "model.safetensors")
        save_factorized(model, tmp_path / "again.safetensors")
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(p.grad is not None for p in model.parameters() if p.ndim > 1)


def test_dense_weights_under_inference_mode():
    """Into parameters that can be written to; others are named before anything changed."""
    with torch.inference_mode():
        state, made = Net().state_dict(), Net()
    model, ordinary = _factorized(), _factorized()
    with torch.inference_mode():
        load_dense_(model, state)
    load_dense_(ordinary, state)
    assert _alike(model, ordinary)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    factorize(made, rank=2)
    with pytest.raises(ValueError, match=r"body\.0\.bias.*made under torch\.inference_mode"):
        load_dense_(made, state)


@needs_safetensors
def test_a_dense_file_and_a_missing_one(tmp_path):
    """The first says what loads it; the second is what a missing file always is."""
    from safetensors.torch import save_file

    save_file(Net().state_dict(), tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match=r"no structure.*load_state_dict"):
        load_factorized(Net(), tmp_path / "dense.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_factorized(Net(), tmp_path / "nothing")


@pytest.mark.cpu("its mesh is of CPUs")
@needs_safetensors
@pytest.mark.usefixtures("alone")
def test_sharded_models_are_refused(tmp_path):
    """Each process has a part; nothing is read from it or written to it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    path = tmp_path / "model.safetensors"
    model = _factorized()
    save_factorized(model, path)
    held, mesh = model.head.parametrizations.weight, init_device_mesh("cpu", (1,))
    held.original0 = nn.Parameter(distribute_tensor(held.original0.detach(), mesh))
    for act in (save_factorized, load_factorized):
        with pytest.raises(ValueError, match=r"head.*original0 is sharded.*before fully_shard"):
            act(model, path)
    with pytest.raises(ValueError, match=r"head\.weight: the factors are sharded"):
        load_dense_(model, Net().state_dict())
    with pytest.raises(ValueError, match=r"cannot reset Linear\.weight: .* sharded"):
        model.head.reset_parameters()


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    """Nothing else needs it, nor do files of it that are written."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    save_factorized(_factorized(), tmp_path / "model.safetensors")
    with pytest.raises(ImportError, match=r"pip install safetensors, or frobdecay\[cli\]"):
        load_factorized(Net(), tmp_path / "model.safetensors")


class Settled(LowRank):
    """It refuses other methods than it was made with."""

    def __setattr__(self, name, value):
        assert name != "right_inverse"
        assert name != "init" or name not in vars(self)
        super().__setattr__(name, value)


@needs_safetensors
def test_factors_that_are_known_are_put_in_place_without_a_change_of_methods(tmp_path, monkeypatch):
    """Those of a stack, and those of a file: torch is told of them, and the checks are its own."""
    monkeypatch.setitem(parametrization.KINDS, "Settled", Settled)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    factorize(model, rank=2, parametrization=Settled)
    save_factorized(model, tmp_path / "f")
    again = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    load_factorized(again, tmp_path / "f")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not again[0].parametrizations.weight.unsafe
