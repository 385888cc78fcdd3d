"""Frobenius decay adds next to nothing to a training step.

    python -m benchmarks.step --threads 2                    # under three minutes
    python -m benchmarks.step --case resnet
    python -m benchmarks.step --layers 12 --device cuda      # all of BERT-base

Every row is a whole step (forward, backward, zero_grad, the optimizer) of one factorized model:

    weight decay       the optimizer with its weight decay on every factor
    Frobenius decay    the same optimizer in frobdecay.FrobeniusDecay
    penalty            no decay, λ/2·‖W‖² of all products added to the loss by frobdecay.penalty
    … step() alone     the optimizer's part of the first two
    bound, toward …    that of Frobenius decay with a bound on what moves, and of decay toward the
                       factors as they are at the beginning

in turns. What the decay adds is the difference of the optimizer's parts; that of whole steps is of
the size of their noise. ResNet-32 has its first convolution and classifier dense and takes 128
images. The BERT layers are the linear layers of BERT-base between normalizations and GELU, at rank
192, without attention itself, which would only make the share of the decay smaller. What the decay
may take of their step is 1.3 times its share of the flops, 2r ÷ (3 · tokens).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from benchmarks import measure
from benchmarks.cases import FRACTION
from benchmarks.measure import Report, Target
from benchmarks.models import resnet
from frobdecay.models.factorize import factorize
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.find import products
from frobdecay.product.product import penalty

__all__ = ["CASES", "Layer", "main", "whole_step"]

DECAY = 1e-4
PLAIN, OURS, LOSS = "weight decay", "Frobenius decay", "penalty"
PLAIN_ALONE, OURS_ALONE = f"{PLAIN}, step() alone", f"{OURS}, step() alone"
BOUND_ALONE, TOWARD_ALONE = f"{OURS} and a bound, step() alone", "toward the start, step() alone"
ADDED, SHARE = 0.01, 1.3
"""What is promised: of the ResNet's step; times the flops of the BERT layers'."""
BOUNDED = 1.5
"""What is promised of the BERT layers' step() with a bound, beside that with decay alone."""


class Layer(nn.Module):
    """The six linear layers of a transformer layer, residual, without attention.

    Args:
        width: of the stream; the hidden layer has four times as many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, width) to the same."""
        y = self.norm1(x)
        x = x + self.o(self.q(y) + self.k(y) + self.v(y))
        return x + self.down(gelu(self.up(self.norm2(x))))


Case = tuple[nn.Module, Callable[[nn.Module], Tensor], Callable[..., torch.optim.Optimizer]]


def _resnet(options: Any, device: torch.device) -> Case:
    model = resnet(options.depth)
    factorize(model, rank=FRACTION, exclude=["conv1", "fc"])
    images = torch.randn(options.batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (options.batch,), device=device)

    def loss(model: nn.Module) -> Tensor:
        return cross_entropy(model(images), labels)

    def optimizer(parameters: Any, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=weight_decay)

    return model.to(device), loss, optimizer


def _bert(tokens: int) -> Callable[[Any, torch.device], Case]:
    def make(options: Any, device: torch.device) -> Case:
        model = nn.Sequential(*(Layer(options.width) for _ in range(options.layers)))
        # matched: what the factors are does not matter here, and SI would take its time
        factorize(model, rank=options.width // 4, init="matched")
        x = torch.randn(tokens, options.width, device=device)

        def loss(model: nn.Module) -> Tensor:
            return model(x).square().mean()

        def optimizer(parameters: Any, weight_decay: float) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=weight_decay)

        return model.to(device), loss, optimizer

    return make


TOKENS = {"bert 8×128": 8 * 128, "bert 8×1024": 8 * 1024}
CASES: dict[str, Callable[[Any, torch.device], Case]] = {
    "resnet": _resnet,
    **{name: _bert(tokens) for name, tokens in TOKENS.items()},
}


def whole_step(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    optimizer: torch.optim.Optimizer,
    extra: Callable[[], Tensor] | None = None,
) -> Callable[[], object]:
    """Make a training step: the loss, and what is added to it, backward, the optimizer.

    Args:
        model: is handed to ``loss``.
        loss: of a model, without dimensions.
        optimizer: clears the gradients, and steps.
        extra: added to the loss.
    """

    def run() -> None:
        total = loss(model)
        if extra is not None:
            total = total + extra()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return run


def _measure(name: str, options: Any, device: torch.device) -> tuple[list[Any], list[Target]]:
    model, loss, make = CASES[name](options, device)
    plain, ours, added = model, copy.deepcopy(model), copy.deepcopy(model)
    wrapped = FrobeniusDecay(make(ours.parameters(), DECAY), ours)
    found = products(added)
    optimizer = make(plain.parameters(), DECAY)
    bounded, toward = copy.deepcopy(model), copy.deepcopy(model)
    start = products(toward, toward="initial")
    runs = {
        PLAIN: whole_step(plain, loss, optimizer),
        OURS: whole_step(ours, loss, wrapped),
        LOSS: whole_step(added, loss, make(added.parameters(), 0.0), lambda: penalty(found, DECAY)),
        PLAIN_ALONE: optimizer.step,
        OURS_ALONE: wrapped.step,
        BOUND_ALONE: FrobeniusDecay(make(bounded.parameters(), DECAY), bounded, bound=1.0).step,
        TOWARD_ALONE: FrobeniusDecay(make(toward.parameters(), DECAY), start).step,
    }
    for each in (bounded, toward):
        loss(each).backward()  # steps of gradients, which are not cleared
    timings = measure.interleave(runs, device, seconds=options.seconds, rounds=options.rounds)
    ms = {key: timing.ms for key, timing in timings.items()}
    rows = [
        {
            "": key,
            "ms": ms[key],
            "quartiles": timing.quartiles(),
            "of the step": f"{ms[key] / ms[PLAIN]:.2%}",
            "samples": timing.samples,
        }
        for key, timing in timings.items()
    ]
    limit = 100 * ADDED
    if name in TOKENS:
        limit = 100 * SHARE * 2 * (options.width // 4) / (3 * TOKENS[name])
    gain = 100 * (ms[OURS_ALONE] - ms[PLAIN_ALONE]) / ms[PLAIN]
    targets = [Target(f"{name}, added by Frobenius decay", gain, limit, unit="%")]
    if name in TOKENS:
        times = ms[BOUND_ALONE] / ms[OURS_ALONE]
        targets.append(Target(f"{name}, step() with a bound ÷ without", times, BOUNDED))
    return rows, targets


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("step", __doc__ or "", seconds=25.0)
    measure.add_names(made, "--case", CASES)
    made.add_argument("--depth", type=measure.count, default=32, help="default: %(default)s")
    made.add_argument("--batch", type=measure.count, default=128, help="default: %(default)s")
    made.add_argument("--width", type=measure.count, default=768, help="default: %(default)s")
    made.add_argument("--layers", type=measure.count, default=1, help="default: %(default)s")
    made.add_argument("--rounds", type=measure.count, default=7, help="default: %(default)s")
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Measure the cases."""
    for name in options.case:
        rows, targets = _measure(name, options, report.device)
        report.table(name, rows)
        report.targets += targets


if __name__ == "__main__":
    main()
