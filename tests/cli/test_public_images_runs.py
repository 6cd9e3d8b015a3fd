"""Runs that learn on public images, as a user starts them: with a baseline beside them, resumed and scored again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fkd_med.checkpoints import read_checkpoint
from fkd_med.cli import main
from fkd_med.data import Phantoms
from fkd_med.evaluation import ImageTable


@pytest.fixture
def public(tmp_path: Path) -> Path:
    Phantoms(hospitals=1, images=6, size=48, seed=9).prepare(tmp_path / "public")
    return tmp_path / "public"


def overlay(folder: Path, **federation: Any) -> str:
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump({"federation": {"init_args": federation}}))
    return str(path)


@pytest.mark.slow
def test_feddf_with_a_baseline(tiny_run: Path, public: Path, tmp_path: Path, capsys) -> None:
    method = {"class_path": "fkd_med.federated.FedDF", "init_args": {"steps": 2, "batch_size": 4}}
    given = ["--config", str(tiny_run.parents[1] / "tiny.yaml")]
    given += ["--config", overlay(tmp_path, server_distillation=method), "--data.public", str(public)]
    run = tmp_path / "run"
    assert main(["fit", *given, "--run_dir", str(run), "--debug"]) == 0
    assert "server/kl_last" in (run / "metrics.csv").read_text()
    arms = {row.arm for row in ImageTable.read(run / "images.csv").of("test")}
    assert arms == {"", "local-only", "federated"}
    # Both the run and its baseline are scored again from what they wrote, even when the public images are gone.
    shutil.rmtree(public)
    for folder in (run, run / "local"):
        assert main(["test", "--config", str(folder / "config.yaml"), "--debug"]) == 0
    capsys.readouterr()
    assert main(["fit", *given, "--run_dir", str(tmp_path / "again")]) == 2
    assert "data.public" in capsys.readouterr().err


def test_fedmd_leaves_a_student_per_hospital(tiny_run: Path, public: Path, tmp_path: Path, capsys) -> None:
    recipe = {
        "share_logits": True,
        "aggregator": {"class_path": "fkd_med.aggregation.LogitConsensus"},
        "client_rules": [{"class_path": "fkd_med.federated.PublicDigest", "init_args": {"images": 4}}],
    }
    given = ["--config", str(tiny_run.parents[1] / "tiny.yaml"), "--config", overlay(tmp_path, **recipe)]
    run = tmp_path / "run"
    assert main(["fit", *given, "--data.public", str(public), "--run_dir", str(run), "--debug"]) == 0
    said = capsys.readouterr().out
    assert "logits of the student" in said and "extras:public-logits" in (run / "ledger.csv").read_text()
    assert not (run / "student.ckpt").exists()
    students = [run / "clients" / client / "student.ckpt" for client in ("hospital-a", "hospital-b")]
    one, other = (read_checkpoint(path)["state_dict"] for path in students)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    tested = [line for line in (run / "images.csv").read_text().splitlines() if ",test," in line]
    shutil.rmtree(public)
    for folder in (run, run / "local"):
        assert main(["test", "--config", str(folder / "config.yaml"), "--debug"]) == 0
    again = [line for line in (run / "images.csv").read_text().splitlines() if ",test," in line]
    assert {line for line in again if "federated" in line} == {line for line in tested if "federated" in line}
