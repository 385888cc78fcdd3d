"""One trial of translation: a small Transformer, factorized, with SI and FD on parts of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import frobdecay
from benchmarks.experiments.text import BOS, EOS, PAD, load_parallel
from benchmarks.experiments.trials import Arm, Common, Training, count_parameters
from benchmarks.models import TranslationTransformer
from frobdecay import Product

__all__ = ["TranslationArm", "TranslationProtocol", "TranslationTrial", "translate"]


@dataclass(frozen=True, kw_only=True)
class TranslationArm(Arm):
    """What is special about an arm.

    Attributes:
        dense: leaves all as it is.
        linear: initialization of the factorized weights.
        attention_si: spectral initialization of the query–key and output–value products.
        decayed: which products get Frobenius decay: "linear", "output_value", "query_key".
    """

    dense: bool = False
    linear: str = "kaiming"
    attention_si: bool = False
    decayed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TranslationProtocol(Common):
    """What all arms have in common; the defaults are the paper's, its data apart.

    Attributes:
        data: directory with train, val and test in both languages.
        languages: source and target.
        vocabulary: tokens of each.
        rank: fraction that is kept of linear layers, embeddings and heads.
        tokens: a batch.
        flat: updates before the learning rate falls with the square root of their number.
        momentum, smoothing, dropout: of the optimizer and the loss.
        optimizer: "sgd", as in the paper; or "adamw", whose learning rate rises in a tenth of the
            updates and falls to zero, along straight lines.
        weight_decay: λ. With SGD that of Frobenius decay, and there is no other, as in the paper.
            With AdamW all matrices decay, those of products that are not ``decayed`` by factors.
        width, hidden, heads, layers: of the model.
        beam: of the translation of the test set.
    """

    data: str = "multi30k"
    languages: tuple[str, str] = ("de", "en")
    vocabulary: int = 8000
    rank: float = 0.5
    epochs: int = 60
    tokens: int = 4000
    lr: float = 0.25
    flat: int = 4000
    optimizer: str = "sgd"
    momentum: float = 0.99
    clip: float | None = 0.1
    smoothing: float = 0.1
    dropout: float = 0.2
    weight_decay: float = 1e-5
    width: int = 256
    hidden: int = 1024
    heads: int = 4
    layers: int = 2
    beam: int = 5


_load = lru_cache(maxsize=1)(load_parallel)


class TranslationTrial(Training):
    """Train one arm from one seed; arguments are those of ``Training``."""

    def __init__(
        self,
        out: Path,
        arm: TranslationArm,
        seed: int,
        protocol: TranslationProtocol,
        key: str,
        after: str | None = None,
    ) -> None:
        super().__init__(out, arm, seed, protocol, key, after)
        self.bleu = _bleu()
        self.text = _load(protocol.data, protocol.languages, protocol.vocabulary, protocol.limit)
        sizes = [tokenizer.get_vocab_size() for tokenizer in self.text.tokenizers]
        head = protocol.width // protocol.heads
        options: dict[str, Any] = {
            name: getattr(protocol, name)
            for name in ("width", "hidden", "heads", "layers", "dropout")
        }

        def make(size: int) -> TranslationTransformer:
            return TranslationTransformer(*sizes, **options, size=size)

        with torch.device("meta"):
            self.dense_parameters = count_parameters(make(head))
        model = make(head if arm.dense else max(1, round(protocol.rank * head)))
        if arm.attention_si:
            frobdecay.balance_(frobdecay.products(model))
        if not arm.dense:
            frobdecay.factorize(
                model,
                rank=protocol.rank,
                include=[nn.Linear, nn.Embedding],
                exclude=["*.query", "*.key", "*.value", "*attention.output", "*cross.output"],
                init=arm.linear,
            )
        model.to(protocol.device)
        products = frobdecay.products(model)
        decayed = [product for product in products if _kind(product) in arm.decayed]
        optimizer: torch.optim.Optimizer
        if protocol.optimizer == "adamw":
            groups = frobdecay.split_param_groups(model, protocol.weight_decay)
            optimizer, decay = torch.optim.AdamW(groups, protocol.lr, betas=(0.9, 0.98)), None
            self.updates = self.epochs * sum(1 for _ in self._pairs("train"))
        else:
            optimizer = torch.optim.SGD(
                model.parameters(), protocol.lr, protocol.momentum, nesterov=True
            )
            decay = protocol.weight_decay
        if decayed:
            optimizer = frobdecay.FrobeniusDecay(optimizer, decayed, decay=decay)
        self.ready(model, optimizer, products)

    @property
    def momentum(self) -> float:  # type: ignore[override]
        """Of SGD, whose decay is coupled."""
        return self.protocol.momentum if self.protocol.optimizer == "sgd" else 0.0

    def rate(self) -> float:
        """Flat, then falling with the square root of the number of updates; or see "adamw"."""
        if self.protocol.optimizer == "adamw":
            passed = (self.steps + 1) / (self.updates + 1)
            return float(self.protocol.lr * min(passed / 0.1, (1 - passed) / 0.9))
        return self.protocol.lr * min(1.0, (self.protocol.flat / (self.steps + 1)) ** 0.5)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Padded sentences of both languages."""
        yield from self._pairs("train", self.generator)

    def _pairs(
        self, split: str, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for source, target, _ in self.text.batches(split, self.protocol.tokens, generator):
            yield source.to(self.protocol.device), target.to(self.protocol.device)

    def compute_loss(self, *batch: Tensor) -> Tensor:
        """Cross-entropy of a token, smoothed."""
        return self._loss(*batch, smoothing=self.protocol.smoothing)

    def _loss(self, source: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        scores = self.network(source, target[:, :-1], source == PAD)
        return cross_entropy(
            scores.flatten(0, 1),
            target[:, 1:].flatten(),
            ignore_index=PAD,
            label_smoothing=smoothing,
        )

    def validate(self) -> float:
        """Perplexity of a token."""
        return self._perplexity("val")

    def _perplexity(self, split: str) -> float:
        total, count = 0.0, 0
        for source, target in self._pairs(split):
            tokens = int((target[:, 1:] != PAD).sum())
            total, count = total + float(self._loss(source, target)) * tokens, count + tokens
        return exp(total / count)

    def test(self) -> dict[str, Any]:
        """BLEU by sacrebleu, and perplexity."""
        references = self.text.references["test"]
        written = [""] * len(references)
        tokenizer = self.text.tokenizers[1]
        for source, _, where in self.text.batches("test", self.protocol.tokens):
            found = translate(self.model, source.to(self.protocol.device), self.protocol.beam)
            for k, ids in zip(where, found, strict=True):
                written[k] = tokenizer.decode(ids).strip()
        score = self.bleu(written, [references]).score
        return {"score": score, "test perplexity": self._perplexity("test")}


def _bleu() -> Any:
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'frobdecay[experiments]'") from error
    return corpus_bleu


def _kind(product: Product) -> str:
    last = product.name.rpartition(".")[2]
    return last if last in ("query_key", "output_value") else "linear"


@torch.no_grad()
def translate(
    model: nn.Module, source: Tensor, beam: int, longest: int | None = None
) -> list[list[int]]:
    """Translate by beam search: of what the beam holds at last, the best mean log-probability.

    Args:
        model: a ``TranslationTransformer`` in evaluation mode.
        source: tokens (N, S), padded.
        beam: width; 1 is greedy.
        longest: number of tokens, the end included; 2 S + 10 unless given.

    Returns:
        Token ids of each sentence, without the special ones.
    """
    count, padding = len(source), source == PAD
    memory = model.encode(source, padding).repeat_interleave(beam, 0)
    padding = padding.repeat_interleave(beam, 0)
    tokens = source.new_full((count * beam, 1), BOS)
    scores = torch.full((count, beam), -torch.inf, device=source.device)
    scores[:, 0] = 0  # all beams begin alike: only one of them may branch
    done = torch.zeros(count, beam, dtype=torch.bool, device=source.device)
    first = beam * torch.arange(count, device=source.device)[:, None]
    for _ in range(longest or 2 * source.shape[1] + 10):
        step = model.decode(memory, tokens, padding)[:, -1].float().log_softmax(-1)
        step = step.unflatten(0, (count, beam))
        words = step.shape[-1]
        step[..., [PAD, BOS]] = -torch.inf
        ended = torch.full_like(step, -torch.inf)
        ended[..., PAD] = 0  # a finished sentence goes on as it is
        total = scores.unsqueeze(-1) + torch.where(done.unsqueeze(-1), ended, step)
        scores, best = total.flatten(1).topk(beam)
        parent, word = best // words, best % words
        tokens = torch.cat([tokens[(parent + first).flatten()], word.reshape(-1, 1)], 1)
        done = done.gather(1, parent) | (word == EOS)
        if bool(done.all()):
            break
    lengths = (tokens[:, 1:] != PAD).sum(1).unflatten(0, (count, beam))
    chosen = (scores / lengths).argmax(1, keepdim=True)
    kept = tokens[(chosen + first).flatten()]
    return [[t for t in row if t not in (PAD, BOS, EOS)] for row in kept.tolist()]
