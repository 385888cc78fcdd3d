"""Text for the experiments: parallel sentences and running text, as tokens.

Tokens come from a byte-pair vocabulary (Hugging Face's tokenizers) that is trained on the training
split, without randomness.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = [
    "BOS",
    "EOS",
    "MASK",
    "PAD",
    "SPECIAL",
    "Parallel",
    "Running",
    "find",
    "load_characters",
    "load_parallel",
    "load_running",
]

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
PAD, BOS, EOS, _, MASK = range(len(SPECIAL))


def find(source: str) -> Path:
    """The path itself, else the one below FROBDECAY_DATA.

    Raises:
        FileNotFoundError: there is neither.
    """
    root = os.environ.get("FROBDECAY_DATA")
    for path in (Path(source), *([Path(root) / source] if root else [])):
        if path.exists():
            return path
    raise FileNotFoundError(f"no text at {source}; FROBDECAY_DATA may name a directory to look in")


def _train(lines: Sequence[str], size: int) -> Any:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("text needs tokenizers: pip install 'frobdecay[experiments]'") from error
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


@dataclass(frozen=True)
class Parallel:
    """Sentences in two languages.

    Attributes:
        tokenizers: of source and target.
        splits: name -> (source, target) token ids of each sentence.
        references: name -> the target sentences as text.
    """

    tokenizers: tuple[Any, Any]
    splits: dict[str, list[tuple[Tensor, Tensor]]]
    references: dict[str, list[str]]

    def batches(
        self, split: str, tokens: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Padded batches of sentences of like length: source, target, positions in the split.

        Args:
            split: which.
            tokens: of the longer side, padding included, that a batch holds at most.
            generator: shuffles; in order of length without.
        """
        pairs = self.splits[split]
        jitter = [0.0] * len(pairs)
        if generator is not None:  # sentences of one length meet others every time
            jitter = torch.rand(len(pairs), generator=generator).tolist()
        order = sorted(range(len(pairs)), key=lambda k: (max(map(len, pairs[k])), jitter[k]))
        groups: list[list[int]] = [[]]
        for k in order:
            longest = max(map(len, pairs[k]))
            if groups[-1] and (len(groups[-1]) + 1) * longest > tokens:
                groups.append([])
            groups[-1].append(k)
        if generator is not None:
            shuffled = torch.randperm(len(groups), generator=generator).tolist()
            groups = [groups[k] for k in shuffled]
        for group in groups:
            sides = zip(*(pairs[k] for k in group), strict=True)
            source, target = (pad_sequence(side, True, PAD) for side in sides)
            yield source, target, group


def load_parallel(
    directory: str, languages: tuple[str, str], vocabulary: int, limit: int | None = None
) -> Parallel:
    """Read train, val and test in two languages, one sentence a line.

    Args:
        directory: with files such as ``train.de``.
        languages: endings of source and target.
        vocabulary: tokens of each language.
        limit: training sentences; all unless given.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the sides have different numbers of lines.
    """
    where = find(directory)
    texts = {
        (split, language): (where / f"{split}.{language}").read_text("utf-8").splitlines()
        for split in ("train", "val", "test")
        for language in languages
    }
    for split in ("train", "val", "test"):
        source, target = (len(texts[split, language]) for language in languages)
        if source != target:
            raise ValueError(f"{where}: expected as many {split} lines, got {source} and {target}")
    tokenizers = tuple(
        _train(texts["train", language][:limit], vocabulary) for language in languages
    )
    splits = {}
    for split in ("train", "val", "test"):
        stop = limit if split == "train" else None
        sides = [
            [
                torch.tensor([BOS, *encoding.ids, EOS])
                for encoding in tokenizer.encode_batch(texts[split, language][:stop])
            ]
            for tokenizer, language in zip(tokenizers, languages, strict=True)
        ]
        splits[split] = list(zip(*sides, strict=True))
    references = {split: texts[split, languages[1]] for split in ("val", "test")}
    return Parallel((tokenizers[0], tokenizers[1]), splits, references)


@dataclass(frozen=True)
class Running:
    """One long text.

    Attributes:
        tokenizer: that the tokens are from, or the characters' numbers.
        train, val, test: token ids, the first 90 %, the next and the last 5 %.
    """

    tokenizer: Any
    train: Tensor
    val: Tensor
    test: Tensor

    def batches(self, length: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Windows (size, length) of the training text, each token once, from a random start.

        A batch that would hold fewer is left out, unless it is the only one.
        """
        start = int(torch.randint(length, (), generator=generator))
        count = (len(self.train) - start) // length
        order = torch.randperm(count, generator=generator).to(self.train.device)
        groups = order.split(size)
        for chosen in groups[: max(1, count // size)]:
            yield self._cut(self.train, start + chosen * length, length)

    def windows(self, split: str, length: int, size: int) -> Iterator[Tensor]:
        """All of another split, in order."""
        text: Tensor = getattr(self, split)
        starts = torch.arange(0, len(text) - length + 1, length, device=text.device)
        for chosen in starts.split(size):
            yield self._cut(text, chosen, length)

    @staticmethod
    def _cut(text: Tensor, starts: Tensor, length: int) -> Tensor:
        return text[starts[:, None] + torch.arange(length, device=text.device)]


def load_running(
    source: str,
    vocabulary: int,
    limit: int | None = None,
    *,
    tokenizer: Any = None,
    device: str = "cpu",
) -> Running:
    """Read a text file.

    Args:
        source: the file.
        vocabulary: number of tokens.
        limit: characters to train on; all unless given.
        tokenizer: in place of one that is trained on the training text.
        device: where the tokens will be.

    Raises:
        FileNotFoundError: it is not there.
    """
    text = find(source).read_text("utf-8")
    first, second = int(0.9 * len(text)), int(0.95 * len(text))
    parts = text[:first][:limit], text[first:second], text[second:]
    tokenizer = tokenizer or _train(parts[0].splitlines(keepends=True), vocabulary)
    ids = [torch.tensor(tokenizer.encode(part).ids, device=device) for part in parts]
    return Running(tokenizer, *ids)


def load_characters(
    source: str, limit: int | None = None, *, device: str = "cpu"
) -> tuple[Running, int]:
    """Read a text file by characters.

    Args:
        source: the file.
        limit: characters to train on; all unless given.
        device: where the tokens will be.

    Returns:
        The text, and how many characters there are.

    Raises:
        FileNotFoundError: it is not there.
    """
    text = find(source).read_text("utf-8")
    numbers = {character: k for k, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text], device=device)
    first, second = int(0.9 * len(text)), int(0.95 * len(text))
    parts = ids[:first][:limit], ids[first:second], ids[second:]
    return Running(numbers, *parts), len(numbers)
