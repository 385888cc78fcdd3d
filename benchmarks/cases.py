"""Shapes named after models: one table for all scripts, so that they speak of the same things.

pairs        what the penalty sees: (m, n, r) of every product of a model
matrices     what an initialization sees: the same, without the rank's factors
LINEARS      single layers n → m
CONVS        single 3×3 convolutions of ResNets and VGG
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.models import resnet

__all__ = ["CASES", "CONVS", "LINEARS", "Case", "Conv", "Shape", "stack", "suites"]

Shape = tuple[int, int, int]
FRACTION = 0.111
"""Of the smaller side: a rank at which CIFAR ResNets keep about a quarter of their parameters."""


@dataclass(frozen=True)
class Case:
    """The products of a model.

    Attributes:
        title: for tables.
        make: gives (m, n, r) of every product, in the model's order.
        large: too large for a CPU's patience; runs where it is named or on an accelerator.
        suite: whether it runs unless cases are named.
    """

    title: str
    make: Callable[[], list[Shape]]
    large: bool = False
    suite: bool = True

    @cached_property
    def pairs(self) -> list[Shape]:
        """(m, n, r) of every product."""
        return self.make()

    @property
    def parameters(self) -> int:
        """Entries of all factors."""
        return sum(r * (m + n) for m, n, r in self.pairs)

    @property
    def flops(self) -> int:
        """What the Gram route needs: two Grams and two updates a product, 4r²(m+n)."""
        return sum(4 * r**2 * (m + n) for m, n, r in self.pairs)

    def factors(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> list[tuple[Tensor, Tensor]]:
        """Random U (m×r) and V (n×r) of every product."""
        return [
            (_normal(m, r, device, dtype), _normal(n, r, device, dtype)) for m, n, r in self.pairs
        ]


def _normal(rows: int, r: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, r, device=device, dtype=dtype) * rows**-0.5


def _resnet(depth: int) -> list[Shape]:
    """The 3×3 convolutions as (3o × 3i) matrices, but the first."""
    shapes = []
    with torch.device("meta"):
        convolutions = [m for m in resnet(depth).modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions[1:]:
        m, n = 3 * conv.out_channels, 3 * conv.in_channels
        shapes.append((m, n, max(1, round(FRACTION * min(m, n)))))
    return shapes


def _transformer(layers: int, matrices: list[tuple[int, int]], r: int) -> list[Shape]:
    return [(m, n, r) for _ in range(layers) for m, n in matrices]


_BERT = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
_LLAMA = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]

CASES: Mapping[str, Case] = {
    "resnet32": Case("ResNet-32, spatial 3×3 convolutions", lambda: _resnet(32)),
    "resnet110": Case("ResNet-110, spatial 3×3 convolutions", lambda: _resnet(110)),
    "bert": Case("BERT-base, linear layers, r = 192", lambda: _transformer(12, _BERT, 192)),
    "lora": Case("LoRA, 128 layers 4096², r = 16", lambda: _transformer(128, [(4096, 4096)], 16)),
    "lora7b": Case("LoRA, 7B, r = 16", lambda: _transformer(32, _LLAMA, 16), large=True),
    "tiny": Case("two sizes, for tests", lambda: [(12, 8, 2)] * 3 + [(9, 6, 3)], suite=False),
}


def suites(device: torch.device) -> list[str]:
    """Keys of the cases that are models, of those that a device has room for."""
    cpu = device.type == "cpu"
    return [key for key, case in CASES.items() if case.suite and not (case.large and cpu)]


def stack(layers: int, width: int, r: int) -> Case:
    """Equal square products, for scaling."""
    return Case(f"{layers} of {width}², r = {r}", lambda: [(width, width, r)] * layers)


@dataclass(frozen=True)
class Conv:
    """A 3×3 convolution with padding 1 and as many channels out as in.

    Attributes:
        channels: in and out.
        size: of the square image.
        batch: images.
    """

    channels: int
    size: int
    batch: int


LINEARS: Mapping[str, tuple[int, int]] = {  # name -> (n, m)
    "1024→1024": (1024, 1024),
    "768→3072": (768, 3072),
    "4096→4096": (4096, 4096),
}

CONVS: Mapping[str, Conv] = {
    "ResNet-32 stage 1": Conv(16, 32, 128),
    "ResNet-32 stage 3": Conv(64, 8, 128),
    "VGG-19 block 3": Conv(256, 8, 32),
    "VGG-19 block 5": Conv(512, 2, 128),
}
