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
        (["--model.optimizer=SlimUNet"], "model.optimizer is SlimUNet: give the class_path of a class. `fkd"),
    ],
)  # fmt: skip
def test_key_value_and_what_the_key_takes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIG), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.loss=segmentation_models_pytorch.losses.DiceLoss"],
            "model.loss: segmentation_models_pytorch.losses.DiceLoss needs mode: give --model.loss.mode VALUE (in a",
        ),
        (
            ["--model.scheduler=torch.optim.lr_scheduler.StepLR"],
            "model.scheduler: torch.optim.lr_scheduler.StepLR needs step_size: give --model.scheduler.step_size VALUE",
        ),
        (
            ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"],
            "trainer.callbacks: lightning.pytorch.callbacks.EarlyStopping needs monitor: give it in its init_args.\n",
        ),
        (["--model.network=pathlib.Path"], "model.network is pathlib.Path, which is no torch.nn.Module: give the"),
        (["--model.network=math.sqrt"], "model.network is math.sqrt, which is no torch.nn.Module: give the class_path"),
        (["--model.optimizer=torch.nn.Conv2d"], "model.optimizer is torch.nn.Conv2d, which is no Optimizer: give the"),
        (
            ["--model.scheduler=torch.nn.Conv2d"],
            "model.scheduler is torch.nn.Conv2d, which is no LRScheduler or ReduceLROnPlateau: give the class_path of",
        ),
        (
            ["--federation.aggregator=fkd_med.networks.SlimUNet"],
            "federation.aggregator is fkd_med.networks.SlimUNet, which is no Aggregator: give the class_path of one.\n",
        ),
        (
            ["--model=fkd_med.modules.DistillationModule", "--model.losses={own: {class_path: torch.nn.ReLU}}"],
            "model.losses is torch.nn.ReLU, which is no DistillationTerm: give the class_path of one.\n",
        ),
        (["--data.layout=fkd_med.data.Layout"], "data.layout is fkd_med.data.Layout, which is abstract: give the "),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_used(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIG), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--federation.round=3"], "'round' is unknown (in federation). Did you mean rounds?\n"),
        (["--data.layout=FolderPair", "--data.layout.image=x"], "is unknown (in data.layout). Did you mean images?\n"),
        (
            ["--config", str(CONFIG.parents[1] / "distillation" / "cwd.yaml")],
            "DistillationModule and MutualDistillationModule: give it there (configurations named fkd_* distil)",
        ),
    ],
)
def test_what_a_place_takes_comes_before_what_others_do(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(CONFIG), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["fit", "teachers", "validate", "test"])
def test_a_command_without_a_configuration_asks_for_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert f"`fkd {command}` needs a model: give --" in error and "--config FILE" in error
    assert ("--run_dir DIR" in error) == (command in ("validate", "test"))


def test_a_setting_of_another_class_is_told_from_a_misspelt_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIG), "--model.teacher_cache=off"]) == 2
    error = capsys.readouterr().err
    assert "'teacher_cache' is unknown" in error and "It is a setting of DistillationModule: give it there" in error


def test_a_setting_of_a_class_that_is_not_named_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIG), "--data.layout.mask_suffix=_mask"]) == 2
    error = capsys.readouterr().err
    assert "give" in error and "setting of FolderPair" in error and error.count("\n") == 1
    assert "--data.layout=CLASS --data.layout.mask_suffix=_mask." in error


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
