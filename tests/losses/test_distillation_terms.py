"""Every distillation loss against float64 NumPy written from its formula, its gradient and its degenerate cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from loss_references import TERMS, Reference, apply, example, np_at, np_hint, np_ifvd, np_pairwise, np_rad
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses import (
    CWD,
    IFVD,
    AttentionTransfer,
    BoundaryKL,
    DistillationTerm,
    DISTIntra,
    HintMSE,
    LogitKL,
    PairwiseAffinity,
    RegionAffinity,
    attention_transfer,
    boundary_kl,
    cwd,
    dist_intra,
    hint_mse,
    ifvd,
    pairwise_affinity,
    region_affinity,
)


def name(term: object) -> str:
    return type(term).__name__


def is_of_channels(term: DistillationTerm) -> bool:
    """Tell whether the formula is a mean over channels, so that one logit is not two classes."""
    return isinstance(term, CWD | HintMSE) or getattr(term, "reduction", "") == "mean"


ALL = pytest.mark.parametrize("term", [term for term, _ in TERMS], ids=name)
CLASSES = pytest.mark.parametrize("classes", [1, 2, 4])


# --- against the formulae -----------------------------------------------------------------------------------------


@CLASSES
@pytest.mark.parametrize(("term", "reference"), TERMS)
def test_against_numpy(term: DistillationTerm, reference: Reference, classes: int) -> None:
    student, teacher, mask = example(classes)
    found = apply(term, student, teacher, mask)
    assert found.ndim == 0 and found.dtype == torch.float64
    expected = reference(student.numpy(), teacher.numpy(), mask.numpy(), np.full(mask.shape, True))
    assert found.item() == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-6  # the example is not degenerate
    assert apply(term, student.float(), teacher.float(), mask).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [(5, 7), (4, 4)])
def test_features_of_different_widths_against_numpy(size: tuple[int, int]) -> None:
    """The pure functions take features: student and teacher need not have the same number of channels."""
    student, teacher, mask = example(4, size=size)
    student, mask = student[:, :3], mask.clamp_max(1)
    s, t, m, v = student.numpy(), teacher.numpy(), mask.numpy(), np.full(mask.shape, True)
    for found, expected in (
        (pairwise_affinity(student, teacher, 0.5), np_pairwise(s, t, v, 0.5)),
        (ifvd(student, teacher, mask), np_ifvd(s, t, m, v, 2)),
        (region_affinity(student, teacher, mask), np_rad(s, t, m, v, 2)),
        (attention_transfer(student, teacher, 4), np_at(s, t, v, 4)),
    ):
        assert found.item() == pytest.approx(expected, rel=1e-9) and expected > 1e-6
    assert hint_mse(student, teacher[:, 1:]).item() == pytest.approx(np_hint(s, t[:, 1:], v))


@pytest.mark.parametrize("term", [term for term, _ in TERMS if not is_of_channels(term)], ids=name)
def test_one_logit_is_two_classes(term: DistillationTerm) -> None:
    student, teacher, mask = example(1)
    two = [torch.cat([torch.zeros_like(z), z], dim=1) for z in (student, teacher)]
    torch.testing.assert_close(apply(term, student, teacher, mask), apply(term, two[0], two[1], mask))


@pytest.mark.parametrize("term", [CWD(), HintMSE(connector=None), LogitKL(reduction="mean")], ids=name)
def test_one_logit_is_one_channel(term: DistillationTerm) -> None:
    student, teacher, mask = example(1)
    two = [torch.cat([torch.zeros_like(z), z], dim=1) for z in (student, teacher)]
    torch.testing.assert_close(apply(term, student, teacher, mask), 2 * apply(term, two[0], two[1], mask))


@ALL
@CLASSES
def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn(term: DistillationTerm, classes: int) -> None:
    _, teacher, mask = example(classes)
    student = teacher.clone().requires_grad_()
    loss = apply(term, student, teacher, mask)
    loss.backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-9
    assert abs(loss.item()) < 1e-9


# --- gradients ------------------------------------------------------------------------------------------------------


@ALL
@CLASSES
def test_gradcheck(term: DistillationTerm, classes: int) -> None:
    student, teacher, mask = example(classes, size=(4, 4))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: apply(term, s, teacher, mask), (student,))


def test_gradcheck_of_features() -> None:
    student, teacher, mask = example(3, size=(4, 4))
    student.requires_grad_()
    mask = mask.clamp_max(1)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda s: pairwise_affinity(s, teacher),
        lambda s: ifvd(s, teacher, mask),
        lambda s: region_affinity(s, teacher, mask),
        lambda s: hint_mse(s, teacher),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (student,))


@ALL
def test_the_teacher_gets_no_gradient(term: DistillationTerm) -> None:
    student, teacher, mask = example(2)
    apply(term, student.requires_grad_(), teacher.requires_grad_(), mask).backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().max() > 0


# --- degenerate and extreme input -----------------------------------------------------------------------------------


@ALL
@CLASSES
@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_constant_maps_have_finite_gradients(term: DistillationTerm, classes: int, value: float, which: str) -> None:
    student, teacher, mask = example(classes, torch.float32)
    student, teacher = (
        torch.full_like(z, value) if which in (name, "both") else z
        for name, z in (("student", student), ("teacher", teacher))
    )
    loss = apply(term, student.requires_grad_(), teacher, mask)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all() and loss.isfinite()


def test_features_of_zeros_have_finite_gradients() -> None:
    _, teacher, mask = example(3, torch.float32)
    for function in (
        lambda s: pairwise_affinity(s, teacher),
        lambda s: ifvd(s, teacher, mask.clamp_max(1)),
        lambda s: region_affinity(s, teacher, mask.clamp_max(1)),
        lambda s: attention_transfer(s, teacher),
    ):
        student = torch.zeros_like(teacher, requires_grad=True)
        function(student).backward()
        assert student.grad is not None and student.grad.abs().max() == 0


@ALL
@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite(term: DistillationTerm, classes: int, dtype: torch.dtype) -> None:
    student, teacher, mask = example(classes, dtype)
    student, teacher = (1e4 * student.sign()).requires_grad_(), 1e4 * teacher.sign()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = apply(term, student, teacher, mask)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all() and loss.isfinite()


@CLASSES
@pytest.mark.parametrize(("term", "reference"), TERMS)
def test_bfloat16_autocast_is_computed_in_float32(term: DistillationTerm, reference: Reference, classes: int) -> None:
    """Only the logits are rounded, before the loss sees them."""
    student, teacher, mask = example(classes, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply(term, student, teacher, mask)
    assert found.dtype == torch.float32
    expected = reference(student.double().numpy(), teacher.double().numpy(), mask.numpy(), np.full(mask.shape, True))
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("term", [IFVD(), RegionAffinity()])
@CLASSES
def test_images_without_a_class_are_skipped(term: DistillationTerm, classes: int) -> None:
    student, teacher, mask = example(classes)
    assert (mask[2] == 0).all()
    torch.testing.assert_close(apply(term, student, teacher, mask), apply(term, student[:2], teacher[:2], mask[:2]))
    student.requires_grad_()
    loss = apply(term, student, teacher, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and student.grad.abs().max() == 0


def test_boundary_of_batches_without_contours() -> None:
    student, teacher, mask = example(2)
    student.requires_grad_()
    for k in (0, 1):
        loss = apply(BoundaryKL(), student, teacher, torch.full_like(mask, k))
        loss.backward()
        assert loss.item() == 0 and student.grad is not None and student.grad.abs().max() == 0


def test_boundary_leaves_out_pixels_far_from_a_contour() -> None:
    student, teacher = torch.zeros(1, 1, 1, 9), torch.zeros(1, 1, 1, 9)
    mask = torch.tensor([[[0, 0, 0, 0, 1, 1, 1, 1, 1]]])  # the contour is between 3 and 4: a band of 2 is 2..5
    student[..., [0, 1, 6, 7, 8]] = 5
    assert boundary_kl(student, teacher, mask, band=2).item() == 0
    assert boundary_kl(student, teacher, mask, band=3).item() > 0


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("classes", [1, 2])
def test_pearson_of_a_constant_map_counts_as_zero(which: str, classes: int) -> None:
    student, teacher, _ = example(classes, torch.float32, size=(64, 64))
    if which != "teacher":
        student = torch.full_like(student, 0.3)
    if which != "student":
        teacher = torch.full_like(teacher, -0.7)
    student.requires_grad_()
    loss = dist_intra(student, teacher)
    loss.backward()
    assert loss.item() == 1 and student.grad is not None and student.grad.abs().max() == 0


def test_dist_ignores_scale_and_offset_of_probabilities() -> None:
    p = torch.rand(2, 1, 5, 5, dtype=torch.float64)
    student, teacher = torch.logit(0.1 + 0.3 * p), torch.logit(0.2 + 0.7 * p)
    assert dist_intra(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert dist_intra(torch.logit(0.9 - 0.3 * p), teacher).item() == pytest.approx(2)


def test_cwd_does_not_see_an_offset() -> None:
    student, _, _ = example(1)
    assert cwd(student, student + 3).item() == pytest.approx(0, abs=1e-12)


# --- refusals -------------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("shape", [(3, 2, 6, 8), (2, 2, 6, 9), (2, 6, 9)])
def test_shapes_that_do_not_match_are_refused(term: DistillationTerm, shape: tuple[int, ...]) -> None:
    student, _, mask = example(2)
    with pytest.raises(ConfigError, match="Distillation"):
        apply(term, student, torch.zeros(shape), mask)


@pytest.mark.parametrize("term", [IFVD(), RegionAffinity(), BoundaryKL()])
def test_masks_of_another_shape_are_refused(term: DistillationTerm) -> None:
    student, teacher, mask = example(2)
    with pytest.raises(ConfigError, match=r"mask \(3, 1, 6, 9\) does not match"):
        apply(term, student, teacher, mask[:, None])


def test_hints_of_other_shapes_are_not_broadcast() -> None:
    with pytest.raises(ConfigError, match="must have one shape"):
        hint_mse(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (CWD, {"temperature": 0.0}, "temperature"),
        (DISTIntra, {"temperature": -1.0}, "temperature"),
        (BoundaryKL, {"temperature": 0.0}, "temperature"),
        (BoundaryKL, {"band": 0}, "band must be 1 pixel or more"),
        (PairwiseAffinity, {"pool": 0.0}, "pool"),
        (PairwiseAffinity, {"pool": 1.5}, "pool"),
        (AttentionTransfer, {"p": 3}, "p must be 2 or 4"),
        (RegionAffinity, {"weight": -0.1}, "RegionAffinity: weight"),
        (IFVD, {"weight": float("inf")}, "IFVD: weight"),
    ],
)
def test_unusable_settings_are_refused(make: Any, arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**arguments)
