"""What an optimizer does with weight decay, measured against what the wrapper does.

For W = U·I with I frozen, ½‖W‖² is ½‖U‖², and its decay is U's own weight decay: whatever an
optimizer does with its ``weight_decay``, the wrapped optimizer does it too, or is in another mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from cases import seeded
from torch import Tensor, nn
from torch.optim import Optimizer

import frobdecay
from frobdecay import Factor, Product

RATE, DECAY, STEPS = 1e-3, 1.0, 12


class Net(nn.Module):
    """A product U·Vᵀ and a bias, fitted to noise; V is the identity and frozen on request."""

    def __init__(self, dtype: torch.dtype, *, frozen: bool) -> None:
        super().__init__()
        generator = seeded(0)

        def normal(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(dtype)

        self.U = nn.Parameter(normal(6, 4, scale=3.0))
        self.V = nn.Parameter(normal(4, 4, scale=1.0))
        self.bias = nn.Parameter(normal(6, scale=0.5))
        if frozen:
            self.V = nn.Parameter(torch.eye(4, dtype=dtype), requires_grad=False)
        self.x, self.y = normal(16, 4, scale=1.0), normal(16, 6, scale=20.0)

    def product(self) -> Product:
        """The only one."""
        return Product("W", (Factor(self, "U"), Factor(self, "V")))

    def loss(self) -> Tensor:
        """Mean squared error."""
        return (self.x @ self.V @ self.U.T + self.bias - self.y).square().mean()


@dataclass(frozen=True)
class Subject:
    """An optimizer to measure, with the options that decide on its kind of decay.

    Subclasses say how it is made, and what else is special.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    dtype = torch.float64
    second_order = False
    closure = False
    preparing = 0
    """First steps in which it decays nothing, because it does not step."""

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    def net(self, *, frozen: bool) -> Net:
        """What it trains."""
        return Net(self.dtype, frozen=frozen)

    def build(self, net: Net, decay: float) -> Optimizer:
        """The optimizer; only factors have the weight decay."""
        raise NotImplementedError

    def train(self, net: Net, optimizer: Optimizer, steps: int = STEPS) -> Tensor:
        """Take steps and return U; ours do not decay in the steps that only prepare."""
        torch.manual_seed(0)
        numpy.random.seed(0)  # noqa: NPY002 - an optimizer draws from it

        @torch.enable_grad()
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = net.loss()
            loss.backward(create_graph=self.second_order)
            return loss

        if hasattr(optimizer, "train"):
            optimizer.train()
        coefs = [group.get("frobenius_decay") for group in optimizer.param_groups]
        for step in range(steps):
            for group, coef in zip(optimizer.param_groups, coefs, strict=True):
                if coef is not None:
                    group["frobenius_decay"] = 0.0 if step < self.preparing else coef
            if self.closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        return net.U.detach().clone()


@dataclass(frozen=True)
class Measurement:
    """What became of U.

    Attributes:
        auto: the kind that ``mode="auto"`` finds, or None where it asks.
        errors: of each mode, its distance from the optimizer's own weight decay, in units of
            what that does; infinite if it does nothing.
        effects: of each mode, how far it moves U, in units of lr·λ·‖U‖ a step.
    """

    auto: str | None
    errors: dict[str, float]
    effects: dict[str, float]

    @property
    def kinds(self) -> set[str]:
        """The modes that do what the optimizer does, to the order of lr·λ in lr·λ.

        So it is the same whether before or after its update, and by 1 − lr·λ or 1 / (1 + lr·λ).
        """
        return {mode for mode, error in self.errors.items() if error < 2 * RATE * DECAY}

    @property
    def idle(self) -> bool:
        """Whether the optimizer's own weight decay, if any, does nothing here."""
        return all(error == math.inf for error in self.errors.values())

    @property
    def exact(self) -> float | None:
        """The error of what ``mode="auto"`` does."""
        return None if self.auto is None else self.errors[self.auto]


def measure(subject: Subject) -> Measurement:
    """Train without decay, with the optimizer's own, and with ours in each mode."""

    def run(decay: float, mode: str | None) -> Tensor:
        net = subject.net(frozen=True)
        optimizer = subject.build(net, decay)
        if mode is not None:
            optimizer = frobdecay.FrobeniusDecay(optimizer, net.product(), decay=DECAY, mode=mode)
        return subject.train(net, optimizer)

    start = subject.net(frozen=True).U.detach()
    without, own = run(0.0, None), run(DECAY, None)
    acts = (own - without).norm().item()
    unit = RATE * DECAY * STEPS * start.norm().item()
    errors, effects = {}, {}
    for mode in ("coupled", "decoupled"):
        try:
            ours = run(DECAY, mode)
        except ValueError as error:
            if mode == "coupled" or "mode='coupled'" not in str(error):
                raise
            continue
        errors[mode] = (ours - own).norm().item() / acts if acts > 1e-12 else math.inf
        effects[mode] = (ours - without).norm().item() / unit
    return Measurement(automatic(subject), errors, effects)


def automatic(subject: Subject) -> str | None:
    """The mode that is found, or None where it has to be given."""
    net = subject.net(frozen=True)
    try:
        wrapped = frobdecay.FrobeniusDecay(subject.build(net, DECAY), net.product(), decay=DECAY)
    except ValueError as error:
        if "mode='coupled' or mode='decoupled'" not in str(error):
            raise
        return None
    return "decoupled" if "auto (decoupled)" in repr(wrapped) else "coupled"
