"""A teacher's mean answer to an image seen in several ways: mirrored, and turned by quarters.

A segmentation should not depend on how the image lies. A network's does a little, and the mean over all ways is the
part that does not. Asked once per image by the teacher cache, it costs the rounds nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.losses.tensors import class_logits, precise
from fkd_med.networks import forward_padded

# Quarter turns, and whether the image is mirrored before. The first 2 are the image and its mirror; the first 4 the
# flips: mirrored and upside down is the vertical one. All 8 are the symmetries of the square.
_VIEWS = ((0, False), (0, True), (2, False), (2, True), (1, False), (1, True), (3, False), (3, True))
NUMBERS = (1, 2, 4, 8)
Views = Literal[1, 2, 4, 8]


class MeanOfViews(nn.Module):
    """Answers the mean of a network's probabilities over views of the image, each brought back to how the image lies.

    ``p(x) = 1/V sum_v g_v^-1 softmax f(g_v x)``, g_v the first V symmetries of the square; the answer turns and flips
    with the image: ``p(g x) = g p(x)``. Of all answers it is the nearest to what the views say, by the mean of
    KL(p_v || p), the divergence that distillation uses; and it is unsure where they disagree. It is given as logits:
    ``log p``, plus the views' mean log-partition, so that views that agree give the network's own logits. One logit is
    the two classes (0, z). Computed in float32 or better.

    Args:
        network: images (N, C, H, W) to logits (N, K, H, W).
        views: 2 (the image and its mirror), 4 (these, and both upside down) or 8 (those, and a quarter turn of each);
            1 is the network.
    """

    def __init__(self, network: nn.Module, views: int) -> None:
        super().__init__()
        self.network, self.views = network, views

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K, H, W) of the mean for images (N, C, H, W); each view is padded as the network needs.

        Raises:
            ConfigError: 8 views of images that are not square.
        """
        check_square(self.views, x)
        logits = self._seen_as(x, 0)
        classes = logits.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            partition = class_logits(logits).logsumexp(dim=1, keepdim=True)
            log_p = class_logits(logits) - partition
        for view in range(1, self.views):
            logits = class_logits(self._seen_as(x, view))
            with torch.autocast(x.device.type, enabled=False):
                one = logits.logsumexp(dim=1, keepdim=True)
                log_p, partition = torch.logaddexp(log_p, logits - one), partition + one
        log_p = log_p - math.log(self.views)
        return log_p[:, 1:] - log_p[:, :1] if classes == 1 else log_p + partition / self.views

    def _seen_as(self, x: Tensor, view: int) -> Tensor:
        """Return the logits of one view, as the image lies."""
        return precise(unseen(forward_padded(self.network, seen(x, *_VIEWS[view])), *_VIEWS[view]))


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
