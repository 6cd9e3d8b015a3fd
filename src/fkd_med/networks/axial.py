"""AxialUNet, the cheapest student: it looks along rows and along columns."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fkd_med.errors import ConfigError


class AxialDepthwise(nn.Module):
    """The input plus two depthwise convolutions of it, one along rows and one along columns.

    Source: Dinh et al., ULite, 2023, Figure 2.

    Args:
        channels: channels of input and output.
        kernel: odd length of row and column, in pixels.
        dilation: distance of the pixels that they look at.
    """

    def __init__(self, channels: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        reach = dilation * (kernel // 2)
        self.rows = nn.Conv2d(
            channels, channels, (1, kernel), padding=(0, reach), dilation=dilation, groups=channels, bias=False
        )
        self.columns = nn.Conv2d(
            channels, channels, (kernel, 1), padding=(reach, 0), dilation=dilation, groups=channels, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        out: Tensor = x + self.rows(x) + self.columns(x)
        return out


class AxialContext(nn.Module):
    """Axial convolutions of 3 pixels and several dilations beside each other, over fewer channels, then joined.

    Source: Dinh et al., ULite, 2023, the bottleneck.

    Args:
        channels: channels of input and output.
        dilations: of the branches; each has its share of the channels.
    """

    def __init__(self, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        narrow = channels // len(dilations)
        self.squeeze = _pointwise(channels, narrow)
        self.branches = nn.ModuleList(AxialDepthwise(narrow, 3, dilation) for dilation in dilations)
        self.join = _pointwise(narrow * len(dilations), channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        narrow = self.squeeze(x)
        out: Tensor = self.join(torch.cat([branch(narrow) for branch in self.branches], dim=1))
        return out


class AxialUNet(nn.Module):
    """U-Net of axial depthwise convolutions, 101,986 parameters (3 channels, 2 classes).

    A row and a column of 7 pixels cost 14 numbers per channel where a square costs 49, so almost all parameters are
    in 1x1 convolutions and six levels can be wide. Input (N, in_channels, H, W) with H and W divisible by
    `size_divisor` (see `forward_padded`); output raw logits (N, classes, H, W). Source: Dinh et al., "1M parameters
    are enough? A lightweight CNN-based model for medical image segmentation" (ULite), 2023, narrowed to the bound,
    with a 3x3 stem.

    Parameters: 101,833 for one channel and one class, and 72 per further channel, 9 per further class.

    Args:
        in_channels: channels of the images.
        classes: number of logits; 1 for binary masks with a sigmoid, 2 or more for a softmax.
        widths: channels at full, 1/2, 1/4, ... resolution.
        kernel: odd length of the rows and columns, in pixels.
        dilations: of the branches at the lowest level.

    Raises:
        ConfigError: when the kernel is not odd.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        widths: tuple[int, ...] = (8, 16, 32, 64, 96, 128),
        kernel: int = 7,
        dilations: tuple[int, ...] = (1, 2, 3),
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ConfigError(f"AxialUNet: kernel {kernel} is not odd, so it has no middle pixel.")
        self.size_divisor = 2 ** (len(widths) - 1)
        stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.GELU()
        )
        levels = [
            nn.Sequential(AxialDepthwise(above, kernel), _pointwise(above, width)) for above, width in pairwise(widths)
        ]
        self.encoder = nn.ModuleList([stem, *levels[:-1]])
        self.bottleneck = nn.Sequential(*levels[-1], AxialContext(widths[-1], dilations))
        self.decoder = nn.ModuleList(
            nn.Sequential(_pointwise(below + width, width), AxialDepthwise(width, kernel), _pointwise(width, width))
            for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return raw logits (N, classes, H, W) for images (N, in_channels, H, W)."""
        skips: list[Tensor] = []
        for level in self.encoder:
            x = level(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        x = self.bottleneck(F.max_pool2d(x, 2))
        for level in self.decoder:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = level(torch.cat([x, skips.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.GELU())
