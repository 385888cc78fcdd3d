"""Tucker, TensorTrain and CP on modules: reading, forward, decay, plans, files, refusals."""

import copy
import json
from functools import partial

import pytest
import torch
from closeness import TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import frobdecay
from frobdecay import (
    CP,
    FactoredTensor,
    FrobeniusDecay,
    LowRank,
    TensorTrain,
    Tucker,
    add_penalty_grad_,
    diagnostics,
    factorize,
    merge,
    penalty,
    plan_ranks,
    products,
    unroll,
)
from frobdecay.algebra.tensorize import Tensorization, flat_modes
from frobdecay.weights.forms.cost import force

KINDS = {"Tucker": Tucker, "TensorTrain": TensorTrain, "CP": CP}
ALL = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# name -> layer, inputs
LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), lambda: (torch.randn(3, 12),)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 5, padding="same"), lambda: (torch.randn(2, 8, 9),)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, 2, 1), lambda: (torch.randn(2, 8, 9, 7),)),
    "conv2d, circular": (
        lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular", bias=False),
        lambda: (torch.randn(8, 9, 7),),
    ),
    "conv2d, dilated": (
        lambda: nn.Conv2d(8, 6, (3, 2), (2, 1), (2, 0), (2, 1)),
        lambda: (torch.randn(2, 8, 9, 7),),
    ),
    "conv2d, 1×1": (lambda: nn.Conv2d(8, 12, 1), lambda: (torch.randn(2, 8, 4, 4),)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), lambda: (torch.randn(2, 8, 5, 5),)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), lambda: (torch.randn(2, 6, 4, 5, 3),)),
    "transposed": (
        lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1),
        lambda: (torch.randn(2, 8, 4, 5),),
    ),
    "bilinear": (lambda: nn.Bilinear(5, 4, 6), lambda: (torch.randn(3, 5), torch.randn(3, 4))),
    "embedding": (lambda: nn.Embedding(12, 8), lambda: (torch.tensor([[1, 2], [11, 0]]),)),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: (torch.randn(2, 3, 8),) * 3,
    ),
    "recurrent": (lambda: nn.LSTM(8, 6, batch_first=True), lambda: (torch.randn(2, 3, 8),)),
}
CASES = pytest.mark.parametrize("case", LAYERS)


def tensorized(case, kind, rank=3, **settings):
    """A factorized layer in float64 and its inputs."""
    layer, inputs = LAYERS[case]
    model = nn.ModuleDict({"layer": layer()}).double()
    factorize(model, rank=rank, parametrization=partial(kind, **settings))
    return model, tuple(x.double() if x.is_floating_point() else x for x in inputs())


def run(model, inputs):
    """The layer's first output."""
    out = model["layer"](*inputs)
    return out[0] if isinstance(out, tuple) else out


def gradients(model, inputs):
    """Gradients of a loss for all parameters."""
    model.zero_grad()
    run(model, inputs).square().sum().backward()
    return [p.grad for p in model.parameters()]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.covers("C19")
@pytest.mark.parametrize(
    ("shape", "order", "modes"),
    [
        ((160, 160), 3, (32, 32, 25)),  # the settings of the research code
        ((320, 160), 3, (40, 40, 32)),
        ((640, 320), 3, (64, 64, 50)),
        ((640, 640), 3, (80, 80, 64)),
        ((64, 64), 3, (16, 16, 16)),
        ((7, 5, 3), 3, (7, 5, 3)),
        ((64, 64), 2, (64, 64)),
        ((2, 13), 3, (13, 2, 1)),
        ((10, 10), 4, (4, 5, 5, 1)),
    ],
)
def test_the_flat_rule(shape, order, modes):
    """Equal modes where there are; the weight's own; else divisors from N^(1/d) on."""
    assert flat_modes(shape, order) == modes


@given(st.integers(2, 40), st.integers(2, 40), st.integers(2, 5))
def test_flat_modes_hold_all_entries(m, n, order):
    """Reading is one-to-one, and as many modes come out as were asked for."""
    weight = torch.arange(float(m * n)).reshape(m, n)
    view = Tensorization.of("flat", (m, n), order=order)
    assert len(view.modes) == order
    assert torch.equal(view.back(view.read(weight)), weight)


@pytest.mark.parametrize("count", [2, 13, 101])
def test_primes_have_no_flat_modes(count):
    """Refused, with what to do instead."""
    with pytest.raises(ValueError, match="no divisors; take LowRank or leave it dense"):
        flat_modes((count, 1), 3)


@pytest.mark.covers("C19")
@pytest.mark.parametrize(
    ("shape", "pattern", "modes"),
    [
        ((8, 6, 3, 3), "o i k0 k1 -> o i (k0 k1)", (8, 6, 9)),
        ((8, 6, 5), "o i k0 -> o i (k0)", (8, 6, 5)),
        ((8, 6, 1, 1), "flat", (4, 4, 3)),
        ((8, 1, 3, 3), "flat", (4, 6, 3)),
        ((8, 6), "flat", (4, 4, 3)),
    ],
)
def test_default_readings(shape, pattern, modes):
    """Out, in and kernel where there are three; else flat."""
    view = Tucker(1).matricize(shape)
    assert (view.pattern, view.modes) == (pattern, modes)


PATTERNS = {
    "paired axes": ("(o p) (i j) -> (o i) (p j)", {"o": 5, "i": 4}),
    "in sides": ("(o p) (i j) -> o p i j", {"o": 5, "i": 4}),
    "a matrix": ("o i -> o i", {}),
    "turned": ("o (i j) -> i j o", {"i": 4}),
    "flat": ("flat", {}),
}


@pytest.mark.covers("C19")
@ALL
@pytest.mark.parametrize("name", PATTERNS)
def test_any_pattern_is_right(kind, name):
    """However a linear weight is read: forward, merged and materialized agree, ranks fitting."""
    pattern, axes = PATTERNS[name]
    model, inputs = tensorized("linear", kind, 2, pattern=pattern, axes=axes)
    dense = merge(copy.deepcopy(model))
    for forced in (None, True, False):
        with force(forced):
            assert torch.allclose(run(model, inputs), run(dense, inputs), atol=1e-12)
    (product,) = products(model)
    view = model["layer"].parametrizations.weight[0].matricization
    assert torch.allclose(view.back(product.materialize()), dense["layer"].weight)


@ALL
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "o i -> o j"}, "same axes"),
        ({"pattern": "o i -> (o i)"}, "rows and columns"),
        ({"pattern": "(o p) i -> o p i"}, "give the lengths of all but one"),
        ({"pattern": "(o p) i -> o p i", "axes": {"o": 7}}, "does not fit the shape"),
        ({"pattern": "flat", "axes": {"o": 7}}, "no axes for the pattern 'flat'"),
        ({"axes": {"o": 7}}, "no axes for the pattern 'flat'"),
    ],
)
def test_wrong_dimension_rules_are_refused(kind, settings, message):
    """A named weight that the rule does not fit is an error, before anything is changed."""
    model = nn.Sequential(nn.Linear(12, 10))
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=rf"0\.weight cannot be factorized.*{message}"):
        factorize(model, rank=2, include="0", parametrization=partial(kind, **settings))
    assert list(model.state_dict()) == before


def test_a_prime_number_of_entries_is_left_dense_and_listed():
    """No modes: the plan says so, and what would do."""
    model = nn.Sequential(nn.Linear(7, 1), nn.Linear(8, 8))
    plan = factorize(model, rank=2, parametrization=Tucker)
    assert "no divisors; take LowRank" in plan.rows[0].reason
    assert list(plan.ranks) == ["1.weight"]


# --- forward and backward -------------------------------------------------------------------------


@pytest.mark.covers("C19")
@ALL
@CASES
def test_forward_is_that_of_the_merged_layer(case, kind):
    """Automatic, factored and formed agree with the dense layer that merge makes."""
    model, inputs = tensorized(case, kind)
    dense = merge(copy.deepcopy(model))
    assert not parametrize.is_parametrized(dense["layer"])
    expected = run(dense, inputs)
    for forced in (None, True, False):
        with force(forced):
            assert torch.allclose(run(model, inputs), expected, atol=1e-10)


@ALL
@CASES
def test_gradients_do_not_depend_on_the_way(case, kind):
    """Every parameter's gradient, factored or formed."""
    model, inputs = tensorized(case, kind)
    with force(True):
        factored = gradients(model, inputs)
    with force(False):
        formed = gradients(model, inputs)
    for one, other in zip(factored, formed, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


@ALL
@CASES
def test_merge_brings_the_keys_back(case, kind):
    """The state_dict of the layer as it was, in its order."""
    before = list(nn.ModuleDict({"layer": LAYERS[case][0]()}).state_dict())
    model, _ = tensorized(case, kind)
    assert list(merge(model).state_dict()) == before


@pytest.mark.parametrize(
    ("kind", "rank"), [(Tucker, (4, 4, None)), (Tucker, 4), (TensorTrain, 4), (CP, 8)]
)
def test_convolutions_do_not_form_the_weight(kind, rank, monkeypatch):
    """Where it pays, a convolution runs as two or three thin ones."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    factorize(model, rank=rank if isinstance(rank, int) else {"0": rank}, parametrization=kind)
    monkeypatch.setattr(FactoredTensor, "materialize", None)
    model(torch.randn(2, 64, 16, 16)).sum().backward()


class Convolutions:
    """Counts the calls of F.conv2d below a factored weight, by the weights' shapes."""

    def __init__(self, monkeypatch):
        from frobdecay.weights.forms.table import FORMS

        self.shapes = []
        form = FORMS[nn.functional.conv2d]

        def watched(x, weight, *rest, **options):
            self.shapes.append(tuple(weight.shape))
            return nn.functional.conv2d(x, weight, *rest, **options)

        watching = partial(form.func, watched)
        monkeypatch.setitem(FORMS, nn.functional.conv2d, watching)


def test_tucker_2_is_three_convolutions(monkeypatch):
    """1×1, k×k with r input and s output channels, 1×1."""
    model = nn.Sequential(nn.Conv2d(64, 48, 3, padding=1))
    factorize(model, rank={"0": (8, 6, None)}, parametrization=Tucker)
    seen = Convolutions(monkeypatch)
    model(torch.randn(2, 64, 16, 16))
    assert seen.shapes == [(6, 64, 1, 1), (8, 6, 3, 3), (48, 8, 1, 1)]
    assert [tuple(p.shape) for p in model[0].parametrizations.weight.parameters()] == [
        (8, 6, 9),
        (48, 8),
        (64, 6),
    ]


@pytest.mark.covers("P10")
def test_few_positions_take_the_factors_and_many_the_dense_weight():
    """Near full rank the factors need more for a position, and the dense weight has to be formed.

    Whichever is taken, the result is the other's to rounding.
    """
    model = nn.Sequential(nn.Conv2d(64, 64, 3))
    factorize(model, rank=0.7, parametrization=Tucker)
    for size, formed in ((3, False), (32, True)):
        weight, x = model[0].weight, torch.randn(1, 64, size, size)
        found = nn.functional.conv2d(x, weight)
        assert (weight._memo is not None) == formed
        with force(formed):  # the other route
            other = nn.functional.conv2d(x, model[0].weight)
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)


@ALL
def test_flat_weights_are_plain_tensors(kind):
    """Modes that mix inputs and outputs have no factored form: the weight is dense."""
    model = nn.Sequential(nn.Linear(12, 10))
    factorize(model, rank=2, parametrization=kind)
    assert type(model[0].weight) is torch.Tensor


@ALL
@pytest.mark.parametrize("case", ["conv2d", "linear"])
def test_a_weight_made_without_gradients_gets_none(case, kind):
    """Under no_grad the weight is a constant, in whichever form it is applied later."""
    model, inputs = tensorized(case, kind)
    with torch.no_grad():
        weight = model["layer"].weight
    x = inputs[0].requires_grad_()
    function = nn.functional.conv2d if case == "conv2d" else nn.functional.linear
    with force(True):
        function(x, weight).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())


@ALL
@pytest.mark.parametrize("case", ["conv2d", "linear"])
def test_autocast_forms_the_weight_in_full_precision(case, kind):
    """Factors are multiplied in float32 and the result is cast, as a dense weight is."""
    layer, inputs = LAYERS[case]
    model = nn.ModuleDict({"layer": layer()})
    factorize(model, rank=3, parametrization=kind)
    with force(True), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert model["layer"].weight.dtype == torch.float32
        found = run(model, inputs())
        expected = run(merge(copy.deepcopy(model)), inputs())
    assert found.dtype == expected.dtype == torch.bfloat16


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layers(kind, dtype):
    """Factors, weight and output have the layer's dtype."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 10)).to(dtype)
    factorize(model, rank=3, parametrization=kind)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 8, 4, 4, dtype=dtype)).dtype == dtype


@ALL
def test_compiled_layers_agree(kind):
    """torch.compile, whole graph: forward and backward as without."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 10))
    factorize(model, rank=3, parametrization=kind)
    x = torch.randn(2, 8, 4, 4)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    assert torch.allclose(out, model(x), atol=1e-5)
    out.square().sum().backward()
    for param, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(param.grad, gradient, atol=1e-4)


@ALL
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_traced_layers_agree(kind):
    """torch.jit.trace records the dense weight's formation, and warns of nothing."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 10))
    factorize(model, rank=3, parametrization=kind)
    x = torch.randn(2, 8, 4, 4)
    traced = torch.jit.trace(model, x)
    assert torch.allclose(traced(torch.cat([x, x])), model(torch.cat([x, x])), atol=1e-6)


@ALL
def test_gradients_for_each_sample(kind):
    """functional_call under vmap(grad): the sum over samples is the gradient."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 10)).double()
    factorize(model, rank=3, parametrization=kind)
    params, x = dict(model.named_parameters()), torch.randn(3, 8, 4, 4, dtype=torch.float64)

    def loss(params, sample):
        return torch.func.functional_call(model, params, (sample[None],)).square().sum()

    with force(True):
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
        model(x).square().sum().backward()
    for name, param in params.items():
        assert torch.allclose(each[name].sum(0), param.grad, atol=1e-9)


@ALL
def test_reset_parameters_draws_and_factorizes(kind):
    """The layer's own initialization, decomposed anew."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3))
    factorize(model, rank=3, parametrization=kind)
    before = [p.detach().clone() for p in model.parameters()]
    model[0].reset_parameters()
    assert not any(map(torch.equal, before, model.parameters()))
    assert model[0].weight.materialize().detach().norm() > 0


# --- initialization -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tucker, TensorTrain])
@CASES
def test_full_rank_keeps_the_function(case, kind):
    """At the largest ranks Tucker and train are exact (CP has no such rank)."""
    layer, make = LAYERS[case]
    dense, inputs = nn.ModuleDict({"layer": layer()}), make()
    expected = run(dense, inputs)
    plan = factorize(dense, rank=10**6, parametrization=kind)
    assert max(row.error for row in plan.rows if row.error is not None) < 1e-5
    assert torch.allclose(run(dense, inputs), expected, atol=1e-4)


@pytest.mark.covers("P6")
@ALL
def test_the_plan_has_the_error_of_the_initialization(kind):
    """‖W − Ŵ‖/‖W‖, as measured on the dense weights."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 10))
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    plan = factorize(model, rank=3, parametrization=kind)
    merged = merge(copy.deepcopy(model))
    for row, old, new in zip(plan.rows, before, (merged[0], merged[2]), strict=True):
        assert row.error == pytest.approx(float((old - new.weight).norm().detach() / old.norm()))


def test_hooi_is_no_worse_than_hosvd():
    """``init="hooi"`` improves on "spectral"."""
    weight = torch.randn(24, 16, 3, 3)
    errors = {}
    for init in ("spectral", "hooi"):
        model = nn.Sequential(nn.Conv2d(16, 24, 3))
        model[0].weight.data.copy_(weight)
        plan = factorize(model, rank=0.5, parametrization=partial(Tucker, init=init))
        errors[init] = plan.rows[0].error
    assert errors["hooi"] <= errors["spectral"]


@pytest.mark.covers("C10")
@ALL
def test_matched_factors_have_the_weights_mean_square(kind):
    """Gaussian factors, the baseline without spectral initialization."""
    model = nn.Sequential(nn.Conv2d(64, 96, 3))
    square = model[0].weight.square().mean().item()
    factorize(model, rank=16, parametrization=kind, init="matched")
    assert model[0].weight.materialize().square().mean().item() == pytest.approx(square, rel=0.4)


def test_an_initialization_of_ones_own():
    """A callable of the tensor and the ranks; what it returns has to fit."""
    model = nn.Sequential(nn.Linear(12, 10))
    ones = partial(CP, init=lambda tensor, r: tuple(torch.ones(n, r) for n in tensor.shape))
    factorize(model, rank=2, parametrization=ones)
    assert torch.equal(model[0].weight, torch.full((10, 12), 2.0))
    wrong = partial(CP, init=lambda tensor, r: (tensor,))
    with pytest.raises(ValueError, match=r"0\.weight: expected the initialization to return"):
        factorize(merge(model), rank=2, parametrization=wrong)
    assert not parametrize.is_parametrized(model[0])


@ALL
@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((0,), {}, ValueError, "rank above 0"),
        ((-0.5,), {}, ValueError, "rank above 0"),
        ((True,), {}, TypeError, "rank as int"),
        ((2,), {"modes": 1}, ValueError, "modes to be an int of at least 2"),
        ((2,), {"init": "kaiming"}, ValueError, "expected init of .* to be one of"),
    ],
)
def test_wrong_settings_are_refused(kind, arguments, settings, error, message):
    """At once, where they are given."""
    with pytest.raises(error, match=message):
        kind(*arguments, **settings)


@ALL
def test_zeros_are_left_dense_and_nan_is_an_error(kind):
    """As for LowRank: listed with the reason, or refused by name."""
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    nn.init.zeros_(model[0].weight)
    assert "never train" in plan_ranks(model, rank=2, parametrization=kind).rows[0].reason
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(ValueError, match=r"0\.weight holds NaN"):
        factorize(model, rank=2, parametrization=kind)


@ALL
def test_assigning_the_weight_factorizes_it(kind):
    """``module.weight = W`` at the same ranks; another shape is refused."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3))
    factorize(model, rank=10**6 if kind is not CP else 60, parametrization=kind)
    weight = torch.randn(6, 8, 3, 3)
    model[0].weight = weight
    assert torch.allclose(model[0].weight.reshape(6, 8, 3, 3), weight, atol=2e-2)
    with pytest.raises(ValueError, match=r"expected a weight of shape \(6, 8, 3, 3\)"):
        model[0].weight = torch.randn(6, 8, 5, 5)


def test_a_shape_is_needed_before_the_first_forward():
    """A parametrization by itself knows none."""
    with pytest.raises(RuntimeError, match="CP knows no shape yet"):
        CP(2)(torch.ones(3, 2), torch.ones(3, 2))


# --- plans ----------------------------------------------------------------------------------------


def convnet():
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(),
        nn.Linear(24 * 4, 10),
    )  # fmt: skip


@pytest.mark.covers("C19")
@ALL
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_ratio_is_attained(kind, ratio):
    """One scale for all ranks comes near any share of the parameters, and the count is right."""
    model = convnet()
    plan = factorize(model, ratio=ratio, parametrization=kind, init="matched")
    assert plan.ratio == pytest.approx(ratio, abs=0.08)
    assert plan.after == sum(p.numel() for p in model.parameters())
    assert all(row.after < row.before for row in plan.rows if row.rank is not None)


@ALL
def test_a_plan_repeats_itself(kind):
    """Its ranks, also through JSON's lists, give the same plan on a copy."""
    model = convnet()
    twin = copy.deepcopy(model)
    plan = factorize(model, ratio=0.4, parametrization=kind)
    listed = {name: [*r] if isinstance(r, tuple) else r for name, r in plan.ranks.items()}
    assert factorize(twin, rank=listed, parametrization=kind).ranks == plan.ranks
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_plan_prints_modes_and_ranks():
    """One column for how it is read, one for a rank of each mode or bond."""
    text = str(plan_ranks(convnet(), rank=4, parametrization=Tucker, include="0"))
    assert "16×8×9" in text
    assert "4×4×4" in text


@ALL
def test_plans_need_no_numbers(kind):
    """On the meta device, too."""
    with torch.device("meta"):
        model = convnet()
    assert len(plan_ranks(model, ratio=0.5, parametrization=kind).ranks) >= 2


@pytest.mark.parametrize(
    ("kind", "rank", "message"),
    [
        (Tucker, (2, 2), r"0\.weight: expected 3 ranks, one for each mode of 16×8×9"),
        (Tucker, (20, 2, 2), r"0\.weight: expected Tucker ranks that fit 16×8×9"),
        (Tucker, (9, 2, 2), r"fit 16×8×9, got \(9, 2, 2\), the largest.*\(4, 2, 2\)"),
        (TensorTrain, (2, 2, 2), r"0\.weight: expected 2 ranks, one for each bond"),
        (TensorTrain, (17, 2), r"0\.weight: expected tensor train ranks that fit"),
        (TensorTrain, (2, None), r"0\.weight: expected a number for each bond"),
        (CP, (2, 2, 2), r"expected one rank, an int or a float, for CP"),
        (LowRank, (2, 2), r"expected a rank as int or as float"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(kind, rank, message):
    """With the weight, what fits, and the model as it was."""
    model = convnet()
    with pytest.raises((TypeError, ValueError), match=message):
        factorize(model, rank={"0": rank}, parametrization=kind)
    assert not any(map(parametrize.is_parametrized, model.modules()))


@ALL
def test_energy_is_refused(kind):
    """A tensor has no one spectrum to share out."""
    with pytest.raises(ValueError, match=r"0\.weight is read as a tensor.*rank= or ratio="):
        plan_ranks(convnet(), energy=0.9, parametrization=kind)


# --- decay and diagnostics ------------------------------------------------------------------------


@pytest.mark.covers("C19", "D1")
@ALL
@CASES
def test_decay_is_the_dense_penalty(case, kind):
    """The gradient of ½λ‖W‖² of the weights that the layer applies, factor by factor (D1)."""
    model, inputs = tensorized(case, kind)
    run(model, inputs).sum().backward()
    base = {p: p.grad.clone() for p in model.parameters()}
    add_penalty_grad_(products(model), 0.3)
    added = {p: p.grad - base[p] for p in model.parameters()}
    model.zero_grad()
    for held in model["layer"].modules():
        for weight in getattr(held, "parametrizations", {}).values():
            formed = weight()
            dense = formed.materialize() if isinstance(formed, FactoredTensor) else formed
            (0.15 * dense.square().sum()).backward()
    checked = 0
    for param, gradient in added.items():
        expected = torch.zeros_like(param) if param.grad is None else param.grad
        assert torch.allclose(gradient, expected, atol=1e-10)
        checked += param.grad is not None
    assert checked >= 2
    assert float(penalty(products(model), 0.3).detach()) > 0


@pytest.mark.covers("P5")
@ALL
def test_training_with_frobenius_decay(kind):
    """A loop as a user writes it: the loss falls, and the norm is less than without decay."""
    model = convnet()
    factorize(model, ratio=0.3, parametrization=kind)
    x, y = torch.randn(16, 8, 4, 4), torch.randint(10, (16,))
    norms = {}
    for decay in (0.0, 0.1):
        twin = copy.deepcopy(model)
        base = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
        optimizer = FrobeniusDecay(base, twin, decay=decay)
        losses = []
        for _ in range(20):
            loss = nn.functional.cross_entropy(twin(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        norms[decay] = diagnostics.measure(products(twin)).total("norm")
    assert norms[0.1] < 0.9 * norms[0.0]


@pytest.mark.parametrize("kind", [Tucker, CP])
def test_measure_says_what_is_defined(kind):
    """Norm, bound, rank and effective step; what needs singular values is NaN."""
    model, _ = tensorized("conv2d", kind)
    measured = diagnostics.measure(products(model), lr=0.1)
    (record,) = measured.products
    norm = merge(copy.deepcopy(model))["layer"].weight.detach().norm().item()
    squares = sum(p.detach().square().sum() for p in products(model)[0].params)
    assert record.norm == pytest.approx(norm)
    assert record.bound == pytest.approx(0.5 * squares.item())
    assert record.effective_step == pytest.approx(0.1 / norm**2)
    assert record.rank == 3
    assert record.nuclear != record.nuclear
    assert record.spectrum.numel() == 0
    assert "-" in str(measured)
    recorder = diagnostics.Recorder(products(model))
    recorder.step(0.1)
    assert recorder.history["layer.weight"]["norm"] == [pytest.approx(norm)]


def test_measure_of_nan_is_nan():
    """A run that diverged is recorded, not an error."""
    model, _ = tensorized("conv2d", CP)
    with torch.no_grad():
        next(model["layer"].parametrizations.parameters()).fill_(float("nan"))
    (record,) = diagnostics.measure(products(model)).products
    assert record.norm != record.norm


def test_a_train_is_measured_as_a_chain():
    """Its spectrum is that of the first unfolding."""
    model, _ = tensorized("conv2d", TensorTrain)
    (record,) = diagnostics.measure(products(model)).products
    dense = merge(model)["layer"].weight.detach().flatten(1)
    kept = len(record.spectrum)
    wanted = torch.linalg.svdvals(dense)[:kept].cpu()
    assert torch.allclose(record.spectrum, wanted, atol=1e-10)


# --- copies, files, the way back ------------------------------------------------------------------


@pytest.mark.covers("D25")
@ALL
@pytest.mark.parametrize("case", ["conv2d", "linear"])
def test_copies_after_a_forward_pass(case, kind):
    """Nothing of a graph is kept on the module (D25)."""
    model, inputs = tensorized(case, kind)
    expected = run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs), expected)
    run(twin, inputs).sum().backward()
    assert all(p.grad is None for p in model.parameters())


@ALL
def test_a_state_dict_fits_the_same_structure_only(kind):
    """It loads where kind and reading agree, and says so where they do not."""
    model, other = convnet(), convnet()
    factorize(model, rank=3, parametrization=kind)
    factorize(other, rank=3, parametrization=kind)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(model(x), other(x))
    flat = convnet()
    factorize(flat, rank=3, parametrization=partial(kind, pattern="flat"))
    with pytest.raises(RuntimeError, match="flat"):
        flat.load_state_dict(model.state_dict())


@ALL
def test_files_bring_the_structure_back(kind, tmp_path):
    """save_factorized and load_factorized: the same factors in a model that was dense."""
    pytest.importorskip("safetensors")
    model = convnet()
    factorize(model, ratio=0.4, parametrization=kind)
    frobdecay.save_factorized(model, tmp_path / "model.safetensors")
    loaded = convnet()
    frobdecay.load_factorized(loaded, tmp_path / "model.safetensors")
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(model(x), loaded(x))
    assert [p.name for p in products(loaded)] == [p.name for p in products(model)]


@ALL
def test_dense_weights_load_into_factors(kind):
    """A dense checkpoint is decomposed at the ranks there are, whatever ``init`` was."""
    model, dense = convnet(), convnet()
    factorize(model, rank=6, parametrization=kind, init="matched")
    plan = frobdecay.load_dense_(model, dense.state_dict())
    assert {row.name for row in plan.rows} == {"0.weight", "2.weight", "4.weight"}
    twin = copy.deepcopy(dense)
    expected = factorize(twin, rank=6, parametrization=kind)
    for row, wanted in zip(plan.rows, expected.rows, strict=True):
        assert (row.rank, row.matrix) == (wanted.rank, wanted.matrix)
        assert row.error == pytest.approx(wanted.error, rel=1e-3)


@ALL
def test_unroll_refuses_and_names_merge(kind):
    """There is no chain of plain layers; merge is the way."""
    model = convnet()
    factorize(model, rank=3, parametrization=kind)
    message = rf"cannot unroll\n  0\.weight: a {kind.__name__} is not a chain[\s\S]*merge these"
    with pytest.raises(ValueError, match=message):
        unroll(model)


@ALL
def test_what_a_module_prints(kind):
    """The reading, the modes, the factors and what is kept."""
    model = convnet()
    factorize(model, rank=3, parametrization=kind)
    assert "16×8×9" in repr(model)
    assert "kept 0." in repr(model)
    assert "rank=3" in repr(kind(3))


@ALL
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_config_makes_it_again(kind, dtype):
    """Keyword arguments as plain data, with the ranks that were resolved."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3).to(dtype))
    factorize(model, rank=0.4, parametrization=kind)
    held = model[0].parametrizations.weight[0]
    twin = kind(**held.config())
    twin.adopt((16, 8, 3, 3))
    assert twin.factor_shapes((16, 8, 3, 3)) == held.factor_shapes((16, 8, 3, 3))
    assert twin.record() == held.record()


@pytest.mark.parametrize("kind", [LowRank, *KINDS.values()])
@pytest.mark.parametrize("pattern", [None, "o i kh kw -> (o kh) (i kw)"])
def test_config_before_a_shape_is_known_is_what_was_given(kind, pattern):
    """Plain data that makes it again; the rank stays a fraction until there are sizes."""
    config = kind(0.4, pattern=pattern, axes={"kh": 3}).config()
    assert (config["rank"], config["pattern"]) == (0.4, pattern)
    assert config["axes"] == {"kh": 3}
    assert kind(**json.loads(json.dumps(config))).config() == config


# --- a depthwise convolution, then a decomposed 1×1 -----------------------------------------------


def separable(conv):
    """A k×k convolution as a depthwise one and a 1×1: the structure of the paper's tensor nets."""
    c, options = conv.in_channels, {"bias": False}
    return nn.Sequential(
        nn.Conv2d(c, c, conv.kernel_size, conv.stride, conv.padding, groups=c, **options),
        nn.Conv2d(c, conv.out_channels, 1, bias=conv.bias is not None),
    )


@pytest.mark.covers("C19")
@ALL
def test_the_separable_recipe(kind):
    """Only the 1×1 is decomposed and decayed as a product; the depthwise part keeps its own."""
    model = nn.Sequential(separable(nn.Conv2d(16, 32, 3, padding=1)), nn.ReLU())
    plan = factorize(model, rank=0.5, parametrization=partial(kind, pattern="flat"))
    assert list(plan.ranks) == ["0.1.weight"]
    assert "depthwise" in plan.rows[0].reason
    assert plan.rows[1].matrix == (8, 8, 8)  # 512 entries, a cube
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = FrobeniusDecay(base, model)
    by_decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert by_decay[id(model[0][0].weight)] == 0.1
    factors = list(model[0][1].parametrizations.parameters())
    assert all(by_decay[id(factor)] == 0 for factor in factors)
