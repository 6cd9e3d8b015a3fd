"""Any network on any image size: pad to the network's divisor, run it, crop the logits back."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from fkd_med.errors import ConfigError


def size_divisor(network: nn.Module) -> int:
    """Return the number that a network's input height and width must be divisible by, 1 for any size.

    It is the network's attribute `size_divisor` where it has one (ours do), else its encoder's `output_stride`
    (segmentation-models-pytorch), else 1.
    """
    own = getattr(network, "size_divisor", None)
    stride = getattr(getattr(network, "encoder", None), "output_stride", None)
    return int(own or stride or 1)


def padded_size(network: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Return the height and width at which a network sees images of this height and width."""
    divisor = size_divisor(network)
    return height + -height % divisor, width + -width % divisor


def forward_padded(network: nn.Module, x: Tensor) -> Tensor:
    """Return the raw logits (N, K, H, W) of `network` for images (N, C, H, W) of any H and W.

    The bottom and right are padded by repeating the last row and column: unlike zeros, that adds no edge, unlike
    reflection it mirrors no second lesion into view and works for images smaller than the padding. The logits are
    cropped back. Of a tuple (segmentation-models-pytorch with `aux_params`) the first element is taken.

    Raises:
        ConfigError: when the network returns something else than logits of the size of its input.
    """
    height, width = x.shape[-2:]
    padded_height, padded_width = padded_size(network, height, width)
    bottom, right = padded_height - height, padded_width - width
    padded = F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
    logits = network(padded)
    if isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    _check_logits(network, logits, padded)
    cropped: Tensor = logits[..., :height, :width]
    return cropped


def _check_logits(network: nn.Module, logits: object, padded: Tensor) -> None:
    name = type(network).__name__
    if not isinstance(logits, Tensor):
        found = f"a mapping with keys {list(logits)}" if isinstance(logits, Mapping) else f"a {type(logits).__name__}"
        raise ConfigError(f"{name} returned {found}; a segmentation network must return logits (N, K, H, W).")
    if logits.ndim != 4 or logits.shape[-2:] != padded.shape[-2:]:
        raise ConfigError(
            f"{name} returned logits of shape {tuple(logits.shape)} for images of shape {tuple(padded.shape)}; a "
            "segmentation network must return (N, K, H, W) at the height and width of its input."
        )
