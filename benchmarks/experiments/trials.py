"""What all trials have in common: the loop, the choice of an epoch, the state.

A trial trains one arm from one seed. After each epoch it is validated; the model of the epoch with
the best validation is the one that is tested, once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import captured
from frobdecay import Product
from frobdecay.diagnostics import QUANTITIES, Recorder

__all__ = ["Arm", "Common", "Training", "count_parameters"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is special about an arm.

    Attributes:
        label: for tables.
        after: the arm whose trial of the same seed has to be done before.
        blind: fields of the protocol that it does not read: variants that differ in nothing else
            share its trials.
    """

    label: str
    after: str | None = None
    blind: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all arms of an experiment have in common.

    Attributes:
        data: where it is.
        epochs: over the training data.
        lr: the highest learning rate.
        weight_decay: λ.
        clip: largest norm of the gradient; any unless given.
        limit: training examples; all unless given.
        device: that holds model and data.
        precision: "float32"; or "bfloat16", in which autocast runs forward and backward.
        compile: whether to train the compiled model.
        graph: whether forward and backward are replayed from a CUDA graph.
    """

    data: str
    epochs: int
    lr: float
    weight_decay: float
    clip: float | None = None
    limit: int | None = None
    device: str = "cpu"
    precision: str = "float32"
    compile: bool = False
    graph: bool = False


class Training:
    """One arm with one seed, in the making.

    A subclass makes the model, hands it to ``ready``, and defines what raises below.

    Args:
        out: directory with the results of other trials.
        arm: what is special about this one.
        seed: for everything random.
        protocol: everything else.
        key: of the files that this trial writes for others.
        after: the key of the trial that the arm comes after.

    Attributes:
        model, optimizer: given to ``ready``.
        generator: of everything random but dropout, on the CPU.
        epoch, epochs: done and to be done.
        steps: of the optimizer, so far.
        shrinkage: D = Σ lr·λ / (1 - momentum) over the steps so far: decay alone would have
            shrunk the weights by exp(-D). A decay does not act where it is far below 1.
        losses: of the steps of the last epoch, where the model is: reading them waits for it.
        loss, validation: after each epoch.
        dense_parameters: of the model that the arms' sizes are compared with.
    """

    larger_is_better = False
    momentum = 0.0
    """That of a coupled decay, which it makes act 1 / (1 - momentum) times."""
    first_eligible = 0
    """Epochs before the first whose model may be tested."""

    dense_parameters: int

    def __init__(
        self, out: Path, arm: Any, seed: int, protocol: Any, key: str, after: str | None = None
    ) -> None:
        if protocol.graph and torch.device(protocol.device).type != "cuda":
            raise ValueError(f"expected a CUDA device to replay a graph on, got {protocol.device}")
        torch.manual_seed(seed)
        self.out, self.arm, self.protocol, self.key, self.after = out, arm, protocol, key, after
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch, self.epochs, self.steps = 0, protocol.epochs, 0
        self.shrinkage = 0.0
        self.losses: list[Tensor] = []
        self.loss: list[float] = []
        self.validation: list[float] = []
        self.best: dict[str, Any] = {}

    def ready(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, products: Sequence[Product]
    ) -> None:
        """Take what is trained, and the products whose norms are recorded after each epoch."""
        self.model, self.optimizer = model, optimizer
        self.network: Callable[..., Any] = torch.compile(model) if self.protocol.compile else model
        self.graph: Replayed | None = None  # of forward and backward, until the model is another
        self.recorder = Recorder(products) if products else None
        self._record()

    @property
    def coefficient(self) -> float:
        """λ; 0 for arms that do not read the protocol's."""
        return 0.0 if "weight_decay" in self.arm.blind else float(self.protocol.weight_decay)

    # --- what a subclass says ---------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The training data in random order, on the device."""
        raise NotImplementedError

    def compute_loss(self, *batch: Tensor) -> Tensor:
        """The mean loss of a batch, of ``self.network``."""
        raise NotImplementedError

    def rate(self) -> float:
        """The learning rate of the next step."""
        raise NotImplementedError

    def validate(self) -> float:
        """How good the model is on the validation data."""
        raise NotImplementedError

    def test(self) -> dict[str, Any]:
        """How good the model is on the test data: "score", and more for the JSON."""
        raise NotImplementedError

    def set_rate(self) -> None:
        """Have the next step taken with its learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()

    def after_step(self) -> None:
        """Whatever follows a step of the optimizer."""

    # --- the loop ---------------------------------------------------------------------------------

    def advance(self) -> None:
        """Train for one epoch and validate."""
        self.model.train()
        self.losses = []
        for batch in self.batches():
            self.set_rate()
            lasting = 1 - self.momentum
            self.shrinkage += self.rate() * self.coefficient / lasting
            self.losses.append(self._differentiate(*batch))
            if self.protocol.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.protocol.clip)
            self.optimizer.step()
            self.steps += 1
            self.after_step()
        self.epoch += 1
        self.loss.append(float(torch.stack(self.losses).mean()))
        self.validation.append(self._evaluate(self.validate))
        self._choose()
        self._record()

    def _differentiate(self, *batch: Tensor) -> Tensor:
        """Leave the gradients of a batch; its loss."""
        if not self.protocol.graph:
            return self._backward(*batch)
        if self.graph is None:
            self.graph = Replayed(self._backward, self.model, batch)
        return self.graph(*batch)

    def _backward(self, *batch: Tensor) -> Tensor:
        with self._autocast():
            loss = self.compute_loss(*batch)
        self.optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        enabled = self.protocol.precision == "bfloat16"
        kind = torch.device(self.protocol.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=enabled)

    def _evaluate(self, what: Callable[[], Any]) -> Any:
        self.model.eval()
        with torch.no_grad(), self._autocast():
            return what()

    def _choose(self) -> None:
        """Keep the model if none before was better; a run that diverged has one, too."""
        sign = 1 if self.larger_is_better else -1
        ranks = [sign * value for value in self.validation[self.first_eligible :]]
        ranks = [rank if rank == rank else -torch.inf for rank in ranks]
        if ranks and ranks[-1] == max(ranks):
            state = self.model.state_dict()
            self.best = {name: value.clone() for name, value in state.items()}

    def _record(self) -> None:
        if self.recorder is not None:
            self.recorder.step(self.optimizer)

    # --- the state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        on_gpu = torch.device(self.protocol.device).type == "cuda"
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "shrinkage": self.shrinkage,
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "global": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if on_gpu else None,
            "loss": self.loss,
            "validation": self.validation,
            "recorder": self.recorder and self.recorder.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the epoch at which the state was taken."""
        self.epoch, self.steps = state["epoch"], state["steps"]
        self.shrinkage = state["shrinkage"]
        self.model.load_state_dict(state["model"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])
        self.loss, self.validation = list(state["loss"]), list(state["validation"])
        if self.recorder is not None:
            self.recorder.load_state_dict(state["recorder"])

    def parameters(self) -> int:
        """How many there are to train."""
        return count_parameters(self.model)

    def result(self) -> dict[str, Any]:
        """The test of the chosen epoch, curves and norms."""
        self.model.load_state_dict(self.best)
        norms = {}
        if self.recorder is not None:
            norms = {quantity: self.recorder.total(quantity) for quantity in QUANTITIES}
        return {
            **self._evaluate(self.test),
            "parameters": self.parameters(),
            "ratio": self.parameters() / self.dense_parameters,
            "shrinkage": self.shrinkage,
            "loss": self.loss,
            "validation": self.validation,
            "norms": norms,
        }


class Replayed:
    """A function that leaves gradients, replayed from a CUDA graph on new batches.

    Args:
        run: from a batch to its loss; leaves new gradients of a model's parameters.
        model: whose gradients and buffers those are.
        batch: an example of what it is run on; batches of other shapes are run as they are.
    """

    def __init__(
        self, run: Callable[..., Tensor], model: nn.Module, batch: Sequence[Tensor]
    ) -> None:
        self.run, self.batch = run, [tensor.clone() for tensor in batch]
        self.params = [param for param in model.parameters() if param.requires_grad]
        before = [buffer.clone() for buffer in model.buffers()]
        self.replay = captured(self._run, batch[0].device)
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)  # as they were before it was warmed up
        self.grads = [param.grad for param in self.params]

    def _run(self) -> None:
        self.loss = self.run(*self.batch)

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, whose gradients are left."""
        if any(new.shape != old.shape for new, old in zip(batch, self.batch, strict=True)):
            return self.run(*batch)
        for old, new in zip(self.batch, batch, strict=True):
            old.copy_(new)
        self.replay()
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        return self.loss.clone()


def count_parameters(model: nn.Module) -> int:
    """How many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
