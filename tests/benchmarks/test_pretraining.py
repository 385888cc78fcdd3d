"""Language models from scratch, in miniature: every arm trains, is bounded, and continues."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.experiments.engine import Job, run_one
from benchmarks.experiments.pretraining import (
    PRETRAINING,
    PretrainingProtocol,
    PretrainingTrial,
    factorize,
    narrowed,
)
from benchmarks.experiments.trials import count_parameters
from benchmarks.models.decoder import Decoder

ARMS = PRETRAINING["pretraining"].arms
TEXT = "the quick brown fox jumps over the lazy dog; " * 40


@pytest.fixture
def protocol(tmp_path):
    """A decoder of one layer on one sentence."""
    (tmp_path / "text.txt").write_text(TEXT)
    return PretrainingProtocol(
        data=str(tmp_path / "text.txt"), epochs=2, steps=4, length=8, batch=4, width=16, heads=2,
        layers=1, look=1, level=1, lr=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("key", ARMS)
def test_every_arm_trains_and_keeps_its_bound(key, protocol, tmp_path):
    """‖ΔW‖₂ was looked at in every step; a narrow model has the factorized one's parameters."""
    arm = ARMS[key]
    trial = PretrainingTrial(tmp_path, arm, 0, protocol, key)
    for _ in range(2):
        trial.advance()
    result = trial.result()
    assert result["loss"][1] < result["loss"][0]
    assert len(result["looks"]["moved"]) == 8
    if arm.bound is not None:
        assert max(result["looks"]["moved"]) <= trial.peak * arm.bound * (1 + 1e-4)
    if arm.optimizer == "spectron" and arm.decay == "none":  # which comes on top
        assert max(result["looks"]["moved"]) <= trial.peak * 1.25**2
    assert (result["ratio"] == 1) == (arm.init is None and not arm.narrow)
    assert (result["shrinkage"] > 0) == (arm.decay != "none")


@pytest.mark.parametrize("key", ["bounded", "spectron", "muon"])
def test_a_trial_that_was_cut_continues_bit_for_bit(key, protocol, tmp_path):
    """With both optimizers, the text's generator and what was looked at."""
    arm = ARMS[key]

    def make(out):
        return PretrainingTrial(out, arm, 0, protocol, key)

    whole, cut, again = make(tmp_path), make(tmp_path), make(tmp_path)
    whole.advance()
    whole.advance()
    cut.advance()
    torch.save(cut.state_dict(), tmp_path / "cut.pt")
    again.load_state_dict(torch.load(tmp_path / "cut.pt", weights_only=True))
    again.advance()
    assert json.dumps(again.result()) == json.dumps(whole.result())  # with NaN, which has no lr
    run_one(Job("done", make, about={"arm": key}), tmp_path, 1)
    assert (tmp_path / "done.json").exists()


def test_rates_are_tried_on_both_sides_of_an_arms_own(tmp_path, protocol):
    """Twice and half of it at least, in every preset; of one rank each."""
    for preset in PRETRAINING["pretraining"].presets.values():
        assert {-1, 0, 1} <= {one.level for one in preset.values()}
        assert len({one.rank for one in preset.values()}) == 1
    for level in (-1, 0, 1):
        trial = PretrainingTrial(tmp_path, ARMS["si"], 0, replace(protocol, level=level), "si")
        assert trial.peak == ARMS["si"].peak * 2**level


@pytest.mark.parametrize("preset", PRETRAINING["pretraining"].presets)
def test_a_narrow_model_has_as_many_parameters_and_flops(preset):
    """Of those of the factorized one, to 4 %, in every preset."""
    protocol = next(iter(PRETRAINING["pretraining"].presets[preset].values()))

    def make(width):
        return Decoder(65, width=width, heads=protocol.heads, layers=protocol.layers)

    factorized = factorize(make(protocol.width), protocol.rank, "kaiming")
    sizes, flops = [], []
    for model in (factorized, make(narrowed(protocol, make))):
        sizes.append(count_parameters(model))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, protocol.length, dtype=torch.long))
        flops.append(counter.get_total_flops())
    assert 1 <= sizes[1] / sizes[0] <= 1.04
    assert 1 <= flops[1] / flops[0] <= 1.04


def test_no_position_sees_a_later_one():
    """And each knows its place: rotary embeddings."""
    torch.manual_seed(0)
    model = Decoder(10, width=16, heads=2, layers=2)
    ids = torch.randint(10, (1, 7))
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 10
    scores, others = model(ids), model(other)
    assert torch.equal(scores[:, :-1], others[:, :-1])
    assert not torch.allclose(scores[:, -1], others[:, -1])
    turned = ids[:, [1, 0, *range(2, 7)]]
    assert not torch.allclose(model(turned)[:, -1], scores[:, -1])


def test_no_text_is_said(protocol, tmp_path):
    """With what was looked for."""
    with pytest.raises(FileNotFoundError, match="no text at"):
        PretrainingTrial(tmp_path, ARMS["si"], 0, replace(protocol, data="none.txt"), "si")
