"""Comparison: errors of layers alone, in place and of the model, on any form of it."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from cases import seeded
from torch import nn

from frobdecay import compare, factorize, merge, unroll


def pair(seed=0):
    """A model, and a deep copy whose first layer is factorized."""
    torch.manual_seed(seed)
    original = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 4))
    model = copy.deepcopy(original)
    factorize(model, rank={"0": 3})
    return model, original


BATCHES = [torch.randn(9, 12, generator=seeded(k)) for k in (1, 2)]


@pytest.mark.parametrize("form", [lambda model: None, merge, unroll])
def test_errors_are_those_of_the_outputs(form):
    """Factorized, merged and unrolled; later layers only pass the first one's error on."""
    model, original = pair()
    form(model)
    found = compare(model, original, BATCHES)
    x = torch.cat(BATCHES)
    with torch.no_grad():
        y, other = original(x), model(x)
        first, second = original[0](x), model[0](x)
    assert found.error == pytest.approx(float((y - other).norm() / y.norm()), rel=1e-5)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(y, other).mean()), rel=1e-5)
    layer = found.layers[0]
    assert layer.name == "0"
    assert layer.alone == pytest.approx(float((first - second).norm() / first.norm()), rel=1e-5)
    assert layer.error == pytest.approx(layer.alone, rel=1e-5)
    assert [row.name for row in found.layers[1:]] == ["2", "3"]
    assert all(row.alone < 1e-6 < row.error for row in found.layers[1:])
    assert not any(m._forward_hooks for one in (model, original) for m in one.modules())


def test_padding_is_not_compared():
    """By the batch's mask, as calibration leaves it out; None compares all rows."""

    class Masked(nn.Sequential):
        def forward(self, x, attention_mask=None):
            return super().forward(x)

    model, original = (Masked(*one) for one in pair())
    x, mask = torch.randn(3, 6, 12, generator=seeded(3)), torch.ones(3, 6).tril(2)
    batch = {"x": x, "attention_mask": mask}
    plain = [{"x": x[mask.bool()]}]
    found, expected = compare(model, original, [batch]), compare(model, original, plain)
    assert (found.error, found.cosine) == pytest.approx((expected.error, expected.cosine))
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert (a.alone, a.error, a.cosine) == pytest.approx((b.alone, b.error, b.cosine), abs=1e-6)
    every, expected = (compare(model, original, [b], mask=None) for b in (batch, {"x": x}))
    assert every.error == pytest.approx(expected.error)
    assert every.error != pytest.approx(found.error, rel=1e-3)


def test_it_prints_and_is_drawn(tmp_path):
    """With what it costs."""
    found = compare(*pair(), BATCHES)
    text = str(found)
    assert "layer" in text
    assert "the model" in text
    assert "MB" in text
    assert found.nbytes[1] < found.nbytes[0]
    assert all(seconds > 0 for seconds in found.seconds)
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "layers.svg")
    assert (tmp_path / "layers.svg").stat().st_size > 1000


def test_what_comes_next_may_write_to_a_layers_outputs():
    """As activations in place do."""
    model, original = pair()
    expected = compare(model, original, BATCHES)
    for one in (model, original):
        one[1] = nn.Hardtanh()
    expected = compare(model, original, BATCHES)
    for one in (model, original):
        one[1].inplace = True
    assert compare(model, original, BATCHES).layers == expected.layers


@pytest.mark.parametrize("compiled", [torch.compile, lambda m, **how: m.compile(**how) or m])
def test_compiled_models_that_ran_are_compared(compiled):
    """Layer by layer."""
    torch._dynamo.reset()
    both = pair()
    expected = compare(*both, BATCHES)
    both = [compiled(one, backend="eager") for one in both]
    with torch.no_grad():
        for one in both:
            one(BATCHES[0])
    assert compare(*both, BATCHES).layers == expected.layers


def test_layers_that_both_models_have_are_not_listed():
    """Nor are those of an equal copy."""
    model, original = pair()
    model[3] = original[3]
    assert [row.name for row in compare(model, original, BATCHES).layers] == ["0", "2"]
    found = compare(original, copy.deepcopy(original), BATCHES)
    assert (found.layers, found.error, found.cosine) == ((), 0, pytest.approx(1))


@pytest.mark.parametrize("same", [lambda m: m, copy.copy, lambda m: nn.Sequential(*m)])
def test_an_original_that_is_the_model_is_refused(same):
    """It was factorized with it, so that nothing is lost."""
    model, _ = pair()
    with pytest.raises(ValueError, match=r"original of its own.*copy\.deepcopy"):
        compare(model, same(model), BATCHES)


@dataclass
class Answer:
    """What some models return."""

    words: list
    scores: torch.Tensor


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: (None, y),
        lambda y: [3, {"scores": y, "more": y * 0}],
        lambda y: Answer(["no tensor"], y),
        lambda y: SimpleNamespace(logits=y),
        lambda y: SimpleNamespace(logits=[y]),
        lambda y: y.square().sum(),
    ],
)
def test_the_first_tensor_that_is_returned_is_compared(answer):
    """In whatever it is."""
    model, original = pair()
    found = compare(model, original, BATCHES, lambda model, batch: answer(model(batch)))
    assert found.layers == compare(model, original, BATCHES).layers
    assert found.error > 0.01


def test_imaginary_parts_are_compared():
    """Complex outputs are twice as many real ones."""

    class Imaginary(nn.Linear):
        def forward(self, x):
            return 1j * super().forward(x)

    original = Imaginary(8, 8)
    model, x = copy.deepcopy(original), torch.randn(10, 8)
    factorize(model, rank=2)
    with torch.no_grad():
        expected = float((model(x) - original(x)).norm() / original(x).norm())
    assert compare(model, original, [x]).error == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_compared_is_refused():
    """By name."""
    model, original = pair()
    with pytest.raises(ValueError, match="empty or exhausted"):
        compare(model, original, [])
    for nothing in (None, 3, (), {}, "text"):
        with pytest.raises(ValueError, match="expected a tensor"):
            compare(model, original, BATCHES, lambda model, batch, nothing=nothing: nothing)
    with pytest.raises(ValueError, match=r"0: expected outputs like \[9, 16\], got"):
        compare(nn.Sequential(nn.Linear(12, 1)), original, BATCHES)

    def halves(one, batch):
        return one[:1](batch) if one is model else one(batch)

    with pytest.raises(ValueError, match="2 ran in the original and not in the model"):
        compare(
            model,
            original,
            BATCHES,
            lambda m, b: halves(m, b) @ torch.ones(halves(m, b).shape[-1], 1),
        )


def test_one_batch_is_refused():
    """It would be taken for as many as it has rows."""
    model, original = pair()
    with pytest.raises(TypeError, match="a loader or a list of batches, got a Tensor"):
        compare(model, original, BATCHES[0])
