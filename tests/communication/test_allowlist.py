"""Nothing but the student travels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fkd_med.communication import AllowList, Broadcast, Update
from fkd_med.errors import TrainingError

STUDENT = {"conv.weight": torch.zeros(2, 3, 3, 3), "bn.num_batches_tracked": torch.tensor(0)}


def an_update(**changes: Any) -> Update:
    base: dict[str, Any] = {"client": "a", "round": 0, "attempt": 0, "state": dict(STUDENT), "num_examples": 1}
    return Update(**(base | {"num_steps": 1, "metrics": {"train/loss_epoch": 1.0}} | changes))


def test_the_students_tensors_pass_both_ways() -> None:
    allowed = AllowList(STUDENT, {"scaffold"})
    allowed.check(Broadcast(0, dict(STUDENT)))
    allowed.check(an_update(extras={"scaffold": {"conv.weight": torch.ones(2, 3, 3, 3), "a": torch.tensor(0.5)}}))


def test_a_shared_teacher_is_held_to_its_own_tensors() -> None:
    allowed = AllowList(STUDENT, whose="teacher")
    allowed.check(an_update())
    for state, said in (
        (STUDENT | {"image": torch.zeros(1)}, "'image', which is not the teacher's"),
        (STUDENT | {"conv.weight": torch.zeros(2, 3, 3, 4)}, "where the teacher has"),
        ({}, "does not send tensor 'bn.num_batches_tracked'"),
    ):
        with pytest.raises(TrainingError, match=rf"{said}.*Use the same teacher on all sides\."):
            allowed.check(an_update(state=state))


def test_finiteness_is_not_its_business() -> None:
    nan = {"conv.weight": torch.full((2, 3, 3, 3), float("nan"))}
    AllowList(STUDENT).check(an_update(state=STUDENT | nan, metrics={"loss": float("nan")}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"state": STUDENT | {"teacher.conv.weight": torch.zeros(2, 3, 3, 3)}}, r"teacher\.conv\.weight"),
        ({"state": STUDENT | {"image": torch.zeros(1, 3, 64, 64)}}, "image"),
        ({"state": STUDENT | {"conv.weight": torch.zeros(2, 3, 3, 4)}}, r"conv\.weight"),
        ({"state": STUDENT | {"conv.weight": torch.zeros(2, 3, 3, 3).double()}}, r"conv\.weight"),
        ({"state": {"conv.weight": STUDENT["conv.weight"]}}, r"bn\.num_batches_tracked"),
        ({"extras": {"logits": {"conv.weight": torch.zeros(2, 3, 3, 3)}}}, "logits"),
        ({"extras": {"scaffold": {"images": torch.zeros(1, 3, 64, 64)}}}, "images"),
        ({"extras": {"scaffold": {"mask": torch.zeros(1, 64, 64, dtype=torch.int64)}}}, "mask"),
        ({"extras": {"scaffold": {"conv.weight": torch.zeros(3, 64, 64)}}}, r"conv\.weight"),
        ({"extras": {"scaffold": {"patient-17/scan.png": torch.tensor(1.0)}}}, r"scan\.png"),
        ({"metrics": {"/data/patient-17/scan.png": 1.0}}, r"scan\.png"),
        ({"metrics": {"C:\\scans": 1.0}}, "scans"),
        ({"metrics": {f"pixel{i}": 0.1 for i in range(64 * 64)}}, "4096 metrics"),
        ({"num_examples": 0}, "num_examples = 0"),
        ({"num_steps": 0}, "num_steps = 0"),
        ({"num_examples": -3}, "num_examples = -3"),
    ],
)
def test_nothing_else_passes_and_the_error_names_client_and_thing(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TrainingError, match=named) as caught:
        AllowList(STUDENT, frozenset({"scaffold"})).check(an_update(**changes))
    assert "Client 'a'" in str(caught.value)


def test_a_frozen_teacher_inside_the_student_module_never_passes() -> None:
    class Distiller(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = torch.nn.Conv2d(3, 1, 1)
            self.teacher = torch.nn.Conv2d(3, 1, 1)

    module = Distiller()
    allowed = AllowList({n: t for n, t in module.state_dict().items() if n.startswith("student.")})
    with pytest.raises(TrainingError, match=r"The server sends tensor 'teacher\."):
        allowed.check(Broadcast(0, module.state_dict()))
