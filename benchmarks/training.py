"""One run of one arm: make the model and its optimizer, train, validate, test once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import cos, pi
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import frobdecay
from benchmarks.data import ImageData
from benchmarks.measure import synchronize
from benchmarks.models import resnet
from frobdecay.diagnostics import QUANTITIES, Recorder

__all__ = ["ARMS", "Arm", "Protocol", "Run", "batches", "evaluate", "make", "train"]


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        label: for tables and legends.
        init: of the factors; None leaves the model dense.
        product_decay: Frobenius decay in place of weight decay on each factor.
    """

    label: str
    init: str | None
    product_decay: bool = False


ARMS = {
    "dense": Arm("dense", None),
    "lowrank": Arm("low-rank", "kaiming"),
    "si": Arm("low-rank + SI", "spectral"),
    "fd": Arm("low-rank + FD", "kaiming", product_decay=True),
    "sifd": Arm("low-rank + SI & FD", "spectral", product_decay=True),
}


@dataclass(frozen=True)
class Protocol:
    """What all arms have in common.

    Attributes:
        depth, width: of the ResNet.
        ratio: parameters of the factorized model ÷ those of the dense one.
        epochs: passes over the training images.
        batch: images a step.
        lr: learning rate at the start; it falls to 0 along half a cosine.
        decay: λ, of weight decay and of Frobenius decay alike.
    """

    depth: int
    width: int
    ratio: float
    epochs: int
    batch: int
    lr: float
    decay: float


@dataclass
class Run:
    """What one run gave.

    Attributes:
        arm: key in ``ARMS``.
        seed: of initialization and data order; runs of one seed are paired.
        parameters: of the model.
        test_accuracy: after the last epoch, 0 to 1.
        loss, accuracy: training loss and validation accuracy after each epoch.
        ms_per_step: median over all steps.
        norms: quantity -> its total over the factorized weights, before training and after each
            epoch; for the dense arm the norm of the weights that others factorize.
    """

    arm: str
    seed: int
    parameters: int
    test_accuracy: float = 0.0
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    ms_per_step: float = 0.0
    norms: dict[str, list[float]] = field(default_factory=dict)


def make(
    arm: Arm, seed: int, data: ImageData, protocol: Protocol
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make the model and the optimizer: the lines that a user changes.

    Args:
        arm: decides which.
        seed: of the initialization.
        data: gives channels, classes and device.
        protocol: everything else.

    Raises:
        ValueError: a depth, a ratio, an lr or a decay that cannot be.
    """
    torch.manual_seed(seed)
    channels = data.train[0].shape[1]
    model = resnet(
        protocol.depth, width=protocol.width, channels=channels, classes=data.classes
    ).to(data.mean.device)
    if arm.init is not None:  # by default, as in the paper, the first and the last layer stay dense
        frobdecay.factorize(model, ratio=protocol.ratio, init=arm.init)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), lr=protocol.lr, momentum=0.9, weight_decay=protocol.decay
    )
    if arm.product_decay:
        optimizer = frobdecay.FrobeniusDecay(optimizer, model, decay=protocol.decay)
    return model, optimizer


def train(
    key: str,
    seed: int,
    data: ImageData,
    protocol: Protocol,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Run:
    """Train one arm from one seed.

    The dense initialization and the order and augmentation of the images depend on the seed
    only, so that arms of one seed are paired.

    Args:
        key: of the arm in ``ARMS``.
        seed: for everything random.
        data: on the device to train on.
        protocol: everything else.
        on_epoch: called with the number of epochs done.
    """
    arm = ARMS[key]
    model, optimizer = make(arm, seed, data, protocol)
    watch = _Watch(model)
    run = Run(key, seed, sum(p.numel() for p in model.parameters()))
    steps = -(-len(data.train[1]) // protocol.batch) * protocol.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + cos(pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    times: list[float] = []
    watch.look(optimizer)
    for epoch in range(protocol.epochs):
        model.train()
        losses = []
        for images, labels in batches(data, protocol.batch, generator):
            start = _now(images.device)
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(_now(images.device) - start)
            schedule.step()
            losses.append(loss.detach())
        run.loss.append(float(torch.stack(losses).mean()))
        run.accuracy.append(evaluate(model, data, data.val))
        watch.look(optimizer)
        on_epoch(epoch + 1)
    run.test_accuracy = evaluate(model, data, data.test)
    run.ms_per_step, run.norms = 1e3 * median(times), watch.norms()
    return run


class _Watch:
    """Records the products' norms; of a dense model, the norms of what could be factorized."""

    def __init__(self, model: nn.Module) -> None:
        products = frobdecay.products(model)
        self.recorder = Recorder(products) if products else None
        self.weights = [
            module.weight
            for name, module in model.named_modules()
            if not products and isinstance(module, nn.Conv2d) and name != "conv1"
        ]
        self.dense: list[float] = []

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        if self.recorder is not None:
            self.recorder.step(optimizer)
        else:
            squares = [weight.detach().square().sum() for weight in self.weights]
            self.dense.append(float(torch.stack(squares).sum().sqrt()))

    def norms(self) -> dict[str, list[float]]:
        if self.recorder is None:
            return {"norm": self.dense}
        return {quantity: self.recorder.total(quantity) for quantity in QUANTITIES}


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def batches(
    data: ImageData, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images in random order, augmented if they are photographs."""
    images, labels = data.train
    order = torch.randperm(len(labels), generator=generator)
    pieces = order.split(size)
    # what is random goes to the device at once, which is then not waited for at every step
    places = [_places(len(p), images.shape[2:], generator) for p in pieces if data.natural]
    rows, columns = (torch.cat([place[k] for place in places] or [order]) for k in (0, 1))
    order, rows, columns = (tensor.to(images.device) for tensor in (order, rows, columns))
    for chosen, *place in zip(*(t.split(size) for t in (order, rows, columns)), strict=True):
        batch = data.normalize(images[chosen])
        yield _cut(batch, *place) if data.natural else batch, labels[chosen]


def _places(
    count: int, shape: Sequence[int], generator: torch.Generator, shift: int = 4
) -> tuple[Tensor, Tensor]:
    """Rows and columns to take of padded images: half of them flipped, all from a random place."""
    flip = torch.rand(count, generator=generator) < 0.5
    rows, columns = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
    rows, columns = rows + torch.arange(shape[0]), columns + torch.arange(shape[1])
    return rows, torch.where(flip[:, None], columns.flip(1), columns)


def _cut(images: Tensor, rows: Tensor, columns: Tensor, shift: int = 4) -> Tensor:
    """Take these rows and columns of images that zeros were put around."""
    padded = pad(images, (shift,) * 4).movedim(1, -1)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageData, half: tuple[Tensor, Tensor]) -> float:
    """Fraction of images whose highest score is their label's."""
    model.eval()
    right = [
        (model(data.normalize(images)).argmax(1) == labels).sum()
        for images, labels in zip(half[0].split(200), half[1].split(200), strict=True)
    ]
    return int(torch.stack(right).sum()) / len(half[1])
