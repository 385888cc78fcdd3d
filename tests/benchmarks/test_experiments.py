"""The paper's experiments: trials that continue, tables that say what the trials did."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import frobdecay
from benchmarks.experiments import __main__ as command
from benchmarks.experiments import tables, trials
from benchmarks.experiments.catalogue import EXPERIMENTS, jobs
from benchmarks.experiments.engine import Job, run_all, run_one, share
from benchmarks.experiments.images import (
    DECAYS,
    KINDS,
    ImageArm,
    ImageProtocol,
    ImageTrial,
    _cut_out,
)
from benchmarks.experiments.vision import VISION
from benchmarks.models import DENSE, MODELS, resnet

pytestmark = pytest.mark.slow


def arms():
    """One arm for every way to make weights, for every way to decay them, and for a late start."""
    found, seen = {}, set()
    for name, experiment in VISION.items():
        for key, arm in experiment.arms.items():
            ways = {arm.kind, arm.decay, *(["warm"] if arm.warm and arm.decay != "plain" else [])}
            if not ways <= seen:
                seen |= ways
                found[name, key] = arm
    assert seen == {*KINDS, *DECAYS, "warm"}
    return found


ARMS = arms()


@pytest.fixture
def protocol(monkeypatch):
    """A ResNet of eight layers on the embedded digits."""
    monkeypatch.setitem(MODELS, "tiny", lambda **options: resnet(8, width=8, **options))
    monkeypatch.setitem(DENSE, "tiny", ["conv1", "fc"])
    return ImageProtocol(
        data="digits", model="tiny", ratio=0.5, epochs=4, batch=32, limit=64, cutout=3
    )


def trial(out, arm, protocol, after=None):
    """A trial of one arm; tensors are smaller."""
    if arm.kind in ("tucker", "train"):
        protocol = replace(protocol, ratio=0.13)
    return ImageTrial(out, arm, 0, protocol, "key", after)


def finish(trial):
    """Run a trial to its end."""
    while trial.epoch < trial.epochs:
        trial.advance()
    return trial.result()


@pytest.mark.covers("C25")
@pytest.mark.parametrize(("name", "key"), ARMS)
def test_an_interrupted_trial_ends_in_the_same_result(name, key, tmp_path, protocol):
    """Stopped after three of four epochs, its state written and read again, bit for bit."""
    arm, after = ARMS[name, key], None
    if arm.after:
        finish(trial(tmp_path, VISION[name].arms[arm.after], protocol))
        after = "key"
    whole, first = (trial(tmp_path, arm, protocol, after) for _ in range(2))
    expected = finish(whole)
    for _ in range(3):
        first.advance()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = trial(tmp_path, arm, protocol, after)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.rand(7)  # whatever else happens meanwhile
    assert repr(finish(second)) == repr(expected)  # NaN is not equal to itself
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_epoch_that_validates_best_is_tested(tmp_path, protocol):
    """The later one of equals; its weights and no later ones."""
    one = trial(tmp_path, VISION["compression"].arms["lowrank"], protocol)
    scores, states = iter((50.0, 70.0, 70.0, 60.0)), []
    one.validate = lambda: next(scores)
    while one.epoch < one.epochs:
        one.advance()
        states.append({name: value.clone() for name, value in one.model.state_dict().items()})
    one.result()
    found = one.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in states[2].items())
    assert any(not torch.equal(found[name], value) for name, value in states[3].items())


def test_a_diverged_trial_has_a_result(tmp_path, protocol):
    """Nothing to choose from is no failure of the others."""
    one = trial(tmp_path, VISION["compression"].arms["lowrank"], replace(protocol, epochs=2))
    one.validate = lambda: float("nan")
    assert finish(one)["score"] >= 0


def test_pruned_models_are_not_tested_before_they_are(tmp_path, protocol):
    """However good they were."""
    one = trial(tmp_path, VISION["compression"].arms["pruned"], protocol)
    scores = iter((90.0, 90.0, 10.0, 20.0))
    one.validate = lambda: next(scores)
    assert finish(one)["ratio"] == pytest.approx(protocol.ratio, abs=2e-3)
    assert sum(int((module.weight == 0).sum()) for module, _ in one._inside(one.model))


def test_a_dense_start_is_factorized_with_its_momentum(tmp_path, protocol):
    """After its share of the epochs; U has the momentum of the dense weight times V."""
    one = trial(tmp_path, VISION["warmup"].arms["warmsifd25"], protocol)
    assert one.first_eligible == 1
    one.advance()
    weight = one.model.layer2[0].conv1.weight
    momentum = one.optimizer.state[weight]["momentum_buffer"].clone()
    one._factorize()
    held = one.model.layer2[0].conv1.parametrizations.weight
    V = held.original1.detach()
    found = one.optimizer.state[held.original0]["momentum_buffer"]
    torch.testing.assert_close(found, held[0].matricization.matrix(momentum) @ V)
    assert isinstance(one.optimizer, frobdecay.FrobeniusDecay)
    decays = [group["frobenius_decay"] for group in one.optimizer.param_groups]
    assert decays == [0.0, protocol.weight_decay]
    assert one.kept == pytest.approx(protocol.ratio, abs=0.03)


@pytest.mark.parametrize("kind", ["lowrank", "tucker", "train"])
def test_sizes_are_the_ratio_of_the_dense_model(kind, tmp_path, protocol):
    """Also where the model that is factorized is another one."""
    made = trial(tmp_path, ImageArm(label="", kind=kind, init="spectral"), protocol)
    assert made.kept == pytest.approx(made.protocol.ratio, abs=0.03)
    held = sum(p.numel() for p in made.model.parameters())
    assert held == made.parameters() == round(made.kept * made.dense_parameters)


def test_scales_are_the_ranks_of_the_paper(tmp_path, protocol):
    """By outputs times kernel height where the matrix has fewer columns, too."""
    made = trial(tmp_path, ImageArm(label=""), replace(protocol, scales={"lowrank": 0.4}))
    products = {product.name: product.rank for product in frobdecay.products(made.model)}
    assert products["layer2.0.conv1.weight"] == round(0.4 * 16 * 3)
    over = trial(tmp_path, ImageArm(label="", rank=1.0), protocol)
    products = {product.name: product.rank for product in frobdecay.products(over.model)}
    assert products["layer2.0.conv1.weight"] == 16 * 3  # of a 48 × 24 matrix
    scaled = replace(protocol, scales={"train": 0.5})
    train = trial(tmp_path, ImageArm(label="", kind="train", init="spectral"), scaled)
    (first,) = [p for p in frobdecay.products(train.model) if "layer1.0.conv1" in p.name]
    assert [tuple(factor.shape) for factor in first.params] == [(4, 2), (4, 2, 2), (4, 2)]


def test_a_ratio_that_tensors_cannot_have_is_refused(tmp_path, protocol):
    """With the one that they can."""
    arm = ImageArm(label="", kind="tucker", init="spectral")
    with pytest.raises(ValueError, match=r"expected a ratio below 0\.18"):
        ImageTrial(tmp_path, arm, 0, protocol, "key")


def test_tensors_are_the_pointwise_convolutions(tmp_path, protocol):
    """All of them, and nothing else."""
    made = trial(tmp_path, ImageArm(label="", kind="tucker", init="spectral"), protocol)
    names = [product.name for product in frobdecay.products(made.model)]
    assert len(names) == 6
    assert all(name.endswith("pointwise.weight") for name in names)


def test_over_complete_networks_are_collapsed(tmp_path, protocol):
    """They are tested and counted as the plain network that they are then."""
    arm = VISION["distillation"].arms["wide"]
    one = trial(tmp_path, arm, replace(protocol, epochs=1))
    assert one.kept > 1
    result = finish(one)
    assert result["ratio"] == 1
    assert sum(p.numel() for p in one.model.parameters()) == one.dense_parameters


def test_cutout_leaves_a_square_out():
    """Of its side, where all of it is inside of the image; other pixels stay."""
    images = torch.ones(200, 3, 9, 9)
    _cut_out(images, 3, torch.Generator().manual_seed(0))
    lost = (images == 0).sum((1, 2, 3))
    assert set((lost // 3).tolist()) == {4, 6, 9}  # in a corner, at an edge, inside
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_train_with_channels_last(kind, tmp_path, protocol):
    """The layout of the images is no matter of what is learnt."""
    arm = ImageArm(label="", kind=kind)
    arm = replace(arm, init="spectral") if kind in ("tucker", "train") else arm
    losses = [
        finish(trial(tmp_path, arm, replace(protocol, channels_last=last)))["loss"]
        for last in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_half_precision_and_channels_last_train(tmp_path, protocol):
    """The options of large GPUs, on whatever there is."""
    options = {"precision": "bfloat16", "channels_last": True}
    arm = VISION["compression"].arms["sifd"]
    results = [
        finish(trial(tmp_path, arm, replace(protocol, epochs=2, cutout=0, **each)))
        for each in ({}, options)
    ]
    losses = [result["loss"] for result in results]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_pruning_keeps_as_many_parameters_as_the_ratio(tmp_path, protocol):
    """Half-way, of all but the first convolution and the classifier."""
    pruned = trial(tmp_path, ImageArm(label="pruned", kind="pruned"), protocol)
    for _ in range(pruned.epochs):
        pruned.advance()
    zeros = sum(int((module.weight == 0).sum()) for module, _ in pruned._inside(pruned.model))
    kept = 1 - zeros / pruned.dense_parameters
    assert kept == pytest.approx(protocol.ratio, abs=2e-3)
    assert pruned.result()["ratio"] == pytest.approx(kept, abs=2e-3)


@pytest.mark.covers("C21")
def test_normalized_trials_have_the_norms_of_the_others(tmp_path, protocol):
    """At every step, though nothing decays."""
    arms = VISION["why"].arms
    result = finish(trial(tmp_path, arms["sifd"], protocol))
    replayed = finish(trial(tmp_path, arms["normalized"], protocol, "key"))
    assert replayed["norms"]["norm"] == pytest.approx(result["norms"]["norm"], rel=1e-4)


def test_milestones_and_warmup_set_the_rate(tmp_path, protocol):
    """The first epoch's, the full one, a tenth after half, a hundredth after three quarters."""
    dense = ImageArm(label="dense", kind="dense")
    one = trial(tmp_path, dense, replace(protocol, epochs=8, warmup=0.01))
    rates = []
    for epoch in range(8):
        one.epoch = epoch
        rates.append(one.rate())
    assert rates == pytest.approx([0.01] + [0.1] * 3 + [0.01] * 2 + [0.001] * 2)
    one = trial(tmp_path, VISION["rates"].arms["dense"], replace(protocol, cosine=True))
    rates = []
    for one.steps in range(8):  # 64 images in batches of 32, 4 epochs
        rates.append(one.rate())
    expected = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx(expected)


def test_shrinkage_is_counted_by_steps(tmp_path, protocol):
    """D: the sum of lr·λ / (1 - momentum), and it survives an interruption."""
    protocol = replace(protocol, cosine=True, weight_decay=0.2)
    result = finish(trial(tmp_path, VISION["transfer"].arms["sifd"], protocol))
    assert result["shrinkage"] == pytest.approx(0.2 / 0.1 * 0.05 * 9)  # a cosine's eight steps


@pytest.mark.covers("C25")
@pytest.mark.parametrize(
    ("name", "preset"), [(n, p) for n in EXPERIMENTS for p in EXPERIMENTS[n].presets]
)
def test_every_preset_makes_its_jobs(name, preset):
    """All arms, variants and seeds, each key once; what waits, waits for another job."""
    experiment, found = EXPERIMENTS[name], jobs(name, preset, 3)
    keys = [job.key for job in found]
    assert len(set(keys)) == len(keys)
    places = [
        (job.about["seed"], job.about["arm"], variant)
        for job in found
        for variant in job.about["variants"]
    ]
    variants = experiment.presets[preset]
    arms = [
        (arm, variant)
        for variant in variants
        for arm in experiment.some.get((preset, variant), experiment.arms)
    ]
    assert sorted(places) == sorted((seed, *place) for seed in range(3) for place in arms)
    assert all(set(job.after) <= set(keys) for job in found)
    assert experiment.baseline in experiment.arms
    assert preset == "paper" or preset in experiment.changes
    one = jobs(name, preset, 3, variants=[(first := next(iter(variants)))])
    assert [job.key for job in one] == [job.key for job in found if first in job.about["variants"]]
    with pytest.raises(ValueError, match="has the presets"):
        jobs(name, "huge", 1)
    with pytest.raises(ValueError, match="expected variants among"):
        jobs(name, preset, 1, variants=["huge"])


def test_what_the_script_for_devices_runs_can_be_run():
    """Each word names an experiment, a preset of it and seeds."""
    script = Path(command.__file__).parents[1] / "gpu.sh"
    shown = script.read_text().partition("|| runs=(")[2].partition(")")[0].split()
    assert len(shown) > 5
    for word in shown:
        name, preset, seeds = word.split(":")
        graph = {"graph": True} if preset in ("small", "fashion") and name != "pretraining" else {}
        assert jobs(name, preset, int(seeds), None, device="cuda", **graph), word


@pytest.mark.parametrize("variant", VISION["compression"].presets["small"])
def test_the_table_of_sizes_is_of_the_one_line(variant):
    """``factorize(model, ratio=...)``, as the README calls it, gives the ranks that it measured."""
    experiment = VISION["compression"]
    protocol = experiment.presets["small"][variant]
    ours, theirs = (MODELS[protocol.model](channels=3, classes=10) for _ in range(2))
    frobdecay.factorize(ours, ratio=protocol.ratio)
    KINDS["lowrank"](theirs, experiment.arms["sifd"], protocol)
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_trials_are_shared_between_variants():
    """A dense network is the same at every ratio: trained once, shown in each."""
    found = jobs("compression", "paper", 1)
    dense = [job for job in found if job.about["arm"] == "dense"]
    assert [len(job.about["variants"]) for job in dense] == [3] * 6
    assert all(len(job.about["variants"]) == 1 for job in found if job not in dense)


def test_what_an_arm_is_blind_to_makes_no_difference(tmp_path, protocol):
    """The dense one, to the ratio."""
    arm = VISION["compression"].arms["dense"]
    assert arm.blind == ("ratio", "scales")
    other = replace(protocol, ratio=0.3, scales={"lowrank": 0.1})
    first, second = (finish(trial(tmp_path, arm, each)) for each in (protocol, other))
    assert first == second


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
    todo = [Job("second", waiting, ("first",)), Job("first", Counting)]
    results = run_all(todo, tmp_path, workers=2, progress=False)
    assert [record["score"] for record in results] == [3, 3]
    (tmp_path / "first.json").write_text('{"score": "kept"}')
    again = run_all([Job("first", failing)], tmp_path, progress=False)
    assert again == [{"score": "kept"}]


def test_a_failed_trial_is_named_and_leaves_the_others(tmp_path):
    """With its reason; it can be run again."""
    todo = [Job("bad", failing), Job("later", Counting, ("bad",)), Job("good", Counting)]
    with pytest.raises(RuntimeError, match="bad failed: stopped; later failed: it needs bad"):
        run_all(todo, tmp_path, progress=False)
    assert json.loads((tmp_path / "good.json").read_text())["score"] == 3
    assert not (tmp_path / "later.json").exists()
    assert run_all([Job("bad", Counting)], tmp_path, progress=False)[0]["score"] == 3


def test_a_trial_continues_at_its_checkpoint(tmp_path, monkeypatch):
    """It begins where the last one was cut off."""
    monkeypatch.setattr("benchmarks.experiments.engine.SAVE_EVERY", 0.0)
    with pytest.raises(ArithmeticError):
        run_one(Job("job", lambda out: Counting(out, stop=2)), tmp_path, 1)
    saved = torch.load(tmp_path / "job.pt", weights_only=True)
    assert saved["trial"] == {"epoch": 2}
    run_one(Job("job", lambda out: Counting(out, stop=1)), tmp_path, 1)  # not from the start
    assert json.loads((tmp_path / "job.json").read_text())["score"] == 3
    assert not (tmp_path / "job.pt").exists()


def test_results_of_another_protocol_are_refused(tmp_path, monkeypatch):
    """And checkpoints: nothing is mixed without a word."""
    run_all([Job("job", Counting, about={"settings": {"lr": (1, 2)}})], tmp_path, progress=False)
    again = Job("job", failing, about={"settings": {"lr": (1, 2)}})
    assert run_all([again], tmp_path, progress=False)[0]["score"] == 3
    other = Job("job", Counting, about={"settings": {"lr": (1, 3)}})
    with pytest.raises(ValueError, match=r"job\.json is of another protocol.*\[1, 3\]"):
        run_all([other], tmp_path, progress=False)
    monkeypatch.setattr("benchmarks.experiments.engine.SAVE_EVERY", 0.0)
    with pytest.raises(ArithmeticError):
        run_one(Job("cut", lambda out: Counting(out, stop=2), about={"seed": 0}), tmp_path, 1)
    with pytest.raises(ValueError, match=r"cut\.pt is of another protocol"):
        run_one(Job("cut", Counting, about={"seed": 1}), tmp_path, 1)


def test_what_another_experiment_has_run_is_not_run_again(tmp_path):
    """Of the same settings and seed; not what others come after, which need more of it."""
    here, there = tmp_path / "here", tmp_path / "there"
    about = {"settings": {"lr": (1, 2)}, "seed": 0, "arm": "one"}
    run_all([Job("theirs", Counting, about=about)], there, progress=False)
    ours = {**about, "arm": "other"}
    todo = [
        Job("ours", failing, about=ours),
        Job("another seed", Counting, about={**ours, "seed": 1}),
        Job("untold", Counting),
    ]
    later = [*todo, Job("later", Counting, ("ours",))]
    assert share(later, here, [here, there]) == []
    assert share(todo, here, [here, there]) == ["ours"]
    found = run_all(todo, here, progress=False)
    assert [one.get("arm") for one in found] == ["other", "other", None]
    assert share(todo, here, [here, there]) == []


def loading(out):
    """A trial whose data took a gigabyte to prepare."""
    torch.ones(2**28)
    return Counting(out)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says it so")
def test_peak_memory_is_that_of_the_trial(tmp_path):
    """And not of the process that started it, nor of what loading took."""
    large = torch.ones(2**28)  # 1 GiB
    run_all([Job("small", loading)], tmp_path, progress=False)
    del large
    assert json.loads((tmp_path / "small.json").read_text())["peak_mib"] < 900


@pytest.mark.covers("C25")
def test_summaries_are_paired_by_seed():
    """Mean, standard error, and the difference to the baseline's run of the same seed."""
    records = [
        {
            "variants": ["v"],
            "arm": arm,
            "label": arm,
            "seed": seed,
            "score": score,
            "parameters": 10,
            "ratio": 0.1,
            "seconds": 60.0,
            "peak_mib": 1.0,
            "norms": {},
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
    command.main(["distillation", "--arms", "dense,deepfd", *size, *out])
    path = tmp_path / "distillation-cpu.json"
    text = path.with_suffix(".md").read_text()
    path.with_suffix(".md").unlink()
    command.main(["report", str(path)])
    assert path.with_suffix(".md").read_text() == text
    assert path.with_suffix(".png").exists()
    assert "deep + FD" in text
    assert "Changes to the paper's protocol" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compression", "--arms", "no such"], "expected arms among"),
        (["why", "--arms", "normalized"], "needs sifd"),
        (["compression", "--data", "nowhere.npz"], "no data set at nowhere.npz"),
        (["compression", "--graph", "--data", "digits"], "expected a CUDA device"),
        (["report"], "expected a PATH with report"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    """Before anything has run."""
    with pytest.raises(SystemExit):
        command.main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pruning_leaves_no_graph_behind(tmp_path, protocol):
    """A CUDA graph of the next step is captured on a stream that could not join it."""
    pruned = trial(tmp_path, VISION["compression"].arms["pruned"], protocol)
    pruned._prune()
    weights = [module.weight for module, _ in pruned._inside(pruned.model)]
    assert weights
    assert all(weight.grad_fn is None for weight in weights)


REPLAYED = pytest.mark.parametrize("name", ["dense", "sifd", "warmsifd25", "pruned"])
GRIDS = {**VISION["warmup"].arms, **VISION["compression"].arms}


@pytest.mark.cpu("torch's default device: a protocol names its own")
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@REPLAYED
def test_steps_replayed_from_a_graph_train_as_others(name, tmp_path, protocol):
    """The last batch of an epoch is smaller; weights become others on the way."""
    protocol = replace(protocol, limit=120, device="cuda")
    eager, graph = (
        finish(trial(tmp_path, GRIDS[name], replace(protocol, graph=graph)))
        for graph in (False, True)
    )
    assert graph["loss"] == pytest.approx(eager["loss"], rel=1e-2)


@REPLAYED
def test_a_replayed_step_is_the_step_bit_for_bit(name, tmp_path, protocol, monkeypatch):
    """By something that, as a graph, writes a loss and gradients where those of its capture are."""
    protocol, replayed = replace(protocol, limit=120), []
    eager = finish(trial(tmp_path, GRIDS[name], protocol))
    one = trial(tmp_path, GRIDS[name], protocol)

    def stand_in(run, device):
        for _ in range(4):
            run()
        held = [param for param in one.model.parameters() if param.requires_grad]
        own = [param.grad for param in held]

        def replay():
            with torch.enable_grad():
                run()
            for param, grad in zip(held, own, strict=True):
                grad.copy_(param.grad)
            replayed.append(1)

        return replay

    monkeypatch.setattr(trials, "captured", stand_in)
    one.protocol = replace(protocol, graph=True)
    assert finish(one)["loss"] == eager["loss"]
    assert len(replayed) == 4 * 3  # all but the last batch of each epoch
