"""The experiments' models: parameters, ranks and ratios of the published ones."""

import pytest
import torch

import frobdecay
from benchmarks.models import DENSE, MODELS, LanguageModel, TranslationTransformer

COUNTS = {
    ("resnet20", 10): 269_722,
    ("resnet32x2", 10): 7_427_914,
    ("resnet32x2", 100): 7_451_044,
    ("resnet32x2", 200): 7_476_744,
    ("vgg19", 10): 20_035_018,
    ("vgg19", 100): 20_081_188,
    ("wrn28-10", 10): 36_479_194,
}


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


@pytest.mark.parametrize("name", MODELS)
def test_what_stays_dense_is_named_rightly(name):
    """The first convolution and the classifier, and nothing else."""
    with torch.device("meta"):
        model = MODELS[name]()
    convolutions = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert DENSE[name] == [convolutions[0], "fc"]


def test_ranks_of_the_paper():
    """ResNet-20 at .111 of the output side: ranks 5, 11, 21 by stage, 0.2367 of the parameters."""
    with torch.device("meta"):
        model = MODELS["resnet20"]()
    ranks = {f"layer{k + 1}.*": rank for k, rank in enumerate((5, 11, 21))}
    plan = frobdecay.plan_ranks(model, rank=ranks, exclude=DENSE["resnet20"])
    assert plan.ratio == pytest.approx(0.2367, abs=5e-5)


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
