"""Supervised segmentation losses: Dice beside cross-entropy, and the one place where targets are shaped.

Everywhere masks are class indices, int64 (N, H, W); logits are (N, K, H, W), where K = 1 means one Bernoulli logit
and K >= 2 a softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss, SoftBCEWithLogitsLoss
from torch import Tensor, nn

from fkd_med.errors import ConfigError


class DiceCE(nn.Module):
    """Weighted sum of the soft Dice loss and the cross-entropy, for one logit, two classes or many.

    Dice is counted over the pixels of the whole batch and averaged over the foreground classes (class 0 is the
    background), so one logit z and the two logits (0, z) have the same loss. A class without a pixel in the batch
    adds 0 to Dice, where Dice would only say "less"; cross-entropy still teaches it. Computed in float32 under any
    autocast. Source: Milletari et al., "V-Net", 2016; the sum as in Isensee et al., "nnU-Net", 2021.

    Args:
        dice_weight: factor of the Dice loss; 0 leaves it out.
        ce_weight: factor of the mean cross-entropy per pixel; 0 leaves it out.
        smooth: added to both sides of the Dice fraction, in pixels; steadies lesions of few pixels.

    Raises:
        ConfigError: for negative weights, both weights 0, or a negative `smooth`.
    """

    def __init__(self, dice_weight: float = 1.0, ce_weight: float = 1.0, smooth: float = 1.0) -> None:
        super().__init__()
        if min(dice_weight, ce_weight, smooth) < 0 or dice_weight + ce_weight == 0:
            raise ConfigError(
                f"DiceCE(dice_weight={dice_weight}, ce_weight={ce_weight}, smooth={smooth}): weights and smooth must "
                "not be negative, and one weight must be above 0."
            )
        self.dice_weight, self.ce_weight = dice_weight, ce_weight
        self.dice = DiceLoss(mode="multilabel", from_logits=False, smooth=smooth)
        self.bce = SoftBCEWithLogitsLoss(ignore_index=None)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the scalar loss of logits (N, K, H, W) against class indices (N, H, W); (N, 1, H, W) is taken too."""
        mask = mask.reshape(logits.shape[0], *logits.shape[-2:]).long()
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            loss = logits.new_zeros(())
            if self.dice_weight:
                loss = loss + self.dice_weight * self.dice(*_foreground(logits, mask))
            if self.ce_weight:
                loss = loss + self.ce_weight * self._cross_entropy(logits, mask)
        return loss

    def _cross_entropy(self, logits: Tensor, mask: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            bce: Tensor = self.bce(logits, mask.unsqueeze(1).float())
            return bce
        if torch.are_deterministic_algorithms_enabled():  # class indices have no deterministic CUDA kernel in 2-d
            return F.cross_entropy(logits, F.one_hot(mask, logits.shape[1]).movedim(-1, 1).to(logits.dtype))
        return F.cross_entropy(logits, mask)


def supervised_loss(loss: nn.Module, logits: Tensor, mask: Tensor) -> Tensor:
    """Apply any loss module of (logits, target) to class indices, shaping the target as such losses expect it.

    With one logit the target is float (N, 1, H, W), what `torch.nn.BCEWithLogitsLoss` and the binary mode of every
    segmentation-models-pytorch loss take; with K >= 2 logits it is int64 (N, H, W), what `torch.nn.CrossEntropyLoss`
    and their multiclass mode take. Losses that want probabilities (`MCCLoss`) need a module of your own around them.

    Args:
        loss: module of (logits, target) returning a scalar.
        logits: raw logits (N, K, H, W), passed on in float32.
        mask: class indices, int64 (N, H, W).

    Raises:
        ConfigError: when the loss does not return a scalar.
    """
    target = mask.unsqueeze(1).float() if logits.shape[1] == 1 else mask
    with torch.autocast(logits.device.type, enabled=False):
        value: Tensor = loss(logits.float(), target)
    if value.numel() != 1:
        raise ConfigError(
            f"{type(loss).__name__} returned shape {tuple(value.shape)}: it must be a scalar; set reduction."
        )
    return value


def _foreground(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return foreground probabilities and one-hot truth, both (N, max(1, K - 1), H, W)."""
    classes = logits.shape[1]
    if classes == 1:
        return logits.sigmoid(), mask.unsqueeze(1).float()
    truth = F.one_hot(mask, classes).movedim(-1, 1)
    return logits.softmax(dim=1)[:, 1:], truth[:, 1:].float()
