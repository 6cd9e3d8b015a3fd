"""AT, attention transfer: where is the teacher most active, whatever the channel?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.tensors import blank, check_maps, mean_of_images, precise, unit


def attention_transfer(student: Tensor, teacher: Tensor, p: int = 2, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of attention maps, each of Euclidean length 1 per image.

    The map is ``sum_c |f_c|^p``; the mean is over images and pixels, as in the authors' code (the paper prints the
    length of the difference instead, which has no gradient at 0). A map of zeros stays one. One logit is one channel:
    (0, z) has the same map. Channels of student and teacher may differ. No gradient reaches the teacher. Source:
    Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, eq. 2.

    Args:
        student: logits or features (N, C, H, W).
        teacher: the same, (N, C', H, W).
        p: 2, or 4 for sharper maps.
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.

    Raises:
        ConfigError: for another p, or shapes that do not match.
    """
    _check_p(p)
    check_maps(student, teacher, valid)
    student, teacher = blank(student, valid), blank(teacher.detach(), valid)
    with torch.autocast(student.device.type, enabled=False):
        difference = _attention(precise(student), p) - _attention(precise(teacher), p)
        return mean_of_images(difference.square(), None if valid is None else valid.flatten(1))


class AttentionTransfer(DistillationTerm):
    """Match where in the image the teacher's answers are large, of either sign (AT, Zagoruyko and Komodakis 2017).

    Args:
        p: power of the attention map: 2, or 4 for sharper maps.
        weight: factor beside the supervised loss; 0 turns the term off. 1e3 to 1e4 in reference code, for small
            feature maps; the raw loss is a mean over pixels of maps of length 1, so it shrinks with the image's area.
        where: student_tap, teacher_tap, resize, connector and schedule, as in `DistillationTerm`.

    Raises:
        ConfigError: for another p or a negative weight.
    """

    def __init__(self, p: int = 2, weight: float = 1000.0, **where: Any) -> None:
        super().__init__(weight, **where)
        _check_p(p)
        self.p = p

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of two maps (N, C, H, W), a scalar; no mask is needed."""
        return attention_transfer(student, teacher, self.p, valid=pixels.valid)


def _attention(features: Tensor, p: int) -> Tensor:
    """Return the attention maps (N, H * W), of length 1 each."""
    # Maps of length 1 do not depend on the scale of the features; without it, 1e5 to the fourth would overflow later.
    scale = features.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled = features / torch.where(scale > 0, scale, 1.0)
    return unit(scaled.pow(p).sum(dim=1).flatten(1), dim=1)


def _check_p(p: int) -> None:
    if p not in (2, 4):
        raise ConfigError(f"AttentionTransfer: p must be 2 or 4, not {p}.")
