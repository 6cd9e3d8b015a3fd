"""The metric that chooses the kept round: one that nobody logs, or that is better the other way, is refused at once."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from torch import nn

from fkd_med.cli import main
from fkd_med.cli.monitor import check_callbacks, check_monitor
from fkd_med.errors import ConfigError
from fkd_med.modules import SegmentationModule


class Own(SegmentationModule):
    """A class of a user's own, which may log more."""


@pytest.mark.parametrize(
    ("monitor", "mode", "clients"),
    [
        ("val/dice", "max", ["a"]), ("step", "max", ["a"]), ("val/loss", "min", ["a"]), ("a/val_dice", "max", ["a"]),
        (None, "min", ["a"]), ("train/loss", "min", None),
    ],
)  # fmt: skip
def test_what_is_logged_is_taken(monitor: str | None, mode: str, clients: list[str] | None) -> None:
    check_monitor(monitor, mode, SegmentationModule(nn.Conv2d(3, 1, 1)), clients)


def test_modules_of_others_may_log_what_they_like() -> None:
    check_monitor("val/surface", "min", Own(nn.Conv2d(3, 1, 1)), ["a"])
    check_monitor("score", "min", L.LightningModule(), None)


@pytest.mark.parametrize(
    ("monitor", "mode", "clients", "message"),
    [
        ("val/dcie", "max", ["a"], "there is no 'val/dcie'. Did you mean val/dice?.*a/val_dice"),
        ("b/val_dice", "max", ["a"], "Did you mean a/val_dice"),
        ("train/loss", "min", ["a"], "There are val/dice"),
        (
            "val/dice",
            "min",
            None,
            "takes the smallest val/dice for the best: give --checkpoint.mode max",
        ),
        ("step", "min", ["a"], "--checkpoint.mode max"),
        ("val/loss", "max", ["a"], "takes the largest val/loss for the best: give --checkpoint.mode min"),
        ("train/loss", "max", None, "--checkpoint.mode min"),
    ],
)
def test_what_is_not_or_is_turned_is_refused(monitor: str, mode: str, clients: list[str] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_monitor(monitor, mode, SegmentationModule(nn.Conv2d(3, 1, 1)), clients)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            EarlyStopping("val/dcie", mode="max"),
            "callbacks: EarlyStopping.monitor: there is no 'val/dcie'. Did you mean val/",
        ),
        (
            EarlyStopping("val/dice"),
            "callbacks: EarlyStopping.mode is min, .* give trainer.callbacks: EarlyStopping.mode",
        ),
        (ModelCheckpoint(monitor="val/iuo", mode="max"), "callbacks: ModelCheckpoint.monitor: .* Did you mean val/iou"),
    ],
)
def test_callbacks_of_the_users_own_are_checked_too(callback: L.Callback, message: str) -> None:
    module = SegmentationModule(nn.Conv2d(3, 1, 1))
    check_callbacks([RichProgressBar(), ModelCheckpoint(), EarlyStopping("val/dice", mode="max")], module, ["a"])
    with pytest.raises(ConfigError, match=message):
        check_callbacks([callback], module, ["a"])


def test_it_is_said_before_anything_is_trained_or_written(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["fit", "--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(run)]
    store = f"--model.teacher.store={tmp_path / 'teachers'}"
    assert main([*arguments, store, "--checkpoint.monitor=steps"]) == 2
    assert "Did you mean step?" in capsys.readouterr().err
    assert not run.exists() and not (tmp_path / "teachers").exists()
