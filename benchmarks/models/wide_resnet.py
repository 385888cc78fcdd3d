"""Wide residual networks with pre-activation (Zagoruyko and Komodakis, arXiv:1605.07146)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

__all__ = ["PreActivationBlock", "WideResNet"]


class PreActivationBlock(nn.Module):
    """Normalization and ReLU before each of two 3×3 convolutions, beside a shortcut.

    Args:
        in_channels: channels of the input.
        channels: of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = (
            None
            if in_channels == channels
            else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return skip + self.conv2(relu(self.bn2(self.conv1(out))))


class WideResNet(nn.Module):
    """A convolution, three stages of pre-activation blocks, a classifier.

    Args:
        depth: 6k + 4 for k blocks a stage.
        factor: channels of the stages ÷ (16, 32, 64).
        channels: of the images.
        classes: outputs.

    Raises:
        ValueError: there is no such depth.

    Example:
        >>> sum(p.numel() for p in WideResNet(10, 2).parameters())
        303706
    """

    def __init__(
        self, depth: int = 28, factor: int = 10, channels: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"expected a depth of 6k + 4, such as 10, 16 or 28, got {depth}")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        stages, width = [], 16
        for k in range(3):
            out = 16 * factor * 2**k
            blocks = [PreActivationBlock(width, out, 1 if k == 0 else 2)]
            blocks += [PreActivationBlock(out, out, 1) for _ in range((depth - 4) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
            width = out
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, channels, H, W) to scores (N, classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(relu(self.bn(x)).mean(dim=(2, 3)))
