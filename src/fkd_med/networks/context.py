"""ContextUNet, a student of plain convolutions above and of context below: it compares what it sees with the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fkd_med.errors import ConfigError


class ContextUNet(nn.Module):
    """Plain U-Net with image context at its two lowest levels, 100,623 parameters (3 channels, 2 classes).

    Where images are large it is SlimUNet: plain 3x3 convolutions, quick and easy to train, cost few parameters over
    few channels. Where they are small, and a polyp a few pixels wide, depthwise 5x5 kernels in inverted residuals look
    further for less, squeeze-and-excitation weighs channels by the mean of the image, and the bottleneck joins several
    dilations with that mean. Input (N, in_channels, H, W) with H and W divisible by `size_divisor` (see
    `forward_padded`); output raw logits (N, classes, H, W). Sources: Ronneberger et al., "U-Net", 2015; below, those
    of its parts; plain convolutions first as Tan and Le, "EfficientNetV2", 2021.

    Parameters: 100,394 for one channel and one class, and 108 per further channel, 13 per further class.

    Args:
        in_channels: channels of the images.
        classes: number of logits; 1 for binary masks with a sigmoid, 2 or more for a softmax.
        widths: channels at full, 1/2, 1/4, ... resolution.
        plain: levels of plain convolutions, from full resolution down; inverted residuals follow.
        dilations: of the branches at the lowest level.

    Raises:
        ConfigError: when not one level is plain, or no level is left for inverted residuals.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        widths: tuple[int, ...] = (12, 16, 20, 24, 30, 40),
        plain: int = 4,
        dilations: tuple[int, ...] = (1, 2),
    ) -> None:
        super().__init__()
        if not 0 < plain < len(widths):
            raise ConfigError(f"ContextUNet: plain {plain} of {len(widths)} levels; use 1 to {len(widths) - 1}.")
        self.size_divisor = 2 ** (len(widths) - 1)
        levels = [
            _plain_level(above, width) if level < plain else _inverted_level(above, width)
            for level, (above, width) in enumerate(zip((in_channels, *widths[:-1]), widths, strict=True))
        ]
        self.encoder = nn.ModuleList(levels[:-1])
        self.bottleneck = nn.Sequential(*levels[-1], DilatedContext(widths[-1], dilations))
        self.decoder = nn.ModuleList(
            _conv_bn_relu(below + width, width, 3) for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
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


class SqueezeExcitation(nn.Module):
    """Weigh each channel by a number in (0, 1) that depends on the mean of every channel.

    Without batch norm: a mean over the image leaves one value per image and channel, too few for statistics.
    Source: Hu et al., "Squeeze-and-Excitation Networks", 2018, Eq. 3.

    Args:
        channels: channels of input and output.
        narrow: channels between.
    """

    def __init__(self, channels: int, narrow: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.excite = nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        mean = x.mean(dim=(2, 3), keepdim=True)
        out: Tensor = x * torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return out


class InvertedResidual(nn.Module):
    """Expand by 1x1, look by 5x5 depthwise, weigh channels, project by 1x1, add the input.

    Source: Sandler et al., "MobileNetV2", 2018, Figure 3; with squeeze-and-excitation as Howard et al., "Searching for
    MobileNetV3", 2019, Figure 4.

    Args:
        channels: channels of input and output.
        expansion: how many times wider the inside is.
    """

    def __init__(self, channels: int, expansion: int = 3) -> None:
        super().__init__()
        wide = expansion * channels
        self.body = nn.Sequential(
            _conv_bn_relu(channels, wide, 1),
            _conv_bn_relu(wide, wide, 5, groups=wide),
            SqueezeExcitation(wide, max(4, channels // 4)),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        out: Tensor = x + self.body(x)
        return out


class DilatedContext(nn.Module):
    """Depthwise 3x3 convolutions of several dilations over half the channels, and the mean of the image, added.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (DeepLabv3), 2017, Figure 5;
    its branch of the image's mean without batch norm, as in `SqueezeExcitation`.

    Args:
        channels: channels of input and output.
        dilations: of the branches.
    """

    def __init__(self, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        narrow = channels // 2
        self.squeeze = _conv_bn_relu(channels, narrow, 1)
        self.branches = nn.ModuleList(
            _conv_bn_relu(narrow, narrow, 3, groups=narrow, dilation=dilation) for dilation in dilations
        )
        self.join = nn.Sequential(nn.Conv2d(narrow * len(dilations), channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.image = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        narrow = self.squeeze(x)
        joined = self.join(torch.cat([branch(narrow) for branch in self.branches], dim=1))
        return F.relu(x + joined + self.image(x.mean(dim=(2, 3), keepdim=True)))


def _plain_level(above: int, width: int) -> nn.Sequential:
    return nn.Sequential(_conv_bn_relu(above, width, 3), _conv_bn_relu(width, width, 3))


def _inverted_level(above: int, width: int) -> nn.Sequential:
    return nn.Sequential(_conv_bn_relu(above, width, 1), InvertedResidual(width))


def _conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=groups,
        bias=False,
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())
