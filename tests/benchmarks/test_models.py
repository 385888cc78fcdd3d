"""The experiments' models: parameters, ranks and ratios of the published ones."""

from functools import partial

import pytest
import torch

import frobdecay
from benchmarks.models import (
    DENSE,
    MODELS,
    LanguageModel,
    TranslationTransformer,
    output_ranks,
    separate_,
)

COUNTS = {
    ("resnet20", 10): 269_722,
    ("resnet32x2", 10): 7_427_914,
    ("resnet32x2", 100): 7_451_044,
    ("resnet32x2", 200): 7_476_744,
    ("vgg19", 10): 20_035_018,
    ("vgg19", 100): 20_081_188,
    ("vgg19", 200): 20_132_488,
    ("wrn28-10", 10): 36_479_194,
}


@pytest.mark.covers("C25")
@pytest.mark.parametrize(("name", "classes"), COUNTS)
def test_parameters_are_those_of_the_paper(name, classes):
    """Counted on the meta device."""
    with torch.device("meta"):
        model = MODELS[name](classes=classes)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name, classes]


@pytest.mark.parametrize("name", MODELS)
def test_images_become_scores(name):
    """Shapes at every model's smallest image, without numbers."""
    with torch.device("meta"):
        model, images = MODELS[name](classes=7), torch.empty(2, 3, 32, 32)
    assert model(images).shape == (2, 7)


@pytest.mark.covers("D28")
@pytest.mark.parametrize("name", MODELS)
def test_what_stays_dense_is_named_rightly(name):
    """The first convolution and the classifier, and nothing else."""
    with torch.device("meta"):
        model = MODELS[name]()
    convolutions = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert DENSE[name] == [convolutions[0], "fc"]


RATIOS = [  # model, classes, rank ÷ (outputs · kernel height), parameters left ÷ all
    ("resnet20", 10, 0.037, 0.0871),
    ("resnet20", 10, 0.111, 0.2367),
    ("resnet20", 10, 0.333, 0.6982),
    ("resnet20", 10, 1.0, 2.076),
    ("resnet20", 10, 3.0, 6.21),
    ("resnet20", 10, 9.0, 18.61),
    ("resnet32x2", 10, 0.00879, 0.02021),
    ("resnet32x2", 100, 0.00732, 0.02072),
    ("wrn28-10", 10, 0.00757, 0.01673),
]
SOUGHT = [  # the same, with a ratio that was aimed at and missed by a rounded rank
    ("resnet32x2", 10, 0.02393, 0.05),
    ("resnet32x2", 10, 0.04785, 0.1),
    ("resnet32x2", 100, 0.02197, 0.05),
    ("resnet32x2", 100, 0.04688, 0.1),
    ("resnet32x2", 200, 0.02051, 0.05),
    ("resnet32x2", 200, 0.04541, 0.1),
    ("resnet32x2", 200, 0.06934, 0.15),
    ("vgg19", 10, 0.00928, 0.02),
    ("vgg19", 10, 0.02368, 0.05),
    ("vgg19", 10, 0.04761, 0.1),
    ("vgg19", 100, 0.00830, 0.02),
    ("vgg19", 100, 0.02271, 0.05),
    ("vgg19", 100, 0.04688, 0.1),
    ("vgg19", 200, 0.00708, 0.02),
    ("vgg19", 200, 0.02148, 0.05),
    ("vgg19", 200, 0.04590, 0.1),
    ("wrn28-10", 10, 0.03198, 0.06667),
]


def low_rank(name, classes, scale, **options):
    """The plan at the paper's ranks: a fraction of the output side, outputs times kernel height."""
    with torch.device("meta"):
        model = MODELS[name](classes=classes)
    return frobdecay.plan_ranks(
        model,
        rank=output_ranks(model, scale, DENSE[name]),
        exclude=DENSE[name],
        parametrization=partial(frobdecay.LowRank, **options),
    )


@pytest.mark.covers("C25")
@pytest.mark.parametrize(("name", "classes", "scale", "ratio"), RATIOS)
def test_ratios_are_those_of_the_paper(name, classes, scale, ratio):
    """All of the digits that are known."""
    places = len(str(ratio).partition(".")[2])
    assert round(low_rank(name, classes, scale).ratio, places) == ratio


@pytest.mark.parametrize(("name", "classes", "scale", "ratio"), SOUGHT)
def test_ratios_that_the_paper_aims_at_are_met(name, classes, scale, ratio):
    """As nearly as ranks are whole numbers."""
    assert low_rank(name, classes, scale).ratio == pytest.approx(ratio, rel=0.03)


def test_the_ratio_of_deep_layers_is_that_of_the_paper():
    """With one inner factor at full rank."""
    assert low_rank("resnet20", 10, 1.0, depth=1).ratio == pytest.approx(3.15, abs=5e-3)


def test_ranks_are_those_of_the_paper():
    """By stage of ResNet-20 and of WRN-28-10, whose shortcuts have ranks of their own."""
    assert {row.rank for row in low_rank("resnet20", 10, 0.111).rows} == {5, 11, 21}
    assert {row.rank for row in low_rank("wrn28-10", 10, 0.00757).rows} == {4, 7, 15, 1, 2, 5}
    wide = low_rank("wrn28-10", 10, 0.03198)
    assert {row.rank for row in wide.rows} == {15, 31, 61, 5, 10, 20}


TENSORS = [
    (frobdecay.TensorTrain, 0.234, 607_160),
    (frobdecay.TensorTrain, 0.705, 2_434_702),
    (frobdecay.Tucker, 0.211, 608_501),
    (frobdecay.Tucker, 0.68, 2_444_223),
]


@pytest.mark.covers("C25")
@pytest.mark.parametrize(("kind", "scale", "parameters"), TENSORS)
def test_tensor_networks_have_the_parameters_of_the_paper(kind, scale, parameters):
    """Of WRN-28-10; there a Tucker core is a redundant tensor train, here it is itself."""
    with torch.device("meta"):
        model = MODELS["wrn28-10"]()
    separate_(model, DENSE["wrn28-10"])
    separated = sum(p.numel() for p in model.parameters())
    plan = frobdecay.plan_ranks(
        model, rank=scale, include="*.pointwise", parametrization=partial(kind, pattern="flat")
    )
    redundant = 0
    if kind is frobdecay.Tucker:
        for row in plan.rows:
            p, q, r = row.rank
            bond = min(row.matrix[0], q * r)
            redundant += p * bond + bond * q * r + r * r - p * q * r
    assert round(plan.ratio * separated) + redundant == parameters


def test_translation_ignores_padding_and_the_future():
    """What stands behind a position, or is masked out, does not change its scores."""
    torch.manual_seed(0)
    model = TranslationTransformer(20, 20, width=16, hidden=32, heads=2).eval()
    source, target = torch.randint(20, (2, 6)), torch.randint(20, (2, 5))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = True
    scores = model(source, target, padding)
    other = source.clone()
    other[:, 4:] = 3
    later = target.clone()
    later[:, 3:] = 7
    changed = model(other, later, padding)
    torch.testing.assert_close(changed[:, :3], scores[:, :3])
    assert not torch.allclose(changed[:, 3:], scores[:, 3:])


@pytest.mark.parametrize("causal", [True, False])
def test_language_models_see_what_they_should(causal):
    """A later token changes earlier scores only where the model is not causal."""
    model = LanguageModel(20, width=16, hidden=32, heads=2, layers=2, causal=causal).eval()
    tokens = torch.randint(20, (2, 6))
    later = tokens.clone()
    later[:, 4] = (tokens[:, 4] + 1) % 20
    same = torch.isclose(model(tokens)[:, :4], model(later)[:, :4], atol=1e-5).all()
    assert bool(same) == causal


def test_attention_has_products_and_small_heads_fewer_columns():
    """A query–key and an output–value product in each attention, cross-attention included."""
    model = TranslationTransformer(20, 20, width=16, hidden=32, heads=2, layers=1, size=3)
    found = frobdecay.products(model)
    assert len(found) == 6
    assert {tuple(product.shape) for product in found} == {(2, 16, 16)}
    assert {product.rank for product in found} == {3}
