"""Weights & Biases without an account: recorded offline, one run each, read back from the file it leaves."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import wandb
from rich.console import Console
from wandb.proto import wandb_internal_pb2

from fkd_med.cli.wandb_parts import record_part, recorded_parts
from fkd_med.errors import RunError
from fkd_med.rundir import RunDir
from fkd_med.tracking import WandbLogger
from fkd_med.tracking.wandb_logger import has_account

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "config"))


def records(path: Path, patience: float = 30.0) -> list[Any]:
    """Return the records of an offline run, once its last one is there: another process writes them."""
    end = time.monotonic() + patience
    while True:
        found = list(read_records(path))
        kinds = {record.WhichOneof("record_type") for record in found}
        if "exit" in kinds or time.monotonic() > end:
            return found
        time.sleep(0.05)


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run: a 7-byte header, then LevelDB-style log blocks of 32 KiB."""
    data, position, buffer = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7
        if length == 0 and kind == 0:
            position += left - 7
            continue
        if position + length > len(data):  # the other process is in the middle of writing it
            return
        buffer += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            yield record
            buffer = b""


def history(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("wandb/*run-*/run-*.wandb")
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def axes(folder: Path) -> dict[str, str]:
    """Return the axis that was declared for each metric or pattern."""
    (path,) = folder.glob("wandb/*run-*/run-*.wandb")
    found = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "metric":
            found[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return found


def test_offline_run_reads_back(tmp_path) -> None:
    logger = WandbLogger(name="mine", save_dir=str(tmp_path))
    logger.log_teacher({"teacher/a/val/dice": 0.25}, epoch=1)
    logger.log_teacher({"teacher/a/val/dice": 0.5}, epoch=2)
    for round in (1, 2, 3):
        logger.log_metrics({"a/train/loss": 1 / round, "b/train/loss": 2 / round}, step=round)
        logger.log_metrics({"val/dice": round / 10, "a/val_dice": round / 20}, step=round)
    logger.log_image("val/pictures", [np.zeros((8, 8, 3), np.uint8)], caption=["a: 1"])
    console = Console(record=True, width=200)
    logger.close(console)
    rows = history(tmp_path)

    def curve(name: str, axis: str) -> list[tuple[int, float]]:
        return [(row[axis], row[name]) for row in rows if name in row]

    assert curve("a/train/loss", "trainer/global_step") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert curve("b/train/loss", "trainer/global_step") == [(1, 2.0), (2, 1.0), (3, 2 / 3)]
    assert curve("val/dice", "trainer/global_step") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert curve("a/val_dice", "trainer/global_step") == [(1, 0.05), (2, 0.1), (3, 0.15)]
    assert curve("teacher/a/val/dice", "teacher/epoch") == [(1, 0.25), (2, 0.5)]
    declared = axes(tmp_path)
    assert declared["teacher/a/val/dice"] == "teacher/epoch"
    assert declared["*"] == "trainer/global_step"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/val/pictures*.png"))) == 1
    assert "wandb sync" in console.export_text()


def test_no_account_is_offline_and_the_environment_comes_back(tmp_path) -> None:
    logger = WandbLogger(save_dir=str(tmp_path))
    logger.log_metrics({"x": 1.0}, step=1)
    logger.close()
    assert "WANDB_MODE" not in os.environ
    assert len(history(tmp_path)) == 1


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_users_mode_comes_back(tmp_path, monkeypatch, mode) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    logger = WandbLogger(save_dir=str(tmp_path))
    logger.log_metrics({"x": 1.0}, step=1)
    logger.close()
    assert os.environ["WANDB_MODE"] == mode
    assert bool(list(tmp_path.glob("wandb/*run-*/run-*.wandb"))) == (mode == "offline")


def test_two_runs_in_one_process_are_two_runs(tmp_path) -> None:
    for name in ("one", "two"):
        logger = WandbLogger()
        logger.place(str(tmp_path / name), name)
        (tmp_path / name).mkdir()
        logger.log_metrics({name: 1.0}, step=1)
        logger.close()
    for name in ("one", "two"):
        (row,) = history(tmp_path / name)
        assert name in row
    ids = {path.name for path in tmp_path.glob("*/wandb/*run-*/run-*.wandb")}
    assert len(ids) == 2


def test_a_given_place_and_name_win(tmp_path) -> None:
    logger = WandbLogger(name="mine", save_dir=str(tmp_path / "own"))
    logger.place(str(tmp_path / "run"), "run")
    assert (logger._name, logger._wandb_init["dir"]) == ("mine", str(tmp_path / "own"))
    logger.close()


def part(run: RunDir, value: float, resumes: bool) -> tuple[str, str]:
    """Record what one process of a run would; return its folder, and what it said at the end."""
    logger, console = WandbLogger(), Console(record=True, width=400)
    run_id, parts = recorded_parts(run) if resumes else (None, [])
    logger.place(str(run.path), "run", run_id, parts)
    record_part(run, logger)
    logger.log_metrics({"x": value}, step=1)
    folder = logger.folder
    logger.close(console)
    return folder, console.export_text()


def test_a_resumed_run_is_one_run_and_every_part_has_its_sync_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir("run")
    run.create()
    first, said = part(run, 1.0, resumes=False)
    assert said.splitlines() == [f"Weights & Biases: recorded offline; upload it with:  wandb sync {local(first)}"]
    time.sleep(1.1)  # folders are named by the second
    second, said = part(run, 2.0, resumes=True)
    assert said.splitlines()[1:] == [f"  wandb sync {local(first)}", f"  wandb sync {local(second)}"]
    identity, folders = recorded_parts(run)
    assert [os.path.realpath(folder) for folder in folders] == [os.path.realpath(path) for path in (first, second)]
    ids = {record.run.run_id for path in run.path.glob("wandb/offline-run-*/*.wandb") for record in records(path)
           if record.WhichOneof("record_type") == "run"}  # fmt: skip
    assert ids == {identity} and first != second


def local(folder: str) -> str:
    return os.path.relpath(folder)


def test_parts_come_in_the_order_of_the_run_whatever_the_clock_said(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["offline-run-20270101_000000-a", "offline-run-20260101_000000-a", "offline-run-20260201_000000-a"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run-a.wandb").touch()
    logger = WandbLogger()
    logger.place(str(tmp_path), "run", "a", names[:2])
    assert [line.split()[-1] for line in logger._sync_lines(names[2])[1:]] == names
    (tmp_path / names[0] / "run-a.wandb.synced").touch()
    shutil.rmtree(tmp_path / names[1])
    assert logger._sync_lines(names[2]) == [
        f"Weights & Biases: recorded offline; upload it with:  wandb sync {names[2]}"
    ], "what was uploaded, or is gone, is not asked for again"
    logger.close()


def test_a_run_of_an_earlier_version_has_an_id_and_no_parts(tmp_path) -> None:
    run = RunDir(tmp_path)
    assert recorded_parts(run) == (None, [])
    run.wandb_id.write_text("abcd1234")
    assert recorded_parts(run) == ("abcd1234", [])


@pytest.mark.parametrize(
    ("server", "host", "known"),
    [
        (None, "api.wandb.ai", True),
        (None, urlparse(wandb.Settings().base_url).hostname, True),  # what `wandb login` of this version writes
        (None, "wandb.hospital.org", False),
        ("https://wandb.hospital.org", "wandb.hospital.org", True),
        ("https://wandb.hospital.org", "api.wandb.ai", False),
    ],
)
def test_a_key_counts_for_the_server_that_the_run_goes_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str | None, host: str, known: bool
) -> None:
    assert not has_account()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert has_account() == known


def test_a_server_that_cannot_be_reached_is_one_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(**_: Any) -> None:
        raise wandb.errors.CommError("<no message>\nmore of it")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", unreachable)
    logger = WandbLogger()
    logger.place(str(tmp_path), "run")
    with pytest.raises(RunError, match=r"Weights & Biases \(https://.*<no message>. With WANDB_MODE=offline it"):
        logger.log_hyperparams({"a": 1})
