"""The dry pass: wrong taps, unfit maps and class counts are found on untrained networks, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fkd_med.distillation import rehearse
from fkd_med.errors import ConfigError
from fkd_med.losses import CWD, AttentionTransfer, HintMSE, LogitKL, RegionAffinity, pointwise
from fkd_med.networks import ResUNet, SlimUNet

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STUDENT, TEACHER = SlimUNet().eval(), ResUNet(width=4).eval()


def unfit(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels + 1, out_channels, 1)


def test_connectors_lead_from_the_students_channels_to_the_teachers() -> None:
    terms = {
        "kd": LogitKL(),
        "hint": HintMSE(student_tap="decoder.0", teacher_tap="bridge", connector=pointwise),
        "at": AttentionTransfer(student_tap="decoder.1", teacher_tap="decoder.0"),
        "rad": RegionAffinity(student_tap="decoder.1", teacher_tap="decoder.0"),
    }
    found = rehearse(STUDENT, TEACHER, terms, IMAGE)
    assert set(found) == {"hint"}
    assert (found["hint"].in_channels, found["hint"].out_channels) == (30, 32)


def test_modes_and_statistics_are_as_before() -> None:
    student, teacher = SlimUNet(), ResUNet(width=4)
    student.encoder[0].eval()
    modes = [m.training for m in student.modules()]
    before = {k: v.clone() for k, v in [*student.state_dict().items(), *teacher.state_dict().items()]}
    generator = torch.get_rng_state()
    rehearse(student, teacher, {"kd": LogitKL()}, IMAGE)
    after = dict([*student.state_dict().items(), *teacher.state_dict().items()])
    assert [m.training for m in student.modules()] == modes and all(m.training for m in teacher.modules())
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(m._forward_hooks for network in (student, teacher) for m in network.modules())


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (
            {"at": AttentionTransfer(student_tap="decodr.0")},
            "model.losses.at.student_tap: the student SlimUNet has no module 'decodr.0'.*decoder.0",
        ),
        (
            {"at": AttentionTransfer(teacher_tap="bridje")},
            "model.losses.at.teacher_tap: the teacher ResUNet has no module 'bridje'.*bridge",
        ),
        (
            {"cw": CWD(student_tap="decoder.0", teacher_tap="bridge")},
            r"model.losses.cw \(CWD\) cannot compare the student's decoder.0 \(1, 30, 2, 2\) with the teacher's bridge "
            r"\(1, 32, 4, 4\).*connector: fkd_med.losses.pointwise",
        ),
        (
            {"at": AttentionTransfer(student_tap="encoder.0", teacher_tap="bridge", resize="none")},
            r"student's encoder.0 .*teacher's bridge .*\(32, 32\) and the teacher's \(4, 4\); resize",
        ),
        (
            {"hint": HintMSE(student_tap="decoder.0", teacher_tap="bridge", connector=unfit)},
            "model.losses.hint .HintMSE. cannot compare",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_explained(terms, words) -> None:
    with pytest.raises(ConfigError, match=words):
        rehearse(STUDENT, TEACHER, terms, IMAGE)


def test_class_counts() -> None:
    with pytest.raises(ConfigError, match="teacher has 2 output channels and the student 1"):
        rehearse(STUDENT, ResUNet(width=4, classes=2), {"kd": LogitKL()}, IMAGE)


def test_networks_that_cannot_take_the_images() -> None:
    with pytest.raises(ConfigError, match=r"the teacher ResUNet cannot take images of shape \(1, 3, 32, 32\)"):
        rehearse(STUDENT, ResUNet(in_channels=1, width=4), {"kd": LogitKL()}, IMAGE)
