"""metrics.csv: appended durably, never rewritten but for a resume."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from fkd_med.tracking import MetricsCSV


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_appends_one_line_per_number(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsCSV(path).log_metrics({"val/dice": 0.25, "epoch": 3, "a/lr": torch.tensor(0.5)}, step=1)
    MetricsCSV(path).log_metrics({"val/dice": 1 / 3}, step=2)  # another process, in effect
    MetricsCSV(path).log_metrics({"x": 1.0})
    assert rows(path) == [
        ["step", "name", "value"],
        ["1", "a/lr", "0.5"],
        ["1", "val/dice", "0.25"],
        ["2", "val/dice", repr(1 / 3)],
        ["0", "x", "1.0"],
    ]


def test_nothing_is_written_before_there_is_something(tmp_path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_hyperparams({"lr": 1})
    logger.log_metrics({"epoch": 1}, step=1)
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_drop_after_keeps_earlier_steps_and_teachers(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path)
    logger.drop_after(1)  # no file yet
    logger.log_teacher({"teacher/a/val/dice": 0.5}, epoch=40)
    for step in (1, 2, 3):
        logger.log_metrics({"val/dice": step / 10}, step=step)
    logger.drop_after(2)
    assert rows(path)[1:] == [["40", "teacher/a/val/dice", "0.5"], ["1", "val/dice", "0.1"], ["2", "val/dice", "0.2"]]
    logger.log_metrics({"val/dice": 0.9}, step=3)
    assert rows(path)[-1] == ["3", "val/dice", "0.9"]


@pytest.mark.parametrize("torn", ["3,val/di", "3", "3,val/dice,0.", "\x00"])
def test_a_line_that_a_crash_cut_off_is_no_trouble(tmp_path, torn) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path)
    logger.log_metrics({"val/dice": 0.5}, step=1)
    whole = path.read_text()
    path.write_text(whole + torn)
    logger.drop_after(2)
    assert path.read_text() == whole
    path.write_text(whole + torn)
    logger.log_metrics({"val/dice": 0.75}, step=2)
    assert rows(path)[1:] == [["1", "val/dice", "0.5"], ["2", "val/dice", "0.75"]]


def test_names_with_commas_survive(tmp_path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({'St. Mary, "West"/val_dice': 0.5}, step=1)
    logger.drop_after(1)
    assert rows(tmp_path / "metrics.csv")[1] == ["1", 'St. Mary, "West"/val_dice', "0.5"]


def test_a_teachers_epoch_that_comes_again_stands_there_once(tmp_path) -> None:
    """Killed after the epoch was logged and before it was saved; the torn line is of the kill too."""
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for epoch in (1, 2):
        first.log_teacher({"teacher/a/val/dice": epoch / 10, "teacher/a/val/loss": 1.0}, epoch)
    whole = path.read_text()
    with path.open("a") as file:
        file.write("3,teacher/a/val/di")
    again = MetricsCSV(path)
    again.log_teacher({"teacher/a/val/dice": 0.2, "teacher/a/val/loss": 1.0}, epoch=2)
    assert path.read_text() == whole
    again.log_teacher({"teacher/b/val/dice": 0.5}, epoch=1)
    assert path.read_text() == whole + "1,teacher/b/val/dice,0.5\n"


def test_a_torn_line_is_dropped_though_it_could_be_read(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsCSV(path).log_metrics({"val/dice": 0.25}, step=1)
    with path.open("a") as file:
        file.write("1,val/loss,0.1")  # of 0.125
    MetricsCSV(path).drop_after(1)
    assert rows(path)[1:] == [["1", "val/dice", "0.25"]]


def test_drop_tests_keeps_all_else(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsCSV(path).log_metrics({"test/dice": 0.1, "a/test_dice": 0.2, "val/dice": 0.3, "a/val_dice": 0.4}, step=2)
    MetricsCSV(path).drop_tests()
    assert rows(path)[1:] == [["2", "a/val_dice", "0.4"], ["2", "val/dice", "0.3"]]
