"""timm's optimizers as the base: all of its registry, under the names that it gives them."""

from dataclasses import dataclass

import pytest
import torch
from base_decay import RATE, Subject, measure
from optim_cases import assert_identical, values

optim = pytest.importorskip("timm.optim")

import frobdecay  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
    pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'"),
]
NAMES = [name for name in optim.list_optimizers() if not name.startswith(("fused", "bnb"))]


@pytest.fixture(autouse=True)
def _uncompiled():
    """Steps that compile themselves are run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass(frozen=True)
class Case(Subject):
    """An optimizer by timm's name, with the options that the name stands for."""

    dtype = torch.float32

    @property
    def second_order(self) -> bool:
        """Whether it differentiates the gradients."""
        return self.name == "adahessian"

    def build(self, net, decay):
        """Over the factors alone; momentum as timm gives it."""
        factors = [p for p in (net.U, net.V) if p.requires_grad]
        return optim.create_optimizer_v2(
            [{"params": factors, "weight_decay": decay}],
            opt=self.name,
            lr=RATE,
            weight_decay=decay,
            momentum=0.9,
        )


# Decay is lr·λ for these, too, but by an option that says otherwise, or only while lr is constant.
ASKS = ("Adafactor", "Adan", "Kron", "Lamb")


def sweep(column: str) -> list:
    """Parameters for pytest, each a row of the matrix."""
    return [
        pytest.param(
            Case(name), id=name, marks=pytest.mark.integration(row=f"timm {name}", column=column)
        )
        for name in NAMES
    ]


def test_the_registry_is_not_empty():
    """The sweeps run over timm's own registry."""
    assert len(NAMES) > 60


@pytest.mark.parametrize("case", sweep("λ = 0 is the base, bitwise"))
def test_without_decay_the_trajectory_is_the_base_bitwise(case):
    """λ = 0 gives the same parameters and the same state."""
    plain, ours = case.net(frozen=False), case.net(frozen=False)
    base, reference = case.build(ours, 0.0), case.build(plain, 0.0)
    wrapped = frobdecay.FrobeniusDecay(base, ours.product(), decay=0.0, mode="coupled")
    case.train(plain, reference)
    case.train(ours, wrapped)
    assert_identical(values(ours), values(plain))
    assert_identical(list(wrapped.state.values()), list(reference.state.values()))


@pytest.mark.parametrize("case", sweep("λ > 0 decays"))
def test_decay_is_the_bases_own(case):
    """For W = U·I, what auto finds takes the base's steps; it asks where neither kind does."""
    found = measure(case)
    base = case.build(case.net(frozen=True), 0.0)
    corrected = base.param_groups[0].get("corrected_weight_decay")
    if found.auto is None:
        assert not found.kinds or corrected or type(base).__name__ in ASKS
    else:
        assert found.auto in found.kinds
        assert not corrected


@pytest.mark.parametrize("name", ["lookahead_sgd", "lookahead_adamw"])
def test_lookahead_as_the_base(name):
    """Its own wrapper asks for the mode, then is decayed around."""
    case = Case(name)
    net = case.net(frozen=True)
    with pytest.raises(ValueError, match="expected mode="):
        frobdecay.FrobeniusDecay(case.build(net, 1.0), net.product())
    found = measure(case)
    assert found.kinds == {"coupled" if name.endswith("sgd") else "decoupled"}


@pytest.mark.covers("C15")
def test_groups_agree_with_timms():
    """What timm would not decay, split_param_groups does not; the factors are apart."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_weight_decay

    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5)
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    ours = frobdecay.split_param_groups(model, 0.1)
    for λ in (0.0, 0.1):
        mine, other = (
            {id(p) for g in groups if g["weight_decay"] == λ for p in g["params"]}
            for groups in (ours, theirs)
        )
        assert mine == other
    frobdecay.factorize(model, rank=4, include="*.mlp.*")
    *_, factors = frobdecay.split_param_groups(model, 0.1)
    products = frobdecay.products(model)
    assert {id(p) for p in factors["params"]} == {id(p) for w in products for p in w.params}
