"""Pixels that do not count: every distillation loss is what it would be if they did not exist."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from loss_references import TERMS, Reference, apply, np_at, np_hint, np_ifvd, np_pairwise, np_rad
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses import (
    DistillationTerm,
    DISTIntra,
    PairwiseAffinity,
    attention_transfer,
    boundary_kl,
    cwd,
    dist_intra,
    hint_mse,
    ifvd,
    logit_kl,
    pairwise_affinity,
    region_affinity,
)

ALL = pytest.mark.parametrize("term", [term for term, _ in TERMS], ids=lambda t: type(t).__name__)
CLASSES = pytest.mark.parametrize("classes", [1, 2, 4])


def example(classes: int, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (6, 9)) -> tuple[Tensor, ...]:
    """Logits, masks and valid pixels of 6 images that differ in what is left of them."""
    g = torch.Generator().manual_seed(classes)
    student, teacher = (2 * torch.randn(6, classes, *size, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(size[0] * size[1]).reshape(size).flip(1) % max(2, classes)
    mask, valid = mask.repeat(6, 1, 1), torch.ones(6, *size, dtype=torch.bool)
    valid[1, : size[0] // 2 + 1, : size[1] // 2 + 1] = False  # whole patches, as after a rotation
    valid[2] = torch.rand(size, generator=g) < 0.6
    valid[3] = mask[3] != 1  # a class is there, but not among the pixels that count
    mask[4] = 0
    valid[4, :, 1:] = False
    valid[5] = False
    return student.to(dtype), teacher.to(dtype), mask, valid


def littered(x: Tensor, valid: Tensor, scale: float) -> Tensor:
    """Maps with garbage outside of the valid pixels."""
    garbage = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.where(valid[:, None], x, garbage.to(x.dtype))


def loss_and_gradient(function: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss = function(student)
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad


# --- against the formulae -----------------------------------------------------------------------------------------


@CLASSES
@pytest.mark.parametrize(("term", "reference"), TERMS)
def test_against_numpy(term: DistillationTerm, reference: Reference, classes: int) -> None:
    student, teacher, mask, valid = example(classes)
    found = apply(term, student, teacher, mask, valid)
    assert found.ndim == 0 and found.dtype == torch.float64
    expected = reference(student.numpy(), teacher.numpy(), mask.numpy(), valid.numpy())
    assert found.item() == pytest.approx(expected, rel=1e-9)
    everywhere = reference(student.numpy(), teacher.numpy(), mask.numpy(), np.full(mask.shape, True))
    assert expected > 1e-6 and abs(expected - everywhere) > 1e-6 * expected  # the example is not degenerate
    assert apply(term, student.float(), teacher.float(), mask, valid).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [(5, 7), (4, 4)])
def test_features_of_different_widths_against_numpy(size: tuple[int, int]) -> None:
    student, teacher, mask, valid = example(4, size=size)
    student, mask = student[:, :3], mask.clamp_max(1)
    s, t, m, v = student.numpy(), teacher.numpy(), mask.numpy(), valid.numpy()
    for found, expected in (
        (pairwise_affinity(student, teacher, 0.5, valid=valid), np_pairwise(s, t, v, 0.5)),
        (ifvd(student, teacher, mask, valid=valid), np_ifvd(s, t, m, v, 2)),
        (region_affinity(student, teacher, mask, valid=valid), np_rad(s, t, m, v, 2)),
        (attention_transfer(student, teacher, 4, valid=valid), np_at(s, t, v, 4)),
        (hint_mse(student, teacher[:, 1:], valid=valid), np_hint(s, t[:, 1:], v)),
    ):
        assert found.item() == pytest.approx(expected, rel=1e-9) and expected > 1e-6


@pytest.mark.parametrize("term", [t for t, _ in TERMS if not isinstance(t, PairwiseAffinity)])
@CLASSES
def test_an_image_with_an_invalid_margin_is_its_middle(term: DistillationTerm, classes: int) -> None:
    """Patches of the pair-wise loss are of the whole image; every other loss knows pixels only."""
    student, teacher, mask, _ = example(classes)
    valid = torch.zeros_like(mask, dtype=torch.bool)
    valid[:, 1:5, 2:8] = True
    middle = apply(term, student[:, :, 1:5, 2:8], teacher[:, :, 1:5, 2:8], mask[:, 1:5, 2:8])
    torch.testing.assert_close(apply(term, student, teacher, mask, valid), middle)
    assert middle > 1e-6


@ALL
@CLASSES
def test_all_valid_is_none(term: DistillationTerm, classes: int) -> None:
    student, teacher, mask, _ = example(classes, torch.float32)
    everywhere = torch.ones_like(mask, dtype=torch.bool)
    expected = loss_and_gradient(lambda s: apply(term, s, teacher, mask), student)
    found = loss_and_gradient(lambda s: apply(term, s, teacher, mask, everywhere), student)
    torch.testing.assert_close(found, expected)
    assert expected[1].abs().max() > 0


# --- what lies in invalid pixels ----------------------------------------------------------------------------------


@ALL
@CLASSES
@pytest.mark.parametrize("scale", [1.0, 1e30, math.inf])
def test_garbage_in_invalid_pixels_changes_nothing(term: DistillationTerm, classes: int, scale: float) -> None:
    student, teacher, mask, valid = example(classes, torch.float32)
    expected = loss_and_gradient(lambda s: apply(term, s, teacher, mask, valid), student)
    teacher = littered(teacher, valid, -scale)
    mask = torch.where(valid, mask, (mask + 1) % max(2, classes))
    found = loss_and_gradient(lambda s: apply(term, s, teacher, mask, valid), littered(student, valid, scale))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[1].movedim(1, -1)[~valid].abs().max() == 0
    assert found[1].movedim(1, -1)[valid].abs().max() > 0


@ALL
@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_valid_pixel_the_loss_is_zero(term: DistillationTerm, classes: int, dtype: torch.dtype) -> None:
    student, teacher, mask, _ = example(classes, dtype)
    nowhere = torch.zeros_like(mask, dtype=torch.bool)
    for scale in (1.0, 1e30, math.inf):
        loss, gradient = loss_and_gradient(
            lambda s: apply(term, s, teacher, mask, nowhere), littered(student, nowhere, scale)
        )
        assert loss.item() == 0 and gradient.isfinite().all() and gradient.abs().max() == 0


@ALL
@CLASSES
def test_a_single_valid_pixel_is_enough(term: DistillationTerm, classes: int) -> None:
    student, teacher, mask, _ = example(classes, torch.float32)
    valid = torch.zeros_like(mask, dtype=torch.bool)
    valid[1, 2, 3] = True
    loss, gradient = loss_and_gradient(lambda s: apply(term, s, teacher, mask, valid), student)
    assert loss.isfinite() and gradient.isfinite().all()
    assert gradient.movedim(1, -1)[~valid].abs().max() == 0


@CLASSES
def test_pearson_of_a_map_that_is_constant_where_it_counts_is_zero(classes: int) -> None:
    student, teacher, mask, valid = example(classes, torch.float32)
    student = torch.where(valid[:, None], 0.3, student)
    loss, gradient = loss_and_gradient(lambda s: apply(DISTIntra(), s, teacher, mask, valid), student)
    assert loss.item() == 1 and gradient.abs().max() == 0


# --- gradients and precision --------------------------------------------------------------------------------------


@ALL
@CLASSES
def test_gradcheck(term: DistillationTerm, classes: int) -> None:
    student, teacher, mask, valid = (x[[1, 2, 5]].contiguous() for x in example(classes, size=(4, 5)))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: apply(term, s, teacher, mask, valid), (student,))


@CLASSES
@pytest.mark.parametrize(("term", "reference"), TERMS)
def test_bfloat16_autocast_is_computed_in_float32(term: DistillationTerm, reference: Reference, classes: int) -> None:
    student, teacher, mask, valid = example(classes, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply(term, student, teacher, mask, valid)
    assert found.dtype == torch.float32
    expected = reference(student.double().numpy(), teacher.double().numpy(), mask.numpy(), valid.numpy())
    assert found.item() == pytest.approx(expected, rel=1e-4)


@ALL
@CLASSES
def test_huge_logits_stay_finite(term: DistillationTerm, classes: int) -> None:
    student, teacher, mask, valid = example(classes, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = loss_and_gradient(
            lambda s: apply(term, s, 1e4 * teacher.sign(), mask, valid), 1e4 * student.sign()
        )
    assert loss.isfinite() and gradient.isfinite().all()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_valid_pixels_of_another_shape_are_refused() -> None:
    student, teacher, mask, valid = example(2)
    small = valid[:, :1]  # would be broadcast
    for function in (
        lambda: logit_kl(student, teacher, valid=small),
        lambda: boundary_kl(student, teacher, mask, valid=small),
        lambda: cwd(student, teacher, valid=small),
        lambda: dist_intra(student, teacher, valid=small),
        lambda: pairwise_affinity(student, teacher, valid=small),
        lambda: attention_transfer(student, teacher, valid=small),
        lambda: ifvd(student, teacher, mask, valid=small),
        lambda: region_affinity(student, teacher, mask, valid=small),
        lambda: hint_mse(student, teacher, valid=small),
    ):
        with pytest.raises(ConfigError, match=r"map of valid pixels \(6, 1, 9\) does not match"):
            function()
