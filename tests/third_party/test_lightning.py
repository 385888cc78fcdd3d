"""Lightning: FrobeniusDecay from configure_optimizers, with all that Trainer does around it."""

import logging
import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")

import text
import zoo
from optim_cases import assert_identical, values

import frobdecay
from frobdecay import FrobeniusDecay, split_param_groups

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
}


EPOCH = 4  # batches


def cell(column: str, **more) -> pytest.MarkDecorator:
    """A cell of the matrix."""
    return pytest.mark.integration(row="Lightning", column=column, **more)


class Model(lightning.LightningModule):
    """A small language model, its layers' weights in factors."""

    def __init__(self, name: str = "AdamW") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, _ = zoo.llama()
        frobdecay.factorize(self.net, rank=8, include=["*.mlp.*_proj", "*.self_attn.*_proj"])
        self.train()
        self.name = name
        self.losses: list[float] = []

    def training_step(self, batch, index):
        """The loss, which is remembered."""
        loss = self.net(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        """Wrapper and schedule."""
        base = OPTIMIZERS[self.name](split_param_groups(self, 0.1))
        optimizer = FrobeniusDecay(base, self)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Manual(Model):
    """Steps both of its optimizers by hand: one for attention, one for the rest."""

    def __init__(self, name: str = "AdamW") -> None:
        super().__init__(name)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        """Both optimizers, one after the other, the second with a closure."""
        first, second = self.optimizers()
        loss = self.net(**batch).loss
        self.manual_backward(loss)
        first.step()
        first.zero_grad()

        def closure():
            second.zero_grad()
            loss = self.net(**batch).loss
            self.manual_backward(loss)
            return loss

        second.step(closure)
        self.losses.append(loss.item())

    def configure_optimizers(self):
        """Each wrapper is given the products that it trains."""
        attention = [p for p in frobdecay.products(self) if "self_attn" in p.name]
        rest = [p for p in frobdecay.products(self) if "self_attn" not in p.name]
        theirs = {id(param) for product in attention for param in product.params}
        groups = [
            {**group, "params": [p for p in group["params"] if (id(p) in theirs) == inside]}
            for inside in (True, False)
            for group in split_param_groups(self, 0.1)
        ]
        for group in groups:
            del group["param_names"]
        half = len(groups) // 2
        return [
            FrobeniusDecay(OPTIMIZERS[self.name]([g for g in part if g["params"]]), products)
            for part, products in ((groups[:half], attention), (groups[half:], rest))
        ]


def fit(model, folder, *, steps: int = 8, checkpoint=None, **more):
    """Train on the CPU without a word; the data come in the same order every time."""
    settings = {
        "max_steps": steps,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
        **more,
    }
    batches = [text.batch(step) for step in range(EPOCH)]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer = lightning.Trainer(**settings)
    trainer.fit(model, data, ckpt_path=checkpoint)
    return trainer


def by_hand(model, *, steps=8, pieces=1, clip=None) -> None:
    """The same without Lightning."""
    made = model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    model.train()
    for step in range(steps * pieces):
        (model.net(**text.batch(step % EPOCH)).loss / pieces).backward()
        if (step + 1) % pieces == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def assert_close(one, other) -> None:
    """The same parameters: the decay comes behind the update when there is a closure."""
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.covers("P37")
@cell("closures")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_plain_loop(name, tmp_path):
    """Lightning always steps with a closure; the parameters are those of the plain loop."""
    ours, plain = Model(name), Model(name)
    trainer = fit(ours, tmp_path)
    by_hand(plain)
    assert_close(ours, plain)
    assert ours.losses[-1] < 0.9 * ours.losses[0]
    assert type(trainer.optimizers[0]) is FrobeniusDecay


@cell("accumulation")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation(name, tmp_path):
    """The decay acts once a step."""
    ours, plain = Model(name), Model(name)
    fit(ours, tmp_path, steps=3, accumulate_grad_batches=2)
    by_hand(plain, steps=3, pieces=2)
    assert_close(ours, plain)


@cell("clipping")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping(name, tmp_path):
    """Lightning clips between backward and step, ahead of the decay."""
    ours, plain = Model(name), Model(name)
    fit(ours, tmp_path, gradient_clip_val=0.1)
    by_hand(plain, clip=0.1)
    assert_close(ours, plain)


@cell("bf16-mixed")
def test_bf16_mixed(tmp_path):
    """Autocast to bf16."""
    model = Model()
    fit(model, tmp_path, precision="bf16-mixed")
    assert model.losses[-1] < 0.9 * model.losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@cell("bf16-true")
def test_bf16_true_resumes(tmp_path):
    """Parameters in bf16: rounding at random goes on where it was."""
    resumes(tmp_path, "SGD", precision="bf16-true")


@pytest.mark.covers("P35")
@cell("16-mixed")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_16_mixed(name, tmp_path):
    """With Lightning's scaler for fp16, made for the CPU, the decay is the plain one's."""
    ours, plain = Model(name), Model(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    fit(ours, tmp_path, steps=4, plugins=[plugin])
    by_hand(plain, steps=4)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        # Of all numbers together: where a gradient is near 0, its sign, which is Adam's step, is
        # decided by the last digit of fp16.
        assert float((mine - theirs).detach().norm() / theirs.detach().norm()) < 3e-2
    assert ours.losses[-1] < ours.losses[0]


@cell("checkpoints")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_going_on(name, tmp_path):
    """Save after four of eight steps, load into new objects, go on: the same bits."""
    resumes(tmp_path, name)


def resumes(folder, name, **more) -> None:
    """Compare eight steps with four, a checkpoint, and four more."""
    whole, half, resumed = Model(name), Model(name), Model(name)
    more |= {"steps": -1}  # whole epochs: it cannot go on in the middle of one
    fit(whole, folder, max_epochs=2, **more)
    fit(half, folder, max_epochs=1, **more).save_checkpoint(folder / "half.ckpt")
    fit(resumed, folder, max_epochs=2, checkpoint=folder / "half.ckpt", **more)
    assert_identical(values(whole), values(resumed))


@cell("two optimizers")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_optimizers_by_hand(name, tmp_path):
    """Manual optimization of disjoint products: as two plain wrappers, and the loss falls."""
    ours, plain = Manual(name), Manual(name)
    fit(ours, tmp_path, steps=16)  # Lightning counts every optimizer's steps
    first, second = plain.configure_optimizers()
    plain.train()
    for step in range(8):
        plain.net(**text.batch(step % EPOCH)).loss.backward()
        first.step()
        first.zero_grad()
        second.zero_grad()
        plain.net(**text.batch(step % EPOCH)).loss.backward()
        second.step()
    assert_close(ours, plain)
    assert ours.losses[-1] < 0.9 * ours.losses[0]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_backbone_that_is_added_has_one_learning_rate(name, tmp_path):
    """By what the page says: ``BackboneFinetuning`` writes it to the last group alone."""
    make = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[name]

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16))
            self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
            frobdecay.factorize(self, rank=4)

        def training_step(self, batch, index):
            return self.head(self.backbone(batch)).square().mean()

        def configure_optimizers(self):
            groups = split_param_groups(self.head, 0.1)
            for group in groups:
                del group["param_names"]
            base = make(groups, lr=0.1, weight_decay=0)
            return FrobeniusDecay(base, self, decay=0.1)

    callback = lightning.pytorch.callbacks.BackboneFinetuning(1, lambda epoch: 0.5)
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(tmp_path),
        callbacks=[callback],
    )
    model = Classifier()
    trainer.fit(model, torch.utils.data.DataLoader(list(torch.randn(4, 8)), batch_size=2))
    groups = trainer.optimizers[0].param_groups
    added = {id(param) for param in model.backbone.parameters()}
    assert {id(param) for param in groups[-1]["params"]} == added
    assert groups[-1]["lr"] == pytest.approx(0.1 * 0.1 * 0.5**2)
    assert (groups[-1]["weight_decay"], groups[-1]["frobenius_decay"]) == (0, 0.1)


@cell("wrapped too late", refused=True)
def test_wrapping_what_lightning_hands_out_is_refused(tmp_path):
    """Inside a training step there is Lightning's optimizer, around which a wrapper is too late."""

    class Late(Manual):
        def training_step(self, batch, index):
            FrobeniusDecay(self.optimizers(), self.net, decay=0.1, mode="coupled")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="wrap the optimizer before it is prepared"):
        fit(Late(), tmp_path)
