"""Accelerate: FrobeniusDecay through prepare, accumulation, clipping, scaler, save and load."""

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")

import text  # noqa: E402
import zoo  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from optim_cases import assert_identical, values  # noqa: E402

import frobdecay  # noqa: E402
from frobdecay import FrobeniusDecay, split_param_groups  # noqa: E402

OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
}


def cell(column: str, **more) -> pytest.MarkDecorator:
    """A cell of the matrix."""
    return pytest.mark.integration(row="Accelerate", column=column, **more)


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def factorized() -> nn.Module:
    """A small language model, its layers' weights in factors."""
    torch.manual_seed(0)
    model, _ = zoo.llama()
    frobdecay.factorize(model, rank=8, include=["*.mlp.*_proj", "*.self_attn.*_proj"])
    return model.train()


def wrapped(model: nn.Module, name: str = "AdamW", **more) -> FrobeniusDecay:
    """The optimizer over our groups."""
    return FrobeniusDecay(OPTIMIZERS[name](split_param_groups(model, 0.1)), model, **more)


def schedule(optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A falling learning rate."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)


def run(accelerator, model, optimizer, scheduler, steps, *, clip=None) -> list[float]:
    """Train as Accelerate's documentation does."""
    found = []
    for step in steps:
        with accelerator.accumulate(model):
            loss = model(**text.batch(step)).loss
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found


def by_hand(model, optimizer, scheduler, steps, *, pieces=1, clip=None) -> None:
    """The same without Accelerate."""
    for step in steps:
        (model(**text.batch(step)).loss / pieces).backward()
        if (step + 1) % pieces == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def assert_same(one, other) -> None:
    """The same parameters, bit for bit."""
    assert_identical(values(one), values(other))


@pytest.mark.covers("P30", "P41")
@cell("prepare")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_prepare_tracks_it_and_changes_nothing(name):
    """Accelerate holds the wrapper; saving and loading its state before the first step is exact."""
    model = factorized()
    optimizer = wrapped(model, name)
    before = optimizer.state_dict()
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    assert [held.optimizer for held in accelerator._optimizers] == [optimizer]
    assert prepared.param_groups is optimizer.param_groups
    assert_identical(optimizer.state_dict(), before)


@pytest.mark.covers("P30")
@cell("training")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_it_is_the_plain_loop(name, clip):
    """Parameters are the same as without Accelerate, bit for bit, and the loss falls."""
    ours, plain = factorized(), factorized()
    optimizer = wrapped(ours, name)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(ours, optimizer, schedule(optimizer))
    found = run(accelerator, *prepared, range(8), clip=clip)
    reference = wrapped(plain, name)
    by_hand(plain, reference, schedule(reference), range(8), clip=clip)
    assert_same(ours, plain)
    assert found[-1] < found[0]


@cell("accumulation")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation(name):
    """The decay acts when Accelerate steps, not for every piece of a batch."""
    ours, plain = factorized(), factorized()
    optimizer = wrapped(ours, name)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    prepared = accelerator.prepare(ours, optimizer, schedule(optimizer))
    run(accelerator, *prepared, range(6), clip=1.0)
    reference = wrapped(plain, name)
    by_hand(plain, reference, schedule(reference), range(6), pieces=3, clip=1.0)
    assert_same(ours, plain)


@cell("bf16")
def test_bf16():
    """Autocast to bf16: the loss falls, parameters stay float32."""
    model = factorized()
    optimizer = wrapped(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model, optimizer, schedule(optimizer))
    found = run(accelerator, *prepared, range(8))
    assert found[-1] < found[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.covers("P35")
@cell("GradScaler")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_scale_does_not_matter(name):
    """With a scaler, as Accelerate has it for fp16, the steps are the same up to rounding."""
    ours, plain = factorized(), factorized()
    optimizer = wrapped(ours, name)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    prepared = accelerator.prepare(ours, optimizer, schedule(optimizer))
    assert accelerator._optimizers[0].scaler is accelerator.scaler
    for step in range(4):
        accelerator.scaler.scale(ours(**text.batch(step)).loss).backward()
        prepared[1].step()
        prepared[2].step()
        prepared[1].zero_grad()
        assert not prepared[1].step_was_skipped
    reference = wrapped(plain, name)
    by_hand(plain, reference, schedule(reference), range(4))
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@cell("GradScaler")
def test_a_skipped_step_decays_nothing():
    """An overflow leaves everything alone, and Accelerate knows."""
    model = factorized()
    optimizer = wrapped(model)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, prepared = accelerator.prepare(model, optimizer)
    before = values(model)
    accelerator.scaler.scale(model(**text.batch(0)).loss).backward()
    next(model.parameters()).grad[0, 0] = torch.inf
    prepared.step()
    assert prepared.step_was_skipped
    assert_identical(values(model), before)


@cell("save_state, load_state")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_going_on(name, dtype, tmp_path):
    """Save, load into new objects, go on: the same bits, rounding at random included."""

    def prepared() -> tuple:
        _reset()
        model = factorized().to(dtype)
        optimizer = wrapped(model, name)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer, schedule(optimizer))

    whole = prepared()
    run(*whole, range(3))
    whole[0].save_state(str(tmp_path))
    run(*whole, range(3, 6))
    resumed = prepared()
    resumed[0].load_state(str(tmp_path))
    run(*resumed, range(3, 6))
    assert_same(whole[1], resumed[1])


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@cell("wrapped too late", refused=True)
def test_wrapping_what_was_prepared_is_refused():
    """The decay would act on scaled gradients, and for every piece of a batch."""
    model = factorized()
    base = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="wrap the optimizer before it is prepared"):
        FrobeniusDecay(base, model, decay=0.1, mode="coupled")


@pytest.mark.covers("P42")
@cell("schedule-free")
def test_train_and_eval_reach_the_base():
    """Accelerate switches schedule-free optimizers through the wrapper, and leaves others alone."""
    schedulefree = pytest.importorskip("schedulefree")
    model = factorized()
    groups = split_param_groups(model, 0.1)
    optimizer = FrobeniusDecay(schedulefree.SGDScheduleFree(groups, lr=0.1), model)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    prepared.train()
    assert all(group["train_mode"] for group in optimizer.param_groups)
    prepared.eval()
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    Accelerator(cpu=True).prepare(wrapped(model)).train()
