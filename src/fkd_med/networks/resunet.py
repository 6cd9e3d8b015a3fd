"""ResUNet, the deep residual U-Net: the convolutional teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two pre-activated 3x3 convolutions beside a 3x3 convolution with batch norm.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut; 2 halves the resolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out: Tensor = self.residual(x) + self.shortcut(x)
        return out


class UpBlock(nn.Module):
    """Double the resolution with a transposed convolution, concatenate the skip, refine."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels, kernel_size=2, stride=2)
        self.refine = ResidualBlock(in_channels + skip_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map x (N, in, H, W) and skip (N, skip, 2H, 2W) to (N, out, 2H, 2W)."""
        out: Tensor = self.refine(torch.cat([self.up(x), skip], dim=1))
        return out


class ResUNet(nn.Module):
    """Deep residual U-Net, 13.0 million parameters at width 64, 70.9 GMAC at 256x256.

    Input (N, in_channels, H, W) with H and W divisible by `size_divisor` (see `forward_padded`); output raw
    logits (N, classes, H, W). Source: Zhang, Liu and Wang, "Road Extraction by Deep Residual U-Net", 2018.

    Args:
        in_channels: channels of the images.
        classes: number of logits; 1 for binary masks with a sigmoid, 2 or more for a softmax.
        width: channels at full resolution; the levels below have 2, 4 and 8 times as many. The paper's is 64;
            parameters grow with its square (16 gives 0.82 million).
    """

    size_divisor = 8

    def __init__(self, in_channels: int = 3, classes: int = 1, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.stem_shortcut = nn.Conv2d(in_channels, width, 3, padding=1)
        self.encoder = nn.ModuleList(
            [ResidualBlock(width, 2 * width, stride=2), ResidualBlock(2 * width, 4 * width, stride=2)]
        )
        self.bridge = ResidualBlock(4 * width, 8 * width, stride=2)
        self.decoder = nn.ModuleList(
            [
                UpBlock(8 * width, 4 * width, 4 * width),
                UpBlock(4 * width, 2 * width, 2 * width),
                UpBlock(2 * width, width, width),
            ]
        )
        self.head = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return raw logits (N, classes, H, W) for images (N, in_channels, H, W)."""
        x = self.stem(x) + self.stem_shortcut(x)  # (N, width, H, W)
        skips = [x]
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        x = self.bridge(x)  # (N, 8 width, H/8, W/8)
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            x = block(x, skip)
        logits: Tensor = self.head(x)
        return logits
