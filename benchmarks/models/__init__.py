"""The models of the paper's experiments: table MODELS, name -> how to make it.

All are written for images of any number of channels and classes; which of their weights the paper
factorizes is said by ``DENSE``: the selectors of those that it leaves as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from benchmarks.models.ranks import output_ranks, selected_ratio
from benchmarks.models.resnet import ResNet, resnet
from benchmarks.models.separable import separate_
from benchmarks.models.transformer import LanguageModel, TranslationTransformer
from benchmarks.models.vgg import VGG
from benchmarks.models.wide_resnet import WideResNet

__all__ = [
    "DENSE",
    "LanguageModel",
    "MODELS",
    "ResNet",
    "TranslationTransformer",
    "VGG",
    "WideResNet",
    "output_ranks",
    "selected_ratio",
    "resnet",
    "separate_",
]

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x2": partial(resnet, 8, width=32),
    "resnet32x2": partial(resnet, 32, width=64, shortcut="convolution"),
    "vgg19": VGG,
    "vgg19-16": partial(VGG, width=16),
    "wrn28-10": WideResNet,
    "wrn16-4": partial(WideResNet, 16, 4),
    "wrn10-2": partial(WideResNet, 10, 2),
}

DENSE: Mapping[str, list[str]] = {
    **{name: ["conv1", "fc"] for name in MODELS},
    **{name: ["features.0", "fc"] for name in ("vgg19", "vgg19-16")},
}
