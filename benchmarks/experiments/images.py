"""One trial on images: a dense, factorized, tensorized, pruned or over-complete classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

import frobdecay
from benchmarks.data import ImageData, load
from benchmarks.models import DENSE, MODELS
from benchmarks.training import batches, evaluate
from frobdecay.diagnostics import QUANTITIES, Recorder

__all__ = ["DECAYS", "KINDS", "Arm", "ImageTrial", "Protocol"]


@dataclass(frozen=True)
class Arm:
    """A way to make and to decay the weights.

    Attributes:
        label: for tables.
        kind: key in ``KINDS``.
        init: of the factors: "spectral" is SI.
        decay: key in ``DECAYS``.
        rank: fraction of the smaller side in place of the protocol's ratio.
        norms_of: the arm whose norms the decay "normalized" replays.
    """

    label: str
    kind: str = "lowrank"
    init: str = "kaiming"
    decay: str = "plain"
    rank: float | None = None
    norms_of: str | None = None


@dataclass(frozen=True)
class Protocol:
    """What all arms of an experiment have in common.

    Attributes:
        data: source for ``benchmarks.data.load``.
        model: key in ``MODELS``.
        ratio: parameters to keep ÷ all of the dense model's.
        epochs, batch, lr, weight_decay, momentum: of SGD.
        milestones, gamma: fractions of the epochs at which lr is multiplied by gamma.
        warmup: lr of the first epoch, for deep models.
        limit: training images; all unless given.
        device: where to train.
    """

    data: str
    model: str
    ratio: float | None = None
    epochs: int = 200
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float | None = None
    limit: int | None = None
    device: str = "cpu"


Make = Callable[[nn.Module, Arm, Protocol], float]
"""Changes a dense model in place; returns the fraction of the parameters that is left."""


def _dense(model: nn.Module, arm: Arm, protocol: Protocol) -> float:
    return 1.0


def _factorized(parametrization: Callable[..., nn.Module]) -> Make:
    def make(model: nn.Module, arm: Arm, protocol: Protocol) -> float:
        size: dict[str, Any] = {"ratio": protocol.ratio} if arm.rank is None else {"rank": arm.rank}
        plan = frobdecay.factorize(
            model,
            exclude=DENSE[protocol.model],
            parametrization=parametrization,
            init=arm.init,
            **size,
        )
        return plan.ratio

    return make


KINDS: Mapping[str, Make] = {
    "dense": _dense,
    "pruned": _dense,  # becomes sparse half-way, see ImageTrial
    "lowrank": _factorized(frobdecay.LowRank),
    "deep": _factorized(partial(frobdecay.LowRank, depth=1)),
}


DECAYS: Mapping[str, Callable[[float], float] | None] = {
    "plain": lambda kept: 1.0,
    "scaled": lambda kept: kept,
    "none": lambda kept: 0.0,
    "normalized": lambda kept: 0.0,  # and the norms of the Frobenius run, see ImageTrial
    "frobenius": None,
}
"""Weight decay of each factor ÷ λ, from the fraction of kept parameters; None: of the product."""


def _optimizer(
    model: nn.Module, decay: str, protocol: Protocol, kept: float
) -> torch.optim.Optimizer:
    scale, whole = DECAYS[decay], protocol.weight_decay
    factors = {id(p) for product in frobdecay.products(model) for p in product.params}
    inside = [p for p in model.parameters() if id(p) in factors]
    outside = [p for p in model.parameters() if id(p) not in factors]
    groups: list[dict[str, Any]] = [{"params": outside, "weight_decay": whole}]
    if inside:
        rate = whole if scale is None else whole * scale(kept)
        groups.append({"params": inside, "weight_decay": rate})
    base = torch.optim.SGD(groups, protocol.lr, protocol.momentum)
    return base if scale is not None else frobdecay.FrobeniusDecay(base, model)


class ImageTrial:
    """Train one arm from one seed; the dense start and the order of images depend on the seed only.

    Args:
        out: directory with the results of other trials.
        arm: what is special about this one.
        seed: for everything random.
        protocol: everything else.
        key: file name of its recorded norms.
        norms: file name of the norms to replay, for the decay "normalized".
    """

    def __init__(
        self,
        out: Path,
        arm: Arm,
        seed: int,
        protocol: Protocol,
        key: str,
        norms: str | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.out, self.arm, self.seed, self.protocol, self.key = out, arm, seed, protocol, key
        self.data: ImageData = load(protocol.data, limit=protocol.limit).to(protocol.device)
        channels, classes = self.data.train[0].shape[1], self.data.classes
        model = MODELS[protocol.model](channels=channels, classes=classes)
        self.dense_parameters = sum(p.numel() for p in model.parameters())
        self.kept = KINDS[arm.kind](model, arm, protocol)
        self.model = model.to(protocol.device)
        self.optimizer = _optimizer(self.model, arm.decay, protocol, self.kept)
        self.epoch, self.epochs = 0, protocol.epochs
        self.generator = torch.Generator().manual_seed(seed)
        self.products = frobdecay.products(self.model)
        self.recorder = Recorder(self.products) if self.products else None
        self.norms = Recorder(self.products, quantities=["norm"]) if self.products else None
        if arm.decay == "normalized":
            assert self.norms is not None
            assert norms is not None
            self.norms.load(out / f"{norms}.norms")
        self.steps = 0
        self.loss: list[float] = []
        self.accuracy: list[float] = []
        self._record()

    def _record(self) -> None:
        if self.recorder is not None:
            self.recorder.step(self.optimizer)

    def _rate(self) -> float:
        protocol, passed = self.protocol, self.epoch / self.epochs
        if protocol.warmup is not None and self.epoch == 0:
            return protocol.warmup
        return protocol.lr * protocol.gamma ** sum(passed >= m for m in protocol.milestones)

    def advance(self) -> None:
        """Train for one epoch and validate."""
        if self.arm.kind == "pruned" and self.epoch == self.epochs // 2:
            self._prune()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.model.train()
        losses = []
        for images, labels in batches(self.data, self.protocol.batch, self.generator):
            loss = cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self._after_step()
            losses.append(loss.detach())
        self.epoch += 1
        self.loss.append(float(torch.stack(losses).mean()))
        self.accuracy.append(evaluate(self.model, self.data, self.data.val))
        self._record()

    def _after_step(self) -> None:
        """Record the norms for those who replay them, or replay."""
        if self.norms is not None and self.arm.decay == "normalized":
            self.norms.replay_(self.steps)
        elif self.norms is not None and self.arm.decay == "frobenius":
            self.norms.step()
        self.steps += 1

    def _prunable(self) -> list[tuple[nn.Module, str]]:
        dense = DENSE[self.protocol.model]
        return [
            (module, "weight")
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name not in dense
        ]

    def _prune(self) -> None:
        """Keep the largest entries of all weights, as many as the ratio leaves parameters."""
        weights = self._prunable()
        inside = sum(module.weight.numel() for module, _ in weights)
        keep = self.protocol.ratio * self.dense_parameters - (self.dense_parameters - inside)
        amount = 1 - max(keep, 0) / inside
        prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)
        self.kept = 1 - amount * inside / self.dense_parameters
        self.optimizer = _optimizer(self.model, self.arm.decay, self.protocol, self.kept)

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, generators, curves."""
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "kept": self.kept,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "global": torch.get_rng_state(),
            "loss": self.loss,
            "accuracy": self.accuracy,
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
            "norms": None if self.norms is None else self.norms.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the epoch that the state was taken."""
        self.epoch, self.steps = state["epoch"], state["steps"]
        if self.arm.kind == "pruned" and self.epoch > self.epochs // 2:
            self._prune()  # the masks' names; their values follow
        self.kept = state["kept"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global"])
        self.loss, self.accuracy = list(state["loss"]), list(state["accuracy"])
        for recorder, name in ((self.recorder, "recorder"), (self.norms, "norms")):
            if recorder is not None:
                recorder.load_state_dict(state[name])

    def result(self) -> dict[str, Any]:
        """Test accuracy of the last epoch, curves, norms; the norms of every step in a file."""
        if self.norms is not None and self.arm.decay == "frobenius":
            self.norms.save(self.out / f"{self.key}.norms")
        totals = {}
        if self.recorder is not None:
            totals = {quantity: self.recorder.total(quantity) for quantity in QUANTITIES}
        return {
            "score": 100 * evaluate(self.model, self.data, self.data.test),
            "parameters": round(self.kept * self.dense_parameters),
            "ratio": self.kept,
            "loss": self.loss,
            "validation": [100 * value for value in self.accuracy],
            "norms": totals,
        }
