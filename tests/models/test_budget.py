"""Budgets: what stays dense, how the rest is divided, and what a budget cannot do."""

import functools
import itertools

import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from frobdecay.algebra.reading import Matricization
from frobdecay.models.budget.allocation import ALLOCATORS
from frobdecay.models.budget.kept import ENDS, SMALL, floor
from frobdecay.models.calibration.run import calibrate
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge
from frobdecay.models.ranks import plan_ranks
from frobdecay.weights.lowrank import LowRank
from frobdecay.weights.tensors import Tucker


def _six():
    """The convolutions of a small classifier."""
    widths = [1, 32, 32, 64, 64, 128, 128]
    body = [nn.Conv2d(*pair, 3, padding=1) for pair in itertools.pairwise(widths)]
    return nn.ModuleDict({"body": nn.Sequential(*body), "head": nn.Linear(128, 10)})


def _spectral(*decays, size=24):
    """Square weights whose singular values fall off, each at its own speed."""
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in decays))
    generator = seeded(0)
    with torch.no_grad():
        for layer, decay in zip(model, decays, strict=True):
            q = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in "pq"]
            layer.weight.copy_(q[0] * decay ** torch.arange(size) @ q[1])
    return model


def _reasons(plan):
    return {row.name: row.reason for row in plan.rows if row.rank is None}


def test_a_budget_leaves_the_ends_dense_where_they_are_small():
    """By default; the plan says which and why."""
    plan = plan_ranks(_six(), ratio=0.25)
    assert _reasons(plan) == {
        "body.0.weight": "kept dense: the first layer",
        "head.weight": "kept dense: the last layer",
    }
    assert plan.ratio == pytest.approx(0.25, abs=0.01)
    assert "kept dense: the last layer" in str(plan)


@pytest.mark.parametrize("act", [factorize, plan_ranks])
def test_what_is_included_is_factorized(act):
    """And where a rank is given."""
    assert len(act(_six(), ratio=0.25, include="*").ranks) == 7
    assert len(act(_six(), rank=2).ranks) == 7


def test_large_ends_are_factorized_and_small_weights_are_not():
    """A third of the budget is theirs at most; of one size all stay dense, or none."""
    model = nn.Sequential(nn.Linear(900, 200), nn.Linear(200, 200), nn.Linear(200, 20))
    assert list(_reasons(plan_ranks(model, ratio=0.2))) == ["2.weight"]
    small = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    model = nn.Sequential(nn.Linear(100, 100), *small, nn.Linear(100, 100), nn.Linear(100, 100))
    reasons = _reasons(plan_ranks(model, ratio=0.2))
    assert reasons == {f"{k}.weight": "kept dense: among the smallest" for k in (1, 2, 3)}


def test_weights_of_many_shapes_are_told_apart_by_their_hashes():
    """A budget groups those that are read alike; none is compared with all of the others."""
    model = nn.Sequential(*(nn.Linear(20 + k % 20, 20 + k // 20) for k in range(200)))
    found, compared, equal = [], [], Matricization.__eq__

    def counted(one, other):
        compared.append((one, other))
        return equal(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matricization, "__eq__", counted)
        found.append(plan_ranks(model, ratio=0.5))
    assert len(compared) < 10 * len(model)
    assert found == [plan_ranks(model, ratio=0.5)]


def test_the_rule_gives_way_to_the_budget():
    """Before it is refused, all is factorized, down to rank 1."""
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(4)))
    plan = plan_ranks(model, ratio=0.05)
    assert set(plan.ranks.values()) == {1}
    assert all("rank 1 of 40" in row.remarks for row in plan.rows)


def test_narrow_weights_have_a_floor():
    """Heads that are not the last layer are no bottleneck of one number."""
    model = nn.ModuleDict({"body": nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))})
    model.update({f"head{k}": nn.Linear(128, 10) for k in range(3)})
    plan = plan_ranks(model, ratio=0.25)
    heads = [row for row in plan.rows if "head" in row.name]
    assert all(row.rank is None or row.rank >= 5 for row in heads)
    assert plan.ratio == pytest.approx(0.25, abs=0.01)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    ratio=st.floats(0.05, 0.95),
    allocate=st.sampled_from(["fraction", "uniform"]),
)
def test_the_rule_holds_whatever_the_model(sizes, ratio, allocate):
    """What it keeps is a part of the budget, no rank is below the floor, the rest meets it."""
    model = nn.Sequential(*(nn.Linear(n, m) for m, n in sizes))
    try:
        plan = plan_ranks(model, ratio=ratio, allocate=allocate)
    except ValueError:  # cannot be attained
        return
    kept = [row for row in plan.rows if (row.reason or "").startswith("kept dense")]
    budget = ratio * plan.before
    assert sum(row.before for row in kept) <= (ENDS + SMALL) * budget
    low = [row.name for row in plan.rows if row.rank and row.rank < floor(min(row.shape))]
    if low:  # it gave way, as with them at the floor there would be more than the budget
        floors = {row.name: floor(min(row.shape)) for row in plan.rows if row.rank}
        assert plan_ranks(model, rank=floors).after > budget
    open_rows = [row for row in plan.rows if row not in kept]
    steps = [sum(row.shape) for row in open_rows] or [0]
    falls_short = min(row.before for row in open_rows) if open_rows else 0
    assert abs(plan.after - budget) <= max(sum(steps), falls_short, plan.before - budget)


def test_a_ratio_with_include_is_of_what_it_selects():
    """So that half of an encoder is half of it, however large the rest is."""
    model = nn.ModuleDict({"encoder": nn.Linear(100, 100), "table": nn.Embedding(5000, 64)})
    plan = plan_ranks(model, ratio=0.5, include="encoder")
    assert sum(row.after for row in plan.rows if row.rank) == pytest.approx(5000, abs=200)
    with pytest.raises(ValueError, match=r"the 10,000 parameters of the weights that include"):
        plan_ranks(model, ratio=0.001, include="encoder")
    with pytest.raises(
        ValueError, match=r"of the model.*the largest that is left as it is: table.w"
    ):
        plan_ranks(model, ratio=0.1, exclude="table")


@pytest.mark.parametrize("allocate", [*ALLOCATORS])
@pytest.mark.parametrize("depth", [0, 1])
def test_every_allocation_meets_the_budget(allocate, depth):
    """To within one rank of one weight."""
    model = _spectral(0.5, 0.8, 0.95)
    more = {"evaluate": _error_of(model)} if ALLOCATORS[allocate].measures else {}
    make = functools.partial(LowRank, depth=depth)
    plan = factorize(model, ratio=0.5, include="*", allocate=allocate, parametrization=make, **more)
    assert plan.after == pytest.approx(0.5 * plan.before, abs=3 * 48 + depth * 3 * 24)
    assert plan.after == sum(p.numel() for p in model.parameters())


def _error_of(model, prices=(1, 1, 1)):
    """A loss that is the squared error of each weight at a price of its own."""
    before = [layer.weight.detach().clone() for layer in model]

    def evaluate(now):
        pairs = zip(now, before, prices, strict=True)
        return 1 + sum(float(p * (x.weight.detach() - w).square().sum()) for x, w, p in pairs)

    return evaluate


def test_uniform_is_one_share_of_each_weight():
    """Whatever their shapes, as far as ranks can be whole."""
    model = nn.Sequential(nn.Linear(64, 640, bias=False), nn.Linear(160, 160, bias=False))
    plan = plan_ranks(model, ratio=0.5, include="*", allocate="uniform")
    assert [row.after / row.before for row in plan.rows] == pytest.approx([0.5, 0.5], abs=0.02)
    assert plan.ranks != plan_ranks(model, ratio=0.5, include="*").ranks


def test_energy_goes_where_singular_values_are():
    """Its plan keeps more of the weights' shares together than equal ranks do."""
    model = _spectral(0.5, 0.8, 0.99)
    kept = {}
    for allocate in ("fraction", "energy"):
        plan = plan_ranks(model, ratio=0.5, include="*", allocate=allocate)
        squares = [torch.linalg.svdvals(x.weight.detach()).square() for x in model]
        kept[allocate] = sum(
            float(s[: row.rank or 24].sum() / s.sum())
            for s, row in zip(squares, plan.rows, strict=True)
        )
    assert kept["energy"] > kept["fraction"] + 0.01
    ranks = [row.rank or 24 for row in plan.rows]
    assert ranks == sorted(ranks)


def test_sensitivity_goes_where_the_loss_is_and_restores_the_weights():
    """A weight a hundred times as dear gets the ranks."""
    model = _spectral(0.9, 0.9, 0.9)
    before = [layer.weight.detach().clone() for layer in model]
    calls, loss = [], _error_of(model, (1, 100, 1))

    def evaluate(now):
        calls.append(now)
        return loss(now)

    plan = plan_ranks(model, ratio=0.5, include="*", allocate="sensitivity", evaluate=evaluate)
    ranks = [row.rank or 24 for row in plan.rows]
    assert ranks[1] > ranks[0]
    assert ranks[0] == pytest.approx(ranks[2], abs=1)
    assert len(calls) == 1 + 3 * len(model)
    assert all(torch.equal(x.weight, w) for x, w in zip(model, before, strict=True))


@pytest.mark.parametrize("rule", [{"ratio": 0.3}, {"ratio": 0.7}, {"tolerance": 0.3}])
def test_what_was_measured_for_one_plan_serves_another(rule):
    """The prices are in the plan: another budget needs no further loss, or a tolerance its own."""
    model = _spectral(0.8, 0.9, 0.95)
    calls, loss = [], _error_of(model, (1, 100, 10))

    def evaluate(now):
        calls.append(now)
        return loss(now)

    measured = {"include": "*", "allocate": "sensitivity", "evaluate": evaluate}
    plan = plan_ranks(model, ratio=0.5, **measured)
    assert plan.rows[1].price > 10 * plan.rows[0].price > 0
    assert "price" in str(plan)
    assert "price" not in str(plan_ranks(model, ratio=0.5))
    wanted, count = plan_ranks(model, **rule, **measured), len(calls)
    own = {"evaluate": evaluate} if "tolerance" in rule else {}
    again = plan_ranks(model, **rule, include="*", allocate=plan, **own)
    assert again == wanted
    assert len(calls) - count == (count - 20 if own else 0)  # ten for the prices of either
    made = factorize(model, ratio=0.4, include="*", allocate=again)
    assert [row.price for row in made.rows] == [row.price for row in plan.rows]


def test_prices_of_other_weights_are_refused():
    """A plan that has none, one of another model, and one in which names have other shapes."""
    model, small = _spectral(0.8, 0.9, 0.95), _spectral(0.8)
    narrow = nn.Sequential(*(nn.Linear(12, 12) for _ in model))
    measured = {"ratio": 0.5, "include": "*", "allocate": "sensitivity"}
    plans = [
        plan_ranks(one, **measured, evaluate=lambda now: float(now[0].weight.detach().norm()))
        for one in (small, narrow)
    ]
    for other in (*plans, plan_ranks(model, ratio=0.5)):
        with pytest.raises(ValueError, match=r"weight: expected allocate= to be a plan by 'sens"):
            factorize(model, ratio=0.5, include="*", allocate=other)
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.parametrize("calibrated", [False, True])
def test_prices_of_another_energy_are_refused(calibrated):
    """That of the weights is no price of that of the outputs; the same one is taken."""
    model = _spectral(0.8, 0.9, 0.95)
    inits = ["spectral", calibrate(model, [torch.randn(64, 24)])][:: -1 if calibrated else 1]
    options = {"ratio": 0.5, "include": "*"}
    measured = {"allocate": "sensitivity", "evaluate": _error_of(model)}
    plan = plan_ranks(model, init=inits[0], **measured, **options)
    again = plan_ranks(model, init=inits[0], allocate=plan, **options)
    assert plan_ranks(model, init=inits[0], allocate=again, **options) == plan
    with pytest.raises(ValueError, match=r"0\.weight: .*energy of (‖W‖²|its outputs).*init="):
        factorize(model, init=inits[1], allocate=again, **options)
    assert isinstance(model[0].weight, nn.Parameter)


def test_prices_are_not_measured_twice_for_what_stays_tied():
    """A copy that is not used is taken out of the plan, which is then made once more."""
    model = _spectral(0.8, 0.9, 0.95)
    model[2].weight = model[0].weight
    calls = []

    def evaluate(now):
        calls.append(now)
        return sum(k * float(p.detach().square().sum()) for k, p in enumerate(now.parameters()))

    plan = plan_ranks(model, ratio=0.96, on_tied="untie", allocate="sensitivity", evaluate=evaluate)
    assert any("stays tied" in (row.reason or "") for row in plan.rows)
    assert len(calls) <= 1 + 3 * len(model)


@pytest.mark.parametrize("allocate", [*ALLOCATORS])
def test_a_tolerance_is_kept_and_not_much_more(allocate):
    """The factorized model's own loss is within it; that of a smaller one is not."""
    model = _spectral(0.6, 0.7, 0.8)
    evaluate = _error_of(model)
    options = {"allocate": allocate, "evaluate": evaluate, "include": "*"}
    plan = factorize(model, tolerance=0.1, **options)
    assert evaluate(merge(model)) <= 1.1
    assert plan.ratio < 0.9
    fresh = _spectral(0.6, 0.7, 0.8)
    factorize(fresh, ratio=plan.ratio - 0.1, **{**options, "evaluate": None}
              if not ALLOCATORS[allocate].measures else options, )  # fmt: skip
    assert evaluate(merge(fresh)) > 1.1


def test_a_tolerance_that_cannot_be_kept():
    """Says how far it is, and leaves the weights alone."""
    model = _spectral(1.0, 1.0, 1.0)
    before = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(
        ValueError,
        match=r"tolerance=1e-06 cannot be met: evaluate gives 1 for.*\(of 0, no share is\)",
    ):
        factorize(model, tolerance=1e-6, evaluate=_error_of(model))
    assert all(torch.equal(x.weight, w) for x, w in zip(model, before, strict=True))


BAD = {
    "unknown": ({"ratio": 0.5, "allocate": "best"}, ValueError, "one of .*'energy'.*got 'best'"),
    "no budget": ({"rank": 2, "allocate": "energy"}, ValueError, "ratio= or tolerance=, not rank="),
    "no loss": ({"ratio": 0.5, "allocate": "sensitivity"}, TypeError, "'sensitivity' needs evalua"),
    "no loss for a tolerance": ({"tolerance": 0.1}, TypeError, "tolerance= needs evaluate="),
    "loss for nothing": ({"ratio": 0.5, "evaluate": len}, ValueError, "evaluate= is for"),
    "loss that is none": (
        {"tolerance": 0.1, "evaluate": lambda model: None}, TypeError, "a number.*NoneType"),
    "loss that is NaN": (
        {"tolerance": 0.1, "evaluate": lambda model: float("nan")}, ValueError, "finite.*nan"),
    "two budgets": ({"ratio": 0.5, "tolerance": 0.1}, ValueError, "got ratio= and tolerance="),
    "tensors": (
        {"ratio": 0.5, "allocate": "energy", "parametrization": Tucker}, ValueError, "as a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("act", [factorize, plan_ranks])
@pytest.mark.parametrize("case", BAD)
def test_bad_budgets(act, case):
    """Are refused before anything is changed."""
    arguments, error, message = BAD[case]
    model = nn.Sequential(nn.Linear(24, 24), nn.Conv2d(8, 8, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        act(model, **arguments)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("allocate", ["energy", "sensitivity"])
def test_weights_whose_outputs_never_vary_get_the_least(allocate):
    """They keep all at any rank."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24)])
    x = torch.randn(50, 24)

    def forward(model, batch):
        return model[0](batch) + model[1](torch.ones(5, 24))

    more = {"evaluate": lambda m: float((m[0](x) - 1).square().mean().detach())}
    more = more if ALLOCATORS[allocate].measures else {}
    options = {"include": "*", "allocate": allocate, "init": calibrate(model, [x[:5]] * 9, forward)}
    with torch.no_grad():
        ranks = plan_ranks(model, ratio=0.5, **options, **more).ranks
    assert ranks["1.weight"] < ranks["0.weight"]
    assert sum(ranks.values()) == 12


def _trained(model):
    with torch.no_grad():
        model[0].bias.add_(1)
    return 1.0


def _replaced(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    return 1.0


def _factorized(model):
    factorize(model, rank=2, include="0")
    return 1.0


@pytest.mark.parametrize("evaluate", [_trained, _replaced, _factorized])
@pytest.mark.parametrize("rule", [{"tolerance": 0.5}, {"ratio": 0.5, "allocate": "sensitivity"}])
def test_a_loss_that_changes_the_model_is_refused(rule, evaluate):
    """Two losses of it are not to be compared."""
    with pytest.raises(ValueError, match=r"evaluate\(model\) changed 0\."):
        plan_ranks(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), evaluate=evaluate, **rule)


@pytest.mark.parametrize("rule", [{"tolerance": 0.5}, {"ratio": 0.5, "allocate": "sensitivity"}])
@pytest.mark.parametrize("training", [True, False])
def test_a_loss_leaves_mode_and_buffers(rule, training):
    """It may set the one, as most do, and batch statistics move in the other."""
    layers = nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24), nn.Dropout()
    model, x = nn.Sequential(*layers).train(training), torch.randn(8, 24, generator=seeded(0))
    before = [buffer.clone() for buffer in model.buffers()]

    def evaluate(now):
        now.train()(x)
        return float(now.eval()(x).square().mean().detach())

    plan_ranks(model, evaluate=evaluate, include="*", **rule)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(b, was) for b, was in zip(model.buffers(), before, strict=True))


def test_a_tolerance_that_no_factors_can_use():
    """Of vectors factors have more parameters than the weight."""
    with pytest.raises(ValueError, match="factors make no weight smaller"):
        plan_ranks(nn.Linear(8, 1), tolerance=0.5, evaluate=lambda _: 1.0)


def test_an_error_of_the_loss_restores_the_weights():
    """Whatever it is."""
    model = _spectral(0.5, 0.5)
    before, calls = [layer.weight.detach().clone() for layer in model], []

    def evaluate(now):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        factorize(model, ratio=0.5, allocate="sensitivity", evaluate=evaluate)
    assert all(torch.equal(x.weight, w) for x, w in zip(model, before, strict=True))


@pytest.mark.parametrize("allocate", ["fraction", "uniform"])
def test_tensors_share_a_budget(allocate):
    """Their ranks are fractions of each mode."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3))
    plan = factorize(model, ratio=0.4, include="*", allocate=allocate, parametrization=Tucker)
    assert plan.ratio == pytest.approx(0.4, abs=0.1)


def test_what_is_remarkable_is_remarked():
    """A rank of 1, one above the full rank, an error near 1."""
    model = nn.Sequential(nn.Linear(128, 10), nn.Linear(8, 8), nn.Linear(400, 400))
    plan = factorize(model, rank={"0": 1, "1": 12, "2": 2})
    remarks = [row.remarks for row in plan.rows]
    assert remarks[0] == ("rank 1 of 10",)
    assert remarks[1] == ("rank 12 above the full 8",)
    assert remarks[2][0].startswith("keeps 2 % of ‖W‖²") or remarks[2][0].startswith("keeps 1 %")
    assert all(remark[0] in str(plan) for remark in remarks)


def test_a_calibrated_budget_follows_the_outputs():
    """A weight whose inputs have few directions needs few ranks, whatever its own spectrum."""
    model = _spectral(1.0, 1.0)
    generator = seeded(1)
    few = torch.randn(64, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    inputs = {0: few, 1: torch.randn(64, 24, generator=generator)}
    stats = calibrate(model, [inputs], lambda model, batch: [model[k](batch[k]) for k in batch])
    options = {"include": "*", "allocate": "energy", "init": stats}
    plan = plan_ranks(model, ratio=0.6, **options)
    assert plan.ranks["0.weight"] <= 4
    assert "1.weight" not in plan.ranks or plan.ranks["1.weight"] > 8

    def evaluate(model):
        return 1 + float((model[0](few) - few @ whole.mT).square().mean())

    whole = model[0].weight.detach().clone()
    with torch.no_grad():
        plan = factorize(model, tolerance=1e-3, evaluate=evaluate, **options)
    assert plan.ranks["0.weight"] <= 4
