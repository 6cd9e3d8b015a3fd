"""The second run is the product: repeated, resumed, interrupted early, scored again, cut short."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Callback

from fkd_med.checkpoints import SafeCheckpointIO
from fkd_med.cli import main
from fkd_med.data import Manifest
from fkd_med.evaluation import ImageTable
from fkd_med.files import write_error


class InterruptInRound(Callback):
    """Ctrl-C after the first client of a round."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_train_batch_end(self, trainer, *args) -> None:  # type: ignore[no-untyped-def]
        if trainer.current_epoch + 1 == self.round:
            raise KeyboardInterrupt


def command(tiny_run: Path, verb: str, run: Path, *options: str) -> int:
    return main([verb, "--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(run), *options])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


SHORT = ("--federation.local_baseline=false", "--federation.rounds=1", "--test_after_fit=false")


def test_a_run_repeated_from_its_config_leaves_the_first_one_alone(tiny_run: Path, tmp_path: Path) -> None:
    before = digests(tiny_run / "checkpoints")
    again = tmp_path / "again"
    assert main(["fit", "--config", str(tiny_run / "config.yaml"), "--run_dir", str(again), *SHORT]) == 0
    assert digests(tiny_run / "checkpoints") == before
    assert (again / "checkpoints" / "last.ckpt").is_file()


def test_an_interruption_before_the_first_checkpoint_needs_no_flag(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stop = (f"--trainer.callbacks+={__name__}.InterruptInRound", "--trainer.callbacks.round=1")
    assert command(tiny_run, "fit", run, *SHORT, *stop) == 130
    assert "Interrupted" in capsys.readouterr().err
    assert (run / "config.yaml").exists()
    assert command(tiny_run, "fit", run, *SHORT) == 0


def test_another_seed_on_the_command_line_does_not_deal_the_images_anew(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = (run / "images.csv").read_bytes()
    assert command(tiny_run, "test", run, "--seed_everything=8") == 0
    tested = {row.id for row in ImageTable.read(run / "images.csv").of("test")}
    assert tested == {row.id for row in Manifest.read(run / "manifest.csv").rows if row.split == "test"}
    assert (run / "images.csv").read_bytes().startswith(before)


def test_a_run_that_has_lost_its_manifest_is_not_dealt_anew(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    copy = (run / "manifest.csv").rename(tmp_path / "copy.csv")
    before = (run / "images.csv").read_bytes()
    assert command(tiny_run, "test", run) == 2
    assert "manifest.csv is missing" in capsys.readouterr().err and (run / "images.csv").read_bytes() == before
    assert command(tiny_run, "test", run, f"--data.manifest={copy}") == 0


def test_a_student_is_scored_on_images_of_others(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "others"
    shutil.copytree(tiny_run.parents[1] / "phantoms", data)
    (data / "phantoms.json").unlink()
    names, *lines = (data / "clients.csv").read_text().splitlines()
    (data / "clients.csv").write_text("\n".join([f"{names},split", *(f"{line},test" for line in lines)]))
    others = (
        f"--data.root={data}",
        "--data.layout=fkd_med.data.FolderPair",
        f"--ckpt_path={tiny_run / 'student.ckpt'}",
    )
    assert command(tiny_run, "test", tmp_path / "run", *others) == 0
    said = capsys.readouterr().out
    assert "student.ckpt" in said and all(f"hospital-{name}" in said for name in "ab")
    assert not (tmp_path / "run").exists()


def test_other_weights_are_shown_and_not_kept(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = (run / "images.csv").read_bytes()
    assert command(tiny_run, "test", run, "--ckpt_path=last") == 0
    assert (run / "images.csv").read_bytes() == before


@pytest.mark.slow
def test_a_resume_keeps_the_split_when_the_data_have_grown(tiny_run: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(tiny_run.parents[1] / "phantoms", data)
    (data / "phantoms.json").unlink()
    folder = (f"--data.root={data}", "--data.layout=fkd_med.data.FolderPair")
    assert command(tiny_run, "fit", run, *folder, *SHORT) == 0
    manifest = (run / "manifest.csv").read_bytes()
    lines = (data / "clients.csv").read_text().splitlines()
    for number, line in enumerate(lines[1:9]):
        name = line.split(",")[0]
        for kind in ("images", "masks"):
            shutil.copy(data / kind / f"{name}.png", data / kind / f"new-{number}.png")
        lines.append(f"new-{number},{line.split(',')[1]},new-patient-{number}")
    (data / "clients.csv").write_text("\n".join(lines))
    longer = ("--federation.local_baseline=false", "--federation.rounds=2", "--resume.allow=federation,test_after_fit")
    assert command(tiny_run, "fit", run, *folder, *longer, "--ckpt_path=last") == 0
    assert (run / "manifest.csv").read_bytes() == manifest
    assert not any(row.id.startswith("new") for row in ImageTable.read(run / "images.csv"))


def test_without_test_images_the_student_is_still_written(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ("--data.test_fraction=0", "--federation.rounds=1")
    assert command(tiny_run, "fit", run, *options) == 0
    assert (run / "student.ckpt").is_file()
    assert "no test images" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_test_the_student_is_still_written(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(tiny_run, "fit", run, *SHORT) == 0
    assert (run / "student.ckpt").is_file() and not (run / "report.md").exists()


@pytest.mark.parametrize("aggregator", ["fkd_med.aggregation.FedAvg", "null"])
def test_one_hospital_of_several_may_train(tiny_run: Path, tmp_path: Path, aggregator: str) -> None:
    run = tmp_path / "run"
    options = ("--data.client=hospital-a", f"--federation.aggregator={aggregator}", "--federation.local_baseline=false")
    assert command(tiny_run, "fit", run, *options, "--federation.rounds=1") == 0
    clients = {row.client for row in ImageTable.read(run / "images.csv").of("test", "student")}
    alone = aggregator == "null"  # then nobody else has a student to score
    assert clients == ({"hospital-a"} if alone else {"hospital-a", "hospital-b"})


@pytest.mark.slow
def test_the_baseline_has_the_budget_of_a_run_that_stopped_early(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    early = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        "--trainer.callbacks.monitor=val/dice",
        "--trainer.callbacks.stopping_threshold=-1",
        "--trainer.callbacks.mode=max",
    )
    assert command(tiny_run, "fit", run, *early, "--federation.rounds=3") == 0
    rounds = [{row.round for row in ImageTable.read(path / "images.csv").of("val")} for path in (run, run / "local")]
    assert rounds[0] == rounds[1] == {1}


def test_a_home_folder_in_run_dir_is_one_folder(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(tiny_run, "fit", Path("~/run"), *SHORT) == 0
    assert {"config.yaml", "checkpoints", "student.ckpt"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_saved_configuration_leaves_derived_paths_open(tiny_run: Path) -> None:
    config = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert config["checkpoint"]["dirpath"] is None and config["trainer"]["default_root_dir"] is None
    assert config["data"]["init_args"]["manifest"] is None


@pytest.mark.slow
def test_a_crash_between_the_first_best_and_the_first_last_can_be_resumed(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(tiny_run, "fit", run, *SHORT) == 0
    (run / "checkpoints" / "last.ckpt").unlink()
    (run / "student.ckpt").unlink()
    assert command(tiny_run, "fit", run, *SHORT) == 2, "there is something to resume"
    assert command(tiny_run, "fit", run, *SHORT, "--ckpt_path=last") == 0
    assert (run / "student.ckpt").is_file()
    assert {row.round for row in ImageTable.read(run / "images.csv")} == {1}


@pytest.mark.slow
def test_a_test_that_is_made_again_does_not_stand_there_twice(tiny_run: Path, tmp_path: Path) -> None:
    """As after a kill in the test; here the whole of it had been written, and nothing is left to train."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = [line for line in (run / "images.csv").read_text().splitlines() if ",local-only," not in line]
    assert command(tiny_run, "fit", run, "--federation.local_baseline=false", "--ckpt_path=last") == 0
    assert sorted((run / "images.csv").read_text().splitlines()) == sorted(before)
    curves = (run / "metrics.csv").read_text().splitlines()
    assert sum(",test/dice," in line for line in curves) == 1


def test_a_disk_that_fills_up_in_the_first_round_alone(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The baseline has written its best checkpoint and not its last: it goes on from the best."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "local")
    write = SafeCheckpointIO.save_checkpoint

    def full(self: SafeCheckpointIO, checkpoint: dict[str, Any], path: Any, **rest: Any) -> None:
        if str(path).endswith(os.path.join("local", "checkpoints", "last.ckpt")):
            raise write_error(Path(path), OSError(errno.ENOSPC, "No space left on device"))
        write(self, checkpoint, path, **rest)

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", full)
    assert command(tiny_run, "fit", run, "--ckpt_path=last") == 2
    assert [path.name for path in (run / "local" / "checkpoints").iterdir()] == ["best-step=1.ckpt"]
    monkeypatch.undo()
    assert command(tiny_run, "fit", run, "--ckpt_path=last") == 0
    assert "exists already" not in capsys.readouterr().err
    whole, again = (ImageTable.read(folder / "local" / "images.csv").of("test") for folder in (tiny_run, run))
    assert {row.key: row.dice for row in whole} == {row.key: row.dice for row in again}
