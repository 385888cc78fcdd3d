"""Language models trained from scratch with all their linear layers factorized.

Arms differ in the optimizer of the layers' weights or factors; embeddings and norms are AdamW's in
all of them. Every arm has a learning rate of its own, doubled and halved by the protocol's
``level``, the best of which is chosen on the validation text; all take as many steps on as many
tokens. Beside the loss the largest ‖W‖₂ and ‖ΔW‖₂ of a step are kept, and by how much the loss
ever jumped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import frobdecay
from benchmarks.experiments.experiment import Claim, Experiment, carried_over
from benchmarks.experiments.text import Running, load_characters
from benchmarks.experiments.trials import Arm, Common, Training, count_parameters
from benchmarks.models.decoder import Decoder

__all__ = ["PRETRAINING", "PretrainingArm", "PretrainingProtocol", "PretrainingTrial"]


@dataclass(frozen=True, kw_only=True)
class PretrainingArm(Arm):
    """What is special about an arm.

    Attributes:
        peak: learning rate at the protocol's level 0, at the peak of the schedule.
        optimizer: of weights or factors: "adamw", "muon" or "spectron".
        init: of the factors, "spectral" or "kaiming"; None for a dense model.
        decay: "plain", of each weight or factor; "frobenius", of the products; or "none".
        bound: ‖ΔW‖₂ of a step at most, in units of the learning rate.
        narrow: whether the dense model is as narrow as to have the factorized one's parameters,
            which are its flops, too; it has up to 4 % more of both.
    """

    peak: float
    optimizer: str = "adamw"
    init: str | None = None
    decay: str = "plain"
    bound: float | None = None
    narrow: bool = False


@dataclass(frozen=True, kw_only=True)
class PretrainingProtocol(Common):
    """What all arms have in common.

    Attributes:
        data: a text file, read by characters.
        level: by how many powers of two an arm's learning rate is larger than its own.
        rank: of the factors ÷ that of the weight.
        steps: of an epoch, after which the model is validated.
        length, batch: characters of a text, texts of a batch.
        warmup: fraction of the steps in which the learning rate rises; then it falls to zero.
        lr: of embeddings and norms.
        width, heads, layers: of the model.
        look: steps from one measurement of ‖W‖₂ and ‖ΔW‖₂ to the next.
    """

    data: str = "tinyshakespeare.txt"
    level: int = 0
    rank: float = 0.25
    epochs: int = 8
    steps: int = 100
    length: int = 64
    batch: int = 24
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float | None = 1.0
    width: int = 128
    heads: int = 4
    layers: int = 4
    look: int = 50


class Several:
    """Optimizers that step together, each with its own learning rate at the peak of a schedule."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.peaks = [[group["lr"] for group in one.param_groups] for one in optimizers]

    def set_rate(self, part: float) -> None:
        """Set every learning rate to a part of its peak."""
        for one, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(one.param_groups, peaks, strict=True):
                group["lr"] = part * peak

    def zero_grad(self) -> None:
        """Reset the gradients of all."""
        for one in self.optimizers:
            one.zero_grad()

    def step(self) -> None:
        """Take a step of each."""
        for one in self.optimizers:
            one.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """That of each."""
        return [one.state_dict() for one in self.optimizers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from there."""
        for one, state in zip(self.optimizers, states, strict=True):
            one.load_state_dict(state)


class PretrainingTrial(Training):
    """Train one arm from one seed; arguments are those of ``Training``."""

    text: Running
    optimizer: Any

    def __init__(
        self,
        out: Path,
        arm: Any,
        seed: int,
        protocol: PretrainingProtocol,
        key: str,
        after: str | None = None,
    ) -> None:
        super().__init__(out, arm, seed, protocol, key, after)
        self.text, self.size = load_characters(
            protocol.data, protocol.limit, device=protocol.device
        )
        self.looks: list[tuple[int, float, float]] = []
        self.lowest, self.spike = float("inf"), 0.0
        self._before: list[Tensor] | None = None
        with torch.device("meta"):
            self.dense_parameters = count_parameters(self.make(protocol.width))
        model = self.make(narrowed(protocol, self.make) if arm.narrow else protocol.width)
        if arm.init is not None:
            factorize(model, protocol.rank, arm.init)
        model.to(protocol.device)
        products = frobdecay.products(model)
        self.weights = products or [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.ready(model, Several(self._optimizers(model, products)), products)  # type: ignore[arg-type]

    @property
    def coefficient(self) -> float:
        """λ; 0 for arms without decay."""
        return 0.0 if self.arm.decay == "none" else float(self.protocol.weight_decay)

    def make(self, width: int) -> Decoder:
        """A dense model."""
        protocol = self.protocol
        return Decoder(self.size, width=width, heads=protocol.heads, layers=protocol.layers)

    def _optimizers(self, model: nn.Module, products: Sequence[Any]) -> list[Any]:
        arm, protocol = self.arm, self.protocol
        rate, decay = self.peak, protocol.weight_decay
        own = [p for name, p in model.named_parameters() if p.ndim == 2 and "tokens" not in name]
        kept = {id(p) for p in own}
        rest = [p for p in model.parameters() if id(p) not in kept]
        others = torch.optim.AdamW(rest, lr=protocol.lr, weight_decay=0.0)
        plain = decay if arm.decay == "plain" else 0.0
        optimizer: torch.optim.Optimizer
        if arm.optimizer == "spectron":
            optimizer = frobdecay.Spectron(products, lr=rate, weight_decay=plain)
        elif arm.optimizer == "muon":
            optimizer = torch.optim.Muon(own, lr=rate, weight_decay=plain)
        else:
            optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=plain)
        if arm.decay == "frobenius" or arm.bound is not None:
            lam = decay if arm.decay == "frobenius" else 0.0
            optimizer = frobdecay.FrobeniusDecay(optimizer, products, decay=lam, bound=arm.bound)
        return [optimizer, others]

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Texts from anywhere, and the next characters."""
        protocol = self.protocol
        text, size = self.text.train, (protocol.steps, protocol.batch, 1)
        starts = torch.randint(len(text) - protocol.length, size, generator=self.generator)
        for places in (starts + torch.arange(protocol.length + 1)).to(text.device):
            window = text[places]
            yield window[:, :-1], window[:, 1:]

    def compute_loss(self, *batch: Tensor) -> Tensor:
        """Cross-entropy of a character, in nats."""
        tokens, targets = batch
        return cross_entropy(self.network(tokens).flatten(0, 1), targets.flatten())

    def rate(self) -> float:
        """That of weights or factors."""
        return self.peak * self._part()

    @property
    def peak(self) -> float:
        """The largest learning rate of weights or factors."""
        return float(self.arm.peak * 2.0**self.protocol.level)

    def _part(self) -> float:
        """Of the peak: rising, then falling, both along straight lines."""
        protocol = self.protocol
        passed = (self.steps + 1) / (protocol.epochs * protocol.steps + 1)
        return max(0.0, min(passed / protocol.warmup, (1 - passed) / (1 - protocol.warmup)))

    def set_rate(self) -> None:
        """And look at the weights where they are to be compared with those after the step."""
        self.optimizer.set_rate(self._part())
        due = self.steps % self.protocol.look == 0
        self._before = [*self._dense()] if due else None

    def _dense(self) -> Iterable[Tensor]:
        for one in self.weights:
            weight = one.weight if isinstance(one, nn.Linear) else one.materialize()
            yield weight.detach().clone()

    def after_step(self) -> None:
        """Measure what the step did to the weights."""
        if self._before is None:
            return
        pairs = [*zip(self._before, self._dense(), strict=True)]
        size, moved = (
            max(map(_largest, matrices))
            for matrices in ([new for _, new in pairs], [new - old for old, new in pairs])
        )
        self.looks.append((self.steps, size, moved))

    def advance(self) -> None:
        """Train for one epoch and validate; then see by how much the loss jumped."""
        super().advance()
        for loss in torch.stack(self.losses).tolist():
            if self.epoch > 1:
                self.spike = max(self.spike, loss - self.lowest)
            self.lowest = min(self.lowest, loss)

    def validate(self) -> float:
        """Cross-entropy of a character, in nats."""
        return self.evaluate("val")

    def test(self) -> dict[str, Any]:
        """Cross-entropy of a character, in nats."""
        columns = zip(("steps", "size", "moved"), zip(*self.looks, strict=True), strict=True)
        looks = {name: list(values) for name, values in columns}
        return {"score": self.evaluate("test"), "spike": self.spike, "looks": looks}

    def evaluate(self, split: str) -> float:
        """Cross-entropy of a character, over all of a split."""
        protocol, total, count = self.protocol, 0.0, 0
        for window in self.text.windows(split, protocol.length + 1, 4 * protocol.batch):
            loss = self.compute_loss(window[:, :-1], window[:, 1:])
            total, count = total + float(loss) * len(window), count + len(window)
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        ours = {"looks": self.looks, "lowest": self.lowest, "spike": self.spike}
        return {**super().state_dict(), **ours}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the epoch at which the state was taken."""
        super().load_state_dict(state)
        self.looks = [tuple(look) for look in state["looks"]]
        self.lowest, self.spike = state["lowest"], state["spike"]

    def _record(self) -> None:
        if self.recorder is not None:
            self.recorder.step()


def _largest(matrix: Tensor) -> float:
    """‖·‖₂, from the smaller Gram, in float64."""
    wide = matrix.cpu().double()
    gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())


def factorize(model: nn.Module, rank: float, init: str) -> nn.Module:
    """All linear layers, in place."""
    frobdecay.factorize(model, rank=rank, include=nn.Linear, init=init)
    return model


def narrowed(protocol: PretrainingProtocol, make: Callable[[int], nn.Module]) -> int:
    """The width of a dense model of about as many parameters as the factorized one."""
    with torch.random.fork_rng():
        wanted = count_parameters(factorize(make(protocol.width), protocol.rank, "kaiming"))
    with torch.device("meta"):
        step = 2 * protocol.heads
        widths = range(step, protocol.width + 1, step)
        return min(widths, key=lambda width: abs(count_parameters(make(width)) - wanted))


_ADAMW, _MUON = 3e-3, 0.02
_ARMS = {
    "dense": PretrainingArm(label="dense, AdamW", peak=_ADAMW, blind=("rank",)),
    "si": PretrainingArm(label="low-rank + SI, AdamW", peak=_ADAMW, init="spectral"),
    "sifd": PretrainingArm(label="SI & FD, AdamW", peak=_ADAMW, init="spectral", decay="frobenius"),
    "bounded": PretrainingArm(
        label="SI & FD, AdamW, bounded",
        peak=6e-3,
        init="spectral",
        decay="frobenius",
        bound=10.0,
    ),
    "spectron": PretrainingArm(
        label="SI, Spectron",
        peak=0.1,
        optimizer="spectron",
        init="spectral",
        decay="none",
    ),
    "spectronfd": PretrainingArm(
        label="SI & FD, Spectron",
        peak=0.1,
        optimizer="spectron",
        init="spectral",
        decay="frobenius",
    ),
    "densemuon": PretrainingArm(label="dense, Muon", peak=_MUON, optimizer="muon", blind=("rank",)),
    "muon": PretrainingArm(
        label="low-rank + SI, Muon", peak=_MUON, optimizer="muon", init="spectral"
    ),
    "muonfd": PretrainingArm(
        label="SI & FD, Muon",
        peak=_MUON,
        optimizer="muon",
        init="spectral",
        decay="frobenius",
    ),
    "narrow": PretrainingArm(
        label="dense of as many parameters and flops, AdamW", peak=_ADAMW, narrow=True
    ),
    "narrowmuon": PretrainingArm(
        label="dense of as many parameters and flops, Muon",
        peak=_MUON,
        optimizer="muon",
        narrow=True,
    ),
    "lowrank": PretrainingArm(label="low-rank, AdamW", peak=_ADAMW, init="kaiming"),
}

_BASE = PretrainingProtocol()
_SMALL = replace(_BASE, width=64)
_LARGE = replace(_BASE, width=192, layers=6, epochs=20)
_DECAYS = (0.1, 0.3, 1.0, 3.0)


def _changes(protocol: PretrainingProtocol) -> str:
    return (
        f"{protocol.layers} layers, width {protocol.width}, rank {protocol.rank:g} of that, "
        f"{protocol.epochs * protocol.steps:,} steps of {protocol.batch}×{protocol.length} "
        "characters of Shakespeare"
    )


def _variants(protocol: PretrainingProtocol, levels: Sequence[int]) -> dict[str, Any]:
    return {f"rate ×{2.0**level:g}": replace(protocol, level=level) for level in levels}


_LEVELS = (0, -1, 1, -2, 2)
_SIZES = {
    "gpu": _BASE,
    "half": replace(_BASE, rank=0.5),
    "small": _SMALL,
    "smallhalf": replace(_SMALL, rank=0.5),
    "large": _LARGE,
}

PRETRAINING = {
    "pretraining": Experiment(
        "Language models from scratch",
        "Factors whose step is bounded in the product are trained as well as the dense weights of "
        "a model of more than twice their size.",
        _ARMS,
        {
            "cpu": _variants(_BASE, _LEVELS[:3]),
            **{preset: _variants(protocol, _LEVELS) for preset, protocol in _SIZES.items()},
        },
        {preset: _changes(protocol) for preset, protocol in [("cpu", _BASE), *_SIZES.items()]},
        PretrainingTrial,
        "test cross-entropy of a character, nats",
        baseline="sifd",
        claims=(
            Claim("the bound helps AdamW on factors", "bounded", "sifd", tuned="own"),
            Claim("Spectron's rule helps more", "spectron", "bounded", tuned="own"),
            Claim("it comes to the dense model, by 0.02", "spectron", "dense", 0.02, tuned="own"),
            Claim("so it does where that is Muon's", "spectron", "densemuon", 0.02, tuned="own"),
            Claim("Muon on the factors is not as good", "spectron", "muon", tuned="own"),
            Claim("and is better than a narrow dense one", "spectron", "narrow", tuned="own"),
            Claim("FD helps Spectron's rule", "spectronfd", "spectron", tuned="own"),
            Claim("FD helps Muon on the factors", "muonfd", "muon", tuned="own"),
            Claim(
                "Muon's factors are better than a narrow dense model by Muon",
                "muon",
                "narrowmuon",
                tuned="own",
            ),
        ),
        along="level",
        reference="dense",
        larger_is_better=False,
        digits=3,
    ),
    "causal": Experiment(
        "λ carried over, language models with AdamW",
        "nothing about it; asked is, of decoupled decay, whether the λ that is best for the dense "
        "network is best for SI & FD, and whether that of plain decay is another.",
        {
            **{key: _ARMS[key] for key in ("dense", "lowrank", "si")},
            "fd": PretrainingArm(label="FD, AdamW", peak=_ADAMW, init="kaiming", decay="frobenius"),
            "sifd": _ARMS["sifd"],
        },
        {"cpu": {f"λ {decay:g}": replace(_SMALL, weight_decay=decay) for decay in _DECAYS}},
        {"cpu": f"{_changes(_SMALL)}, AdamW at {_ADAMW:g}"},
        PretrainingTrial,
        "test cross-entropy of a character, nats",
        claims=[
            *carried_over(0.01, "0.01"),
            Claim("FD alone is below plain low-rank there", "lowrank", "fd", tuned="own"),
        ],
        along="weight_decay",
        larger_is_better=False,
        digits=3,
    ),
}
