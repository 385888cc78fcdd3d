"""Does a small model keep more by the default budget than with every weight factorized?

Six families that differ in what their first and last weights are, each trained for a short while
from scratch, by AdamW along half a cosine, factors with Frobenius decay:

    cnn, resnet, mlp, vit    images of digits
    words                    an encoder that names the masked word of a caption, among the 30 most
                             frequent ones that are not listed in ``_COMMON``
    characters               a language model that names the next character

    python -m benchmarks.defaults --threads 1
    python -m benchmarks.defaults --families cnn,mlp --seeds 1

The texts are multi30k/train.en and tinyshakespeare.txt below FROBDECAY_DATA. At each ratio all
weights are factorized (``include="*"``), or those that the default rule chooses. The rule: one is
better in a family if its mean accuracy over the seeds is higher by more than the larger of the two
standard deviations; the default should be worse nowhere.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import cos, pi
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import frobdecay
from benchmarks import measure
from benchmarks.data import load
from benchmarks.experiments.text import find, load_characters
from benchmarks.measure import Report
from benchmarks.models import resnet

__all__ = ["FAMILIES", "Family", "main"]

_COMMON = (
    "a an the in on of with and is are at to his her their two from for by while wearing as it its "
    "that other up front"
)
_WORDS, _LONGEST, _NAMED = 3000, 24, 30
_LENGTH = 64  # of texts, in characters
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Family:
    """A model and how it is trained.

    Attributes:
        title: for the table.
        make: makes the dense model.
        batches: of training, without end: from a generator, so many at once.
        test: inputs and targets.
        steps, batch, lr: of the training.
    """

    title: str
    make: Callable[[], nn.Module]
    batches: Callable[[torch.Generator, int], Iterator[Pair]]
    test: Callable[[], Pair]
    steps: int
    batch: int = 64
    lr: float = 4e-3


# --- models -------------------------------------------------------------------------------------


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    before = 1
    for k, width in enumerate((16, 16, 32, 32, 64, 64)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if k in (1, 3) else []
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def _mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU()]
    layers += [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


class _Patches(nn.Module):
    """A ViT of 2×2 patches."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks, self.norm = _blocks(width, 2), nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x).mean(1)))  # type: ignore[no-any-return]


class _Text(nn.Module):
    """Tokens (N, T) to scores of a class, or causal ones of every next token."""

    def __init__(self, tokens: int, outputs: int, width: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(_LENGTH if causal else _LONGEST, width)
        self.blocks, self.norm = _blocks(width, layers), nn.LayerNorm(width)
        self.head, self.causal = nn.Linear(width, outputs, bias=not causal), causal

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        if not self.causal:
            return self.head(self.norm(self.blocks(x).mean(1)))  # type: ignore[no-any-return]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.norm(self.blocks(x, mask, is_causal=True)))  # type: ignore[no-any-return]


def _blocks(width: int, layers: int) -> nn.Module:
    one = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(one, layers, enable_nested_tensor=False)


# --- data ---------------------------------------------------------------------------------------


def _shuffled(train: Pair, generator: torch.Generator, size: int) -> Iterator[Pair]:
    while True:
        for chosen in torch.randperm(len(train[1]), generator=generator).split(size):
            yield train[0][chosen], train[1][chosen]


@lru_cache
def _digits() -> tuple[Pair, Pair]:
    data = load("digits")
    (images, labels), (tested, right) = data.train, data.test
    return (data.normalize(images), labels), (data.normalize(tested), right)


@lru_cache
def _captions() -> tuple[Pair, Pair]:
    """Captions with one word masked, and which; the last 1,000 are tested."""
    text = find("multi30k/train.en").read_text("utf-8").lower().splitlines()[:6000]
    lines = [re.findall(r"\w+", line)[:_LONGEST] for line in text]
    often = Counter(word for line in lines for word in line).most_common(_WORDS - 2)
    numbers = {word: k for k, (word, _) in enumerate(often, 2)}  # 0 pads, 1 masks
    named = [word for word, _ in often if word not in _COMMON.split()][:_NAMED]
    generator = torch.Generator().manual_seed(0)
    inputs, targets = [], []
    for line in lines:
        if places := [k for k, word in enumerate(line) if word in named]:
            place = places[int(torch.randint(len(places), (), generator=generator))]
            targets.append(named.index(line[place]))
            ids = [numbers.get(word, 1) if k != place else 1 for k, word in enumerate(line)]
            inputs.append(ids + [0] * (_LONGEST - len(ids)))
    x, y = torch.tensor(inputs), torch.tensor(targets)
    return (x[:-1000], y[:-1000]), (x[-1000:], y[-1000:])


@lru_cache
def _characters() -> tuple[Tensor, Tensor]:
    text, _ = load_characters("tinyshakespeare.txt")
    return text.train, text.test


def _windows(text: Tensor, starts: Tensor) -> Pair:
    found = text[starts[:, None] + torch.arange(_LENGTH + 1)]
    return found[:, :-1], found[:, 1:]


def _next_characters(generator: torch.Generator, size: int) -> Iterator[Pair]:
    text, _ = _characters()
    while True:
        yield _windows(text, torch.randint(len(text) - _LENGTH, (size,), generator=generator))


def _last_characters() -> Pair:
    _, text = _characters()
    return _windows(text, torch.arange(0, len(text) - _LENGTH, 5 * _LENGTH))


def _of_digits(title: str, make: Callable[[], nn.Module], epochs: int, lr: float = 4e-3) -> Family:
    def batches(generator: torch.Generator, size: int) -> Iterator[Pair]:
        return _shuffled(_digits()[0], generator, size)

    return Family(title, make, batches, lambda: _digits()[1], 16 * epochs, lr=lr)


FAMILIES = {
    "cnn": _of_digits("CNN, six layers", _cnn, 4),
    "resnet": _of_digits("ResNet-8", partial(resnet, 8, width=8, channels=1, classes=10), 6, 6e-3),
    "mlp": _of_digits("MLP, four layers", _mlp, 10, 3e-3),
    "vit": _of_digits("ViT, two blocks", _Patches, 8),
    "words": Family(
        "encoder with word embeddings",
        lambda: _Text(_WORDS, _NAMED, 48, 1, causal=False),
        lambda generator, size: _shuffled(_captions()[0], generator, size),
        lambda: _captions()[1],
        300,
    ),
    "characters": Family(
        "character language model",
        lambda: _Text(65, 65, 64, 2, causal=True),
        _next_characters,
        _last_characters,
        400,
        batch=16,
    ),
}


# --- runs ---------------------------------------------------------------------------------------


def _run(family: Family, seed: int, **size: Any) -> tuple[float, float]:
    """Test accuracy in percent, and parameters ÷ those of the dense model."""
    torch.manual_seed(seed)
    model = family.make()
    kept = frobdecay.factorize(model, **size).ratio if size else 1.0
    base = torch.optim.AdamW(model.parameters(), lr=family.lr, weight_decay=0.01)
    optimizer = frobdecay.FrobeniusDecay(base, model) if size else base

    def part(step: int) -> float:
        return min(1.0, 20 * (step + 1) / family.steps) * (1 + cos(pi * step / family.steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, part)
    generator = torch.Generator().manual_seed(seed)
    batches = family.batches(generator, family.batch)
    for _ in range(family.steps):
        x, y = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    x, y = family.test()
    with torch.no_grad():
        found = torch.cat([model(some).argmax(-1) for some in x.split(256)])
    return 100 * float((found == y).float().mean()), kept


def _measure(family: Family, seeds: int, ratios: Sequence[float]) -> dict[str, Any]:
    """A row of the table: mean accuracy ± standard deviation, and which is better."""

    def column(**size: Any) -> list[float]:
        return [_run(family, seed, **size)[0] for seed in range(seeds)]

    row: dict[str, Any] = {"model": family.title, "dense": _shown(column())}
    for ratio in ratios:
        try:
            every = column(ratio=ratio, include="*")
        except ValueError:  # the budget cannot be met that way
            every = []
        default = column(ratio=ratio)
        row |= {f"{ratio:g}: all": _shown(every), f"{ratio:g}: default": _shown(default)}
        row[f"{ratio:g}: better"] = _better(every, default) if every else "default"
    return row


def _shown(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}" if values else "not to be had"


def _better(every: Sequence[float], default: Sequence[float]) -> str:
    spread = max(stdev(every), stdev(default)) if len(every) > 1 else 0.0
    gain = fmean(default) - fmean(every)
    return "undecided" if abs(gain) <= spread else "default" if gain > 0 else "all"


def _parser() -> argparse.ArgumentParser:
    made = measure.parser("defaults", __doc__ or "", device=False)
    measure.add_names(made, "--families", FAMILIES)
    ratios = {"type": measure.numbers, "default": "0.25,0.1"}
    made.add_argument("--ratios", **ratios, help="default: %(default)s")
    made.add_argument("--seeds", type=measure.count, default=3, help="default: %(default)s")
    return made


@measure.script(_parser)
def main(report: Report, options: argparse.Namespace) -> None:
    """Measure the families."""
    rows = []
    for name in options.families:
        rows.append(_measure(FAMILIES[name], options.seeds, options.ratios))
        report.console.print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    report.table(f"Test accuracy in percent, {options.seeds} seeds", rows)
    better = [row[f"{ratio:g}: better"] for row in rows for ratio in options.ratios]
    target = measure.Target("plans in which all is better", better.count("all"), 0, unit="")
    report.targets.append(target)


if __name__ == "__main__":
    main()
