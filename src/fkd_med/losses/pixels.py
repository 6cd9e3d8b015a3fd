"""The pixels that a distillation term compares: their classes, and which of them count.

An augmented image has pixels from outside the image: the teacher never saw them, so no term may.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pixels:
    """What the masks say of a batch, at one resolution.

    Args:
        mask: class indices, int64 (N, H, W).
        classes: number of classes, the background included: at least 2.
        valid: which pixels count, bool (N, H, W); all of them when left out.
        labelled: which images have a mask, bool (N,); all of them when left out. The mask of another means nothing.
    """

    mask: Tensor
    classes: int
    valid: Tensor | None = None
    labelled: Tensor | None = None

    def with_masks(self) -> Pixels:
        """Return the pixels for terms that look at masks: images without one do not count."""
        if self.labelled is None:
            return self
        known = self.labelled.view(-1, 1, 1).expand(self.mask.shape)
        return replace(self, valid=known if self.valid is None else self.valid & known)

    def at(self, size: tuple[int, int]) -> Pixels:
        """Return the pixels at another height and width.

        The mask is sampled at the nearest pixel. A pixel counts only if every pixel that it covers does.
        """
        if tuple(self.mask.shape[1:]) == tuple(size):
            return self
        mask = F.interpolate(self.mask.unsqueeze(1).float(), size=size, mode="nearest-exact").squeeze(1).long()
        if self.valid is None:
            return replace(self, mask=mask)
        outside = F.adaptive_max_pool2d((~self.valid).unsqueeze(1).float(), size).squeeze(1)
        return replace(self, mask=mask, valid=outside == 0)
