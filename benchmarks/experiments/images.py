"""One trial on images: a dense, factorized, tensorized, pruned or over-complete classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

import frobdecay
from benchmarks.data import ImageData, load
from benchmarks.experiments.trials import Arm, Common, Training, count_parameters
from benchmarks.models import DENSE, MODELS, output_ranks, selected_ratio, separate_
from benchmarks.training import batches, evaluate
from frobdecay.diagnostics import Recorder

__all__ = ["DECAYS", "KINDS", "ImageArm", "ImageProtocol", "ImageTrial"]


@dataclass(frozen=True, kw_only=True)
class ImageArm(Arm):
    """A way to make and to decay the weights.

    Attributes:
        kind: key in ``KINDS``.
        init: of the factors: "spectral" is SI.
        decay: key in ``DECAYS``.
        warm: fraction of the epochs in which the network is trained dense, before it is factorized
            with what its optimizer remembers.
        rank: fraction of the output side (``output_ranks``) in place of the protocol's ratio.
        recorded: whether the norms of every step are kept, for an arm that replays them.
        after: the arm whose norms the decay "normalized" replays.
    """

    kind: str = "lowrank"
    init: str = "kaiming"
    decay: str = "plain"
    warm: float = 0.0
    rank: float | None = None
    recorded: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageProtocol(Common):
    """What all arms of an experiment have in common; by default the paper's for most of them.

    Attributes:
        data: source for ``benchmarks.data.load``.
        model: key in ``MODELS``.
        ratio: parameters to keep ÷ all of the dense model's.
        scales: kind -> the ranks by which the paper comes to that ratio, in place of it: fractions
            of the output side, of tensors those of the modes.
        side: pixels to which images are averaged down; as they are unless given.
        epochs, batch, lr, weight_decay, momentum: of SGD.
        cosine: lr falls along half a cosine, step by step, in place of the milestones.
        milestones, gamma: fractions of the epochs at which lr is multiplied by gamma.
        warmup: lr of the first epoch, for deep models and large batches.
        cutout: side of the square that is cut out of each training image.
        channels_last: memory format of images and kernels.
    """

    model: str
    ratio: float | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 200
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    side: int | None = None
    cosine: bool = False
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float | None = None
    cutout: int = 0
    channels_last: bool = False


Make = Callable[..., float]
"""From (model, arm, protocol): changes a dense model in place, and of kinds of factors also its
optimizer; returns the fraction of the parameters that is left."""


def _dense(model: nn.Module, arm: ImageArm, protocol: ImageProtocol) -> float:
    return 1.0


def _factorized(parametrization: Callable[..., nn.Module]) -> Make:
    def make(
        model: nn.Module,
        arm: ImageArm,
        protocol: ImageProtocol,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> float:
        size: dict[str, Any] = {"include": "*", "exclude": DENSE[protocol.model]}
        scale = protocol.scales.get(arm.kind) if arm.rank is None else arm.rank
        if scale is not None:
            size["rank"] = output_ranks(model, scale, DENSE[protocol.model])
        else:
            assert protocol.ratio is not None
            parameters = protocol.ratio * count_parameters(model)
            size["ratio"] = selected_ratio(model, parameters, **size)
        plan = frobdecay.factorize(
            model,
            parametrization=parametrization,
            init=arm.init,
            optimizer=optimizer,
            **size,
        )
        return plan.ratio

    return make


def _tensorized(parametrization: Callable[..., nn.Module]) -> Make:
    def make(model: nn.Module, arm: ImageArm, protocol: ImageProtocol) -> float:
        dense = count_parameters(model)
        separate_(model, DENSE[protocol.model])
        most = count_parameters(model) / dense
        scale = protocol.scales.get(arm.kind)
        if scale is None and protocol.ratio >= most:
            raise ValueError(f"expected a ratio below {most:.3f}, that of the separated model")
        chosen = {"include": "*.pointwise"}
        kept = scale is None and selected_ratio(model, protocol.ratio * dense, **chosen)
        frobdecay.factorize(
            model,
            **chosen,
            **({"ratio": kept} if scale is None else {"rank": scale}),
            parametrization=parametrization,
            init=arm.init,
        )
        return count_parameters(model) / dense

    return make


KINDS: Mapping[str, Make] = {
    "dense": _dense,
    "pruned": _dense,  # becomes sparse half-way, see ImageTrial
    "lowrank": _factorized(frobdecay.LowRank),
    "deep": _factorized(partial(frobdecay.LowRank, depth=1)),
    "tucker": _tensorized(partial(frobdecay.Tucker, pattern="flat")),
    "train": _tensorized(partial(frobdecay.TensorTrain, pattern="flat")),
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
    model: nn.Module,
    decay: str,
    protocol: ImageProtocol,
    kept: float,
    planned: Sequence[Tensor] = (),
) -> torch.optim.Optimizer:
    scale, whole = DECAYS[decay], protocol.weight_decay
    factors = {id(p) for product in frobdecay.products(model) for p in product.params}
    factors |= {id(weight) for weight in planned}
    inside = [p for p in model.parameters() if id(p) in factors]
    outside = [p for p in model.parameters() if id(p) not in factors]
    groups: list[dict[str, Any]] = [{"params": outside, "weight_decay": whole}]
    if inside:
        rate = whole if scale is None else whole * scale(kept)
        groups.append({"params": inside, "weight_decay": rate})
    base = torch.optim.SGD(groups, protocol.lr, protocol.momentum)
    wrapped = scale is None and not planned
    return frobdecay.FrobeniusDecay(base, model) if wrapped else base


@lru_cache(maxsize=1)
def _load(source: str, limit: int | None, side: int | None) -> ImageData:
    return load(source, limit=limit, side=side)


class ImageTrial(Training):
    """Train one arm from one seed; the dense start and the order of images depend on the seed only.

    Arguments are those of ``Training``; the trial that this one follows gives the norms to replay.
    """

    larger_is_better = True

    @property
    def momentum(self) -> float:  # type: ignore[override]
        """Of SGD, whose decay is coupled."""
        return float(self.protocol.momentum)

    @property
    def coefficient(self) -> float:
        """λ as the arm's decay scales it."""
        scale = DECAYS[self.arm.decay]
        return float(self.protocol.weight_decay) * (1.0 if scale is None else scale(self.kept))

    def __init__(
        self,
        out: Path,
        arm: ImageArm,
        seed: int,
        protocol: ImageProtocol,
        key: str,
        after: str | None = None,
    ) -> None:
        super().__init__(out, arm, seed, protocol, key, after)
        self.data = _load(protocol.data, protocol.limit, protocol.side).to(protocol.device)
        channels, classes = self.data.train[0].shape[1], self.data.classes
        model = MODELS[protocol.model](channels=channels, classes=classes)
        self.dense_parameters = count_parameters(model)
        self.kept = (
            _dense(model, arm, protocol) if arm.warm else KINDS[arm.kind](model, arm, protocol)
        )
        model.to(protocol.device)
        self.layout = torch.channels_last if protocol.channels_last else torch.contiguous_format
        model.to(memory_format=self.layout)  # type: ignore[call-overload]
        products = frobdecay.products(model)
        planned = [module.weight for module, _ in self._inside(model)] if arm.warm else []
        self.ready(model, _optimizer(model, arm.decay, protocol, self.kept, planned), products)
        replayed = arm.decay == "normalized"
        recorded = arm.recorded or replayed
        self.norms = Recorder(products, quantities=["norm"]) if recorded else None
        if replayed:
            assert self.norms is not None
            self.norms.load(out / f"{after}.norms")

    @property
    def first_eligible(self) -> int:  # type: ignore[override]
        """A model that is to be pruned or factorized is not tested before it is."""
        return self.epochs // 2 if self.arm.kind == "pruned" else round(self.arm.warm * self.epochs)

    def rate(self) -> float:
        """The protocol's; but for a cosine the same in all of an epoch."""
        protocol, passed = self.protocol, self.epoch / self.epochs
        if protocol.warmup is not None and self.epoch == 0:
            return float(protocol.warmup)
        if protocol.cosine:
            whole = -(-len(self.data.train[1]) // protocol.batch) * self.epochs
            return float(protocol.lr * 0.5 * (1 + cos(pi * self.steps / whole)))
        return protocol.lr * protocol.gamma ** sum(passed >= m for m in protocol.milestones)

    def advance(self) -> None:
        """Train for one epoch and validate; prune before the second half, factorize when warm."""
        if self.arm.warm and self.epoch == self.first_eligible:
            self._factorize()
        if self.arm.kind == "pruned" and self.epoch == self.epochs // 2:
            self._prune()
        super().advance()

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Augmented images and their labels."""
        for images, labels in batches(self.data, self.protocol.batch, self.generator):
            if self.protocol.cutout:
                _cut_out(images, self.protocol.cutout, self.generator)
            yield images.contiguous(memory_format=self.layout), labels

    def compute_loss(self, *batch: Tensor) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def validate(self) -> float:
        """Accuracy in percent."""
        return 100 * evaluate(self.model, self.data, self.data.val)

    def test(self) -> dict[str, Any]:
        """Accuracy in percent, of over-complete networks collapsed; also writes norms to replay."""
        if self.norms is not None and self.arm.recorded:
            self.norms.save(self.out / f"{self.key}.norms")
        if self.kept > 1:  # over-complete weights have done what they are for
            frobdecay.merge(self.model)
            self.kept = 1.0
        return {"score": 100 * evaluate(self.model, self.data, self.data.test)}

    def parameters(self) -> int:
        """Those that are left."""
        return round(self.kept * self.dense_parameters)

    def after_step(self) -> None:
        """Record the norms for those who replay them, or replay."""
        if self.norms is not None and self.arm.recorded:
            self.norms.step()
        elif self.norms is not None:
            self.norms.replay_(self.steps - 1)

    def _inside(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        """What is pruned or factorized."""
        dense = DENSE[self.protocol.model]
        return [
            (module, "weight")
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name not in dense
        ]

    def _factorize(self) -> None:
        """Go on with factors: of a group of their own, with their momentum."""
        base, self.graph = self.optimizer, None
        self.kept = KINDS[self.arm.kind](self.model, self.arm, self.protocol, base)
        if DECAYS[self.arm.decay] is None:
            self.optimizer = frobdecay.FrobeniusDecay(base, self.model)

    def _prune(self) -> None:
        """Keep the largest entries of all weights, as many as the ratio leaves parameters."""
        weights, self.graph = self._inside(self.model), None
        inside = sum(module.weight.numel() for module, _ in weights)
        keep = self.protocol.ratio * self.dense_parameters - (self.dense_parameters - inside)
        amount = 1 - max(keep, 0) / inside
        self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        with torch.no_grad():  # or it leaves a graph, which a capture on its own stream cannot join
            prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.kept = 1 - amount * inside / self.dense_parameters
        self.optimizer = _optimizer(self.model, self.arm.decay, self.protocol, self.kept)

    def state_dict(self) -> dict[str, Any]:
        """Also the norms of every step, and how much pruning has left."""
        norms = self.norms and self.norms.state_dict()
        return {**super().state_dict(), "kept": self.kept, "norms": norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the epoch at which the state was taken."""
        if self.arm.kind == "pruned" and state["epoch"] > self.epochs // 2:
            self._prune()  # the masks' names; their values follow
        if self.arm.warm and state["epoch"] > self.first_eligible:
            self._factorize()
        super().load_state_dict(state)
        self.kept = state["kept"]
        if self.norms is not None:
            self.norms.load_state_dict(state["norms"])


def _cut_out(images: Tensor, side: int, generator: torch.Generator) -> None:
    """Set a square of each image to zero, its centre anywhere (DeVries, Taylor, 2017)."""
    count, _, height, width = images.shape
    inside = []
    for length in (height, width):
        centre = torch.randint(length, (count, 1), generator=generator)
        distance = torch.arange(length) - (centre - side // 2)
        inside.append((distance >= 0) & (distance < side))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    images.masked_fill_(square.to(images.device), 0)
