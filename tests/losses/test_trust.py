"""Trust: which pixels a teacher is believed at, what that leaves of a loss and its gradient, and what is refused.

The formulae against NumPy, masks with holes, precision and gradients: with all other terms, in `loss_references.TERMS`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_references import example
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses import BoundaryKL, LogitKL, Pixels, boundary_kl, logit_kl, trust_map

CLASSES = pytest.mark.parametrize("classes", [1, 2, 4])
TRUSTS = pytest.mark.parametrize("trust", ["correct", "true_class"])


def gradient(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    student = student.clone().requires_grad_()
    logit_kl(student, teacher, 2.0, **options).backward()
    assert student.grad is not None
    return student.grad


def test_by_hand() -> None:
    """One logit: p = 1/4, 3/4 and 1/2, of which the last is background, as a prediction would be."""
    teacher = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64).mul(torch.log(torch.tensor(3.0))).view(1, 1, 1, 3)
    background, foreground = ([1, 0, 1], [0.75, 0.25, 0.5]), ([0, 1, 0], [0.25, 0.75, 0.5])
    for mask, (correct, true_class) in (([0, 0, 0], background), ([1, 1, 1], foreground)):
        labels = torch.tensor(mask).view(1, 1, 3)
        assert trust_map(teacher, labels, "correct").flatten().tolist() == correct
        assert trust_map(teacher, labels, "true_class").flatten().tolist() == pytest.approx(true_class, rel=1e-6)
    three = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().view(1, 3, 1, 1).repeat(1, 1, 1, 3)
    labels = torch.tensor([0, 1, 2]).view(1, 1, 3)
    assert trust_map(three, labels, "correct").flatten().tolist() == [1, 0, 0]
    assert trust_map(three, labels, "true_class").flatten().tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert trust_map(three, labels, "all").flatten().tolist() == [1, 1, 1]


@CLASSES
@TRUSTS
def test_a_believed_pixel_pulls_as_it_would_without_trust(classes: int, trust: Any) -> None:
    """The gradient of each pixel is that of plain logit KL times how far the teacher is believed there."""
    student, teacher, mask = example(classes)
    believed = trust_map(teacher, mask, trust)
    plain, found = gradient(student, teacher), gradient(student, teacher, trust=trust, mask=mask)
    torch.testing.assert_close(found, plain * believed.unsqueeze(1))
    assert 0.05 < believed.mean() < 0.95 and plain.abs().max() > 0


@CLASSES
def test_all_is_the_loss_as_ever_and_needs_no_mask(classes: int) -> None:
    student, teacher, mask = example(classes)
    plain = logit_kl(student, teacher, 2.0)
    assert torch.equal(logit_kl(student, teacher, 2.0, trust="all"), plain)
    assert torch.equal(LogitKL()(student, teacher, Pixels(mask, max(2, classes))), plain)


@TRUSTS
def test_a_teacher_that_is_always_right_is_believed_everywhere(trust: Any) -> None:
    student, _, mask = example(1)
    teacher = 40.0 * (2 * mask.unsqueeze(1).double() - 1)
    torch.testing.assert_close(logit_kl(student, teacher, trust=trust, mask=mask), logit_kl(student, teacher))
    wrong = logit_kl(student, -teacher, trust=trust, mask=mask)
    assert wrong.item() < 1e-12 < logit_kl(student, -teacher).item()


def test_a_batch_of_images_is_the_mean_of_its_images() -> None:
    """With a mean over the pixels believed it would not be: an image would count by how much of it is believed."""
    student, teacher, mask = example(2)
    each = [logit_kl(student[i : i + 1], teacher[i : i + 1], trust="correct", mask=mask[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(logit_kl(student, teacher, trust="correct", mask=mask), torch.stack(each).mean())


@TRUSTS
def test_the_teacher_gets_no_gradient(trust: Any) -> None:
    student, teacher, mask = example(3)
    teacher.requires_grad_()
    assert not trust_map(teacher, mask, trust).requires_grad
    logit_kl(student.requires_grad_(), teacher, trust=trust, mask=mask).backward()
    assert teacher.grad is None


def test_what_trust_cannot_be_used_with_is_refused() -> None:
    student, teacher, mask = example(3)
    with pytest.raises(ConfigError, match="trust compares the teacher with the mask, and there is none"):
        logit_kl(student, teacher, trust="correct")
    unlabelled = mask.clone()
    unlabelled[0, 0, 0] = 255
    with pytest.raises(ConfigError, match=r"pixels of none of the 3 classes \(values 0 to 255\)"):
        logit_kl(student, teacher, trust="true_class", mask=unlabelled)
    outside = unlabelled != 255
    logit_kl(student, teacher, trust="true_class", mask=unlabelled, valid=outside)  # where nobody asks
    with pytest.raises(ConfigError, match=r"mask \(3, 6, 8\)"):
        logit_kl(student, teacher, trust="true_class", mask=mask[..., 1:])
    for make in (LogitKL, BoundaryKL):
        with pytest.raises(ConfigError, match="trust must be one of all, correct, true_class, not 'some'"):
            make(trust="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not 'some'"):
        boundary_kl(student, teacher, mask, trust="some")  # type: ignore[arg-type]
