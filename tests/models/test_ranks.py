"""Plans: the ranks that were asked for, the nearest attainable ratio, the smallest rank."""

import copy
import functools
import json

import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from frobdecay import CP, TensorTrain, Tucker
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge
from frobdecay.models.ranks import plan_ranks
from frobdecay.product import names
from frobdecay.weights.lowrank import LowRank


def _small():
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)
    )


@st.composite
def models(draw):
    """A stack of layers of random sizes, never run."""
    layers = [nn.BatchNorm1d(draw(st.integers(1, 5)))]
    for _ in range(draw(st.integers(1, 4))):
        m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        layers.append(draw(st.sampled_from([nn.Linear(n, m), nn.Conv2d(n, m, 3)])))
    return nn.Sequential(*layers)


def _counts(model, depth):
    """Parameters of all weights at every scale where a rank changes, the plain way."""
    shapes = []
    for module in model:
        if isinstance(module, nn.Linear):
            shapes.append((1, *module.weight.shape))
        elif isinstance(module, nn.Conv2d):
            o, i, kh, kw = module.weight.shape
            shapes.append((1, o * kh, i * kw))
    total = sum(m * n for _, m, n in shapes)
    scales = {
        (r + 0.5) / min(m, n) + e
        for _, m, n in shapes
        for r in range(min(m, n))
        for e in (-1e-9, 0, 1e-9)  # 0: halves are rounded to even
    } | {1e-12}
    counts = set()
    for scale in scales:
        size = 0
        for _, m, n in shapes:
            r = max(1, round(scale * min(m, n)))
            size += min(m * n, r * (m + n) + depth * r * r)
        counts.add(size)
    return total, counts


@pytest.mark.covers("C17", "D27")
@given(model=models(), ratio=st.floats(0.01, 0.99), depth=st.integers(0, 1))
def test_ratio_search_finds_the_nearest_attainable_D27(model, ratio, depth):
    """Against brute force over every scale where a rank changes (D27)."""
    total, counts = _counts(model, depth)
    make = functools.partial(LowRank, depth=depth)
    if ratio * total < min(counts):
        with pytest.raises(ValueError, match="attainable are"):
            plan_ranks(model, ratio=ratio, include="*", parametrization=make)
        return
    plan = plan_ranks(model, ratio=ratio, include="*", parametrization=make)
    nearest = min(abs(count - ratio * total) for count in counts)
    after = sum(row.after for row in plan.rows)
    assert abs(after - ratio * total) == pytest.approx(nearest, abs=1e-6)
    assert plan.after == after + sum(p.numel() for p in model.parameters()) - total


@pytest.mark.covers("C16")
@given(model=models(), ratio=st.floats(0.3, 0.95))
def test_plan_is_a_dry_run_of_factorize(model, ratio):
    """The plan says what factorize then does, and counts the parameters that are then there."""
    try:
        plan = plan_ranks(model, ratio=ratio)
    except ValueError:
        return
    done = factorize(model, ratio=ratio)
    assert (done.ranks, done.after) == (plan.ranks, plan.after)
    assert sum(p.numel() for p in model.parameters()) == plan.after


@pytest.mark.covers("D27")
def test_ratio_counts_all_parameters_of_the_model_D27():
    """Norms, biases and excluded layers are part of both sides of the ratio (D27)."""
    model = _small()
    plan = plan_ranks(model, ratio=0.4, exclude="3")
    assert plan.before == sum(p.numel() for p in model.parameters())
    assert plan.ratio == pytest.approx(0.4, abs=0.03)
    assert {row.name: row.reason for row in plan.rows}["3.weight"] == "excluded"


@pytest.mark.covers("C17", "D27")
def test_rank_fraction_is_of_the_smaller_side_D27():
    """The same rule for all layers: round(fraction · min(m, n)), at least 1 (D27)."""
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Linear(100, 30))
    assert plan_ranks(model, rank=0.5).ranks == {"0.weight": 6, "1.weight": 15}
    assert plan_ranks(model, rank=1e-9).ranks == {"0.weight": 1, "1.weight": 1}


@pytest.mark.covers("C4", "C17")
@pytest.mark.parametrize("rank", [1, 5, 16, 40, 1.0, 3.0])
def test_an_explicit_rank_is_obeyed(rank):
    """Also where it does not pay: full rank and overcomplete."""
    expected = rank if isinstance(rank, int) else round(rank * 16)
    assert plan_ranks(nn.Linear(16, 16), rank=rank).ranks == {"weight": expected}


@pytest.mark.covers("P10")
def test_ratio_leaves_dense_and_lists_what_does_not_pay():
    """A column vector has no smaller factorization."""
    plan = plan_ranks(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)), ratio=0.5)
    row = plan.rows[1]
    assert (row.rank, row.before, row.after) == (None, 64, 64)
    assert "does not pay" in row.reason


@pytest.mark.covers("C3")
def test_depthwise_convolutions_stay_dense_unless_named():
    """One channel a matrix has nothing to share; a name overrides that."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1))
    plan = plan_ranks(model, rank=2)
    assert list(plan.ranks) == ["1.weight"]
    assert "depthwise" in plan.rows[0].reason
    assert plan_ranks(model, rank=2, include=["0", "1"]).ranks == {"0.weight": 2, "1.weight": 2}


def _calls(monkeypatch, module, name):
    """Every call of a function, counted."""
    original, counted = getattr(module, name), []

    def call(*args, **kwargs):
        counted.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return counted


@pytest.mark.parametrize(
    "rule", ["names", "modules", "modules and a glob"], ids=lambda rule: rule.replace(" ", "-")
)
def test_a_rank_for_each_name_takes_no_longer_for_each_of_many(rule, monkeypatch):
    """A plain name is looked up among the weights, not compared with all of them."""
    size = 60
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(size)))
    ranks = {f"{k}.weight" if rule == "names" else str(k): 1 + k % 3 for k in range(size)}
    counted = _calls(monkeypatch, names, "fits")
    plan = plan_ranks(model, rank=ranks | ({"*": 4} if "glob" in rule else {}))
    assert plan.ranks == {f"{k}.weight": 1 + k % 3 for k in range(size)}
    assert len(counted) < 20 * size


@pytest.mark.parametrize("apart", [False, True])
def test_a_search_asks_each_shape_until_its_rank_is_known(apart, monkeypatch):
    """Not each at every step down to neighbouring floats, and equal shapes once."""
    size = 40
    model = nn.Sequential(*(nn.Linear(8 + k * apart, 40 + 3 * k * apart) for k in range(size)))
    counted = _calls(monkeypatch, LowRank, "__init__")
    assert plan_ranks(model, ratio=0.4).ratio == pytest.approx(0.4, abs=0.06)
    assert len(counted) < (25 * size if apart else 6 * size + 60)


READINGS = [
    (nn.Conv2d(1, 8, 3), "o i kh kw -> (o kh) (i kw)"),  # can pay: the documented default
    (nn.Conv2d(1, 8, (16, 1)), "o i kh kw -> o (i kh kw)"),
    (nn.Conv2d(1, 8, (1, 16)), "o i kh kw -> (o kh) (i kw)"),
    (nn.Conv2d(8, 1, (16, 1)), "o i kh kw -> (o kh) (i kw)"),
    (nn.Conv2d(8, 1, (1, 16)), "o i kh kw -> (o kh kw) i"),
    (nn.Conv1d(1, 8, 9), "o i k -> o (i k)"),
    (nn.Conv1d(8, 1, 9), "o i k -> (o k) i"),
    (nn.Conv3d(1, 8, (9, 1, 1)), "o i kd kh kw -> o (i kd kh kw)"),
    (nn.Conv3d(8, 1, (1, 9, 1)), "o i kd kh kw -> (o kd kh) (i kw)"),
    (nn.Conv3d(8, 1, (1, 1, 9)), "o i kd kh kw -> (o kd kh kw) i"),
    (nn.ConvTranspose1d(8, 1, 9), "i o k -> (o k) i"),
    (nn.ConvTranspose2d(1, 8, (16, 1)), "i o kh kw -> o (i kh kw)"),
    (nn.ConvTranspose3d(8, 1, (1, 1, 9)), "i o kd kh kw -> (o kd kh kw) i"),
    (nn.Conv2d(4, 32, (9, 1), groups=4), "(g o) i kh kw -> g o (i kh kw)"),  # depthwise, named
    (nn.Bilinear(8, 9, 1), "o i j -> (o i) j"),
    (nn.Bilinear(8, 9, 4), "o i j -> o (i j)"),
]
VECTORS = [nn.Conv2d(64, 1, 1), nn.Conv2d(1, 1, (9, 1)), nn.Conv1d(1, 1, 9), nn.Linear(9, 1)]


@pytest.mark.covers("C2", "C3")
@pytest.mark.parametrize(("layer", "pattern"), READINGS)
def test_a_weight_is_read_as_a_matrix_that_can_pay(layer, pattern):
    """Long kernels on one channel are a vector in the default reading, and would stay dense."""
    model = nn.Sequential(copy.deepcopy(layer))
    dense, plan = layer.weight, factorize(model, rank=1, include="0")
    assert plan.after < plan.before
    assert model[0].parametrizations.weight[0].matricization.pattern == pattern
    merge(factorized := copy.deepcopy(model))
    best = LowRank(1, pattern=pattern, axes=_axes(layer)).right_inverse(dense)
    view = model[0].parametrizations.weight[0].matricization
    torch.testing.assert_close(view.matrix(factorized[0].weight), best[0] @ best[1].mT)


@pytest.mark.parametrize("layer", [*VECTORS, *(layer for layer, _ in READINGS[:10])])
def test_a_factorization_without_a_module_reads_alike(layer):
    """``LowRank`` by itself knows no module, but the same shapes."""
    view = LowRank(1).matricize(tuple(layer.weight.shape))
    found = plan_ranks(nn.Sequential(layer), rank=1, include="0").rows[0]
    assert found.matrix == view.matrix_shape


@pytest.mark.parametrize("layer", VECTORS)
def test_what_no_reading_makes_smaller_stays_dense(layer):
    """A vector however it is read keeps the default."""
    plan = plan_ranks(nn.Sequential(layer, nn.Linear(64, 64)), ratio=0.5)
    assert "does not pay" in plan.rows[0].reason


@pytest.mark.parametrize(("name", "matrix"), [("spatial", (128, 1)), ("channel", (8, 16))])
def test_a_named_pattern_is_obeyed_where_it_cannot_pay(name, matrix):
    """Only the default is a choice."""
    layer, named = nn.Conv2d(1, 8, (16, 1)), functools.partial(LowRank, pattern=name)
    assert plan_ranks(layer, rank=1, parametrization=named).rows[0].matrix == matrix
    assert named(1).matricize(tuple(layer.weight.shape)).matrix_shape == matrix


def _axes(layer):
    return {"g": layer.groups} if getattr(layer, "groups", 1) > 1 else None


@pytest.mark.covers("C17", "D27")
@given(energy=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_energy_takes_the_smallest_sufficient_rank(energy, seed):
    """One column less would keep less than the share."""
    generator = seeded(seed)
    layer = nn.Linear(12, 40).double()
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.weight.mul_(torch.logspace(0, -6, 12))
    squares = torch.linalg.svdvals(layer.weight.detach()).square()
    try:
        r = plan_ranks(layer, energy=energy).ranks.get("weight")
    except ValueError:
        r = None
    share = squares.cumsum(0) / squares.sum()
    smallest = 1 + int((share < energy * (1 - 1e-12)).sum())
    assert r in (smallest, smallest + 1) or (r is None and smallest * 52 >= 480)


def test_energy_of_a_batch_is_that_of_all_its_matrices():
    """All groups of a convolution get one rank, from their common share."""
    layer = nn.Conv2d(32, 32, 3, groups=2)
    plan = plan_ranks(layer, energy=0.5)
    view = LowRank(1, pattern="(g o) i kh kw -> g (o kh) (i kw)", axes={"g": 2}).matricize(
        tuple(layer.weight.shape)
    )
    squares = torch.linalg.svdvals(view.matrix(layer.weight.detach())).square().sum(0)
    share = squares.cumsum(0) / squares.sum()
    assert plan.ranks["weight"] == 1 + int((share < 0.5).sum())


@pytest.mark.covers("D24")
def test_a_plan_can_be_repeated_on_a_copy_D24():
    """Ranks are plain numbers beside a checkpoint; a fresh model then loads it strictly (D24)."""
    model = _small()
    fresh = copy.deepcopy(model)
    plan = factorize(model, ratio=0.5)
    factorize(fresh, rank=json.loads(json.dumps(plan.ranks)))
    fresh.load_state_dict(model.state_dict())
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_plan_is_a_rank():
    """What plan_ranks returns can be handed to factorize as it is."""
    model = _small()
    plan = plan_ranks(model, energy=0.6)
    assert factorize(model, rank=plan).ranks == plan.ranks


@pytest.mark.covers("C16")
def test_planning_changes_nothing():
    """No copy, no decomposition in place, no random number drawn."""
    model = _small()
    before, held = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    state = torch.get_rng_state()
    plan_ranks(model, ratio=0.3)
    assert torch.equal(state, torch.get_rng_state())
    assert [id(p) for p in model.parameters()] == held
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_ratio_search_needs_no_decomposition(monkeypatch):
    """Counting suffices, also for a model on the meta device."""

    def fail(*args, **kwargs):
        raise AssertionError("decomposed")

    for name in ("svd", "svdvals", "eigh", "eigvalsh", "qr"):
        monkeypatch.setattr(torch.linalg, name, fail)
    monkeypatch.setattr(copy, "deepcopy", fail)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(20)))
    assert plan_ranks(model, ratio=0.1).ratio == pytest.approx(0.1, abs=1e-3)


@pytest.mark.covers("C17")
def test_per_layer_ranks_take_the_exact_name_first():
    """Then the first pattern that matches; the rest stays dense and is listed."""
    model = nn.ModuleDict({"a": nn.Linear(9, 9), "ab": nn.Linear(9, 9), "b": nn.Linear(9, 9)})
    plan = plan_ranks(model, rank={"a*": 3, "a": 2, "?b": 5}, include=nn.Linear)
    assert plan.ranks == {"a.weight": 2, "ab.weight": 3}
    assert plan.rows[2].reason == "no rank given for it"
    plan = plan_ranks(model, rank={"*": 4, "a": 3, "a.weight": 2, "b": 3, "b.weight": 5})
    assert plan.ranks == {"a.weight": 2, "ab.weight": 4, "b.weight": 5}


def test_per_layer_ranks_take_the_names_of_a_compiled_model():
    """Its own names, and those of the model inside."""
    model = torch.compile(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), backend="eager")
    plan = plan_ranks(model, rank={"_orig_mod.0": 3, "1": 2})
    assert list(plan.ranks.values()) == [3, 2]


def test_per_layer_ranks_select_by_themselves():
    """A dict needs no include besides."""
    model = _small()
    assert plan_ranks(model, rank={"0": 3, nn.Linear: 0.5}).ranks == {"0.weight": 3, "3.weight": 5}


@pytest.mark.covers("D28")
def test_every_block_of_a_stage_is_factorized_D28b():
    """Naming a container takes all below it, not only its first layer (D28b)."""
    stage = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()) for _ in range(3)))
    model = nn.ModuleDict({"stage": stage, "head": nn.Linear(8, 8)})
    plan = plan_ranks(model, rank=2, include="stage")
    assert list(plan.ranks) == ["stage.0.0.weight", "stage.1.0.weight", "stage.2.0.weight"]


@pytest.mark.covers("C17")
def test_the_table_is_aligned_and_complete():
    """One line a weight, one for the head, one for the sum, columns under each other."""
    plan = factorize(_small(), ratio=0.5, exclude="3")
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.rows) + 2
    at = lines[0].index("rank") + len("rank")
    assert all(line[at : at + 2] == "  " for line in lines[:-1])
    assert f"{plan.before:,}" in lines[-1]
    assert f"ratio {plan.ratio:.3f}" in lines[-1]
    assert repr(plan) == str(plan)


def test_already_factorized_weights_are_listed():
    """A second call leaves the first one's work alone."""
    model = _small()
    factorize(model, rank=2, include="0")
    with pytest.raises(ValueError, match=r"the 2,448 parameters of the weights that include"):
        plan_ranks(model, ratio=0.001, include="[02]")  # 144 of them in factors
    plan = factorize(model, rank=3)
    assert plan.ranks == {"2.weight": 3, "3.weight": 3}
    row = plan.rows[0]
    assert "already factorized" in row.reason
    assert (row.shape, row.rank, row.before, row.after) == ((16, 8, 3, 3), 2, 144, 144)
    merge(model)
    assert list(model.state_dict()) == list(_small().state_dict())


def test_the_ratio_search_asks_once_for_equal_shapes():
    """A thousand layers of one shape cost no more parametrizations a step than one of them."""
    made = []

    class Counted(LowRank):
        """Counts how many are made."""

        def __init__(self, *args, **kwargs):
            made.append(1)
            super().__init__(*args, **kwargs)

    costs = []
    for layers in (10, 40):
        made.clear()
        model = nn.Sequential(*(nn.Linear(32, 24, device="meta") for _ in range(layers)))
        plan_ranks(model, ratio=0.3, parametrization=Counted)
        costs.append(len(made))
    assert costs[1] - costs[0] <= 10 * 30


@pytest.mark.parametrize(
    ("parametrization", "rank"),
    [
        (functools.partial(LowRank, pattern="channel"), 4),
        (functools.partial(LowRank, pattern="o i kh kw -> (o kw) (i kh)"), 4),
        (functools.partial(LowRank, depth=1), 4),
        (CP, 3),
        (Tucker, 2),
        (TensorTrain, 2),
    ],
)
def test_a_plan_is_executed_as_what_it_is_of(parametrization, rank):
    """By the same parametrization; by another one it is refused, and nothing changes."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3))
    plan = plan_ranks(model, rank=rank, parametrization=parametrization)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"0\.weight: expected what the plan is of.*parametrization="
    ):
        factorize(model, rank=plan)
    assert before.keys() == model.state_dict().keys()
    assert factorize(model, rank=plan, parametrization=parametrization).after == plan.after
