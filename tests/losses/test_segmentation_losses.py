"""DiceCE against NumPy, its degenerate cases, and the targets that other people's losses expect."""

from __future__ import annotations

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.losses import DiceCE, supervised_loss


def reference(logits: Tensor, mask: Tensor, dice_weight: float, ce_weight: float, smooth: float) -> float:
    """Dice + cross-entropy in float64 NumPy, written from the definition."""
    z: NDArray[np.float64] = logits.double().numpy()
    if z.shape[1] == 1:
        z = np.concatenate([np.zeros_like(z), z], axis=1)  # sigmoid(z) is the softmax of (0, z)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    truth = np.moveaxis(np.eye(z.shape[1])[mask.numpy()], -1, 1)
    ce = -(truth * np.log(p)).sum(1).mean()
    terms = []
    for k in range(1, z.shape[1]):
        a, b = p[:, k], truth[:, k]
        dice = (2 * np.minimum(a, b).sum() + 2 * smooth) / (a.sum() + b.sum() + 2 * smooth)
        terms.append(1 - dice if b.sum() else 0.0)
    return float(dice_weight * np.mean(terms) + ce_weight * ce)


def example(classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, classes, 6, 5, generator=g)
    return logits, torch.randint(0, max(2, classes), (3, 6, 5), generator=g)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize(("dice_weight", "ce_weight", "smooth"), [(1.0, 1.0, 1.0), (0.3, 2.0, 0.0), (1.0, 0.0, 1.0)])
def test_dice_ce_against_numpy(classes: int, dice_weight: float, ce_weight: float, smooth: float) -> None:
    logits, mask = example(classes)
    found = DiceCE(dice_weight, ce_weight, smooth)(logits, mask)
    assert found.ndim == 0
    assert found.item() == pytest.approx(reference(logits, mask, dice_weight, ce_weight, smooth), rel=1e-5)


def test_ce_alone_is_torchs() -> None:
    logits, mask = example(1)
    bce = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], mask.float())
    torch.testing.assert_close(DiceCE(dice_weight=0.0)(logits, mask), bce)


def test_deterministic_mode_changes_no_more_than_rounding() -> None:
    logits, mask = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randint(0, 3, (2, 8, 8))
    loss = DiceCE(dice_weight=0.0)
    (usual,) = torch.autograd.grad(loss(logits, mask), logits)
    torch.use_deterministic_algorithms(True)
    try:
        value = loss(logits, mask)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(value, F.cross_entropy(logits, mask))
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], usual)


def test_one_logit_equals_two_classes() -> None:
    logits, mask = example(1)
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    torch.testing.assert_close(DiceCE()(logits, mask), DiceCE()(two, mask))


def test_perfect_is_zero_and_wrong_is_large() -> None:
    _, mask = example(1)
    right = (mask[:, None] * 2.0 - 1) * 50
    assert DiceCE()(right, mask).item() == pytest.approx(0, abs=1e-5)
    assert DiceCE(ce_weight=0, smooth=0)(-right, mask).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_empty_masks_leave_cross_entropy_and_a_gradient(classes: int) -> None:
    logits, mask = example(classes)
    mask = torch.zeros_like(mask)
    logits.requires_grad_()
    assert DiceCE(ce_weight=0.0)(logits, mask).item() == 0
    DiceCE()(logits, mask).backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("classes", [1, 2])
def test_bfloat16_autocast_is_computed_in_float32(classes: int) -> None:
    logits, mask = example(classes)
    logits = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = DiceCE()(logits, mask)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(reference(logits, mask, 1, 1, 1), rel=1e-5)


def test_large_logits_stay_finite() -> None:
    logits, mask = example(2)
    loss = DiceCE()((logits * 1e4).requires_grad_(), mask)
    assert loss.isfinite()


@pytest.mark.parametrize("arguments", [{"dice_weight": -1}, {"dice_weight": 0, "ce_weight": 0}, {"smooth": -1}])
def test_unusable_weights_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="DiceCE"):
        DiceCE(**arguments)


BINARY = [
    DiceCE(),
    nn.BCEWithLogitsLoss(),
    smp.losses.DiceLoss("binary"),
    smp.losses.JaccardLoss("binary"),
    smp.losses.TverskyLoss("binary"),
    smp.losses.FocalLoss("binary"),
    smp.losses.LovaszLoss("binary"),
    smp.losses.SoftBCEWithLogitsLoss(smooth_factor=0.1),
]
MULTICLASS = [
    DiceCE(),
    nn.CrossEntropyLoss(),
    smp.losses.DiceLoss("multiclass"),
    smp.losses.JaccardLoss("multiclass"),
    smp.losses.TverskyLoss("multiclass"),
    smp.losses.FocalLoss("multiclass"),
    smp.losses.LovaszLoss("multiclass"),
    smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1),
]


@pytest.mark.parametrize(
    ("loss", "classes"),
    [(loss, 1) for loss in BINARY] + [(loss, 2) for loss in MULTICLASS] + [(loss, 3) for loss in MULTICLASS],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_any_loss_module_gets_its_target_and_prefers_the_truth(loss: nn.Module, classes: int) -> None:
    logits, mask = example(classes)
    right = 8.0 * (nn.functional.one_hot(mask, max(2, classes)).movedim(-1, 1) * 2 - 1)[:, -classes:]
    bad = supervised_loss(loss, logits.bfloat16().requires_grad_(), mask)
    bad.backward()
    assert bad.ndim == 0 and bad.dtype == torch.float32
    assert supervised_loss(loss, right, mask) < bad


def test_binary_target_is_not_broadcast() -> None:
    """(N, H, W) against (N, 1, H, W) would broadcast to (N, N, H, W) without an error where N = H."""
    logits, mask = torch.randn(5, 1, 5, 5), torch.randint(0, 2, (5, 5, 5))
    expected = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], mask.float())
    torch.testing.assert_close(supervised_loss(nn.BCEWithLogitsLoss(), logits, mask), expected)
    torch.testing.assert_close(supervised_loss(smp.losses.SoftBCEWithLogitsLoss(), logits, mask), expected)


def test_a_loss_that_is_not_scalar_is_refused() -> None:
    with pytest.raises(ConfigError, match="CrossEntropyLoss returned shape"):
        supervised_loss(nn.CrossEntropyLoss(reduction="none"), *example(3))
