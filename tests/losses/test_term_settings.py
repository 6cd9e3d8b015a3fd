"""Where a term looks: its settings on the command line, what they mean to the losses, refusals and copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from loss_references import example
from torch import Tensor, nn

import fkd_med.losses
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
    Pixels,
    Ramp,
    RegionAffinity,
    ifvd,
    pairwise_affinity,
    pointwise,
    region_affinity,
)

OF_FEATURES: list[Any] = [CWD, AttentionTransfer, PairwiseAffinity, IFVD, RegionAffinity, HintMSE]
OF_LOGITS: list[Any] = [LogitKL, DISTIntra, BoundaryKL]


# --- the command line ---------------------------------------------------------------------------------------------


def parse(class_name: str, **init_args: Any) -> DistillationTerm:
    """Build a term as the command line builds those of model.losses."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--terms", type=dict[str, DistillationTerm])
    configuration = {"one": {"class_path": f"fkd_med.losses.{class_name}", "init_args": init_args}}
    built = parser.instantiate_classes(parser.parse_object({"terms": configuration}))
    term = built.terms["one"]
    assert isinstance(term, DistillationTerm)
    return term


@pytest.mark.parametrize("make", OF_FEATURES)
def test_every_setting_reaches_a_term_of_features(make: Any) -> None:
    term = parse(
        make.__name__,
        weight=2.5,
        student_tap="encoder[3]",
        teacher_tap="encoder.layer4",
        resize="teacher",
        connector="fkd_med.losses.pointwise",
        schedule={"class_path": "fkd_med.losses.Ramp", "init_args": {"last": 0.5}},
    )
    assert type(term) is make and term.weight == 2.5
    assert (term.student_tap, term.teacher_tap, term.resize) == ("encoder[3]", "encoder.layer4", "teacher")
    assert term.connector is pointwise
    assert isinstance(term.schedule, Ramp) and term.schedule.last == 0.5 and term.weight_at(1.0) == 1.25


@pytest.mark.parametrize("make", OF_LOGITS)
def test_terms_of_logits_take_resize_and_schedule(make: Any) -> None:
    term = parse(make.__name__, resize="none", schedule={"class_path": "fkd_med.losses.Ramp"})
    assert type(term) is make and term.resize == "none" and isinstance(term.schedule, Ramp)


@pytest.mark.parametrize("make", [*OF_FEATURES, *OF_LOGITS])
def test_defaults_on_the_command_line_are_those_of_the_class(make: Any) -> None:
    term = parse(make.__name__)
    assert vars(term) == vars(make())
    assert (term.student_tap, term.teacher_tap, term.resize, term.schedule) == ("logits", "logits", "student", None)
    assert term.connector is (pointwise if make is HintMSE else None)


def test_a_hint_may_go_without_connector() -> None:
    assert HintMSE(connector=None).connector is None and parse("HintMSE", connector=None).connector is None


def test_a_connector_may_be_a_class() -> None:
    term = parse("CWD", connector={"class_path": "torch.nn.Conv2d", "init_args": {"kernel_size": 3, "padding": 1}})
    assert term.connector is not None
    built = term.connector(4, 6)
    assert isinstance(built, nn.Conv2d) and built.weight.shape == (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"student_tapp": "encoder"}, "student_tapp"),
        ({"connector": "fkd_med.losses.nonsense"}, "nonsense"),
        ({"connector": "fkd_med.losses.cwd"}, "to be a function that returns"),
        ({"resize": "both"}, "resize"),
        ({"schedule": {"class_path": "fkd_med.losses.LogitKL"}}, "schedule"),
    ],
)
def test_wrong_names_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        parse("CWD", **wrong)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OF_LOGITS)
def test_terms_of_logits_refuse_features(make: Any) -> None:
    assert make.logits_only
    for settings in ({"student_tap": "encoder[3]"}, {"teacher_tap": "decoder"}):
        with pytest.raises(ConfigError, match=f"{make.__name__} compares logits; for features use CWD, .*HintMSE"):
            make(**settings)
    with pytest.raises(ConfigError, match=f"{make.__name__} compares logits, which need no connector"):
        make(connector=pointwise)


@pytest.mark.parametrize("make", OF_FEATURES)
def test_terms_of_features_take_them(make: Any) -> None:
    assert not make.logits_only
    assert make(student_tap="encoder[3]", connector=pointwise).student_tap == "encoder[3]"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student_tap": ""}, "CWD: student_tap is empty"),
        ({"teacher_tap": " "}, "CWD: teacher_tap is empty"),
        ({"resize": "both"}, "CWD: resize must be one of student, teacher, none, not 'both'"),
        ({"weight": -1.0}, "CWD: weight"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CWD(**settings)


def test_misspelt_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="studnet_tap"):
        CWD(studnet_tap="encoder")


# --- logits and features ------------------------------------------------------------------------------------------


def softmax(logits: Tensor) -> Tensor:
    two = torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits
    return two.softmax(dim=1)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("make", [PairwiseAffinity, IFVD, RegionAffinity])
def test_cosines_are_of_probabilities_or_of_features(make: Any, classes: int) -> None:
    """One side may show logits and the other features; what comes out of a connector are features."""
    student, teacher, mask = example(classes)
    pixels = Pixels(mask, max(2, classes))
    features = make(student_tap="encoder", teacher_tap="encoder")
    as_features = {
        (s, t): features(s_map, t_map, pixels)
        for s, s_map in (("raw", student), ("soft", softmax(student)))
        for t, t_map in (("raw", teacher), ("soft", softmax(teacher)))
    }
    for term, expected in (
        (make(), ("soft", "soft")),
        (make(student_tap="encoder"), ("raw", "soft")),
        (make(teacher_tap="encoder"), ("soft", "raw")),
        (make(connector=pointwise), ("raw", "soft")),
    ):
        torch.testing.assert_close(term(student, teacher, pixels), as_features[expected])
    assert len({round(value.item(), 9) for value in as_features.values()}) == 4


def test_features_are_compared_over_the_masks_classes() -> None:
    """Eight channels of features and two classes: the number of classes is not the number of channels."""
    student, teacher, mask = example(4)
    mask = mask.clamp_max(1)
    taps = {"student_tap": "encoder", "teacher_tap": "encoder"}
    for make, function in ((IFVD, ifvd), (RegionAffinity, region_affinity)):
        found = make(**taps)(student, teacher, Pixels(mask, 2))
        assert torch.equal(found, function(student, teacher, mask, 2)) and found > 0
    assert torch.equal(
        PairwiseAffinity(**taps)(student, teacher, Pixels(mask, 2)), pairwise_affinity(student, teacher, 0.5)
    )


def test_pointwise_is_a_convolution_with_bias() -> None:
    connector = pointwise(3, 5)
    assert isinstance(connector, nn.Conv2d) and connector.bias is not None
    assert connector(torch.zeros(2, 3, 4, 6)).shape == (2, 5, 4, 6)


# --- copies -------------------------------------------------------------------------------------------------------


class Heavy:
    """A connector's maker that must not be copied."""

    def __call__(self, in_channels: int, out_channels: int) -> nn.Module:
        return nn.Identity()

    def __deepcopy__(self, memo: object) -> Heavy:
        raise AssertionError("copied")


def test_copies_share_the_connectors_maker_only() -> None:
    term = CWD(weight=2.0, connector=Heavy(), schedule=Ramp())
    term.notes = ["mine"]  # type: ignore[attr-defined]
    twin = copy.deepcopy({"a": term, "b": term})
    assert twin["a"] is twin["b"] and twin["a"] is not term and type(twin["a"]) is CWD
    assert twin["a"].connector is term.connector
    assert twin["a"].schedule is not term.schedule and vars(twin["a"].schedule) == vars(term.schedule)
    assert twin["a"].notes == ["mine"] and twin["a"].notes is not term.notes  # type: ignore[attr-defined]
    twin["a"].weight = 1.0
    assert term.weight == 2.0


def test_public_names_are_exported() -> None:
    assert all(hasattr(fkd_med.losses, name) for name in fkd_med.losses.__all__)
    assert {"Pixels", "Ramp", "WeightSchedule", "HintMSE", "pointwise", "DistillationTerm"} <= set(
        fkd_med.losses.__all__
    )
