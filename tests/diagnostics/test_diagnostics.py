"""Diagnostics: every number against the dense product in float64, the record, the recorder."""

import builtins
import copy
import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import frobdecay
from frobdecay import FrobeniusDecay, Tucker, factorize, products
from frobdecay.diagnostics import QUANTITIES, Measurement, Recorder, measure
from frobdecay.product.product import Product, product_norm
from frobdecay.product.toward import toward

# batch, m, n, ranks along the chain
CHAINS = {
    "pair": ((), 12, 7, (3,)),
    "column": ((), 5, 1, (1,)),
    "full rank": ((), 6, 6, (6,)),
    "wide": ((), 6, 4, (9,)),
    "deep": ((), 10, 8, (4, 4)),
    "deeper, uneven": ((), 10, 8, (5, 3, 4)),
    "heads": ((3,), 9, 8, (2,)),
    "deep heads": ((2, 2), 6, 5, (3, 3)),
}


def chain(batch, m, n, ranks, dtype=torch.float64):
    """Random U, M…, V."""
    inner = [torch.randn(*batch, a, b) for a, b in pairwise(ranks)]
    ends = torch.randn(*batch, m, ranks[0]), torch.randn(*batch, n, ranks[-1])
    return [factor.to(dtype) for factor in (ends[0], *inner, ends[1])]


def dense(factors):
    """W in float64."""
    U, *inner, V = [factor.double() for factor in factors]
    for M in inner:
        U = U @ M
    return U @ V.mT


def near(value, rel=1e-9):
    """Equal to rounding."""
    return pytest.approx(float(value), rel=rel, abs=1e-12)


def conditioned(decades, m=60, n=40, r=10):
    """Factors with entangled columns whose product has a spectrum over so many decades."""
    U = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q
    root = torch.logspace(0, -decades / 2, r, dtype=torch.float64)
    A = torch.randn(r, r, dtype=torch.float64)
    return U * root @ A, V * root @ torch.linalg.inv(A).mT


@pytest.mark.covers("C22")
@pytest.mark.parametrize("case", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_spectrum_is_that_of_the_dense_product(case, dtype):
    """Whatever the factors' dtype, singular values are the float64 dense ones."""
    factors = chain(*CHAINS[case], dtype=dtype)
    want = torch.linalg.svdvals(dense(factors)).cpu()
    got = measure(Product.of(*factors)).products[0].spectrum
    kept = got.shape[-1]
    torch.testing.assert_close(got, want[..., :kept], rtol=1e-9, atol=1e-12)
    assert float(want[..., kept:].abs().sum()) < 1e-10


@pytest.mark.covers("C22")
@pytest.mark.parametrize("case", CHAINS)
def test_numbers_follow_from_the_dense_spectrum(case):
    """Norm, nuclear norm and stable rank read a batch as one block-diagonal matrix."""
    factors = chain(*CHAINS[case])
    sigma = torch.linalg.svdvals(dense(factors))
    record = measure(Product.of(*factors, scale=0.5), lr=0.1).products[0]
    square = sigma.square().sum()
    assert record.norm == near(0.5 * square.sqrt())
    assert record.nuclear == near(0.5 * sigma.sum())
    assert record.stable_rank == near(square / sigma.max() ** 2)
    assert record.rank == int(torch.linalg.matrix_rank(dense(factors)).sum())
    assert record.effective_step == near(0.1 / (0.25 * square))
    assert record.bound == near(0.25 * sum(factor.square().sum() for factor in factors))


@pytest.mark.parametrize("decades", [3, 8, 12])
def test_small_singular_values_survive_ill_conditioning(decades):
    """Relative accuracy of the smallest is the condition's, not its square's."""
    factors = conditioned(decades)
    got = measure(Product.of(*factors)).products[0].spectrum
    want = torch.logspace(0, -decades, 10, dtype=torch.float64, device="cpu")
    torch.testing.assert_close(got, want, rtol=1e-13 * 10**decades, atol=0)


def test_rank_deficient_factors_lower_the_rank():
    """Dead columns are not counted, also in float32."""
    U, V = torch.randn(20, 5), torch.randn(15, 5)
    U[:, 3:] = U[:, :2] @ torch.randn(2, 2)
    assert measure(Product.of(U, V)).products[0].rank == 3


@pytest.mark.covers("C22", "C26")
@given(m=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_bound_holds_and_is_tight_where_balanced(m, n, r, seed):
    """(‖U‖² + ‖V‖²)/2 ≥ ‖W‖_*, equal for balanced factors, whose imbalance is 0 (paper T1)."""
    generator = seeded(seed)
    U = torch.randn(m, r, generator=generator, dtype=torch.float64)
    V = torch.randn(n, r, generator=generator, dtype=torch.float64)
    loose = measure(Product.of(U, V)).products[0]
    assert loose.nuclear <= loose.bound * (1 + 1e-12)
    P, S, Qt = torch.linalg.svd(U @ V.mT, full_matrices=False)
    balanced = measure(Product.of(P * S.sqrt(), Qt.mT * S.sqrt())).products[0]
    assert balanced.nuclear == near(balanced.bound)
    assert balanced.nuclear == near(loose.nuclear, rel=1e-7)
    assert balanced.imbalance < 1e-12


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_gauge_changes_balance_only(scale, seed):
    """(U·a, V/a) has another bound and imbalance and the same product."""
    generator = seeded(seed)
    U = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    V = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    one = measure(Product.of(U, V), lr=1.0).products[0].as_dict()
    other = measure(Product.of(U * scale, V / scale), lr=1.0).products[0].as_dict()
    for quantity in ("norm", "nuclear", "stable_rank", "rank", "effective_step"):
        assert other[quantity] == near(one[quantity], rel=1e-7)


@pytest.mark.covers("C22")
def test_imbalance_looks_at_every_bond_of_a_chain():
    """U M Vᵀ is compared at UᵀU = MMᵀ and MᵀM = VᵀV; the worse one counts."""
    U, M, V = chain((), 9, 7, (3, 4))
    pairs = ((U.mT @ U, M @ M.mT), (M.mT @ M, V.mT @ V))
    want = max((a - b).norm() / (a.norm() + b.norm()) for a, b in pairs)
    assert measure(Product.of(U, M, V)).products[0].imbalance == near(want)


def test_axes_that_are_summed_become_rows():
    """Grouped queries: the heads of one group are further rows of one product."""
    U, V = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    grouped = measure(Product.of(U, V, batch=1)).products[0]
    stacked = measure(Product.of(U.flatten(1, 2), V, batch=1)).products[0]
    assert grouped.as_dict() == pytest.approx(stacked.as_dict())


def test_inner_axes_are_on_the_side_of_v():
    """A Tucker-2 core's spatial axes are columns: o × (k i)."""
    U, core, V = (
        torch.randn(7, 3).double(),
        torch.randn(9, 3, 4).double(),
        torch.randn(6, 4).double(),
    )
    W = torch.einsum("or,krs,is->oki", U, core, V).flatten(1)
    got = measure(Product.of(U, core, V, batch=0)).products[0]
    want = torch.linalg.svdvals(W)[:3].cpu()
    torch.testing.assert_close(got.spectrum, want, rtol=1e-9, atol=1e-12)


def test_no_dense_product_is_formed():
    """A product of 2·10⁵ × 2·10⁵ (160 GB in float32) is measured from its Grams."""
    factor = torch.ones(200_000, 1)
    assert measure(Product.of(factor, factor)).products[0].norm == near(2e5)


def test_factors_and_graph_are_left_alone():
    """Measuring neither changes a parameter nor builds a graph."""
    U, V = (torch.randn(4, 2, requires_grad=True) for _ in range(2))
    before = U.detach().clone()
    assert not measure(Product.of(U, V)).products[0].spectrum.requires_grad
    assert torch.equal(U, before)
    assert U.grad is None


@pytest.mark.covers("P5")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_measures_as_nan(value):
    """NaN or infinity in a factor gives NaN numbers instead of LAPACK's error."""
    U, V = torch.ones(4, 2), torch.ones(3, 2)
    U[0, 0] = value
    good = Product.of(V, V, name="good")
    measured = measure([good, Product.of(U, V, name="bad")], lr=0.1)
    assert math.isnan(measured["bad"].norm)
    assert math.isnan(measured.total("imbalance"))
    assert measured["good"].rank == 1


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_squares_beyond_float32_are_measured(size):
    """Of products of any equation, as of chains."""
    tensors = torch.full((2, 3), size), torch.full((4, 5), size)
    found = measure(Product.of(*tensors, equation="ab,cd->acbd"), lr=0.1)["product"]
    assert found.norm == pytest.approx(120**0.5 * size**2, rel=1e-5)
    assert found.effective_step == pytest.approx(0.1 / found.norm**2)


def test_a_zero_product_has_no_direction():
    """Norm, stable rank, rank and imbalance are 0, the effective step infinite."""
    zero = torch.zeros(4, 2)
    record = measure(Product.of(zero, zero), lr=0.1).products[0]
    assert (record.norm, record.stable_rank, record.rank, record.imbalance) == (0, 0, 0, 0)
    assert record.effective_step == math.inf


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_after_a_schedule_there_is_no_step(size):
    """Of an lr of 0 it is 0, of whatever product."""
    factor = torch.nn.Parameter(torch.full((4, 2), size))
    optimizer = torch.optim.SGD([factor], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1)
    optimizer.step()
    schedule.step()
    measured = measure(Product.of(factor, torch.ones(3, 2)), optimizer)
    assert measured.products[0].effective_step == measured.total("effective_step") == 0


@pytest.fixture
def two():
    """Two products with norms 4 and 2."""
    U = torch.nn.Parameter(torch.ones(2, 1))
    V = torch.nn.Parameter(torch.ones(8, 1))
    P = torch.nn.Parameter(torch.ones(1, 1))
    Q = torch.nn.Parameter(torch.ones(4, 1))
    return [Product.of(U, V, name="a"), Product.of(P, Q, name="b")]


def test_totals_over_the_model(two):
    """Squared norms add, nuclear norms and bounds add, steps average geometrically."""
    measured = measure(two, lr=1.0)
    assert measured.total("norm") == near(20**0.5)
    assert measured.total("nuclear") == near(6)
    assert measured.total("bound") == near(7.5)
    assert measured.total("rank") == 1
    assert measured.total("effective_step") == near((1 / 16 * 1 / 4) ** 0.5)


def test_lr_is_read_off_the_groups_of_an_optimizer(two):
    """Each product takes the mean lr of the groups that hold its factors; tensors count."""
    a, b = (list(product.params) for product in two)
    groups = [{"params": [a[0]], "lr": 0.1}, {"params": [a[1]], "lr": torch.tensor(0.3)}]
    optimizer = torch.optim.SGD([*groups, {"params": b}], lr=1.0)
    measured = measure(two, lr=optimizer)
    assert measured["a"].effective_step == near(0.2 / 16, rel=1e-6)
    assert measured["b"].effective_step == near(1.0 / 4)


@pytest.mark.parametrize("options", [{}, {"lr": None}])
def test_an_optimizer_without_a_learning_rate_is_measured_without(options):
    """Some compute it themselves, as Adafactor of transformers does."""
    factors = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4, 2))]

    class Relative(torch.optim.Optimizer):
        def __init__(self):
            super().__init__(factors, {"weight_decay": 0.1, **options})

    product = Product.of(*factors, name="a")
    optimizer = FrobeniusDecay(Relative(), product, mode="coupled")
    (found,) = measure(product, optimizer)
    assert found.effective_step is None
    assert found.decay_step is None


def test_dict_holds_plain_floats_for_loggers(two):
    """Every value is a Python float, its key a path for TensorBoard's grouping."""
    numbers = measure(two, lr=0.1).as_dict("train")
    assert {type(value) for value in numbers.values()} == {float}
    assert set(numbers) == {f"train/{p}{q}" for p in ("", "a/", "b/") for q in QUANTITIES}


def test_effective_step_is_left_out_where_no_lr_is_known(two):
    """Neither the products' nor the model's dict has a made-up step."""
    assert not [key for key in measure(two).as_dict() if "effective_step" in key]


def test_prints_as_a_table(two):
    """A header, a line for each product, a line for the model; columns align."""
    lines = str(measure(two)).splitlines()
    assert [line.split()[0] for line in lines] == ["product", "a", "b", "all"]
    assert len({len(line) for line in lines}) == 1


def test_what_is_frozen_has_no_step():
    """An optimizer need not hold it; the others are measured with theirs."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    frobdecay.factorize(model, rank=2)
    model[0].requires_grad_(False)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = frobdecay.FrobeniusDecay(torch.optim.SGD(trained, lr=0.1), model, decay=0.1)
    found = measure(frobdecay.products(model), optimizer)
    assert found["0.weight"].effective_step is None
    assert found["1.weight"].effective_step > 0
    Recorder(frobdecay.products(model)).step(optimizer)


def test_a_deep_model_is_a_short_table():
    """Layers that repeat share a line, which says where one of them has diverged."""
    products = [
        Product.of(torch.ones(4, 2) * k, torch.ones(3, 2), name=f"layers.{k}.weight")
        for k in range(1, 15)
    ]
    lines = str(measure(products)).splitlines()
    assert lines[1].split()[:4] == ["layers.{1..14}.weight", "×14", "4×3", "6.93–97"]
    assert len(lines) == 3
    products[3].params[0].data.fill_(torch.nan)
    assert "–-" in str(measure(products)).splitlines()[1]


AIMS = {
    "initial": (nn.Linear(7, 6), None),
    "its dense weight": (nn.Linear(7, 6), "dense"),
    "of Tucker": (nn.Conv2d(4, 5, 3), Tucker),
}


@pytest.mark.parametrize("case", AIMS)
def test_what_decays_toward_a_weight_is_measured_as_what_it_is(case):
    """Norm, spectrum and steps are those of W; how far it is from there is a number more."""
    layer, how = AIMS[case]
    layer, dense = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    factorize(layer, rank=2, **({"parametrization": how} if how is Tucker else {}))
    aim = dense if how == "dense" else "initial"
    found, plain = (products(layer, toward=aim), products(layer))
    before = dense.weight if how == "dense" else layer.weight.materialize().detach()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    distance = float((layer.weight.materialize() - before).detach().norm())
    base = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = FrobeniusDecay(base, found)
    ours, theirs = measure(found, optimizer), measure(plain, optimizer)
    numbers = ours.as_dict()
    assert numbers.pop("frobdecay/departure") == pytest.approx(distance)
    assert numbers.pop("frobdecay/weight/departure") == pytest.approx(distance)
    assert numbers == pytest.approx(theirs.as_dict(), nan_ok=True)
    assert "decay_step" in theirs["weight"].as_dict()
    assert "departure" in str(ours).splitlines()[0]
    assert "departure" not in str(theirs)
    mixed = measure([*found, Product.of(torch.ones(2, 1), torch.ones(3, 1), name="other")])
    assert mixed.total("departure") == pytest.approx(distance)


def test_what_decays_toward_a_weight_is_recorded_and_replayed_as_what_it_is(two):
    """Its departure beside its norm; only the present factors are scaled."""
    found = toward(two, "initial")
    full, norms = Recorder(found), Recorder(found, quantities=["norm"])
    for by in (2.0, 3.0):
        for product in two:
            product.params[0].data.mul_(by)
        full.step()
        norms.step()
    for product in two:
        table = full.history[product.name]
        assert table["norm"] == pytest.approx(norms.history[product.name]["norm"])
        start = table["norm"][0] / 2
        assert table["departure"] == pytest.approx([start, 5 * start])
    kept = [p.clone() for q in found for p in q.structure.halves(q.params)[1]]
    norms.replay_(0)
    for product in two:
        assert product_norm(product).item() == pytest.approx(full.history[product.name]["norm"][0])
    held = [p for q in found for p in q.structure.halves(q.params)[1]]
    assert all(torch.equal(p, q) for p, q in zip(held, kept, strict=True))
    with pytest.raises(ValueError, match="expected quantities to be some of"):
        Recorder(two, quantities=["departure"])


def test_a_product_listed_twice_is_measured_once(two):
    """Under another name, too: the model's totals are those of the model."""
    again = [dataclasses.replace(product, name=f"part.{product.name}") for product in two]
    assert measure([*two, *again]).as_dict() == measure(two).as_dict()
    assert list(Recorder([*two, *again]).history) == [product.name for product in two]


WRONG = {
    "no products": (lambda p: measure([]), ValueError, "factorize the model first"),
    "not products": (lambda p: measure([torch.ones(2, 2)]), TypeError, "expected Product"),
    "two of one name": (
        lambda p: measure([p, Product.of(*p.params[::-1], name="a")]),
        ValueError,
        "'a'",
    ),
    "lr is text": (lambda p: measure(p, lr="0.1"), TypeError, "got str"),
    "lr is a flag": (lambda p: measure(p, lr=True), TypeError, "got bool"),
    "foreign optimizer": (
        lambda p: measure(p, lr=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)),
        ValueError,
        "a: expected an optimizer that holds its factors",
    ),
    "every 0": (lambda p: Recorder(p, every=0), ValueError, "at least 1"),
    "unknown quantity": (lambda p: Recorder(p).total("size"), ValueError, "'size'"),
    "another version": (lambda p: Recorder(p).load_state_dict({}), ValueError, "version 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused(two, case):
    """The error names what was found and what to do."""
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(two[0])


def shrink(recorder, steps, lr=0.1):
    """Halve every factor, recording before each step."""
    for _ in range(steps):
        recorder.step(lr)
        with torch.no_grad():
            for param in (p for product in recorder.products for p in product.params):
                param.mul_(0.5)


def test_recorder_keeps_one_value_a_step(two):
    """The history follows the factors; totals follow the history."""
    recorder = Recorder(two)
    shrink(recorder, 3)
    assert recorder.steps == [0, 1, 2]
    assert recorder.history["a"]["norm"] == pytest.approx([4, 1, 0.25])
    assert recorder.total("nuclear") == pytest.approx([6, 1.5, 0.375])


def test_recorder_measures_where_due(two):
    """every=2 measures steps 0, 2, 4 and returns None between."""
    recorder = Recorder(two, every=2)
    kinds = [type(recorder.step()) for _ in range(5)]
    assert recorder.steps == [0, 2, 4]
    assert kinds == [Measurement, type(None)] * 2 + [Measurement]


@pytest.mark.covers("C22")
def test_resumed_history_is_the_uninterrupted_one(two, tmp_path):
    """state_dict through a weights_only checkpoint, mid-way between two recorded steps."""
    whole = Recorder(two, every=2)
    shrink(whole, 3)
    resumed = Recorder(two, every=2)
    torch.save(whole.state_dict(), tmp_path / "checkpoint.pt")
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for recorder in (whole, whole, resumed, resumed):
        recorder.step(0.1)
    assert resumed.state_dict() == whole.state_dict()


def test_state_is_a_copy(two):
    """A checkpoint taken earlier does not grow with the recorder."""
    recorder = Recorder(two)
    state = recorder.state_dict()
    shrink(recorder, 1)
    assert state["steps"] == []
    assert state["history"]["a"]["norm"] == []


def test_file_holds_the_history_in_strict_json(two, tmp_path):
    """NaN (no lr) and infinity (zero product) survive in a file without JSON's NaN."""
    recorder = Recorder(two)
    recorder.step()
    with torch.no_grad():
        two[0].params[0].zero_()
    recorder.step(lr=0.1)
    recorder.save(tmp_path / "norms.json")
    json.loads((tmp_path / "norms.json").read_text(), parse_constant=pytest.fail)
    loaded = Recorder(two)
    loaded.load(tmp_path / "norms.json")
    assert loaded.steps == [0, 1]
    assert math.isnan(loaded.history["a"]["effective_step"][0])
    assert loaded.history["a"]["effective_step"][1] == math.inf


def test_history_of_other_products_is_refused(two):
    """The error lists the names that differ, and nothing was loaded."""
    recorder = Recorder(two[:1])
    with pytest.raises(ValueError, match=r"\['b'\]"):
        recorder.load_state_dict(Recorder(two).state_dict())
    assert list(recorder.history) == ["a"]


def test_plot_writes_four_panels(two, tmp_path):
    """A PNG with norm, nuclear norm, effective step, stable rank."""
    recorder = Recorder(two)
    shrink(recorder, 3)
    figure = recorder.plot(tmp_path / "norms.png")
    assert len(figure.axes) == 4
    assert all(tick == round(tick) for axes in figure.axes for tick in axes.get_xticks())
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    moving = Recorder(toward(two, "initial"))
    shrink(moving, 3)
    norms, before = (drawn.axes[0].get_lines() for drawn in (moving.plot(), figure))
    assert {line.get_label() for line in norms} == {
        *(line.get_label() for line in before), "a, moved", "b, moved"}  # fmt: skip


def test_plot_without_matplotlib_says_what_to_install(two, monkeypatch):
    """The import is inside plot; recording needs no matplotlib."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        Recorder(two).plot()
