"""The small residual networks for CIFAR of He et al. (arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

__all__ = ["BasicBlock", "ResNet", "resnet"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut.

    Args:
        in_channels: channels of the input.
        channels: channels of the output; those that the input lacks are zeros in the shortcut.
        stride: of the first convolution and, by subsampling, of the shortcut.
        shortcut: "padding", without parameters, or a 1×1 "convolution" where channels change.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: str = "padding"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
            if shortcut == "convolution" and self.new_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            return relu(out + self.downsample(x))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return relu(out + shortcut)


class ResNet(nn.Module):
    """A convolution, three stages of blocks at widths w, 2w, 4w, mean over space, a classifier.

    Args:
        blocks: a stage.
        width: channels of the first stage.
        channels: of the images.
        classes: outputs.
        shortcut: of the blocks.
    """

    def __init__(
        self,
        blocks: int,
        width: int = 16,
        channels: int = 3,
        classes: int = 10,
        shortcut: str = "padding",
    ) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(blocks, width, width, stride=1)
        self.layer2 = self._stage(blocks, width, 2 * width, stride=2)
        self.layer3 = self._stage(blocks, 2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def _stage(self, blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, self.shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, channels, H, W) to scores (N, classes)."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.mean(x, dim=(2, 3)))


def resnet(
    depth: int,
    *,
    width: int = 16,
    channels: int = 3,
    classes: int = 10,
    shortcut: str = "padding",
) -> ResNet:
    """Make the ResNet with so many weighted layers.

    Args:
        depth: 6k + 2 for k blocks a stage: 8, 14, 20, 32, 44, 56, 110.
        width: channels of the first stage.
        channels: of the images.
        classes: outputs.
        shortcut: "padding" or "convolution", see ``BasicBlock``.

    Raises:
        ValueError: there is no such depth or shortcut.

    Example:
        >>> sum(p.numel() for p in resnet(20).parameters())
        269722
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"expected a depth of 6k + 2, such as 8, 14, 20 or 32, got {depth}")
    if shortcut not in ("padding", "convolution"):
        raise ValueError(f"expected shortcut to be 'padding' or 'convolution', got {shortcut!r}")
    return ResNet((depth - 2) // 6, width, channels, classes, shortcut)
