"""One trial of language modelling: masked or causal, with the attention's heads made small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import frobdecay
from benchmarks.experiments.text import MASK, SPECIAL, Running, load_running
from benchmarks.experiments.trials import Arm, Common, Training, count_parameters
from benchmarks.models import LanguageModel

__all__ = ["LanguageArm", "LanguageProtocol", "LanguageTrial"]

IGNORED = -100
"""What ``cross_entropy`` leaves out."""


@dataclass(frozen=True, kw_only=True)
class LanguageArm(Arm):
    """What is special about an arm.

    Attributes:
        size: of a head ÷ that of the dense model's.
        balanced: spectral initialization of the query–key and output–value products.
        decay: "plain", of each weight; or "frobenius", of these products in place of their factors.
    """

    size: float = 0.5
    balanced: bool = False
    decay: str = "plain"


@dataclass(frozen=True, kw_only=True)
class LanguageProtocol(Common):
    """What all arms have in common.

    Attributes:
        data: a text file.
        vocabulary: number of tokens.
        masked: predict a part of the tokens from all others, as BERT; else each from those before.
        optimizer: "lamb", with Frobenius decay FLAMBe; or "adamw".
        length, batch: tokens of a text, texts of a batch.
        warmup: fraction of the steps in which the learning rate rises; then it falls to zero.
        width, hidden, heads, layers, dropout: of the model.
    """

    data: str = "tinyshakespeare.txt"
    vocabulary: int = 2000
    masked: bool = False
    optimizer: str = "adamw"
    epochs: int = 20
    length: int = 128
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float | None = 1.0
    width: int = 128
    hidden: int = 512
    heads: int = 4
    layers: int = 4
    dropout: float = 0.1


class LanguageTrial(Training):
    """Train one arm from one seed; arguments are those of ``Training``."""

    def __init__(
        self,
        out: Path,
        arm: Any,
        seed: int,
        protocol: LanguageProtocol,
        key: str,
        after: str | None = None,
    ) -> None:
        super().__init__(out, arm, seed, protocol, key, after)
        self.text = self.load()
        self.begin()

    def load(self) -> Running:
        """The text to train on."""
        protocol = self.protocol
        return load_running(
            protocol.data, protocol.vocabulary, protocol.limit, device=protocol.device
        )

    def begin(self) -> None:
        """Make the model and its optimizer."""
        protocol, arm = self.protocol, self.arm
        with torch.device("meta"):
            self.dense_parameters = count_parameters(self.make())
        model = self.make(arm.size)
        if arm.balanced:
            frobdecay.balance_(frobdecay.products(model))
        model.to(protocol.device)
        whole = [p for p in model.parameters() if p.ndim < 2]
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        groups = [
            {"params": decayed, "weight_decay": protocol.weight_decay},
            {"params": whole, "weight_decay": 0.0},
        ]
        products = frobdecay.products(model)
        frobenius = arm.decay == "frobenius"
        optimizer: torch.optim.Optimizer
        if protocol.optimizer == "lamb":
            chosen = products if frobenius else None
            optimizer = frobdecay.Flambe(groups, chosen, lr=protocol.lr)
        else:
            optimizer = torch.optim.AdamW(groups, lr=protocol.lr)
            if frobenius:
                optimizer = frobdecay.FrobeniusDecay(optimizer, products)
        self.ready(model, optimizer, products)

    def make(self, size: float = 1.0) -> LanguageModel:
        """The model; ``size`` is that of an arm."""
        protocol = self.protocol
        return LanguageModel(
            self.text.tokenizer.get_vocab_size(),
            width=protocol.width,
            hidden=protocol.hidden,
            heads=protocol.heads,
            layers=protocol.layers,
            causal=not protocol.masked,
            size=max(1, round(size * protocol.width / protocol.heads)),
            length=protocol.length,
            dropout=protocol.dropout,
        )

    def rate(self) -> float:
        """Rising, then falling, both along straight lines."""
        protocol = self.protocol
        per_epoch = max(
            1, len(self.text.train) // (protocol.length + self._extra) // protocol.batch
        )
        passed = (self.steps + 1) / (self.epochs * per_epoch + 1)
        falling = (1 - passed) / (1 - protocol.warmup)
        return protocol.lr * max(0.0, min(passed / protocol.warmup, falling))

    @property
    def _extra(self) -> int:
        """Tokens of a window beside those that the model sees: the last one's next."""
        return 0 if self.protocol.masked else 1

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Tokens and what is to be found in their places."""
        protocol = self.protocol
        length = protocol.length + self._extra
        for window in self.text.batches(length, protocol.batch, self.generator):
            yield self._example(window, self.generator)

    def _example(self, window: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if not self.protocol.masked:
            return window[:, :-1], window[:, 1:]
        return mask(window, self.text.tokenizer.get_vocab_size(), generator)

    def compute_loss(self, *batch: Tensor) -> Tensor:
        """Cross-entropy of a token, in nats."""
        tokens, targets = batch
        scores = self.network(tokens)
        return cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def validate(self) -> float:
        """Cross-entropy of a token, in nats."""
        return self.evaluate(self.text, "val")

    def test(self) -> dict[str, Any]:
        """Cross-entropy of a token, in nats."""
        return {"score": self.evaluate(self.text, "test")}

    def evaluate(self, text: Running, split: str) -> float:
        """Cross-entropy of a token; the same ones are masked every time."""
        protocol, generator = self.protocol, torch.Generator().manual_seed(0)
        total, count = torch.zeros((), device=protocol.device), 0
        for window in text.windows(split, protocol.length + self._extra, protocol.batch):
            tokens, targets = self._example(window, generator)
            found = int((targets != IGNORED).sum())
            total, count = total + self.compute_loss(tokens, targets) * found, count + found
        return float(total / count)


def mask(tokens: Tensor, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose 15 % of the tokens, mask 80 % of these, replace 10 % (BERT; Devlin et al., 2019).

    Args:
        tokens: of any shape.
        vocabulary: whose first tokens are special and replace none.
        generator: on the CPU.

    Returns:
        What the model sees, and the chosen tokens in their places; ``IGNORED`` in all others.
    """
    chance = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    random = torch.randint(len(SPECIAL), vocabulary, tokens.shape, generator=generator)
    targets = tokens.masked_fill(chance >= 0.15, IGNORED)
    seen = tokens.masked_fill(chance < 0.8 * 0.15, MASK)
    replaced = (chance >= 0.8 * 0.15) & (chance < 0.9 * 0.15)
    return torch.where(replaced, random.to(tokens.device), seen), targets
