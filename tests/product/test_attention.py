"""Attention: which products it has, their decay, and balancing that changes no output."""

import copy
import pathlib
import re

import pytest
import torch
from cases import Sizes
from closeness import TOLERANCE
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from frobdecay import diagnostics
from frobdecay.algebra.network import Network
from frobdecay.gradient.penalty import add_penalty_grad_, explain
from frobdecay.models.factorize import factorize
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product import find
from frobdecay.product.attention import Attention, linear, provider
from frobdecay.product.balance import balance_
from frobdecay.product.factor import Factor
from frobdecay.product.families import LEFT, TRANSFORMERS
from frobdecay.product.find import left_alone, products, register_products
from frobdecay.product.product import Product, penalty, product_norm, squared_norm


class Grouped(nn.Module):
    """Grouped-query attention without rotary embeddings, as a user would write it."""

    def __init__(self, width=12, heads=4, shared=2, size=3, bias=True):
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, size
        self.q = nn.Linear(width, heads * size, bias)
        self.k = nn.Linear(width, heads // shared * size, bias)
        self.v = nn.Linear(width, heads // shared * size, bias)
        self.o = nn.Linear(heads * size, width, bias)

    def projected(self, x):
        """Queries, keys and values, (batch, length, heads · size)."""
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x):
        """Attend from every position of (batch, length, width) to every one."""
        q, k, v = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in self.projected(x)
        )
        k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
        return self.o(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


@register_products(Grouped)
@provider
def grouped(module):
    """Where the projections are, and what heads there are."""
    parts = [linear(name) for name in "qkvo"]
    return Attention(parts, module.heads, module.size, module.shared)


class Packed(Grouped):
    """The same with one weight for queries, keys and values: in blocks, or together by key head."""

    def __init__(self, by_head, width=12, **options):
        super().__init__(width, **options)
        self.by_head = by_head
        rows = sum(len(part.weight) for part in (self.q, self.k, self.v))
        self.qkv = nn.Linear(width, rows, bias=self.q.bias is not None)
        del self.q, self.k, self.v

    def projected(self, x):
        """Cut what the one weight gives."""
        return self.parts(self.qkv(x))

    def parts(self, packed):
        """Queries, keys and values of a last axis that holds them all."""
        groups = self.heads // self.shared
        if not self.by_head:
            return packed.split([n * self.size for n in (self.heads, groups, groups)], -1)
        together = packed.unflatten(-1, (groups, self.shared + 2, self.size))
        return [part.flatten(-3) for part in together.split([self.shared, 1, 1], -2)]


@register_products(Packed)
@provider
def packed(module):
    """The two lines that a packed layout takes."""
    layout = "qkv:(qkv) o" if module.by_head else "qkv:qkv o"
    return Attention(layout, module.heads, module.size, module.shared)


def projections(module):
    """W_q, W_k, W_v (heads·size × width), W_o (width × heads·size) and (heads, shared, size)."""
    if isinstance(module, Packed):
        parts = [part.T for part in module.parts(module.qkv.weight.T)]
        return [*parts, module.o.weight], (module.heads, module.shared, module.size)
    if isinstance(module, Grouped):
        weights = [getattr(module, name).weight for name in "qkvo"]
        return weights, (module.heads, module.shared, module.size)
    packed = module.in_proj_weight
    inputs = (
        list(packed.chunk(3))
        if packed is not None
        else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    )
    return [*inputs, module.out_proj.weight], (module.num_heads, 1, module.head_dim)


def per_head(module):
    """The dense products of every query head by a plain loop, in float64: query–key, output–value.

    Independent of the library: slices, transposes and matrix products.
    """
    (q, k, v, o), (heads, shared, size) = projections(module)
    query_key, output_value = [], []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        kept = slice(head // shared * size, (head // shared + 1) * size)
        query_key.append(q[own].double().T @ k[kept].double())
        output_value.append(o[:, own].double() @ v[kept].double())
    return torch.stack(query_key), torch.stack(output_value)


@st.composite
def attentions(draw, dtypes=(torch.float64, torch.float32)):
    """Attention modules of all layouts with random weights and biases."""
    size, heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    bias, dtype = draw(st.booleans()), draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        shared = draw(st.integers(1, 3))
        module = Grouped(draw(st.integers(1, 9)), heads * shared, shared, size, bias)
    else:
        widths = draw(st.sampled_from([{}, {"kdim": 7}, {"vdim": 4}, {"kdim": 5, "vdim": 3}]))
        module = nn.MultiheadAttention(heads * size, heads, bias=bias, batch_first=True, **widths)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.to(dtype)


def layer(**options):
    """A packed attention of two heads of size 4, with random biases, in float64."""
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **options)
    return randomize(module)


def randomize(module):
    """Biases are zero at first: give them something to lose."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    return module


def transformer(**options):
    """Encoder and decoder with self- and cross-attention, in float64 unless asked."""
    options = {"dtype": torch.float64, **options}
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True, **options)
    return randomize(model)


# --- which products there are ---------------------------------------------------------------


@pytest.mark.covers("C6")
def test_every_attention_has_two_products():
    """Named after the module, encoder and decoder, self and cross."""
    assert [product.name for product in products(transformer())] == [
        f"{path}.{name}"
        for path in (
            "encoder.layers.0.self_attn",
            "decoder.layers.0.self_attn",
            "decoder.layers.0.multihead_attn",
        )
        for name in ("query_key", "output_value")
    ]


def test_attention_that_is_the_model_has_bare_names():
    """Without a path there is no leading dot."""
    assert [product.name for product in products(layer())] == ["query_key", "output_value"]


@pytest.mark.covers("C6", "D17")
@given(attentions())
def test_products_are_the_loops_over_heads(module):
    """Norm and dense product, for every layout, number of heads, size, width and dtype."""
    tolerance = TOLERANCE[projections(module)[0][0].dtype]
    for product, dense in zip(products(module), per_head(module), strict=True):
        norm = torch.linalg.vector_norm(dense)
        assert abs(product_norm(product) - norm) <= tolerance * norm
        found = product.materialize().double()
        assert torch.linalg.vector_norm(found.reshape_as(dense) - dense) <= tolerance * norm


@given(attentions([torch.float64]), st.sampled_from(["reference", "bucketed", "per_product"]))
def test_the_decay_is_the_gradient_of_the_loop(module, backend):
    """Every backend adds to the weights' .grad, and to no bias, what autograd gives."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    add_penalty_grad_(products(module), 0.3, backend=backend)
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    sum(0.15 * dense.square().sum() for dense in per_head(module)).backward()
    for name, parameter in module.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found[name], wanted, rtol=1e-10, atol=1e-10)
        assert parameter.ndim == 2 or not found[name].any()


def test_factorized_weights_make_no_attention_product():
    """Their own product is decayed; what they would be multiplied with is not theirs."""
    model = transformer()
    factorize(model, rank=2, include="decoder.layers.0.self_attn")
    found = products(model, include="decoder.layers.0.self_attn.*")
    assert [product.name.rpartition("attn.")[2] for product in found] == [
        "in_proj_weight",
        "out_proj.weight",
    ]


def test_of_a_packed_weight_all_parts_are_factors_or_none():
    """Else its weight decay could be neither kept nor taken over."""
    module = layer()
    factorize(module, rank=2, include="out_proj")
    assert [product.name for product in products(module)] == ["out_proj.weight"]
    optimizer = FrobeniusDecay(torch.optim.SGD(module.parameters(), 0.1, weight_decay=0.1), module)
    owners = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert owners[id(module.in_proj_weight)] == 0.1


def test_separate_weights_are_factors_one_by_one():
    """With q_proj_weight factorized the output–value product is what it was."""
    module = layer(kdim=6, vdim=5)
    factorize(module, rank=2, include="q_proj_weight")
    assert [product.name for product in products(module)] == ["output_value", "q_proj_weight"]


class Adapted(nn.Linear):
    """A projection with more than its weight, such as a low-rank adapter."""

    def __init__(self):
        super().__init__(12, 12)
        self.lora_A = nn.Parameter(torch.randn(2, 12))


def test_weights_beside_adapters_are_no_factors():
    """The layer does not multiply with them alone."""
    module = Grouped()
    module.q = Adapted()
    assert [product.name for product in products(module)] == ["output_value"]


class Turned(nn.MultiheadAttention):
    """A subclass that does more to queries and keys than its base, as rotary embeddings would."""

    def forward(self, query, key, value, **options):
        """Attend to the keys of the other direction."""
        return super().forward(query, key.flip(1), value, **options)


@pytest.mark.covers("C6")
def test_products_of_subclasses_with_a_forward_of_their_own_are_fixed():
    """Decayed as the base's, but nobody knows what is between the factors."""
    model = nn.Sequential(Turned(8, 2))
    assert [product.shape for product in products(model)] == [(2, 8, 8)] * 2
    with pytest.raises(ValueError, match=r"0.query_key: a forward of its own in Turned.*exclude="):
        balance_(products(model))


def test_quantized_weights_make_no_product():
    """They hold codes, not numbers, and do not train."""
    module = Grouped()
    module.k.weight = nn.Parameter(torch.ones(6, 12, dtype=torch.int8), requires_grad=False)
    assert [product.name for product in products(module)] == ["output_value"]


@pytest.mark.parametrize(
    "key", [nn.MultiheadAttention, "torch.nn.modules.activation.MultiheadAttention"]
)
def test_subclasses_inherit_and_a_users_provider_wins(monkeypatch, key):
    """The provider of nn.MultiheadAttention, until the user gives another."""

    class Mine(nn.MultiheadAttention):
        pass

    monkeypatch.setattr(find, "_USERS", {})
    model = nn.Sequential(Mine(8, 2))
    assert [p.name for p in products(model)] == ["0.query_key", "0.output_value"]
    register_products(key)(lambda module, name: ())
    assert products(model) == []


@pytest.mark.covers("C6")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 6}, "q.weight to hold 18 = 3 key heads × 2 queries × 3 numbers by outputs"),
        ({"size": 4}, "q.weight to hold 16"),
        ({"shared": 3}, r"q.weight .* \(4 heads in all\), got 12"),
        ({"k": nn.Linear(12, 9)}, r"k.weight to hold 6 = .* got 9 of shape \(9, 12\)"),
        ({"o": nn.Linear(9, 12)}, "o.weight to hold 12 .* by inputs"),
        ({"heads": None}, "no attribute 'heads'.*register_products"),
        ({"v": None}, "has no attribute `v`"),
    ],
)
def test_heads_that_do_not_fit_are_refused(change, message):
    """As after pruning without new attributes: the module is named, with what to do."""
    module = Grouped()
    for name, value in change.items():
        delattr(module, name)
        if value is not None:
            setattr(module, name, value)
    with pytest.raises(ValueError, match=rf"0 \(Grouped\): expected .*{message}"):
        products(nn.Sequential(module))


# --- packed, and left alone -------------------------------------------------------------------


@pytest.mark.covers("C6")
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_parts_of_a_packed_weight_are_the_loops_over_heads(by_head, shared):
    """Blocks one below the other, or what belongs to a key head together; and their decay."""
    module = randomize(Packed(by_head, heads=4, shared=shared)).double()
    found = products(module)
    assert [product.name for product in found] == ["query_key", "output_value"]
    for product, wanted in zip(found, per_head(module), strict=True):
        assert torch.allclose(product.materialize().reshape_as(wanted), wanted)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    add_penalty_grad_(found, 0.3)
    decay = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    sum(0.15 * wanted.square().sum() for wanted in per_head(module)).backward()
    for name, parameter in module.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(decay[name], wanted)
    base = torch.optim.AdamW(module.parameters(), weight_decay=0.1)
    FrobeniusDecay(base, module)  # takes over the decay of all of the packed weight, once


class LatentAttention(nn.Module):
    """Attention of a type that nobody has told of."""

    def __init__(self):
        super().__init__()
        self.attention_output = nn.Linear(8, 8)


def test_attention_that_is_left_alone_is_listed_with_the_reason(monkeypatch):
    """Unknown types, and weights that are not what the layer multiplies with."""
    monkeypatch.setattr(find, "_USERS", {**find._USERS})
    model = nn.ModuleDict(
        {"a": LatentAttention(), "b": Grouped(), "c": layer(), "d": transformer()}
    )
    factorize(model, rank=2, include=["b.q", "c.out_proj"])
    model["b"].o = Adapted()
    assert left_alone(model) == [
        ("b.query_key", "q.weight is computed from other parameters, such as factors"),
        ("b.output_value", "o.weight has more beside it, such as an adapter"),
        ("c.query_key", "out_proj.weight is computed from other parameters, such as factors"),
        ("c.output_value", "out_proj.weight is computed from other parameters, such as factors"),
        ("a", f"no layout is known for LatentAttention ({__name__}); if it is products of weights, "
              "say where they are with frobdecay.register_products"),
    ]  # fmt: skip
    lines = explain(model).splitlines()
    assert "left alone   c.query_key, c.output_value" in lines
    assert "left alone   a" in lines
    assert explain(nn.Sequential(nn.Linear(2, 2))).startswith("no products")
    assert any("d.encoder.layers.0.self_attn.query_key" in line for line in lines)
    register_products(LatentAttention)(lambda module, name: ())
    assert "a" not in dict(left_alone(model))


def test_the_list_in_the_docs_is_the_table():
    """Every model, in the row of its layout, and how many types there are."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "attention.md").read_text("utf-8")
    assert f"in {len(TRANSFORMERS)} attention types of transformers" in page
    models: dict[str, set[str]] = {}
    for name, (layout, *_) in TRANSFORMERS.items():
        models.setdefault(layout.replace("|", "or"), set()).add(name.split(".")[2])
    listed = re.findall(r"^\| `(.+)` \| (.+) \|$", page, re.MULTILINE)
    assert {layout: set(names.split(", ")) for layout, names in listed} == models
    left: dict[str, set[str]] = {}
    for name, reason in LEFT.items():
        left.setdefault(reason, set()).add(name.rpartition(".")[2])
    listed = re.findall(r"^\| (.+) \| `(.+)` \|$", page, re.MULTILINE)
    assert {reason: set(names.split("`, `")) for reason, names in listed} == left


def test_a_type_that_is_left_alone_says_why():
    """By its name, with no module of transformers."""
    path, _, name = next(iter(LEFT)).rpartition(".")
    model = nn.Sequential(type(name, (LatentAttention,), {"__module__": path})())
    assert products(model) == []
    assert left_alone(model) == [("0", f"{name}: {LEFT[f'{path}.{name}']}")]


def test_types_known_by_name_are_left_alone_where_they_are_not_as_they_were():
    """In another version of their package, say; nothing is guessed, and nothing fails."""
    kind = type("Attention", (LatentAttention,), {"__module__": "timm.layers.attention"})
    model = nn.Sequential(kind())
    assert products(model) == []
    ((name, reason),) = left_alone(model)
    assert name == "0"
    assert "Attention is not as it is known: " in reason


# --- choosing ------------------------------------------------------------------------------


NAMES = [product.name for product in products(transformer())]
QUERY_KEY = [name for name in NAMES if name.endswith("query_key")]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("encoder.layers.0.self_attn.query_key", NAMES[:1]),
        ("*.query_key", QUERY_KEY),
        (re.compile(r"decoder\..*key"), QUERY_KEY[1:]),
        (lambda name, product: product.name == name and "multihead" in name, NAMES[-2:]),
        (["encoder.*", "*.query_key"], [*NAMES[:2], *QUERY_KEY[1:]]),
        (lambda name, product: product.rank == 4, NAMES),
    ],
    ids=["name", "glob", "regex", "predicate", "list", "predicate on the product"],
)
def test_products_are_chosen_by_name(selector, expected):
    """What include takes is what exclude leaves out, in module order."""
    model = transformer()
    assert [product.name for product in products(model, include=selector)] == expected
    left = [product.name for product in products(model, exclude=selector)]
    assert left == [name for name in NAMES if name not in expected]


def test_exclude_takes_from_what_include_chose():
    """Both at once: encoder attention without its output–value product."""
    found = products(transformer(), include="encoder.*", exclude="*.output_value")
    assert [product.name for product in found] == NAMES[:1]


@pytest.mark.covers("D8")
@pytest.mark.parametrize("what", ["include", "exclude"])
@pytest.mark.parametrize(
    ("selector", "error", "message"),
    [
        ("encoder.layers.0.query_key", ValueError, "matches no product; near matches: encoder"),
        ("*.key_query", ValueError, r"matches no product; .*query_key"),
        (re.compile("query_key"), ValueError, "matches no product"),
        (lambda name, product: False, ValueError, r"called with names such as \['encoder"),
        (["*.query_key", "fc"], ValueError, "'fc' matches no product"),
        (nn.MultiheadAttention, TypeError, "by name, got the type"),
        (3, TypeError, "got 3"),
    ],
)  # fmt: skip
def test_selectors_that_take_nothing_are_refused(what, selector, error, message):
    """A misspelled name is an error, and says what names there are."""
    with pytest.raises(error, match=message):
        products(transformer(), **{what: selector})


# --- decay ---------------------------------------------------------------------------------


def test_the_optimizer_takes_over_the_decay_of_attention_and_no_other():
    """One line on a dense transformer: four weights a layer, nothing decayed twice."""
    model = transformer()
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.05)
    optimizer = FrobeniusDecay(base, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(placed) == sorted(names.values())
    factors = [name for name in placed if name.endswith(("in_proj_weight", "out_proj.weight"))]
    assert len(factors) == 6
    for group in optimizer.param_groups:
        held = {names[id(p)] in factors for p in group["params"]}
        decays = (group["weight_decay"], group["frobenius_decay"])
        assert (held, decays) in (({True}, (0.0, 0.05)), ({False}, (0.05, 0.0)))


STEPS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    "make", [layer, lambda: layer(kdim=8, vdim=8), lambda: Grouped(8).double()]
)
def test_one_step_decays_the_loops_over_heads(name, make):
    """Coupled the loop's penalty is part of the loss; decoupled, lr·λ·its gradient is taken off."""
    kind, options = STEPS[name]
    ours = make()
    theirs = copy.deepcopy(ours)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    run = (lambda m: m(x)) if isinstance(ours, Grouped) else (lambda m: m(x, x, x)[0])
    lr, decay = options["lr"], 0.3

    base = kind(ours.parameters(), weight_decay=0.0, **options)
    optimizer = FrobeniusDecay(base, ours, decay=decay)
    run(ours).square().sum().backward()
    optimizer.step()

    half = sum(dense.square().sum() for dense in per_head(theirs)) / 2
    used = [p for p in theirs.parameters() if p.ndim == 2]
    slopes = dict(zip(used, torch.autograd.grad(half, used), strict=True))
    run(theirs).square().sum().backward()
    if name == "SGD":
        for parameter, slope in slopes.items():
            parameter.grad += decay * slope
    kind(theirs.parameters(), weight_decay=0.0, **options).step()
    if name == "AdamW":
        with torch.no_grad():
            for parameter, slope in slopes.items():
                parameter -= lr * decay * slope
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_output_value_alone():
    """Separate weights: the others keep their weight decay."""
    module = Grouped()
    base = torch.optim.SGD(module.parameters(), 0.1, weight_decay=0.2)
    optimizer = FrobeniusDecay(base, products(module, include="output_value"))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in module.parameters()} - {
        id(module.v.weight),
        id(module.o.weight),
    }


def test_a_part_of_a_packed_weight_is_refused():
    """Weight decay cannot be taken from a third of a parameter; the error says what to do."""
    module = layer()
    base = torch.optim.SGD(module.parameters(), 0.1, weight_decay=0.2)
    with pytest.raises(ValueError, match=r"output_value.*pass products that cover it"):
        FrobeniusDecay(base, products(module, include="output_value"))


@pytest.mark.parametrize("make", [transformer, lambda: nn.Sequential(Grouped().double())])
def test_diagnostics_measure_heads(make):
    """The spectrum of every head, from factors, is that of its dense product."""
    model = make()
    found = products(model)
    for product, row in zip(found, diagnostics.measure(found, lr=0.1), strict=True):
        dense = product.materialize().detach().flatten(1, -2)
        singular = torch.linalg.svdvals(dense)[..., : row.spectrum.shape[-1]].cpu()
        assert torch.allclose(row.spectrum, singular, rtol=1e-9, atol=1e-9)
        assert row.effective_step == pytest.approx(0.1 / float(dense.square().sum()))


# --- balancing -------------------------------------------------------------------------------


def imbalance(product):
    """The largest ‖UᵀU − VᵀV‖ of a product's heads, relative to ‖UᵀU‖."""
    left, right = (view.flatten(product.batch, -2) for view in product.views())
    left, right = left.mT @ left, right.mT @ right
    return ((left - right).norm(dim=(-2, -1)) / left.norm(dim=(-2, -1))).max().item()


ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}


def run(module, x):
    """What the attention answers."""
    return module(x) if isinstance(module, Grouped) else module(x, x, x, need_weights=False)[0]


MODULES = {
    "packed": lambda bias: nn.MultiheadAttention(12, 3, bias=bias, batch_first=True),
    "zero attention": lambda bias: nn.MultiheadAttention(
        12, 3, bias=bias, batch_first=True, add_zero_attn=True
    ),
    "grouped": lambda bias: Grouped(12, bias=bias),
    "one key head": lambda bias: Grouped(12, heads=3, shared=3, bias=bias),
    "no sharing": lambda bias: Grouped(12, heads=2, shared=1, bias=bias),
    "packed in blocks": lambda bias: Packed(False, bias=bias),
    "packed by head": lambda bias: Packed(True, bias=bias),
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_balancing_changes_no_output(name, bias, dtype):
    """Weights and biases move together; both products are balanced; the function stays."""
    module = randomize(MODULES[name](bias)).to(dtype)
    x = torch.randn(2, 5, 12, dtype=dtype)
    before, weights = run(module, x), [p.detach().clone() for p in module.parameters()]
    found = products(module)
    assert min(imbalance(product) for product in found) > 0.1
    balance_(found)
    after = run(module, x)
    assert (after - before).abs().max() <= ROUNDING[dtype] * before.abs().max()
    assert max(imbalance(product) for product in found) <= ROUNDING[dtype]
    assert all(
        not torch.equal(p, old)
        for p, old in zip(module.parameters(), weights, strict=True)
        if p.ndim == 2
    )


@pytest.mark.covers("C9")
@given(attentions([torch.float64]))
def test_balancing_keeps_the_function_of_every_attention(module):
    """Grouped queries are mixed jointly, by what their key head is mixed by."""
    q, k, v, _ = projections(module)[0]
    assume(min(w.shape[1] for w in (q, k, v)) >= projections(module)[1][2])
    inputs = [torch.randn(1, 4, w.shape[1], dtype=torch.float64) for w in (q, k, v)]
    call = module if isinstance(module, nn.MultiheadAttention) else lambda x, *_: (module(x),)
    before, dense = call(*inputs)[0], per_head(module)
    balance_(products(module))
    after = call(*inputs)[0]
    assert (after - before).abs().max() <= 1e-7 * before.abs().max()
    for found, wanted in zip(per_head(module), dense, strict=True):
        assert (found - wanted).norm() <= 1e-8 * wanted.norm()


def test_balancing_a_transformer_changes_no_output():
    """Self- and cross-attention with masks, in training and on the fast path."""
    model = transformer()
    x, y = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    mask = model.generate_square_subsequent_mask(3, dtype=torch.float64)
    outputs = []
    for _ in range(2):
        for training in (True, False):
            with torch.set_grad_enabled(training):
                outputs.append(model.train(training)(x, y, tgt_mask=mask))
        balance_(products(model))
    for before, after in zip(outputs[:2], outputs[2:], strict=True):
        assert torch.allclose(after, before, rtol=1e-10, atol=1e-10)


def test_balancing_one_product_of_a_packed_weight_leaves_the_other():
    """They are different parts of one parameter."""
    module = layer()
    before = module.in_proj_weight.detach().clone()
    balance_(products(module, include="output_value"))
    assert torch.equal(module.in_proj_weight[:16], before[:16])
    assert not torch.equal(module.in_proj_weight[16:], before[16:])


def test_balancing_without_biases_takes_any_rank():
    """Heads larger than the width: the product has less rank than columns, no column is zero."""
    module = Grouped(width=3, heads=2, shared=1, size=5, bias=False).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    before = module(x)
    balance_(products(module))
    assert torch.allclose(module(x), before, rtol=1e-9, atol=1e-9)
    assert float(module.q.weight.detach().norm(dim=1).min()) > 1e-3


def test_balancing_keeps_zero_biases_of_products_of_low_rank():
    """The biases of a fresh model say nothing against any rank."""
    module = Grouped(width=3, heads=2, shared=1, size=5).double()
    for part in (module.q, module.k, module.v):
        nn.init.zeros_(part.bias)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    before = module(x)
    balance_(products(module))
    assert torch.allclose(module(x), before, rtol=1e-9, atol=1e-9)
    assert not module.q.bias.any()


def added_bias():
    """A key and a value beside those that are projected."""
    return layer(add_bias_kv=True)


def low_rank():
    """Heads larger than the width, with biases."""
    return randomize(Grouped(width=3, heads=2, shared=1, size=5)).double()


def frozen_bias():
    """A bias that must not move."""
    module = layer()
    module.in_proj_bias.requires_grad_(False)
    return module


def frozen_weight():
    """Keys that must not move."""
    module = Grouped()
    module.k.weight.requires_grad_(False)
    return module


class Shift(nn.Module):
    """A parametrization of a bias."""

    def forward(self, bias):
        """Add one."""
        return bias + 1


def computed_bias():
    """A bias that nobody can write to."""
    module = layer()
    parametrize.register_parametrization(module, "in_proj_bias", Shift())
    return module


def tied():
    """Queries and keys are the same projection."""
    module = Grouped(shared=1)
    module.k.weight = module.q.weight
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (added_bias, r"1.query_key: add_bias_kv.*exclude="),
        (low_rank, "1.query_key: expected rank 5 .* got 3.*exclude="),
        (frozen_bias, r"1.query_key \(in_proj_bias\) is frozen"),
        (frozen_weight, r"1.query_key \(weight\) is frozen"),
        (tied, r"1.query_key \(weight\) is also a factor of 1.query_key"),
    ],
)  # fmt: skip
def test_balancing_refuses_what_would_change_the_function(make, message):
    """The product is named, with the remedy, before any product is changed."""
    model = nn.Sequential(layer(), make().double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        balance_(products(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_balancing_refuses_computed_biases():
    """A parametrized weight is no factor; a parametrized bias cannot be written to."""
    with pytest.raises(ValueError, match=r"query_key \(in_proj_bias\) is computed"):
        balance_(products(computed_bias()))


@pytest.mark.cpu("its mesh is of CPUs")
@pytest.mark.usefixtures("alone")
def test_balancing_refuses_sharded_weights():
    """Every process has a part of them only."""
    module = layer()
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"is sharded .*; balancing comes before"):
        balance_(products(module))


@pytest.mark.parametrize("options", [{}, {"pattern": "(p r) n -> p r n", "axes": (("p", 4),)}])
def test_balancing_refuses_the_same_memory_under_two_patterns(options):
    """Only parts that are known to be apart may be balanced in one call."""
    module = layer()
    index = 2 if options else None  # the third quarter: keys and values, each in part
    part = Factor(module, "in_proj_weight", index=index, **options)
    rows = Factor(module.out_proj, "weight")
    with pytest.raises(ValueError, match="also a factor of query_key"):
        balance_([*products(module, include="query_key"), Product("part", (part, rows))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_balancing_in_half_precision(dtype):
    """Computed in float64, rounded once: the heads' products stay to the dtype's digits."""
    module = randomize(Grouped(24)).to(dtype)
    dense = per_head(module)
    balance_(products(module))
    for found, wanted in zip(per_head(module), dense, strict=True):
        assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        ((None,), "one or None for each, got 1 for 2"),
        ((Factor(nn.Linear(3, 4), "bias"), None), "to be a row beside a factor"),
        ((Factor(nn.Linear(3, 5), "bias", "d -> 1 d"), None), r"got \(1, 5\)"),
    ],
)
def test_biases_have_to_fit_their_factor(biases, message):
    """They are rows of the same bond."""
    ends = Factor(nn.Linear(4, 6), "weight"), Factor(nn.Linear(4, 7), "weight")
    with pytest.raises(ValueError, match=f"mine: expected .*{message}"):
        Product("mine", ends, biases=biases)


@pytest.mark.parametrize(("count", "equation"), [(3, "mr,rs,ns->mn"), (2, "mr,nr->nm")])
def test_biases_are_of_chains_of_two_factors(count, equation):
    """Others have no two ends that a row could be added to."""
    factors = tuple(Factor(nn.Linear(4, 4), "weight") for _ in range(count))
    structure = Network.of(equation)
    with pytest.raises(ValueError, match=f"2 for {count} factors, a {structure.name}"):
        Product("mine", factors, biases=(None, None), structure=structure)


# --- what the released research code got wrong -------------------------------------------------


class Penalized(nn.Module):
    """A model whose forward is its penalty."""

    def __init__(self):
        super().__init__()
        self.attention = layer()

    def forward(self):
        """The squared norms of both products."""
        return penalty(products(self), 2.0)


@pytest.mark.covers("D19")
def test_products_look_parameters_up_in_the_module_tree():
    """functional_call reaches all of them, biases too: nothing is kept aside (D19)."""
    model, other = Penalized(), Penalized()
    swapped = torch.func.functional_call(model, dict(other.named_parameters()), ())
    assert torch.equal(swapped, other())
    assert not torch.equal(swapped, model())
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    balance_(products(model))
    state = dict(model.attention.named_parameters())
    twin = torch.func.functional_call(layer(), state, (x, x, x))[0]
    assert torch.equal(twin, model.attention(x, x, x)[0])


@pytest.mark.covers("D20")
def test_products_follow_weights_that_are_replaced():
    """Found before the weight was swapped, tied or moved, a product reads the new one (D20)."""
    module = Grouped()
    found = products(module)
    module.q.weight = nn.Parameter(torch.randn(12, 12))
    module.k.weight = nn.Parameter(torch.randn(12, 6).T)  # another memory layout
    module.double()
    for product, dense in zip(found, per_head(module), strict=True):
        assert squared_norm(product).item() == pytest.approx(dense.square().sum().item())


@pytest.mark.covers("D20")
def test_decay_writes_through_views_of_any_memory_layout():
    """A weight stored transposed is decayed and balanced in place, or not at all (D20)."""
    module = Grouped().double()
    module.q.weight = nn.Parameter(module.q.weight.detach().T.contiguous().T)
    before = per_head(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    add_penalty_grad_(products(module), 1.0)
    total = sum(dense.square().sum() for dense in before)
    assert (module.q.weight.grad * module.q.weight).sum().item() == pytest.approx(
        before[0].square().sum().item()  # Euler's identity, for the query–key product
    )
    balance_(products(module))
    assert sum(d.square().sum() for d in per_head(module)).item() == pytest.approx(total.item())


@pytest.mark.covers("D21")
def test_heads_and_layers_run_together():
    """All heads of all layers are a few batched calls, not a loop over modules (D21)."""
    stack = nn.ModuleList(layer() for _ in range(6))
    lines = explain(products(stack), backend="bucketed").splitlines()
    assert [line.split()[0] for line in lines if "×" in line] == ["bucketed"]
    assert "(12)" in lines[0]


@pytest.mark.covers("C9", "D21")
def test_balancing_heads_never_forms_their_products():
    """QR and an SVD of d×d per head: nothing of width×width (D21)."""
    module = nn.MultiheadAttention(256, 64)
    found = products(module)
    with Sizes() as sizes:
        balance_(found)
    assert max(sizes.seen) <= 3 * 256 * 256 < 64 * 256 * 256
