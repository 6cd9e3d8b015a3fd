"""LargeKernelUNet, a student of large depthwise kernels: it looks far with few parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fkd_med.errors import ConfigError


class InvertedBottleneck(nn.Module):
    """A large depthwise kernel looks around, two 1x1 convolutions think, and the input is added.

    Source: Liu et al., "A ConvNet for the 2020s", 2022, Figure 4, with batch norm for layer norm, as Sandler et al.,
    "MobileNetV2", 2018.

    Args:
        channels: channels of input and output.
        kernel: odd side of the depthwise kernel in pixels.
        expansion: how many times wider the inside of the two 1x1 convolutions is.
    """

    def __init__(self, channels: int, kernel: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * channels
        self.look = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.think = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.GELU(), nn.Conv2d(wide, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        out: Tensor = x + self.think(self.norm(self.look(x)))
        return out


class LargeKernelUNet(nn.Module):
    """U-Net of inverted bottlenecks with large depthwise kernels, 100,938 parameters (3 channels, 2 classes).

    A depthwise kernel costs its area once per channel, so kernels of 7 and 9 pixels where images are small let a
    thin network look far; the two 1x1 convolutions hold most parameters. Strided 2x2 convolutions go down, as in
    ConvNeXt, bilinear ones up. Input (N, in_channels, H, W) with H and W divisible by `size_divisor` (see
    `forward_padded`); output raw logits (N, classes, H, W). Source: Liu et al., "A ConvNet for the 2020s", 2022, and
    Ronneberger et al., "U-Net", 2015.

    Parameters: 100,785 for one channel and one class, and 72 per further channel, 9 per further class.

    Args:
        in_channels: channels of the images.
        classes: number of logits; 1 for binary masks with a sigmoid, 2 or more for a softmax.
        widths: channels at full, 1/2, 1/4, ... resolution.
        kernels: odd sides of the depthwise kernels at these resolutions, in pixels.
        expansion: of the inverted bottlenecks.
        blocks: inverted bottlenecks per level of the encoder.
        up_blocks: inverted bottlenecks per level of the decoder.

    Raises:
        ConfigError: when widths and kernels are not equally many, or a kernel is not odd.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        widths: tuple[int, ...] = (8, 12, 20, 28, 48),
        kernels: tuple[int, ...] = (3, 3, 7, 7, 9),
        expansion: int = 4,
        blocks: int = 2,
        up_blocks: int = 1,
    ) -> None:
        super().__init__()
        _check(widths, kernels)
        self.size_divisor = 2 ** (len(widths) - 1)
        levels = [
            nn.Sequential(
                *(_down(widths[level - 1], width) if level else _stem(in_channels, width)),
                *(InvertedBottleneck(width, kernel, expansion) for _ in range(blocks)),
            )
            for level, (width, kernel) in enumerate(zip(widths, kernels, strict=True))
        ]
        self.encoder = nn.ModuleList(levels[:-1])
        self.bottleneck = levels[-1]
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(below + width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                *(InvertedBottleneck(width, kernel, expansion) for _ in range(up_blocks)),
            )
            for below, width, kernel in zip(widths[:0:-1], widths[-2::-1], kernels[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return raw logits (N, classes, H, W) for images (N, in_channels, H, W)."""
        skips: list[Tensor] = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
        x = self.bottleneck(x)
        for level in self.decoder:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = level(torch.cat([x, skips.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _stem(in_channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]


def _down(above: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(above, width, 2, stride=2, bias=False), nn.BatchNorm2d(width)]


def _check(widths: Sequence[int], kernels: Sequence[int]) -> None:
    if len(widths) != len(kernels):
        raise ConfigError(
            f"LargeKernelUNet: {len(widths)} widths and {len(kernels)} kernels; give one of each per level."
        )
    for kernel in kernels:
        if kernel % 2 == 0:
            raise ConfigError(f"LargeKernelUNet: kernel {kernel} is not odd, so it has no middle pixel.")
