"""A teacher's mean answer to an image seen in several ways: mirrored, and turned by quarters.

A segmentation should not depend on how the image lies. A network's does a little, and the mean over all ways is the
part that does not. Asked once per image by the teacher cache, it costs the rounds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.networks import forward_padded

# Quarter turns, and whether the image is mirrored before. The first 4 are the flips: mirrored and upside down is the
# vertical one. All 8 are the symmetries of the square.
_VIEWS = ((0, False), (0, True), (2, False), (2, True), (1, False), (1, True), (3, False), (3, True))
NUMBERS = (1, 4, 8)


class MeanOfViews(nn.Module):
    """Answers the mean of a network's logits over views of the image, each brought back to how the image lies.

    ``z(x) = 1/V sum_v g_v^-1 f(g_v x)``, g_v the first V symmetries of the square; it turns and flips with the image:
    ``z(g x) = g z(x)``. Logits are averaged, not probabilities: their mean goes with any temperature and with terms
    that compare logits as they are, and an ensemble of teachers answers it too (`MeanLogits`). Computed in float32 or
    better.

    Args:
        network: images (N, C, H, W) to logits (N, K, H, W).
        views: 4 (the image, its two flips, and both) or 8 (those, and a quarter turn of each); 1 is the network.
    """

    def __init__(self, network: nn.Module, views: int) -> None:
        super().__init__()
        self.network, self.views = network, views

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits (N, K, H, W) for images (N, C, H, W); each view is padded as the network needs.

        Raises:
            ConfigError: 8 views of images that are not square.
        """
        check_square(self.views, x)
        total: Tensor | None = None
        for turns, mirrored in _VIEWS[: self.views]:
            logits = unseen(forward_padded(self.network, seen(x, turns, mirrored)), turns, mirrored)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = logits if total is None else total + logits
        assert total is not None
        return total / self.views


def of_views(network: nn.Module, views: int) -> nn.Module:
    """Return what answers the mean over so many views; the network itself for one."""
    return network if views == 1 else MeanOfViews(network, views)


def seen(x: Tensor, turns: int, mirrored: bool) -> Tensor:
    """Return images or maps (N, C, H, W) mirrored left to right, if so, and then turned by quarters."""
    return torch.rot90(x.flip(-1) if mirrored else x, turns, (-2, -1))


def unseen(x: Tensor, turns: int, mirrored: bool) -> Tensor:
    """Undo `seen`."""
    turned = torch.rot90(x, -turns, (-2, -1))
    return turned.flip(-1) if mirrored else turned


def check_square(views: int, image: Tensor) -> None:
    """Refuse quarter turns of images (N, C, H, W) that they would give another height and width.

    Raises:
        ConfigError: names the size and the remedy.
    """
    height, width = image.shape[-2:]
    if views > 4 and height != width:
        raise ConfigError(
            f"model.teacher_views: {views} turns images by quarters, which must be square for that, and these are "
            f"{height} x {width}: use 4, the flips."
        )
