"""The paper's experiments: trials that continue, tables that say what the trials did."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.experiments import __main__ as command
from benchmarks.experiments import tables
from benchmarks.experiments.catalogue import EXPERIMENTS, jobs
from benchmarks.experiments.engine import Job, run_all, run_one
from benchmarks.experiments.images import Arm, ImageTrial, Protocol
from benchmarks.models import DENSE, MODELS, resnet

ARMS = {(name, key): arm for name, e in EXPERIMENTS.items() for key, arm in e.arms.items()}


@pytest.fixture
def protocol(monkeypatch):
    """A ResNet of eight layers on the embedded digits."""
    monkeypatch.setitem(MODELS, "tiny", lambda **options: resnet(8, width=4, **options))
    monkeypatch.setitem(DENSE, "tiny", ["conv1", "fc"])
    return Protocol("digits", "tiny", ratio=0.5, epochs=4, batch=32, limit=64)


def trial(out, arm, protocol, norms=None):
    """A trial of one arm."""
    return ImageTrial(out, arm, 0, protocol, "key", norms)


@pytest.mark.parametrize(("name", "key"), ARMS)
def test_an_interrupted_trial_ends_in_the_same_result(name, key, tmp_path, protocol):
    """Stopped after three of four epochs, its state written and read again, bit for bit."""
    arm, norms = ARMS[name, key], None
    if arm.norms_of:
        source = trial(tmp_path, EXPERIMENTS[name].arms[arm.norms_of], protocol)
        while source.epoch < source.epochs:
            source.advance()
        source.result()
        norms = "key"
    whole, first = (trial(tmp_path, arm, protocol, norms) for _ in range(2))
    while whole.epoch < whole.epochs:
        whole.advance()
    for _ in range(3):
        first.advance()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = trial(tmp_path, arm, protocol, norms)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.rand(7)  # whatever else happens meanwhile
    second.advance()
    assert second.result() == whole.result()
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_pruning_keeps_as_many_parameters_as_the_ratio(tmp_path, protocol):
    """Half-way, of all but the first convolution and the classifier."""
    pruned = trial(tmp_path, Arm("pruned", "pruned"), protocol)
    for _ in range(pruned.epochs):
        pruned.advance()
    zeros = sum(int((module.weight == 0).sum()) for module, _ in pruned._prunable())
    kept = 1 - zeros / pruned.dense_parameters
    assert kept == pytest.approx(protocol.ratio, abs=2e-3)
    assert pruned.result()["ratio"] == pytest.approx(kept, abs=2e-3)


def test_normalized_trials_have_the_norms_of_the_others(tmp_path, protocol):
    """At every step, though nothing decays."""
    arms = EXPERIMENTS["why"].arms
    source = trial(tmp_path, arms["sifd"], protocol)
    for _ in range(source.epochs):
        source.advance()
    result = source.result()
    replayed = trial(tmp_path, arms["normalized"], protocol, "key")
    for _ in range(replayed.epochs):
        replayed.advance()
    norms = replayed.result()["norms"]["norm"]
    assert norms == pytest.approx(result["norms"]["norm"], rel=1e-4)


def test_milestones_and_warmup_set_the_rate(tmp_path, protocol):
    """The first epoch's, the full one, a tenth after half, a hundredth after three quarters."""
    one = trial(tmp_path, Arm("dense", "dense"), replace(protocol, epochs=8, warmup=0.01))
    rates = []
    for epoch in range(8):
        one.epoch = epoch
        rates.append(one._rate())
    assert rates == pytest.approx([0.01] + [0.1] * 3 + [0.01] * 2 + [0.001] * 2)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("preset", ["paper", "cpu", "gpu"])
def test_every_preset_makes_its_jobs(name, preset):
    """All arms, variants and seeds, each key once; what waits, waits for another job."""
    experiment, found = EXPERIMENTS[name], jobs(name, preset, 3, None)
    keys = [job.key for job in found]
    assert len(set(keys)) == len(keys)
    assert len(keys) == 3 * len(experiment.arms) * len(experiment.presets[preset])
    assert all(set(job.after) <= set(keys) for job in found)
    assert experiment.baseline in experiment.arms
    assert preset == "paper" or preset in experiment.changes


class Counting:
    """A trial that counts, and stops where it is told."""

    def __init__(self, out, stop=None, epochs=3):
        self.epoch, self.epochs, self.stop = 0, epochs, stop

    def advance(self):
        """Count, or fail."""
        if self.epoch == self.stop:
            raise ArithmeticError("stopped")
        self.epoch += 1

    def state_dict(self):
        """The count."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        """Continue the count."""
        self.epoch = state["epoch"]

    def result(self):
        """The count."""
        return {"score": self.epoch}


def failing(out):
    """A trial that fails in its second epoch."""
    return Counting(out, stop=1)


def waiting(out):
    """A trial that needs another one's result."""
    assert (out / "first.json").exists()
    return Counting(out)


def test_trials_run_side_by_side_once_and_in_order(tmp_path):
    """Each in its process; results are kept and not run again; what waits comes later."""
    todo = [Job("second", waiting, 3, ("first",)), Job("first", Counting, 3)]
    results = run_all(todo, tmp_path, workers=2, progress=False)
    assert [record["score"] for record in results] == [3, 3]
    (tmp_path / "first.json").write_text('{"score": "kept"}')
    again = run_all([Job("first", failing, 3)], tmp_path, progress=False)
    assert again == [{"score": "kept"}]


def test_a_failed_trial_is_named_and_leaves_the_others(tmp_path):
    """With its reason; it can be run again."""
    with pytest.raises(RuntimeError, match="bad failed: stopped"):
        run_all([Job("good", Counting, 3), Job("bad", failing, 3)], tmp_path, progress=False)
    assert json.loads((tmp_path / "good.json").read_text())["score"] == 3
    assert run_all([Job("bad", Counting, 3)], tmp_path, progress=False)[0]["score"] == 3


def test_a_trial_continues_at_its_checkpoint(tmp_path, monkeypatch):
    """It begins where the last one was cut off."""
    monkeypatch.setattr("benchmarks.experiments.engine.SAVE_EVERY", 0.0)
    with pytest.raises(ArithmeticError):
        run_one(Job("job", lambda out: Counting(out, stop=2), 3), tmp_path, 1)
    saved = torch.load(tmp_path / "job.pt", weights_only=True)
    assert saved["trial"] == {"epoch": 2}
    run_one(Job("job", lambda out: Counting(out, stop=1), 3), tmp_path, 1)  # not from the start
    assert json.loads((tmp_path / "job.json").read_text())["score"] == 3
    assert not (tmp_path / "job.pt").exists()


def test_summaries_are_paired_by_seed():
    """Mean, standard error, and the difference to the baseline's run of the same seed."""
    records = [
        {
            "variant": "v",
            "arm": arm,
            "label": arm,
            "seed": seed,
            "score": score,
            "parameters": 10,
            "ratio": 0.1,
            "seconds": 60.0,
            "peak_mib": 1.0,
        }
        for arm, scores in (("base", (50.0, 60.0)), ("other", (53.0, 61.0)))
        for seed, score in enumerate(scores)
    ]
    base, other = tables.summarize(records, "base")
    assert base.gain is None
    assert other.gain == pytest.approx((2.0, 1.0))
    assert other.score == pytest.approx((57.0, 4.0))


def test_the_command_runs_and_reports_again(tmp_path, capsys):
    """A whole table in miniature; table and picture come anew from the JSON."""
    out = ["--out", str(tmp_path)]
    size = ["--data", "digits", "--limit", "32", "--epochs", "1", "--seeds", "1"]
    command.main(["compression", "--arms", "lowrank,sifd", *size, *out])
    path = tmp_path / "compression-cpu.json"
    text = path.with_suffix(".md").read_text()
    path.with_suffix(".md").unlink()
    command.main(["report", str(path)])
    assert path.with_suffix(".md").read_text() == text
    assert path.with_suffix(".png").exists()
    assert "low-rank + SI & FD" in text
    assert "Changes to the paper's protocol" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compression", "--arms", "no such"], "expected arms among"),
        (["compression", "--data", "nowhere.npz"], "no data set at nowhere.npz"),
        (["report"], "expected a FILE with report"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    """Before anything has run."""
    with pytest.raises(SystemExit):
        command.main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
