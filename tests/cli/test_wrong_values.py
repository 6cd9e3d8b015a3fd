"""A value that a key does not take is answered in one line: the key, the value, what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fkd_med.cli import main
from fkd_med.cli.wrong_values import wrong_value

CONFIG = Path(__file__).parents[2] / "configs" / "folder" / "fedavg_student.yaml"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--federation.optimizer_state=kep"], "federation.optimizer_state is kep: give one of reset, keep."),
        (["--federation.rounds=many"], "federation.rounds is many: give a whole number."),
        (["--federation.local_steps=x"], "federation.local_steps is x: give a whole number or null."),
        (["--federation.frozen=x"], "federation.frozen is x: give a list, such as [a, b] or null."),
        (["--model.optimizer.lr=fast"], "model.optimizer.lr is fast: give a number."),
        (["--data.augmentation=non"], "data.augmentation is non: "),
        (["--test_after_fit=maybe"], "test_after_fit is maybe: give true or false."),
        (["--federation.aggregator=none"], "federation.aggregator is none: give the class_path of a class or null.\n"),
        (["--federation.aggregator=FedAvgg"], "is FedAvgg: give the class_path of a class or null. Did you mean Fed"),
        (
            ["--federation.client_rules=[{class_path: GlobalDistillation, init_args: {views: 3}}]"],
            "federation.client_rules.views is 3: give one of 1, 2, 4, 8.",
        ),
    ],
)  # fmt: skip
def test_key_value_and_what_the_key_takes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIG), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_setting_of_another_class_is_told_from_a_misspelt_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIG), "--model.teacher_cache=off"]) == 2
    error = capsys.readouterr().err
    assert "'teacher_cache' is unknown" in error and "It is a setting of DistillationModule: give it there" in error


def test_a_run_is_scored_by_its_own_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """See also `test_local_only_students_are_scored_alike_after_a_reload`."""
    for command in ("test", "validate"):
        assert main([command, f"--run_dir={tmp_path}"]) == 2
        assert "holds no run: it has no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "something else",
        'Parser key "a": went wrong',
        "Parser key \"a\":\n  Expected a <class 'some.Thing'>. Got value: 3",
        'Parser key "a":\n  Nothing expected. Got value: 3',
    ],
)
def test_other_reports_are_left_as_they_are(text: str) -> None:
    assert wrong_value(text) is None
