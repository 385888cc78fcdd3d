"""transformers' Trainer: FrobeniusDecay by every way in, and what Trainer does around it."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

import text  # noqa: E402
import zoo  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import frobdecay  # noqa: E402
from frobdecay import FrobeniusDecay, FrobeniusDecayFactory, split_param_groups  # noqa: E402

EXAMPLES = text.examples()


def cell(column: str, **more) -> pytest.MarkDecorator:
    """A cell of the matrix."""
    return pytest.mark.integration(row="transformers.Trainer", column=column, **more)


def factorized() -> torch.nn.Module:
    """A small language model, its layers' weights in factors."""
    torch.manual_seed(0)
    model, _ = zoo.llama()
    frobdecay.factorize(model, rank=8, include=["*.mlp.*_proj", "*.self_attn.*_proj"])
    return model


def arguments(folder, **more) -> TrainingArguments:
    """Short runs on the CPU that report to nobody."""
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **more,
    }
    return TrainingArguments(output_dir=str(folder), **settings)


def by_factory(model, args) -> Trainer:
    """One line, everything from the training arguments."""
    return Trainer(
        model,
        args,
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES[:8],
        optimizer_cls_and_kwargs=(FrobeniusDecayFactory, {"args": args}),
    )


def by_object(model, args) -> Trainer:
    """The optimizer made before, from our groups; Trainer makes the schedule on it."""
    base = torch.optim.AdamW(
        split_param_groups(model, args.weight_decay), lr=args.learning_rate, fused=True
    )
    return Trainer(
        model, args, train_dataset=EXAMPLES, optimizers=(FrobeniusDecay(base, model), None)
    )


def by_subclass(model, args) -> Trainer:
    """Trainer's own groups, in which every factor has a weight decay, and its own optimizer."""

    class Ours(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = FrobeniusDecay(super().create_optimizer(), self.model)
            return self.optimizer

    return Ours(model, args, train_dataset=EXAMPLES)


WAYS = [
    pytest.param(by_factory, marks=cell("optimizer factory")),
    pytest.param(by_object, marks=cell("optimizers=")),
    pytest.param(by_subclass, marks=cell("create_optimizer")),
]


def wrapper(trainer) -> FrobeniusDecay:
    """The optimizer that Trainer was given, behind Accelerate's."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def losses(trainer) -> list[float]:
    """The logged ones."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model) -> dict:
    """Copies."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other) -> None:
    """The same parameters, bit for bit."""
    mine, theirs = parameters(one), parameters(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.covers("D5", "P46")
@pytest.mark.parametrize("make", WAYS)
def test_it_trains_and_no_factor_decays_twice(make, tmp_path):
    """The loss falls; factors have λ and no weight decay, dense matrices have theirs."""
    model = factorized()
    trainer = make(model, arguments(tmp_path))
    trainer.train()
    optimizer = wrapper(trainer)
    assert isinstance(optimizer, FrobeniusDecay)
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    factors = {id(p) for product in frobdecay.products(model) for p in product.params}
    assert factors
    for group in optimizer.param_groups:
        inside = {id(p) in factors for p in group["params"]}
        if True in inside:
            assert inside == {True}
            assert (group["weight_decay"], group["frobenius_decay"]) == (0.0, 0.1)
        else:
            assert group["frobenius_decay"] == 0.0
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}


@pytest.mark.covers("P46")
def test_all_ways_are_the_same(tmp_path):
    """Factory, object and subclass end with the same parameters, bit for bit."""
    models = []
    for way in (by_factory, by_object, by_subclass):
        models.append(factorized())
        way(models[-1], arguments(tmp_path)).train()
    assert_same(models[0], models[1])
    assert_same(models[0], models[2])


@pytest.mark.covers("P36")
def test_the_default_optimizer_is_fused(tmp_path):
    """What Trainer takes by default reaches the base."""
    trainer = by_factory(factorized(), arguments(tmp_path))
    base = trainer.create_optimizer().optimizer
    assert type(base) is torch.optim.AdamW
    assert base.defaults["fused"]


def test_the_decay_is_what_changes(tmp_path):
    """Without λ the run is another one: the decay reaches the parameters through Trainer."""
    with_decay, without = factorized(), factorized()
    by_factory(with_decay, arguments(tmp_path)).train()
    args = arguments(tmp_path)
    Trainer(
        without,
        args,
        train_dataset=EXAMPLES,
        optimizer_cls_and_kwargs=(FrobeniusDecayFactory, {"args": args, "decay": 0.0}),
    ).train()
    products = zip(frobdecay.products(with_decay), frobdecay.products(without), strict=True)
    for mine, other in products:
        assert frobdecay.product_norm(mine) < frobdecay.product_norm(other)


@cell("resume")
@pytest.mark.parametrize("make", [by_factory, by_object, by_subclass])
def test_resuming_is_going_on(make, tmp_path):
    """Save after four of eight steps, load into new objects, go on: the same bits."""
    whole = factorized()
    make(whole, arguments(tmp_path / "whole")).train()
    saving = arguments(tmp_path / "parts", save_strategy="steps", save_steps=4)
    make(factorized(), saving).train()
    torch.manual_seed(1)
    resumed = factorized()
    make(resumed, arguments(tmp_path / "parts")).train(
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4")
    )
    assert_same(whole, resumed)


@pytest.mark.covers("C13")
@cell("accumulation, clipping")
def test_accumulation_and_clipping(tmp_path):
    """Two halves are one batch: the decay acts once a step, behind the clipping."""
    whole, halves = factorized(), factorized()
    clip = {"max_grad_norm": 0.1, "optim": "sgd", "learning_rate": 0.5}
    by_factory(whole, arguments(tmp_path, per_device_train_batch_size=8, **clip)).train()
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **clip}
    by_factory(halves, arguments(tmp_path, **more)).train()
    mine, theirs = parameters(whole), parameters(halves)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


@cell("bf16")
@pytest.mark.parametrize("make", [by_factory, by_subclass])
def test_bf16(make, tmp_path):
    """Autocast to bf16: the loss falls and factors stay float32."""
    model = factorized()
    trainer = make(model, arguments(tmp_path, bf16=True))
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.covers("P4")
@cell("bf16 parameters")
def test_bf16_parameters_decay_and_resume(tmp_path):
    """Stochastic rounding makes λ act, and its generator is in the checkpoint."""
    more = {"learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    whole, resumed, without = (factorized().bfloat16() for _ in range(3))
    by_factory(whole, arguments(tmp_path / "whole", **more)).train()
    saving = arguments(tmp_path / "parts", save_strategy="steps", save_steps=4, **more)
    by_factory(factorized().bfloat16(), saving).train()
    by_factory(resumed, arguments(tmp_path / "parts", **more)).train(
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4")
    )
    assert_same(whole, resumed)
    idle = by_factory(without, arguments(tmp_path, **{**more, "weight_decay": 0.0}))
    with pytest.warns(UserWarning, match="no product will decay"):
        idle.train()
    assert any(
        not torch.equal(p, q) for p, q in zip(whole.parameters(), without.parameters(), strict=True)
    )


@cell("load_best_model_at_end")
@pytest.mark.filterwarnings("ignore:.*a step of decay is")
def test_the_best_model_comes_back(tmp_path):
    """Its factors are loaded, whichever step they are of."""
    more = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 1.0,  # so that the best is the first
    }
    model = factorized()
    trainer = by_factory(model, arguments(tmp_path, **more))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-8")
    stored = safetensors.load_file(f"{best}/model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    loaded = dict(type(model).from_pretrained(best).named_parameters())  # a folder as any
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters())


@cell("model_init")
def test_model_init(tmp_path):
    """A model made by Trainer gets its optimizer by the factory."""
    args = arguments(tmp_path)
    trainer = Trainer(
        args=args,
        model_init=factorized,
        train_dataset=EXAMPLES,
        optimizer_cls_and_kwargs=(FrobeniusDecayFactory, {"args": args}),
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


OPTIMIZERS = {
    "adamw_torch": "decoupled",
    "sgd": "coupled",
    "adagrad": "coupled",
    "rmsprop": "coupled",
    "adafactor": "decoupled",
    "schedule_free_sgd": "coupled",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=cell(f"optim={n}")) for n in OPTIMIZERS], ids=OPTIMIZERS
)
def test_optimizers_by_name(name, tmp_path):
    """What ``optim=`` offers on a CPU is wrapped in the mode that it has."""
    model = factorized()
    trainer = by_factory(model, arguments(tmp_path, optim=name, learning_rate=1e-2))
    trainer.train()
    assert f"mode: auto ({OPTIMIZERS[name]})" in repr(wrapper(trainer))
    assert losses(trainer)[-1] < losses(trainer)[0]


@cell("optim=schedule_free_adamw", refused=True)
def test_schedule_free_adam_asks_for_the_mode(tmp_path):
    """Its weight decay is neither coupled nor decoupled."""
    trainer = by_factory(factorized(), arguments(tmp_path, optim="schedule_free_adamw"))
    with pytest.raises(ValueError, match="expected mode='coupled' or mode='decoupled'"):
        trainer.train()


@pytest.mark.covers("P45")
@cell("optimizers of the backward pass", refused=True)
def test_layerwise_optimizers_are_refused(tmp_path, monkeypatch):
    """What Trainer prepares for them is recognized: they update in the backward pass."""
    prepared = (torch.optim.AdamW, {"lr": 0.1, "optimizer_dict": {}})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_: prepared))
    with pytest.raises(ValueError, match="updates in the backward pass"):
        by_factory(factorized(), arguments(tmp_path)).train()


@pytest.mark.covers("P20")
@cell("factorized too late", refused=True)
def test_factorizing_after_the_optimizer_is_refused(tmp_path):
    """At the first step the factors are missing from the optimizer, and it says so."""
    model, _ = zoo.llama()
    frobdecay.factorize(model, rank=8, include="*.mlp.up_proj")
    trainer = by_object(model, arguments(tmp_path))
    frobdecay.factorize(model, rank=8, include="*.self_attn.q_proj")
    with pytest.raises(ValueError, match="build the optimizer after factorize"):
        trainer.train()
