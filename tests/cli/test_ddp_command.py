"""Two processes on CPU run whole commands, as users start them, and nothing is left behind when one of them fails.

Slow: each process imports the stack. What follows is compared bit by bit by `benchmarks/_kills.py`.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fkd_med.checkpoints import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROGRAM = Path(__file__).with_name("ddp_program.py")
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
TOLERANCE = 5.0e-7  # 1.2e-7 was measured, of weights up to 0.63
SECOND_OF_ROUND_2 = 4  # optimizer step: two clients of one step a round


@pytest.fixture(scope="module")
def kills(repository: Path) -> Any:
    sys.path.insert(0, str(repository / "benchmarks"))
    try:
        import _kills
    finally:
        sys.path.remove(str(repository / "benchmarks"))
    return _kills


def fkd(folder: Path, *options: str, launcher: tuple[str, ...] = (), **environment: str) -> Any:
    """Run `fkd fit` of run.yaml in `folder`, in a session of its own; no process may stay after it."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")}
    own = {"PIDS": str(folder / "pids"), "WRITTEN": str(folder.with_name(f"{folder.name}-written"))}
    command = [sys.executable, *launcher, str(PROGRAM), "fit", "--config", "run.yaml", *options]
    process = subprocess.Popen(
        command, cwd=folder, env=inherited | {"OMP_NUM_THREADS": "1"} | own | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job in the background is deaf
    )  # fmt: skip
    try:
        process.out, process.err = process.communicate(timeout=300)  # type: ignore[attr-defined]
    finally:
        orphans = left(folder)
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
    assert not orphans, f"left behind: {orphans}"
    return process


def left(folder: Path, seconds: float = 10) -> list[int]:
    """Return the processes of a command that still run after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        pids = [int(line) for line in (folder / "pids").read_text().split()]
        alive = [pid for pid in pids if is_alive(pid)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(kills: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes that nobody disturbed; its output is beside it."""
    folder: Path = kills.prepare(tmp_path_factory.mktemp("ddp") / "whole", baseline=False)
    ended = fkd(folder, *TWO)
    assert ended.returncode == 0, ended.err
    (folder / "out").write_text(ended.out)
    (folder / "err").write_text(ended.err)
    return folder


def test_two_processes_run_the_whole_job(whole: Path) -> None:
    run, out = whole / "runs" / "run", (whole / "out").read_text()
    lines = [line for line in out.splitlines() if line.startswith(("round ", "teacher", "Run directory", "Test,"))]
    assert len(lines) == len(set(lines)) == 3 + 4 + 1 + 1  # rounds, teachers and maps, table: said once
    assert (whole / "err").read_text() == ""
    manifest = {
        split: {r["id"] for r in rows(run / "manifest.csv") if r["split"] == split} for split in ("val", "test")
    }
    scored = Counter((r["model"], r["split"], r["round"], r["id"]) for r in rows(run / "images.csv"))
    expected = {("student", "val", str(round), name) for round in (1, 2, 3) for name in manifest["val"]}
    expected |= {("teacher", "test", "0", name) for name in manifest["test"]}
    tested = {key for key in scored if key[:2] == ("student", "test")}
    assert {key[3] for key in tested} == manifest["test"] and scored.keys() - tested == expected
    assert set(scored.values()) == {1}
    ledger = [tuple(r[k] for k in ("round", "client", "direction", "section")) for r in rows(run / "ledger.csv")]
    assert len(ledger) == len(set(ledger)) == 3 * 2 * 2 * 2
    curves = [(r["step"], r["name"]) for r in rows(run / "metrics.csv")]
    assert len(curves) == len(set(curves))
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["fkd_med"]["processes"] == 2
    assert not whole.with_name("whole-written").exists()  # the second process writes nothing
    assert len((whole / "pids").read_text().split()) == 2


def test_torchrun_gives_the_same_bits(whole: Path, kills: Any) -> None:
    folder = kills.prepare(whole.with_name("torchrun"), baseline=False)  # without data: the first process makes them
    ended = fkd(folder, *TWO, launcher=("-m", "torch.distributed.run", "--nproc_per_node", "2"))
    assert ended.returncode == 0, ended.err
    assert kills.differences(whole, folder) == []
    assert not folder.with_name("torchrun-written").exists()
    refused = fkd(folder, "--overwrite", launcher=("-m", "torch.distributed.run", "--nproc_per_node", "2"))
    assert refused.returncode == 1 and "torchrun started 2 processes" in refused.err
    assert kills.differences(whole, folder) == []


@pytest.mark.parametrize(
    ("trouble", "codes", "said"),
    [
        ("1:raise", (3, -9), "trouble on purpose"),  # -9: Lightning's watch was faster than the closed connection
        ("0:raise", (1,), "trouble on purpose"),
        ("1:SIGKILL", (3, -9), "Another process of this run has ended"),
        ("0:SIGKILL", (-9,), ""),
        ("0:SIGTERM", (143,), "Terminated"),
        ("0:group-SIGINT", (130,), "Interrupted"),
    ],
)
def test_after_trouble_nothing_is_left_behind_and_a_resume_gives_the_same_bits(
    trouble: str, codes: tuple[int, ...], said: str, whole: Path, kills: Any
) -> None:
    rank, action = trouble.split(":")
    folder = kills.prepare(whole.with_name(trouble.replace(":", "-")), baseline=False)
    ended = fkd(folder, *TWO, TROUBLE=f"{rank}:{SECOND_OF_ROUND_2}:{action}")
    assert ended.returncode in codes, ended.err
    assert said in ended.err or ended.returncode == -9
    assert ended.err.count("fkd: error") <= 2 and "GLHF" not in ended.err  # gloo's own words for a lost process
    resumed = fkd(folder, *TWO, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.err
    assert resumed.out.count("round 2: update of hospital-a found in the journal") == 1
    assert "hospital-b found in the journal" not in resumed.out
    assert kills.differences(whole, folder) == []


def test_killed_in_its_first_round_the_same_command_takes_it_up(whole: Path, kills: Any) -> None:
    folder = kills.prepare(whole.with_name("first-round"), baseline=False)
    assert fkd(folder, *TWO, TROUBLE="1:2:SIGKILL").returncode in (3, -9)
    again = fkd(folder, *TWO)
    assert again.returncode == 0, again.err
    assert again.out.count("round 1: update of hospital-a found in the journal") == 1
    assert kills.differences(whole, folder) == []


NETWORK = '''
"""A network without BatchNorm, whose statistics would be each process's own."""
from torch import nn


class Plain(nn.Sequential):
    def __init__(self, in_channels: int = 3, classes: int = 1, width: int = 8) -> None:
        hidden = nn.Conv2d(width, width, 3, padding=1)
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), hidden, nn.ReLU(), nn.Conv2d(width, classes, 1)
        )
'''


def without_batch_norm(folder: Path, kills: Any, batch_size: int) -> Path:
    """Prepare a job in which two processes of half the batch must do what one does.

    No BatchNorm; no Dice in the loss, which is no mean over images; flips only, as the KL is a mean over those pixels
    that a turned image still shows; no rounded messages.
    """
    kills.prepare(folder, baseline=False)
    (folder / "plain_network.py").write_text(NETWORK)
    configuration: Any = kills.configuration(False)
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2, "momentum": 0.9}}
    loss = {"class_path": "fkd_med.losses.DiceCE", "init_args": {"dice_weight": 0.0}}
    model = configuration["model"]["init_args"]
    model |= {"network": {"class_path": "plain_network.Plain"}, "optimizer": sgd, "loss": loss}
    wide = {"class_path": "plain_network.Plain", "init_args": {"width": 16}}
    model["teacher"]["init_args"]["module"]["init_args"] = {"network": wide, "optimizer": sgd, "loss": loss}
    flip = {"class_path": "albumentations.HorizontalFlip", "init_args": {"p": 0.5}}
    flips = {"class_path": "fkd_med.data.Augmentation", "init_args": {"geometric": [flip], "photometric": []}}
    configuration["data"] |= {"batch_size": batch_size, "augmentation": flips}
    configuration["data"]["layout"]["init_args"]["images"] = 26
    configuration["federation"] = {"rounds": 3, "threads": 1, "local_epochs": 2, "optimizer_state": "keep"}
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    return folder


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def test_two_processes_are_one_within_float32(whole: Path, kills: Any) -> None:
    one = without_batch_norm(whole.with_name("of-one"), kills, 8)
    two = without_batch_norm(whole.with_name("of-two"), kills, 4)
    for folder, options in ((one, []), (two, TWO)):
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        ended = fkd(folder, *options, PYTHONPATH=path, IMAGES=str(folder / "images"))
        assert ended.returncode == 0, ended.err
    students = [read_checkpoint(folder / "runs" / "run" / "student.ckpt")["state_dict"] for folder in (one, two)]
    assert largest(*students) <= TOLERANCE
    curves = [
        {(r["step"], r["name"]): float(r["value"]) for r in rows(folder / "runs" / "run" / "metrics.csv")}
        for folder in (one, two)
    ]
    losses = [key for key in curves[0] if key[1].endswith("/train/loss")]  # of both processes' images
    assert len(losses) == 2 * (2 + 3)
    assert all(curves[1][key] == pytest.approx(curves[0][key], rel=1e-6) for key in losses)
    alone, first, second = trained_on(one, "0"), trained_on(two, "0"), trained_on(two, "1")
    assert len(alone) == 2 * (2 + 3 * 2)  # hospitals x epochs of a teacher and of three rounds
    assert alone.keys() == first.keys() == second.keys()
    for epoch, images in alone.items():
        assert len(images) == len(set(images)) == 16
        assert not set(first[epoch]) & set(second[epoch])
        assert sorted(first[epoch] + second[epoch]) == sorted(images)


def trained_on(folder: Path, rank: str) -> dict[tuple[str, ...], list[str]]:
    """Return the images that one process trained on, by round, epoch and client."""
    found: dict[tuple[str, ...], list[str]] = {}
    for line in (folder / "images").read_text().splitlines():
        by, *epoch, image = line.split(",")
        if by == rank:
            found.setdefault(tuple(epoch), []).append(image)
    return found
