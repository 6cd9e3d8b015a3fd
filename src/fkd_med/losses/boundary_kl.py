"""Boundary KL: logit KL where segmentations are decided, in a band around the contours of the mask."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.logit_kl import kl_map
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.tensors import check_mask, check_temperature, mean_where
from fkd_med.losses.trust import Trust, believed, check_trust


def boundary_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    band: int = 3,
    temperature: float = 1.0,
    *,
    valid: Tensor | None = None,
    trust: Trust = "all",
) -> Tensor:
    """Return the mean of the logit KL (times temperature^2) over the pixels close to a contour of the mask.

    One logit is a Bernoulli distribution, K >= 2 logits a softmax, as in `logit_kl`. The mean is over the band of the
    whole batch; a batch without any contour has loss 0.

    Args:
        student: raw logits (N, K, H, W).
        teacher: raw logits of the same shape.
        mask: class indices (N, H, W).
        band: a pixel counts if another class lies within so many pixels (horizontally, vertically or diagonally), so
            the band is as wide on either side of a contour; the image's border is no contour.
        temperature: softens both distributions; above 0.
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.
        trust: which pixels the teacher is believed at, see `trust_map`; their sum is still divided by the whole band.

    Raises:
        ConfigError: for a band below 1, a temperature not above 0, an unknown trust, or shapes that do not match.
    """
    _check_band(band)
    kl = kl_map(student, teacher, temperature, valid=valid)
    check_mask(mask, student)
    return mean_where(believed(kl, teacher, mask, trust, valid), boundary_band(mask, band, valid))


def boundary_band(mask: Tensor, band: int, valid: Tensor | None = None) -> Tensor:
    """Return where class indices (N, H, W) have another class within `band` pixels, bool (N, H, W)."""
    indices = mask.unsqueeze(1).float()
    if valid is None:
        return (_highest(indices, band) != -_highest(-indices, band)).squeeze(1)
    outside = ~valid.unsqueeze(1)
    highest, lowest = (sign * _highest((sign * indices).masked_fill(outside, -torch.inf), band) for sign in (1, -1))
    return (highest != lowest).squeeze(1) & valid


class BoundaryKL(DistillationTerm):
    """Match the teacher's class distribution near the contours of the mask, where it matters most.

    Args:
        band: width of the band on either side of a contour, in pixels at working resolution; 3 to 5 is usual.
        temperature: softens both distributions, above 0; the loss is multiplied by its square.
        weight: factor beside the supervised loss; 0 turns the term off.
        trust: "all" pixels of the band; "correct", those whose class the teacher gets right; "true_class", each as far
            as the probability that the teacher gives to its class. The mean stays one over the band.
        where: resize and schedule, as in `DistillationTerm`; its taps stay "logits".

    Raises:
        ConfigError: for a band below 1, a temperature not above 0, a negative weight, an unknown trust or feature taps.
    """

    logits_only: ClassVar[bool] = True

    def __init__(
        self, band: int = 3, temperature: float = 2.0, weight: float = 1.0, trust: Trust = "all", **where: Any
    ) -> None:
        super().__init__(weight, **where)
        _check_band(band)
        check_temperature(temperature)
        check_trust(trust)
        self.band, self.temperature, self.trust = band, temperature, trust

    def needs_masks(self) -> bool:
        """Whether the loss looks at the masks: it does."""
        return True

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of logits (N, K, H, W) and the pixels' classes, a scalar."""
        return boundary_kl(
            student, teacher, pixels.mask, self.band, self.temperature, valid=pixels.valid, trust=self.trust
        )


def _highest(indices: Tensor, band: int) -> Tensor:
    """Return the maximum in a square window around each pixel, rows first: far fewer comparisons."""
    rows = F.max_pool2d(indices, (1, 2 * band + 1), stride=1, padding=(0, band))
    return F.max_pool2d(rows, (2 * band + 1, 1), stride=1, padding=(band, 0))


def _check_band(band: int) -> None:
    if band < 1:
        raise ConfigError(f"BoundaryKL: band must be 1 pixel or more, not {band}; 3 to 5 is usual.")
