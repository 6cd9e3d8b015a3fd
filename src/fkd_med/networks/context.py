"""ContextUNet, a student that knows the whole image: dilated and global context, and gates that it controls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fkd_med.errors import ConfigError


class SqueezeExcitation(nn.Module):
    """Weigh each channel by a number in (0, 1) that depends on the mean of every channel.

    Without batch norm: a mean over the image leaves one value per image and channel, too few for statistics.
    Source: Hu et al., "Squeeze-and-Excitation Networks", 2018.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        narrow = max(4, channels // reduction)
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.excite = nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        mean = x.mean(dim=(2, 3), keepdim=True)
        out: Tensor = x * torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return out


class InvertedResidual(nn.Module):
    """Expand by 1x1, look by 3x3 depthwise, weigh channels, project by 1x1; the input is added where shapes agree.

    Source: Sandler et al., "MobileNetV2", 2018, Figure 3; squeeze-and-excitation in it as Howard et al.,
    "Searching for MobileNetV3", 2019.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, expansion: int = 3) -> None:
        super().__init__()
        wide = expansion * in_channels
        self.adds = stride == 1 and in_channels == out_channels
        self.body = nn.Sequential(
            *_conv(in_channels, wide, 1),
            nn.ReLU(),
            *_conv(wide, wide, 3, stride=stride, groups=wide),
            nn.ReLU(),
            SqueezeExcitation(wide, 2 * expansion),
            *_conv(wide, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out: Tensor = self.body(x)
        return x + out if self.adds else out


class DilatedContext(nn.Module):
    """Depthwise 3x3 convolutions of several dilations and the mean of the image, joined and added to the input.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (DeepLabv3), 2017, Figure 5.
    """

    def __init__(self, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*_conv(channels, channels, 3, dilation=dilation, groups=channels), nn.ReLU())
            for dilation in dilations
        )
        self.image = nn.Conv2d(channels, channels, 1)
        self.join = nn.Sequential(*_conv(channels * len(dilations), channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        image = self.image(x.mean(dim=(2, 3), keepdim=True))
        joined = self.join(torch.cat([branch(x) for branch in self.branches], dim=1))
        return F.relu(x + joined + image)


class GatedUp(nn.Module):
    """Bring the coarse map up, let it choose where the skip may speak, add both, refine.

    Source: Oktay et al., "Attention U-Net", 2018, Eq. 1, without its normalisation over the image.
    """

    def __init__(self, in_channels: int, skip_channels: int, expansion: int) -> None:
        super().__init__()
        self.coarse = nn.Sequential(*_conv(in_channels, skip_channels, 1))
        self.query = nn.Conv2d(skip_channels, skip_channels, 1)
        self.gate = nn.Conv2d(skip_channels, 1, 1)
        self.refine = InvertedResidual(skip_channels, skip_channels, expansion=expansion)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map x (N, in, H, W) and skip (N, skip, 2H, 2W) to (N, skip, 2H, 2W)."""
        x = F.interpolate(self.coarse(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        gate = torch.sigmoid(self.gate(F.relu(x + self.query(skip))))
        out: Tensor = self.refine(x + skip * gate)
        return out


class ContextUNet(nn.Module):
    """U-Net of inverted residuals with context and gated skips, 101,189 parameters (3 channels, 2 classes).

    Most blocks are at 1/4 to 1/16, where a polyp is a few pixels wide; the lowest level compares what it sees with
    the mean of the image. Coarse maps decide where a skip may speak, so that texture alone makes no foreground. Input
    (N, in_channels, H, W) with H and W divisible by `size_divisor` (see `forward_padded`); output raw logits
    (N, classes, H, W). Sources: those of its parts.

    Parameters: 101,036 for one channel and one class, and 72 per further channel, 9 per further class.

    Args:
        in_channels: channels of the images.
        classes: number of logits; 1 for binary masks with a sigmoid, 2 or more for a softmax.
        widths: channels at full, 1/2, 1/4, ... resolution.
        blocks: inverted residuals at each of these resolutions but the first.
        expansion: how many times wider the inside of an inverted residual is.
        dilations: of the branches at the lowest level.

    Raises:
        ConfigError: when there is not one number of blocks per level below the first.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        widths: tuple[int, ...] = (8, 12, 20, 32, 47),
        blocks: tuple[int, ...] = (1, 2, 3, 2),
        expansion: int = 3,
        dilations: tuple[int, ...] = (1, 2, 4),
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths) - 1:
            raise ConfigError(
                f"ContextUNet: {len(widths)} widths and {len(blocks)} blocks; give blocks of every level but the first."
            )
        self.size_divisor = 2 ** (len(widths) - 1)
        stem = nn.Sequential(*_conv(in_channels, widths[0], 3), nn.ReLU())
        levels = [
            nn.Sequential(
                InvertedResidual(above, width, stride=2, expansion=expansion),
                *(InvertedResidual(width, width, expansion=expansion) for _ in range(count - 1)),
            )
            for above, width, count in zip(widths[:-1], widths[1:], blocks, strict=True)
        ]
        self.encoder = nn.ModuleList([stem, *levels[:-1]])
        self.bottleneck = nn.Sequential(*levels[-1], DilatedContext(widths[-1], dilations))
        self.decoder = nn.ModuleList(
            GatedUp(below, width, expansion) for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
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
            x = level(x, skips.pop())
        logits: Tensor = self.head(x)
        return logits


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=groups,
        bias=False,
    )
    return [convolution, nn.BatchNorm2d(out_channels)]
