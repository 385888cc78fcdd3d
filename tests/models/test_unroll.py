"""Unrolled layers: equal to what they replace for whoever reads them, or refused by name."""

import functools
import operator
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from frobdecay import factorize, unroll
from frobdecay.models.unroll import bytecode
from frobdecay.weights.lowrank import LowRank

ATTRIBUTE, ATTRIBUTES = "weight", ("weight", "bias")
WEIGHT_OF = operator.attrgetter("weight")
ELSEWHERE = types.ModuleType("elsewhere")
exec(
    "def inner(layer, x):\n    return x @ layer.weight.mT\ndef helper(*a):\n    return inner(*a)",
    vars(ELSEWHERE),
)


def helper(layer, x):
    """Linear, by the weight."""
    return functional.linear(x, layer.weight)


def by_default(layer, x, name="weight"):
    """Linear, by the weight's name."""
    return functional.linear(x, getattr(layer, name))


def decorated(function):
    """Without wraps."""

    def call(self, x):
        return function(self, x)

    return call


class Net(nn.Module):
    """Layers in all kinds of places; each case has a forward of its own."""

    def __init__(self):
        super().__init__()
        self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.fcs = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.named = nn.ModuleDict({"a": nn.Linear(8, 8)})
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.norm = nn.LayerNorm(8)
        self.key, self.by_partial = "weight", functools.partial(by_default, name="weight")
        self.by_lambda = lambda layer, x: x @ layer.weight.mT

    @property
    def dtype(self):
        """Of the weights."""
        return self.fc.weight.dtype

    @functools.cached_property
    def matrix(self):
        """A weight."""
        return self.fc.weight

    @property
    def first(self):
        """A layer."""
        return self.fcs[0]

    @staticmethod
    def static(layer, x):
        """Linear, by the weight."""
        return functional.linear(x, layer.weight)

    def method(self, layer, x):
        """Linear, by the weight."""
        return functional.linear(x, layer.weight)

    def forward_of(self, x):
        """Reads its layer."""
        return functional.linear(x, self.fc.weight)

    def name(self):
        """The name of what is read."""
        return "weight"


def _loop(self, x):
    for fc in self.fcs:
        x = functional.linear(x, fc.weight)
    return x


def _comprehension(self, x):
    return sum(functional.linear(x, w) for w in [fc.weight for fc in self.fcs])


def _generator(self, x):
    return x @ next(fc.weight for fc in self.children() if isinstance(fc, nn.Linear))


def _closure(self, x):
    def inside():
        return self.fc.weight

    return x @ inside()


def _inner_function(self, x):
    def inside(layer):
        return x @ layer.weight

    return inside(self.fc)


def _nested_attribute(self, x):
    return x @ self.block[0].weight


def _string(self, x):
    return x @ getattr(self.fc, "weight")  # noqa: B009


def _strings(self, x):
    return sum(x @ getattr(self.fc, name) for name in ("weight", "weight"))


def _global_strings(self, x):
    return sum((x @ getattr(self.fc, name)).sum() for name in ATTRIBUTES)


def _matched(self, x):
    match self.fc:
        case nn.Linear(weight=w):
            return x @ w
    return x


@decorated
def _wrapped(self, x):
    return functional.linear(x, self.fc.weight)


def _assigned(self, x):
    layer = self.fc
    return x @ layer.weight


def _biased(self, x):
    return self.fc(x) - self.fc.bias


READS = {
    "loop": _loop,
    "comprehension": _comprehension,
    "generator": _generator,
    "closure": _closure,
    "inner function": _inner_function,
    "index": _nested_attribute,
    "dict": lambda self, x: x @ self.named["a"].weight,
    "string": _string,
    "strings": _strings,
    "global string": lambda self, x: x @ getattr(self.fc, ATTRIBUTE),
    "global strings": _global_strings,
    "own string": lambda self, x: x @ getattr(self.fc, self.key),
    "attrgetter": lambda self, x: x @ operator.attrgetter("weight")(self.fc),
    "attrgetter by path": lambda self, x: x @ operator.attrgetter("fc.weight")(self),
    "global attrgetter": lambda self, x: x @ WEIGHT_OF(self.fc),
    "get_submodule": lambda self, x: x @ self.get_submodule("fc").weight,
    "modules by name": lambda self, x: x @ self._modules["fc"].weight,
    "children": lambda self, x: x @ next(iter(self.children())).weight,
    "named modules": lambda self, x: x @ dict(self.named_modules())["fc"].weight,
    "vars": lambda self, x: x @ vars(self)["_modules"]["fc"].weight,
    "helper": lambda self, x: helper(self.fc, x),
    "helper of self": lambda self, x: (lambda net: x @ net.fc.weight)(self),
    "helper with a default": lambda self, x: by_default(self.fc, x),
    "helper elsewhere": lambda self, x: ELSEWHERE.helper(self.fc, x),
    "partial": lambda self, x: functools.partial(helper, self.fc)(x),
    "own partial": lambda self, x: self.by_partial(self.fc, x),
    "own lambda": lambda self, x: self.by_lambda(self.fc, x),
    "map": lambda self, x: sum(map(functools.partial(helper, x=x), self.fcs)),
    "static method": lambda self, x: self.static(self.fc, x),
    "method": lambda self, x: self.method(self.fc, x),
    "named method": lambda self, x: getattr(self, "forward_of")(x),  # noqa: B009
    "method of super": lambda self, x: super(type(self), self).forward_of(x),
    "returned string": lambda self, x: x @ getattr(self.fc, self.name()),
    "property": lambda self, x: self.fc(x.to(self.dtype)),
    "cached property": lambda self, x: x @ self.matrix,
    "layer by property": lambda self, x: x @ self.first.weight,
    "decorated": _wrapped,
    "assigned": _assigned,
    "walrus": lambda self, x: x @ (f := self.fc).weight + f(x),
    "match": _matched,
    "bias": _biased,
    "type": lambda self, x: self.fc(x) if isinstance(self.fc, nn.Linear) else x,
    "exact type": lambda self, x: sum(f(x) for f in self.children() if type(f) is nn.Linear),
    "parametrizations": lambda self, x: x @ self.fc.parametrizations.weight(),
}


def net(forward, kind=Net):
    """A factorized model with this forward, and what it computes."""
    model = type("Net", (kind,), {"forward": forward})()
    factorize(model, rank=2)
    x = torch.linspace(-1, 1, 16).view(2, 8)
    return model, x, model(x)


CYCLE: list = []
CYCLE.append(CYCLE)


def test_a_list_that_holds_itself_is_looked_into_once():
    """Wherever a forward finds it."""

    def forward(self, x):
        return self.fc(x) * len(CYCLE)

    model, x, expected = net(forward)
    model.cycle = CYCLE
    torch.testing.assert_close(unroll(model)(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_inner_factors_are_links_of_a_convolution(kind, groups, bias):
    """With its groups, and with none of its stride, padding and dilation."""
    torch.manual_seed(0)
    layer = kind(8, 12, 3, stride=2, padding=1, dilation=2, groups=groups, bias=bias)
    factorize(layer, rank=2, parametrization=functools.partial(LowRank, depth=2))
    x = torch.randn(2, 8, *[9] * len(layer.kernel_size))
    expected = layer(x)
    chain = unroll(layer)
    point = nn.Conv2d if len(layer.kernel_size) == 2 else nn.Conv1d
    assert [type(link) for link in chain] == [kind, point, point, kind]
    torch.testing.assert_close(chain(x), expected)


@pytest.mark.parametrize("inside", [False, True], ids=["root", "inside"])
@pytest.mark.parametrize("case", READS)
def test_layers_that_may_be_read_are_refused_by_name(case, inside):
    """In whatever words they are read; nothing was changed then."""
    model, x, expected = net(READS[case])
    with pytest.raises(ValueError, match=r"(?s)cannot unroll.*(reads|may read|may ask).*merge"):
        unroll(nn.Sequential(model) if inside else model)
    torch.testing.assert_close(model(x), expected)


def _by_self(net):
    return lambda *_: net.fc.weight.sum() + _[2]


def _by_layer(net):
    fc = net.fc
    return lambda *_: fc.weight.sum() + _[2]


def _by_way(net):
    return lambda *_: by_default(net.fc, _[2])


def _by_global(net):
    ENCLOSING["net"] = net
    return eval("lambda *_: net.fc.weight.sum() + _[2]", ENCLOSING)


ENCLOSING = {"__name__": __name__}


@pytest.mark.parametrize("hook", [_by_self, _by_layer, _by_way, _by_global])
def test_layers_in_variables_around_are_read(hook):
    """What a function encloses, or finds as a global, is looked at as what it is given."""
    model, x, _ = net(lambda self, x: self.other(self.fc(x)))
    model.norm.register_forward_hook(hook(model))
    with pytest.raises(ValueError, match=r"cannot unroll\n  fc.weight: .*read"):
        unroll(model)
    model.norm._forward_hooks.clear()
    model.norm.register_forward_hook(lambda *_: model.fc(_[2]))
    model.norm(unroll(model)(x))


def _gated(self, x):
    return self.fc(x) * self.norm.weight + self.norm.bias


def _looped(self, x):
    for fc in self.fcs:
        x = torch.relu(fc(x))
    return self.named["a"](self.block(x))


def _sizes(self, x):
    for fc in [*self.fcs, self.other]:
        x = fc(x.reshape(-1, fc.in_features)) * fc.out_features
    return x if self.other.bias is None else x + 1


def _skipped(self, x):
    return x if self.fc is None else self.fc(x, *())


HARMLESS = {
    "another module's weight": _gated,
    "loop without a read": _looped,
    "sizes through a loop": _sizes,
    "asked for None": _skipped,
    "asked for another type": lambda self, x: (
        self.fc(x) if isinstance(self.norm, nn.LayerNorm) else x
    ),
    "in a closure": lambda self, x: (lambda: self.fc(x))(),
    "keywords of a call": lambda self, x: functional.layer_norm(
        self.fc(x), (8,), weight=None, bias=None
    ),
    "attributes set": lambda self, x: setattr(self, "seen", 1) or self.fc(x),
}


def test_other_parametrizations_read_no_layer_of_ours():
    """Torch's own properties name a weight, but that of their module."""
    model, x, _ = net(_looped)
    model.block.append(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    expected = model(x)
    torch.testing.assert_close(unroll(model)(x), expected, rtol=1e-4, atol=1e-5)


# Instructions as Python 3.12 compiles them, where others take several; and what they load.
OF_PYTHON_3_12 = {
    "super().of(x)": (
        [("LOAD_GLOBAL", 0, "super"), ("LOAD_DEREF", 2, "__class__"), ("LOAD_FAST", 0, "self"),
         ("LOAD_SUPER_ATTR", 5, "of"), ("LOAD_FAST", 1, "x"), ("CALL", 1, 1),
         ("RETURN_VALUE", None, None)],
        [("super",), ("__class__",), ("", "of"), ("x",)]),
    "'weight'": (
        [("RETURN_CONST", 1, "weight")],
        [("", "weight")]),
    "call(a=1, b=x, weight=3)": (
        [("LOAD_GLOBAL", 1, "call"), ("LOAD_CONST", 1, 1), ("LOAD_FAST", 1, "x"),
         ("LOAD_CONST", 2, 3), ("KW_NAMES", 3, ("a", "b", "weight")), ("CALL", 3, 3),
         ("RETURN_VALUE", None, None)],
        [("call",), ("x",)]),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_PYTHON_3_12)
def test_instructions_of_other_pythons(case, monkeypatch):
    """Names of keywords are no variables; methods of super() and returned strings are found."""
    instructions, expected = OF_PYTHON_3_12[case]
    made = [types.SimpleNamespace(opname=o, arg=n, argval=v) for o, n, v in instructions]
    monkeypatch.setattr(bytecode.dis, "get_instructions", lambda code: made)
    assert [load.names for load in bytecode.loads(helper.__code__)] == expected


@pytest.mark.parametrize("case", HARMLESS)
def test_layers_that_are_not_read_are_unrolled(case):
    """What is read of a layer besides is there, or nobody reads."""
    model, x, expected = net(HARMLESS[case])
    torch.testing.assert_close(unroll(model)(x), expected, rtol=1e-4, atol=1e-5)


SAID = {
    "linear": (lambda: nn.Linear(8, 6, bias=False), ["in_features", "out_features", "bias"]),
    "conv": (
        lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=1, dilation=2, groups=2, bias=False),
        ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
         "padding_mode", "output_padding", "transposed", "bias"]),
    "embedding": (
        lambda: nn.Embedding(9, 6, padding_idx=3),
        ["num_embeddings", "embedding_dim", "padding_idx", "max_norm", "sparse"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_chains_say_what_their_layer_said(case):
    """Also what somebody else noted on it; in copies and pickles, which know nothing of us."""
    make, names = SAID[case]
    layer = make()
    layer.note, layer.scale_init = {"lr": 0.1}, True
    said = {name: getattr(layer, name) for name in (*names, "note", "scale_init")}
    model = nn.Sequential(layer)
    factorize(model, rank=2)
    keys = [*unroll(model)[0].state_dict()]
    assert not [key for key in keys if "." not in key]
    pickled = pickle.dumps(model)
    assert b"frobdecay" not in pickled
    for each in (model[0], pickle.loads(pickled)[0]):
        assert type(each) is nn.Sequential
        assert {name: getattr(each, name) for name in said} == said
        assert not hasattr(each, "weight")


def _kept(make):
    model = Net()
    make(model)
    return model


KEPT = {
    "list": lambda model: setattr(model, "stack", [model.fc]),
    "tuple in a dict": lambda model: setattr(model, "table", {"a": (model.fc,)}),
    "method": lambda model: setattr(model, "run", model.fc.forward),
    "partial": lambda model: setattr(model, "run", functools.partial(helper, model.fc)),
    "attribute past torch": lambda model: object.__setattr__(model, "hidden", model.fc),
}


@pytest.mark.parametrize("case", KEPT)
def test_layers_that_are_held_elsewhere_are_refused(case):
    """A list would go on with the layer that is no more in the model."""
    model = Net()
    KEPT[case](model)
    factorize(model, rank=2)
    with pytest.raises(ValueError, match=r"fc\.weight: \w+ holds it, too"):
        unroll(model)


def test_hooks_that_read_the_layer_are_refused():
    """A hook gets the chain, which has no weight; one that does not read is kept."""
    for hook, refused in (
        (lambda m, a, y: y + m.weight.sum(), True),
        (lambda m, a, y: 2 * y, False),
    ):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].register_forward_hook(hook)
        factorize(model, rank=2)
        x = torch.ones(1, 8)
        expected = model(x)
        if refused:
            with pytest.raises(ValueError, match=r"(?s)0\.weight: .*may read its weight"):
                unroll(model)
        else:
            torch.testing.assert_close(unroll(model)(x), expected)


def test_a_forward_of_the_instance_is_refused():
    """Of a layer that somebody patched, the chain would know nothing."""
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x: 3 * x
    factorize(model, rank=2)
    with pytest.raises(ValueError, match=r"0\.weight: it has a forward of its own"):
        unroll(model)


def test_torch_s_own_readers_are_known():
    """The encoder reads the weights of the layers inside of its first layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    factorize(model, rank=2, include="*.linear?")
    with pytest.raises(
        ValueError, match=r"layers\.0\.linear1\.weight: its .* reads linear1\.weight"
    ):
        unroll(model)
