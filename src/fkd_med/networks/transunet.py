"""TransUNet, a vision transformer over convolutional features with a U-Net decoder: the hybrid teacher."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fkd_med.errors import ConfigError, first_line

_REDUCTION = 16  # of the trunk: one token per 16x16 pixels
_DECODER = (512, 256, 128, 64, 16)


class TransUNet(nn.Module):
    """TransUNet R50-ViT-B/16 with three skips, 105 million parameters, 38.4 GMAC at 256x256.

    Input (N, in_channels, img_size, img_size); output raw logits (N, classes, img_size, img_size). The position
    embedding fixes the size, so `img_size` is the datamodule's image size. One-channel images are repeated to
    the three channels that the trunk was designed (and pretrained) for. Source: Chen et al., "TransUNet:
    Transformers Make Strong Encoders for Medical Image Segmentation", 2021.

    Args:
        in_channels: channels of the images, 1 or 3.
        classes: number of logits; 1 for binary masks with a sigmoid, 2 or more for a softmax.
        img_size: height and width of the images in pixels, a multiple of 16.
        pretrained: start the trunk from timm's weights, which needs a network or timm's cache.
        trunk: timm name of a hybrid vision transformer over the three-stage ResNet; a tag chooses the weights
            (``vit_base_r50_s16_224.orig_in21k``).
        trunk_args: more arguments of that transformer; ``{depth: 2, embed_dim: 192, num_heads: 3}`` is a trunk
            for tests and small machines.
        decoder_channels: channels of the decoder at 1/16, 1/8, 1/4, 1/2 and full resolution; fewer for small machines,
            where it is most of the work.

    Raises:
        ConfigError: for unusable channels, sizes or trunks, and for weights that cannot be had.
    """

    size_divisor = _REDUCTION

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        img_size: int = 256,
        pretrained: bool = False,
        trunk: str = "vit_base_r50_s16_224",
        trunk_args: dict[str, Any] | None = None,
        decoder_channels: tuple[int, int, int, int, int] = _DECODER,
    ) -> None:
        super().__init__()
        if min(decoder_channels) < 1:
            raise ConfigError(f"TransUNet: decoder_channels must be 1 or above, not {min(decoder_channels)}.")
        if in_channels not in (1, 3):
            raise ConfigError(f"TransUNet takes images of 1 or 3 channels, not {in_channels}: set data.in_channels.")
        if img_size < _REDUCTION or img_size % _REDUCTION:
            raise ConfigError(f"TransUNet: img_size must be a multiple of {_REDUCTION}, not {img_size}.")
        self.in_channels, self.img_size = in_channels, img_size
        self.trunk = _build_trunk(trunk, img_size, pretrained, trunk_args or {})
        skips = _skip_channels(self.trunk, trunk)
        self.bottleneck = _conv_bn_relu(self.trunk.embed_dim, decoder_channels[0])
        self.decoder = nn.ModuleList(
            DecoderBlock(below, skip, out)
            for below, skip, out in zip(decoder_channels[:-1], (*skips, 0), decoder_channels[1:], strict=True)
        )
        self.head = nn.Conv2d(decoder_channels[-1], classes, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return raw logits (N, classes, H, W) for images (N, in_channels, H, W) with H = W = img_size."""
        self._check_size(x)
        if self.in_channels == 1:
            x = x.expand(-1, 3, -1, -1)
        x, skips = self._encode(x)
        x = self.bottleneck(x)  # (N, decoder_channels[0], H/16, W/16)
        for block, skip in zip(self.decoder, [*skips, None], strict=True):
            x = block(x, skip)
        logits: Tensor = self.head(x)
        return logits

    def _encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the transformer's map (N, D, H/16, W/16) and the skips at 1/8, 1/4 and 1/2."""
        backbone, trunk = self.trunk.patch_embed.backbone, self.trunk
        skips = []
        for name, layer in backbone.stem.named_children():
            if name == "pool":  # timm's stem includes the pool; the half-resolution skip is what enters it
                skips.append(x)
            x = layer(x)
        for stage in backbone.stages:
            x = stage(x)
            skips.append(x)
        x = trunk.patch_embed.proj(backbone.norm(skips.pop()))
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2) + trunk.pos_embed  # (N, H/16 * W/16, D)
        tokens = trunk.norm(trunk.blocks(trunk.norm_pre(trunk.pos_drop(tokens))))
        return tokens.transpose(1, 2).unflatten(2, (height, width)), skips[::-1]

    def _check_size(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        if (height, width) != (self.img_size, self.img_size):
            raise ConfigError(
                f"TransUNet was built for {self.img_size}x{self.img_size} pixels (its position embedding fixes the "
                f"size) and got {height}x{width}: set the network's img_size and data.image_size to the same number."
            )


class DecoderBlock(nn.Module):
    """Bilinear upsampling by 2, the skip concatenated, two 3x3 convolutions with batch norm and ReLU."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            _conv_bn_relu(in_channels + skip_channels, out_channels), _conv_bn_relu(out_channels, out_channels)
        )

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Map x (N, in, H, W) and skip (N, skip, 2H, 2W) or None to (N, out, 2H, 2W)."""
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        out: Tensor = self.convolutions(x if skip is None else torch.cat([x, skip], dim=1))
        return out


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def _build_trunk(name: str, img_size: int, pretrained: bool, extra: dict[str, Any]) -> Any:
    shape = {**extra, "img_size": img_size, "num_classes": 0}
    try:
        trunk = timm.create_model(
            name, pretrained=False, **{**shape, "class_token": False, "global_pool": "avg", "fc_norm": False}
        )
    except Exception as error:  # timm asserts, and raises KeyError, RuntimeError and TypeError for a wrong argument
        raise ConfigError(f"TransUNet: timm cannot build the trunk '{name}': {first_line(error)}") from error
    if pretrained:
        _load_pretrained(trunk, name, shape)
    return trunk


def _load_pretrained(trunk: nn.Module, name: str, shape: dict[str, Any]) -> None:
    """Copy timm's weights into `trunk`, leaving out the class token that they were trained with."""
    try:
        donor = timm.create_model(name, pretrained=True, **shape)  # interpolates its position embedding to img_size
    except Exception as error:  # the hub, its cache and the file system each raise their own kinds
        raise ConfigError(
            f"TransUNet: the pretrained weights of '{name}' cannot be had ({first_line(error)}). Set "
            "pretrained: false, or run once with internet access so that timm keeps them in its cache."
        ) from error
    weights = donor.state_dict()
    weights.pop("cls_token")
    weights["pos_embed"] = weights["pos_embed"][:, 1:]  # the first position is the class token's
    trunk.load_state_dict(weights)


def _skip_channels(trunk: Any, name: str) -> tuple[int, ...]:
    """Return the channels of the skips at 1/8, 1/4 and 1/2, or refuse a trunk that has no such skips."""
    backbone: Any = getattr(getattr(trunk, "patch_embed", None), "backbone", None)
    fits = isinstance(trunk, VisionTransformer) and hasattr(backbone, "stages") and hasattr(backbone.stem, "pool")
    if not fits or [level["reduction"] for level in backbone.feature_info] != [2, 4, 8, 16]:
        raise ConfigError(
            f"TransUNet: trunk '{name}' is not a vision transformer over a three-stage ResNet, whose maps at 1/2, "
            "1/4 and 1/8 are the skips. Use a vit_base_r50_s16_* of timm and shape it with trunk_args."
        )
    return tuple(level["num_chs"] for level in backbone.feature_info[2::-1])
