"""What a pretrained model is good for, as ``benchmarks.pretrained`` asks it: embeddings, or text.

Models are folders of transformers; texts are files of lines. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TASKS", "Encoder", "Language", "Text"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Text:
    """Lines to learn from and lines to be tested on, none of them in both.

    Attributes:
        name: as given.
        train, held, test: lines; the second are for choices.
    """

    name: str
    train: Sequence[str]
    held: Sequence[str]
    test: Sequence[str]

    @classmethod
    def read(cls, name: str, path: Path) -> Text:
        """A folder with train.en, val.en and test.en, or a file: its last tenths are the others."""
        if path.is_dir():
            return cls(name, *(_lines(path / f"{part}.en") for part in ("train", "val", "test")))
        lines = _lines(path)
        tenth = len(lines) // 10
        return cls(name, lines[: -2 * tenth], lines[-2 * tenth : -tenth], lines[-tenth:])


def _lines(path: Path) -> list[str]:
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in found if len(line) > 20]


class Encoder:
    """Embeddings of sentences: a mean over tokens, of length 1.

    Scores are the mean cosine to the dense model's embeddings, and the share of sentences whose
    nearest neighbour among all is that of the dense model.
    """

    scores = ("cosine", "neighbours")
    better = max

    def __init__(
        self, folder: str, gguf: str | None, texts: Sequence[Text], sizes: Mapping[str, int]
    ):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.texts = {text.name: text for text in texts}
        self.sizes = sizes
        self.known: dict[tuple[str, str], Tensor] = {}
        self.taught: dict[str, Tensor] = {}

    def _some(self, name: str, part: str) -> Sequence[str]:
        return getattr(self.texts[name], part)[: self.sizes[part]]  # type: ignore[no-any-return]

    def _tested(self, name: str, part: str) -> list[Batch]:
        return self.batches(sorted(self._some(name, part), key=len))  # little padding

    def batches(self, lines: Sequence[str], size: int = 32) -> list[Batch]:
        """Padded batches with their masks."""
        options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        return [
            dict(self.tokenizer(list(lines[k : k + size]), **options))
            for k in range(0, len(lines), size)
        ]

    def calibration(self, name: str) -> list[Batch]:
        """Batches of a text to calibrate on."""
        return self.batches(self.texts[name].train[: self.sizes["calibration"]])

    def embed(self, model: nn.Module, batch: Batch) -> Tensor:
        """One unit vector a sentence."""
        states = model(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    @torch.no_grad()
    def _embeddings(self, model: nn.Module, batches: Sequence[Batch]) -> Tensor:
        model.eval()
        return torch.cat([self.embed(model, batch) for batch in batches])

    def quality(self, model: nn.Module, name: str, part: str = "test") -> dict[str, float]:
        """The scores on a text."""
        found = self._embeddings(model, self._tested(name, part))
        if (name, part) not in self.known:
            self.known[name, part] = self._embeddings(self.model, self._tested(name, part))
        dense = self.known[name, part]
        near, wanted = ((each @ each.T).fill_diagonal_(-2).argmax(-1) for each in (found, dense))
        cosine = float((found * dense).sum(-1).mean())
        return {"cosine": cosine, "neighbours": float((near == wanted).float().mean())}

    def lessons(self, name: str, generator: torch.Generator, size: int) -> list[Any]:
        """The training sentences in an order, with what the dense model says of each."""
        lines = self.texts[name].train[: self.sizes["train"]]
        if name not in self.taught:
            self.taught[name] = self._embeddings(self.model, self.batches(lines, 128))
        order = torch.randperm(len(lines), generator=generator).tolist()
        pools = (order[k : k + 8 * size] for k in range(0, len(order), 8 * size))
        alike = [sorted(pool, key=lambda i: len(lines[i])) for pool in pools]  # little padding
        some = [pool[k : k + size] for pool in alike for k in range(0, len(pool), size)]
        some = [some[i] for i in torch.randperm(len(some), generator=generator).tolist()]
        return [
            (self.batches([lines[i] for i in each], size)[0], self.taught[name][each])
            for each in some
        ]

    def loss(self, model: nn.Module, lesson: Any) -> Tensor:
        """One less the mean cosine."""
        batch, wanted = lesson
        return 1 - (self.embed(model, batch) * wanted).sum(-1).mean()

    def example(self) -> Batch:
        """A batch to time."""
        return self.batches(self._some(next(iter(self.texts)), "test")[:32])[0]


class Language:
    """The next token of a text; the score is the perplexity, of windows by themselves."""

    scores = ("perplexity",)
    better = min
    length = 128

    def __init__(
        self, folder: str, gguf: str | None, texts: Sequence[Text], sizes: Mapping[str, int]
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        for name in ("quantization_config", "_is_quantized"):  # what the file was, not the model
            vars(model.config).pop(name, None)
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
        self.model = model.eval()
        self.texts = {text.name: text for text in texts}
        self.sizes = sizes

    def windows(self, name: str, part: str, count: int) -> list[Batch]:
        """Of so many tokens each, one after the other."""
        lines, ids = getattr(self.texts[name], part), []
        for line in lines:
            ids += self.tokenizer(line + "\n")["input_ids"]
            if len(ids) >= count * self.length:
                break
        whole = torch.tensor(ids[: len(ids) // self.length * self.length][: count * self.length])
        return [{"input_ids": window[None]} for window in whole.split(self.length)]

    def calibration(self, name: str) -> list[Batch]:
        """Batches of a text to calibrate on."""
        return self.windows(name, "train", self.sizes["calibration"])

    @torch.no_grad()
    def quality(self, model: nn.Module, name: str, part: str = "test") -> dict[str, float]:
        """The perplexity on a text."""
        model.eval()
        losses = [self.loss(model, batch) for batch in self.windows(name, part, self.sizes[part])]
        return {"perplexity": math.exp(min(float(torch.stack(losses).mean()), 100.0))}

    def lessons(self, name: str, generator: torch.Generator, size: int) -> list[Batch]:
        """The training windows in an order."""
        found = self.windows(name, "train", self.sizes["train"])
        order = torch.randperm(len(found), generator=generator).tolist()
        some = [order[k : k + size] for k in range(0, len(order), size)]
        return [{"input_ids": torch.cat([found[i]["input_ids"] for i in each])} for each in some]

    def loss(self, model: nn.Module, lesson: Batch) -> Tensor:
        """The mean over tokens, in nats."""
        loss: Tensor = model(**lesson, labels=lesson["input_ids"]).loss
        return loss

    def example(self) -> Batch:
        """A window to time."""
        return self.windows(next(iter(self.texts)), "test", 1)[0]


TASKS = {"encoder": Encoder, "language": Language}
