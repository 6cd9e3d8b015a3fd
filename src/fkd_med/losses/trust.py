"""How far a teacher is to be believed at a pixel, by what the mask says there."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.tensors import blank, check_mask, class_logits, precise

Trust = Literal["all", "correct", "true_class"]


def believed(
    values: Tensor, teacher: Tensor, mask: Tensor | None, trust: Trust = "all", valid: Tensor | None = None
) -> Tensor:
    """Return the values of pixels (N, H, W) times how far the teacher is believed there; as they are for "all".

    The mean over pixels stays one over all that count: ``1/|V| sum_i w_i v_i``, not ``sum_i w_i v_i / sum_i w_i``. So
    a pixel that is believed pulls exactly as hard as without trust, whatever its neighbours; and the less a teacher
    knows, the less the term says beside the masks, where the other mean would let its few right pixels shout.

    Args:
        values: of each pixel, such as a divergence.
        teacher: logits (N, K, H, W).
        mask: class indices (N, H, W).
        trust: as in `trust_map`.
        valid: which pixels count, bool (N, H, W); all of them when left out.

    Raises:
        ConfigError: as `trust_map`.
    """
    return values if trust == "all" else values * trust_map(teacher, mask, trust, valid)


def trust_map(teacher: Tensor, mask: Tensor | None, trust: Trust, valid: Tensor | None = None) -> Tensor:
    """Return how far the teacher is believed at each pixel, 0 to 1, (N, H, W); without a gradient.

    One logit z is the two classes (0, z). What lies outside of `valid` is of no meaning, and finite.

    Args:
        teacher: logits (N, K, H, W).
        mask: class indices (N, H, W).
        trust: "all" is 1; "correct" is 1 where the teacher's likeliest class is the mask's, else 0; "true_class" is
            the probability that the teacher gives to the mask's class, at temperature 1.
        valid: which pixels count, bool (N, H, W); all of them when left out.

    Raises:
        ConfigError: an unknown trust; no mask, or one that has another shape or pixels without a class.
    """
    check_trust(trust)
    if trust == "all":
        return torch.ones_like(precise(teacher[:, 0].detach()))
    mask = _labels(mask, teacher, valid).unsqueeze(1)
    with torch.autocast(teacher.device.type, enabled=False):
        logits = class_logits(precise(blank(teacher.detach(), valid)))
        if trust == "correct":
            return (logits.argmax(dim=1, keepdim=True) == mask).squeeze(1).to(logits.dtype)
        return logits.softmax(dim=1).gather(1, mask).squeeze(1)


def check_trust(trust: str) -> None:
    """Refuse an unknown trust (ConfigError)."""
    if trust not in get_args(Trust):
        raise ConfigError(f"Distillation: trust must be one of {', '.join(get_args(Trust))}, not '{trust}'.")


def _labels(mask: Tensor | None, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mask with class 0 outside of `valid`, where nobody asks."""
    if mask is None:
        raise ConfigError("Distillation: trust compares the teacher with the mask, and there is none: use trust: all.")
    check_mask(mask, teacher)
    classes = max(2, teacher.shape[1])
    mask = mask if valid is None else torch.where(valid, mask, 0)
    if mask.numel() and not bool(((mask >= 0) & (mask < classes)).all()):
        raise ConfigError(
            f"Distillation: trust compares the teacher with the mask, which has pixels of none of the {classes} "
            f"classes (values {int(mask.min())} to {int(mask.max())}): label them, or use trust: all."
        )
    return mask
