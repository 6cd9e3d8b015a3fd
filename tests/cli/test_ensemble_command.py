"""`fkd fit` with the ensemble overlay: a configuration's own teachers, found again, shared and reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from building import CONFIGS
from fkd_med.cli import main
from fkd_med.communication import Ledger
from fkd_med.evaluation import ImageTable
from fkd_med.evaluation.tables import human_bytes

OVERLAY = str(CONFIGS / "algorithms" / "ensemble.yaml")


def test_overlay_makes_an_ensemble_of_the_teachers_there_are(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tiny_run.parents[1], tmp_path / "runs" / "ensemble"
    shutil.copytree(base / "teachers", tmp_path / "teachers", ignore=shutil.ignore_patterns("maps"))
    before = sorted(path.parent.name for path in (tmp_path / "teachers").glob("*/teacher.safetensors"))
    arguments = ["fit", "--config", str(base / "tiny.yaml"), "--config", OVERLAY, "--run_dir", str(run), "--debug"]
    arguments += ["--federation.rounds=1", f"--model.teacher.store={tmp_path / 'teachers'}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("teacher of hospital-a: found in") == 2  # also by the baseline; none is trained again
    assert sorted(path.parent.name for path in (tmp_path / "teachers").glob("*/teacher.safetensors")) == before

    ledger = Ledger(run / "ledger.csv")
    up, down = (ledger.total(section="teacher", direction=way) for way in ("up", "down"))  # type: ignore[arg-type]
    assert up == down > 0  # of two clients
    said = f"Teachers, shared once before the first round: {human_bytes(up)} up and {human_bytes(down)} down in all"
    report = (run / "report.md").read_text()
    assert said in report and f"measured, {human_bytes(ledger.total() - up - down)} in all over 1 round" in report
    assert "this teacher (ResUNet)" in report
    arms = {row.model for row in ImageTable.read(run / "images.csv").of("test")}
    assert arms == {"teacher", "student"} and list((run / "pictures").glob("*.png"))

    assert not (run / "local" / "shared-teachers").exists()
    local = yaml.safe_load((run / "local" / "config.yaml").read_text())
    assert local["federation"]["init_args"]["share_teachers"] is False
    assert main(["test", "--config", str(run / "local" / "config.yaml"), "--debug"]) == 0


def test_overlay_without_consent_is_refused_before_training(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_run.parents[1]
    store = f"--model.teacher.store={tmp_path / 'teachers'}"
    for command in ("fit", "teachers"):
        arguments = [command, "--config", str(base / "tiny.yaml"), "--config", OVERLAY, store]
        arguments += ["--run_dir", str(tmp_path / "run"), "--federation.share_teachers=false"]
        assert main(arguments) != 0
        assert "EnsembleStage sends every client's teacher to all its partners" in capsys.readouterr().err
        assert not (tmp_path / "teachers").exists()
