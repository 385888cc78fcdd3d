"""Norms of one run, replayed in another: the normalized run without decay."""

import copy

import pytest
import torch
from cases import PRODUCTS, seeded
from torch import nn

import frobdecay
from frobdecay.algebra.shifted import Shifted
from frobdecay.diagnostics import Recorder
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product, product_norm
from frobdecay.product.toward import toward

SCALABLE = sorted(set(PRODUCTS) - {"symmetric"})


def model():
    """Two layers and a normalization."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(net, optimizer, after, steps=5):
    """Train on fixed data and call ``after(k)`` behind every step."""
    generator = seeded(1)
    for k in range(steps):
        x = torch.randn(16, 10, generator=generator)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        after(k)


@pytest.mark.covers("C21")
def test_a_run_without_decay_follows_the_norms_of_one_with_it(tmp_path):
    """After every step each product has the recorded norm; the directions are its own."""
    decayed = model()
    frobdecay.factorize(decayed, rank=3)
    free = copy.deepcopy(decayed)
    recorder = Recorder(frobdecay.products(decayed), quantities=["norm"])
    base = torch.optim.SGD(decayed.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(decayed, frobdecay.FrobeniusDecay(base, decayed), lambda k: recorder.step())
    recorder.save(tmp_path / "norms.json")

    replay = Recorder(frobdecay.products(free), quantities=["norm"])
    replay.load(tmp_path / "norms.json")
    seen = Recorder(frobdecay.products(free), quantities=["norm"])

    def after(k):
        replay.replay_(k)
        seen.step()

    train(free, torch.optim.SGD(free.parameters(), lr=0.1, momentum=0.9), after)
    for name, table in recorder.history.items():
        assert seen.history[name]["norm"] == pytest.approx(table["norm"], rel=1e-6)
    weights = [net[0].weight.materialize() for net in (decayed, free)]
    assert not torch.allclose(*weights, rtol=1e-3)


@pytest.mark.covers("C21")
@pytest.mark.parametrize("kind", SCALABLE)
def test_every_kind_of_product_is_scaled_evenly(kind):
    """W is multiplied by one number, all factors by its root."""
    product = PRODUCTS[kind](torch.float64)
    recorder = Recorder(product, quantities=["norm"])
    recorder.step()
    W = product.materialize().detach().clone()
    with torch.no_grad():
        for view in product.views():
            view.mul_(1.7)
    before = [view.detach().clone() for view in product.views()]
    recorder.replay_(0)
    torch.testing.assert_close(product.materialize(), W)
    for view, was in zip(product.views(), before, strict=True):
        torch.testing.assert_close(view, was / 1.7)


@pytest.mark.covers("C21")
def test_norms_alone_are_those_of_a_full_record():
    """The cheap record and the measured one agree."""
    products = [PRODUCTS[kind](torch.float32) for kind in ("pair", "deep")]
    products = [Product(str(k), p.factors, p.scale, p.batch) for k, p in enumerate(products)]
    cheap, full = Recorder(products, quantities=["norm"]), Recorder(products)
    cheap.step()
    full.step()
    for name, table in cheap.history.items():
        assert table["norm"] == pytest.approx(full.history[name]["norm"], rel=1e-6)


def zero_now():
    """A product that has become zero."""
    U, V = torch.ones(3, 1), torch.ones(2, 1)
    recorder = Recorder(Product.of(U, V, name="fc"), quantities=["norm"])
    recorder.step()
    U.zero_()
    return recorder


def unrecorded():
    """No step yet."""
    return Recorder(Product.of(torch.ones(3, 1), torch.ones(2, 1)), quantities=["norm"])


def norms_not_kept():
    """Another quantity."""
    recorder = Recorder(Product.of(torch.ones(3, 1), torch.ones(2, 1)), quantities=["rank"])
    recorder.step()
    return recorder


def frozen():
    """A factor that must not move."""
    factors = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(2, 1), requires_grad=False)
    recorder = Recorder(Product.of(*factors, name="fc"), quantities=["norm"])
    recorder.step()
    return recorder


def twice():
    """One parameter is both factors."""
    recorder = Recorder(PRODUCTS["symmetric"](torch.float32), quantities=["norm"])
    recorder.step()
    return recorder


def recorded(*factors, **options):
    """The norm of one product, of which a factor has changed since."""
    recorder = Recorder(Product("fc", factors, **options), quantities=["norm"])
    recorder.step()
    with torch.no_grad():
        factors[-1].param.mul_(4)
    return recorder


def twice_in_two_ways():
    """One parameter is both factors, once seen turned."""
    layer = nn.Linear(4, 4)
    return recorded(Factor(layer, "weight"), Factor(layer, "weight", "r n -> n r"))


def computed():
    """A weight that is made anew at every look."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return recorded(Factor(normed, "weight"), Factor(nn.Linear(5, 4), "weight", "r n -> n r"))


def beside_a_constant():
    """A sum W₀ + BA, which is not scaled as its factors are."""
    layers = nn.Linear(4, 5), nn.Linear(1, 5), nn.Linear(1, 4)
    return recorded(*(Factor(layer, "weight") for layer in layers), structure=Shifted((1.0,)))


@pytest.mark.covers("C21")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zero_now, "fc: expected norms above 0, got .* and 0.0 now"),
        (unrecorded, "expected a step whose norms were recorded, got 0"),
        (norms_not_kept, "expected a step whose norms were recorded"),
        (frozen, "frozen"),
        (twice, "also a factor of"),
        (twice_in_two_ways, "fc.*also a factor of fc"),
        (computed, "fc .weight. is computed"),
        (beside_a_constant, "fc: expected a product of factors alone, got a shifted one"),
    ],
)
def test_what_cannot_be_replayed_is_refused(make, message):
    """The message names the product; nothing moves."""
    recorder = make()
    before = [p.detach().clone() for product in recorder.products for p in product.params]
    with pytest.raises(ValueError, match=message):
        recorder.replay_(0)
    after = [p for product in recorder.products for p in product.params]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert product_norm(recorder.products[0]).isfinite()


@pytest.mark.parametrize("quantities", [[], ["norms"], "norm"])
def test_unknown_quantities_are_refused(quantities):
    """The message lists those there are."""
    with pytest.raises(ValueError, match="expected quantities to be some of"):
        Recorder(Product.of(torch.ones(3, 1), torch.ones(2, 1)), quantities=quantities)


def test_a_history_of_other_quantities_is_refused():
    """A recorder of norms does not load a full history."""
    product = Product.of(torch.ones(3, 1), torch.ones(2, 1))
    full = Recorder(product)
    full.step()
    with pytest.raises(ValueError, match="make the recorder with these quantities"):
        Recorder(product, quantities=["norm"]).load_state_dict(full.state_dict())


def test_products_may_come_in_another_order():
    """Each goes on with its own history, of which totals leave out what does not depart."""
    plain, other = (Product.of(torch.ones(3, 1), torch.ones(2, 1), name=name) for name in "ab")
    (departing,) = toward([other], "initial")
    recorder = Recorder([plain, departing])
    other.params[0].mul_(3)
    recorder.step()
    again = Recorder([departing, plain])
    again.load_state_dict(recorder.state_dict())
    assert again.total("departure") == recorder.total("departure")
    assert again.history == recorder.history


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state["history"]["b"].clear(), "expected a history of .*norm.*of b"),
        (lambda state: state["history"]["b"]["norm"].append(1.0), "expected 1 numbers of b"),
        (lambda state: state.pop("history"), "expected a recorder's state"),
    ],
    ids=["quantity", "length", "history"],
)
def test_a_damaged_history_is_refused(damage, message):
    """Before anything of it is taken over."""
    pairs = [Product.of(torch.ones(3, 1), torch.ones(2, 1), name=name) for name in "ab"]
    recorder = Recorder(pairs, quantities=["norm"])
    recorder.step()
    state, before = recorder.state_dict(), recorder.state_dict()
    state["next"] = 7
    damage(state)
    with pytest.raises(ValueError, match=message):
        recorder.load_state_dict(state)
    assert recorder.state_dict() == before
