"""VGG-19 with batch normalization for small images, without fully connected hidden layers.

(Simonyan and Zisserman, arXiv:1409.1556, configuration E.)
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["VGG"]

_STAGES = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))
"""Channels ÷ the first stage's, and convolutions."""


class VGG(nn.Module):
    """Sixteen 3×3 convolutions in five stages, each followed by a 2×2 maximum, and a classifier.

    Args:
        channels: of the images.
        classes: outputs.
        width: channels of the first stage.

    Example:
        >>> sum(p.numel() for p in VGG().parameters())
        20035018
    """

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for factor, count in _STAGES:
            for _ in range(count):
                layers += [
                    nn.Conv2d(channels, factor * width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(factor * width),
                    nn.ReLU(inplace=True),
                ]
                channels = factor * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, channels, H, W), H and W at least 32, to scores (N, classes)."""
        return self.fc(self.features(x).mean(dim=(2, 3)))
