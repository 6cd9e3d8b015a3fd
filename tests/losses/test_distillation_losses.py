"""Logit KL against float64 NumPy, its reductions, its gradient and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses import DistillationTerm, LogitKL, Pixels, logit_kl


def reference(student: Tensor, teacher: Tensor, temperature: float) -> NDArray[np.float64]:
    """KL(teacher || student) per pixel, times T^2, from the definition, in float64."""

    def probabilities(logits: Tensor) -> NDArray[np.float64]:
        z = logits.double().numpy() / temperature
        if z.shape[1] == 1:
            z = np.concatenate([np.zeros_like(z), z], axis=1)
        e = np.exp(z - z.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))

    p, q = probabilities(teacher), probabilities(student)
    return np.asarray(temperature**2 * (p * np.log(p / q)).sum(1))


def pair(classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(classes)
    student, teacher = (3 * torch.randn(2, classes, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_against_numpy(classes: int, temperature: float) -> None:
    student, teacher = pair(classes)
    kl = reference(student, teacher, temperature)  # (N, H, W)
    for reduction, expected in (("pixel", kl.mean()), ("mean", kl.mean() / classes), ("batchmean", kl.sum() / 2)):
        found = logit_kl(student, teacher, temperature, reduction)  # type: ignore[arg-type]
        assert found.ndim == 0
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("classes", [2, 5])
def test_reductions_are_torchs(classes: int) -> None:
    """Parity with other code: `mean` and `batchmean` of torch.nn.functional.kl_div."""
    student, teacher = pair(classes)
    for reduction in ("mean", "batchmean"):
        theirs = torch.nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction=reduction)
        torch.testing.assert_close(logit_kl(student, teacher, reduction=reduction), theirs)  # type: ignore[arg-type]


def test_one_logit_equals_two_classes() -> None:
    student, teacher = pair(1)
    two = [torch.cat([torch.zeros_like(z), z], dim=1) for z in (student, teacher)]
    torch.testing.assert_close(logit_kl(student, teacher, 2.0), logit_kl(two[0], two[1], 2.0))


@pytest.mark.parametrize("classes", [1, 3])
def test_equal_logits_are_zero_with_zero_gradient(classes: int) -> None:
    _, teacher = pair(classes)
    student = teacher.clone().requires_grad_()
    loss = logit_kl(student, teacher, 2.0)
    loss.backward()
    assert student.grad is not None
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("reduction", ["pixel", "mean", "batchmean"])
def test_gradcheck(classes: int, reduction: Any) -> None:
    student, teacher = (z[..., :2, :2].contiguous() for z in pair(classes, torch.float64))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: logit_kl(s, teacher, 3.0, reduction), (student,))


@pytest.mark.parametrize("classes", [1, 3])
def test_the_teacher_gets_no_gradient(classes: int) -> None:
    student, teacher = (z.requires_grad_() for z in pair(classes))
    logit_kl(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite(classes: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, (2, classes, 4, 4), generator=g) * 2 - 1 for _ in range(2)]
    student, teacher = (1e4 * sign.to(dtype) for sign in signs)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = logit_kl(student, teacher, 1.0)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert loss.isfinite() and loss > 1e3


def test_huge_logits_have_the_right_value() -> None:
    """A sure teacher against a surely wrong student: T^2 * 2e4 / T per pixel for K = 2, T * 1e4 for one logit."""
    one = torch.full((1, 1, 2, 2), 1e4)
    assert logit_kl(-one, one, 2.0).item() == pytest.approx(2e4)
    two = torch.cat([one, -one], dim=1)
    assert logit_kl(-two, two, 2.0).item() == pytest.approx(4e4)


@pytest.mark.parametrize("classes", [1, 3])
def test_bfloat16_autocast_is_computed_in_float32(classes: int) -> None:
    student, teacher = (z.bfloat16() for z in pair(classes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = logit_kl(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(student, teacher, 2.0).mean(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        logit_kl(*pair(1), temperature)
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        LogitKL(temperature=temperature)


def test_different_classes_name_both_shapes() -> None:
    with pytest.raises(ConfigError, match=r"student predicts 1 .*\(2, 1, 4, 4\).*teacher 3 .*\(2, 3, 4, 4\)"):
        logit_kl(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("shape", [(2, 1, 4, 8), (1, 1, 4, 4), (2, 1, 4)])
def test_other_shapes_are_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="logits"):
        logit_kl(torch.zeros(2, 1, 4, 4), torch.zeros(shape))


def test_term_returns_the_raw_loss_and_carries_its_weight() -> None:
    student, teacher = pair(2)
    term = LogitKL(temperature=3.0, weight=0.25, reduction="mean")
    assert term.weight == 0.25
    pixels = Pixels(torch.zeros(2, 4, 5, dtype=torch.int64), 2)
    torch.testing.assert_close(term(student, teacher, pixels), logit_kl(student, teacher, 3.0, "mean"))


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_unusable_weights_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="LogitKL: weight"):
        LogitKL(weight=weight)


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ConfigError, match="reduction must be pixel, mean or batchmean, not 'sum'"):
        LogitKL(reduction="sum")  # type: ignore[arg-type]


def test_terms_are_a_dict_by_name_on_the_command_line() -> None:
    parser = ArgumentParser()
    parser.add_argument("--terms", type=dict[str, DistillationTerm])
    configuration = {"kd": {"class_path": "fkd_med.losses.LogitKL", "init_args": {"temperature": 5.0}}}
    parsed = parser.parse_object({"terms": configuration})
    term = parser.instantiate_classes(parsed).terms["kd"]
    assert isinstance(term, LogitKL) and (term.temperature, term.weight, term.reduction) == (5.0, 1.0, "pixel")
