"""The student: the only network that travels, within the paper's bound of 102,553 parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARAMETER_BOUND = 102_553
"""1/1027 of the two-class TransUNet at 256 px, and below 1/127 of the two-class ResUNet: the paper's ratios."""

_WIDTHS = (12, 16, 20, 24, 30, 34)  # channels at full, 1/2, ..., 1/32 resolution


class SlimUNet(nn.Module):
    """Six-level U-Net of 101,646 parameters (3 channels, 2 classes), all of them in plain 3x3 convolutions.

    Few channels where pixels are many, more where they are few, so a step is cheap; six levels, so that the
    lowest convolutions see the whole of a 256-pixel image. Two convolutions per level going down, one going up.
    Input (N, in_channels, H, W) with H and W divisible by `size_divisor` (see `forward_padded`); output raw logits
    (N, classes, H, W). Source: Ronneberger et al., "U-Net", 2015, thinned.

    Parameters: 101,417 for one channel and one class, and 108 per further channel, 13 per further class.

    Args:
        in_channels: channels of the images.
        classes: number of logits; 1 for binary masks with a sigmoid, 2 or more for a softmax.
    """

    size_divisor = 2 ** (len(_WIDTHS) - 1)

    def __init__(self, in_channels: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.Sequential(_conv_bn_relu(above, width), _conv_bn_relu(width, width))
            for above, width in zip((in_channels, *_WIDTHS[:-1]), _WIDTHS, strict=True)
        )
        self.decoder = nn.ModuleList(
            _conv_bn_relu(below + width, width) for below, width in zip(_WIDTHS[:0:-1], _WIDTHS[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(_WIDTHS[0], classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return raw logits (N, classes, H, W) for images (N, in_channels, H, W)."""
        x = self.encoder[0](x)
        skips = []
        for level in list(self.encoder)[1:]:
            skips.append(x)
            x = level(F.max_pool2d(x, 2))
        for level in self.decoder:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = level(torch.cat([x, skips.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
