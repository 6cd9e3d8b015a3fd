"""`fkd fit` and what follows it, as a user runs them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning import Callback

from fkd_med.checkpoints import read_checkpoint, write_checkpoint
from fkd_med.cli import main
from fkd_med.cli.configuration import _checkpoint
from fkd_med.communication import Ledger
from fkd_med.evaluation import ImageTable, summarize
from slowly import slow_but


class StopBeforeRound(Callback):
    """Ends the process's work as a crash would, before a round is closed."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_train_epoch_start(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        if trainer.current_epoch + 1 == self.round:
            raise KeyboardInterrupt


def command(tiny_run: Path, verb: str, run: Path, *options: str) -> int:
    return main([verb, "--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(run), *options])


def curves(run: Path) -> list[str]:
    """The lines of metrics.csv that rounds wrote."""
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    return [line for line in lines if not line.split(",")[1].startswith(("test/", "teacher/"))]


def test_a_run_leaves_what_it_promises(tiny_run: Path) -> None:
    names = {path.name for path in tiny_run.iterdir()}
    assert {"config.yaml", "manifest.csv", "checkpoints", "ledger.csv", "images.csv", "metrics.csv", "pictures",
            "student.ckpt", "report.md", "local"} <= names  # fmt: skip
    assert not any((tiny_run / "journal").iterdir())
    assert (tiny_run / "pictures" / "overview.png").stat().st_size > 10_000
    table = ImageTable.read(tiny_run / "images.csv")
    arms = {(row.arm, row.model) for row in table.of("test")}
    assert arms == {("", "teacher"), ("local-only", "student"), ("federated", "student")}
    assert {row.round for row in table.of("val")} == {1, 2}
    ids = {arm: {row.id for row in table.of("test", *arm[::-1])} for arm in arms}
    assert len(set(map(frozenset, ids.values()))) == 1, "all arms are tested on the same images"
    whose = {row["id"]: row["patient"] for row in csv.DictReader((tiny_run / "manifest.csv").open())}
    assert all(row.patient == whose[row.id] for row in table) and whose.keys() - set(whose.values())
    assert "local-only student" in (tiny_run / "report.md").read_text()


def test_the_ledger_holds_the_bytes_of_every_message(tiny_run: Path) -> None:
    ledger = Ledger(tiny_run / "ledger.csv")
    assert {(row.round, row.client, row.direction) for row in ledger.rows} == {
        (round, client, way) for round in (1, 2) for client in ("hospital-a", "hospital-b") for way in ("up", "down")
    }
    student = read_checkpoint(tiny_run / "student.ckpt")["state_dict"]
    payload = sum(tensor.numel() * tensor.element_size() for tensor in student.values())
    assert ledger.total(section="state") == 8 * payload
    assert ledger.total(section="header") > 0


def test_a_config_written_by_a_run_parses_again(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(tiny_run / "config.yaml"), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["federation"]["init_args"]["rounds"] == 2
    assert printed["model"]["init_args"]["network"]["init_args"] == {"in_channels": 3, "classes": 1}


def test_an_interrupted_run_goes_on_to_the_same_weights(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop = f"--trainer.callbacks+={__name__}.StopBeforeRound"
    quick = ("--federation.local_baseline=false",)
    assert command(tiny_run, "fit", run, *quick, stop, "--trainer.callbacks.round=2") == 130
    assert [row["round"] for row in csv.DictReader((run / "ledger.csv").open())].count("2") == 0
    assert command(tiny_run, "fit", run, *quick, "--ckpt_path=last", "--resume.allow=trainer.callbacks") == 0
    expected, actual = (read_checkpoint(path / "student.ckpt") for path in (tiny_run, run))
    assert expected["fkd_med"]["round"] == actual["fkd_med"]["round"]
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(tensor, actual["state_dict"][name]), name
    assert (run / "ledger.csv").read_bytes() == (tiny_run / "ledger.csv").read_bytes()
    assert curves(run) == curves(tiny_run)
    old, new = (ImageTable.read(path / "images.csv").of("val") for path in (tiny_run, run))
    assert old == new


def test_a_run_with_hidden_masks_goes_on_and_is_tested(tiny_run: Path, tmp_path: Path) -> None:
    """Its manifest says whose are hidden, and its configuration how many were to be: they do not contradict."""
    run, options = tmp_path / "run", ("--data.hidden_masks=0.5", "--federation.local_baseline=false")
    stopping = (f"--trainer.callbacks+={__name__}.StopBeforeRound", "--trainer.callbacks.round=2")
    assert command(tiny_run, "fit", run, *options, *stopping) == 130
    hidden = [row["id"] for row in csv.DictReader((run / "manifest.csv").open()) if row["split"] == "unlabelled"]
    assert command(tiny_run, "fit", run, *options, "--ckpt_path=last", "--resume.allow=trainer.callbacks") == 0
    assert command(tiny_run, "test", run, *options) == 0
    again = [row["id"] for row in csv.DictReader((run / "manifest.csv").open()) if row["split"] == "unlabelled"]
    assert hidden and again == hidden


def test_overwrite_starts_afresh_and_finds_its_teachers(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "mine.txt").write_text("a note")
    options = ("--federation.local_baseline=false", "--federation.rounds=1", "--test_after_fit=false")
    assert command(tiny_run, "fit", run, "--overwrite", *options) == 0
    out = capsys.readouterr().out
    assert out.count("teacher of hospital") == out.count("teacher maps of hospital") == 2
    assert out.count("found in") == 4
    assert not (run / "local" / "images.csv").exists() and not (run / "report.md").exists()
    assert (run / "mine.txt").read_text() == "a note"


def test_the_round_that_is_kept_may_be_the_last_whatever_validation_says(tiny_run: Path, tmp_path: Path) -> None:
    """By `--checkpoint.monitor step`: what is compared is the number of rounds, and the largest wins."""
    options = ("--checkpoint.monitor=step", "--federation.local_baseline=false")
    assert command(tiny_run, "fit", tmp_path / "run", *options) == 0
    scored = ImageTable.read(tmp_path / "run" / "images.csv").of("test", "student", "federated")
    assert {row.round for row in scored} == {2}
    last, best = (
        read_checkpoint(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("last", "best-step=2")
    )
    (kept,) = [state for state in last["callbacks"].values() if isinstance(state, dict) and state.get("monitor")]
    assert kept["monitor"] == "step" and float(kept["best_model_score"]) == 2
    student = read_checkpoint(tmp_path / "run" / "student.ckpt")["state_dict"]
    assert all(torch.equal(student[name], best["state_dict"][name]) for name in student)


def test_validate_and_test_score_the_runs_checkpoints(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = summarize(ImageTable.read(run / "images.csv").of("test", "student", "federated"))
    assert command(tiny_run, "test", run, f"--ckpt_path={run / 'student.ckpt'}") == 0
    assert summarize(ImageTable.read(run / "images.csv").of("test", "student", "federated")) == before
    said = capsys.readouterr()
    assert said.out.startswith(f"Weights of {run / 'student.ckpt'}\nTest") and "federated student" in said.out
    assert "dirpath" not in said.err, "Lightning's notes on the folder that the checkpoint came from"
    assert command(tiny_run, "validate", run) == 0
    assert "Validation" in capsys.readouterr().out


def test_local_only_students_are_scored_alike_after_a_reload(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert command(tiny_run, "fit", run, "--federation.aggregator=null", "--federation.local_baseline=false") == 0
    assert not (run / "ledger.csv").exists(), "alone, nothing travels"
    assert {path.parent.name for path in run.glob("clients/*/student.ckpt")} == {"hospital-a", "hospital-b"}
    before = sorted(ImageTable.read(run / "images.csv").of("test", "student"), key=lambda row: row.key)
    assert {row.arm for row in before} == {"local-only"}
    for named in ("last", "best"):  # neither is the best of one hospital: each has its own
        capsys.readouterr()
        assert main(["test", "--run_dir", str(run), "--ckpt_path", named]) == 0
        assert f"{sum(row.dice for row in before) / len(before):.3f}" in capsys.readouterr().out
        after = sorted(ImageTable.read(run / "images.csv").of("test", "student"), key=lambda row: row.key)
        assert after == before
    own = [read_checkpoint(path)["state_dict"]["network.head.weight"]
           for path in run.glob("clients/*/student.ckpt")]  # fmt: skip
    assert not torch.equal(*own)


@pytest.mark.parametrize(
    ("aggregator", "found"), [(None, "last.ckpt"), ({"class_path": "fkd_med.aggregation.FedAvg"}, "best-step=1.ckpt")]
)
def test_the_best_of_hospitals_alone_is_in_the_last_checkpoint(tmp_path: Path, aggregator: Any, found: str) -> None:
    """The best checkpoint is that of their mean, and each hospital keeps its own best."""
    for name in ("best-step=1.ckpt", "last.ckpt"):
        write_checkpoint({"state_dict": {}, "global_step": 1}, tmp_path / name)
    config = Namespace(
        checkpoint=Namespace(dirpath=str(tmp_path)), federation=Namespace(init_args=Namespace(aggregator=aggregator))
    )
    for asked in (None, "best"):
        assert Path(str(_checkpoint(config, "test", asked))).name == found


def test_without_a_federation_it_is_plain_lightning(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = yaml.safe_load((tiny_run.parents[1] / "tiny.yaml").read_text())
    del config["federation"]
    config["model"] = config["model"]["init_args"]["teacher"]["init_args"]["module"]
    config["trainer"] |= {"max_epochs": 2}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "plain.yaml"), "--run_dir", str(run)]
    assert main(["fit", *arguments, "--data.client=hospital-b"]) == 0
    rows = ImageTable.read(run / "images.csv")
    assert {row.client for row in rows.of("val")} == {"hospital-b"}, "client restricts validation"
    assert {row.client for row in rows.of("test")} == {"hospital-a", "hospital-b"}, "test covers every hospital"
    assert {row.round for row in rows.of("val")} == {1, 2}
    longer = ["--data.client=hospital-b", "--ckpt_path=last", "--trainer.max_epochs=3"]
    assert main(["fit", *arguments, *longer]) == 2, "schedules may span the epochs"
    assert main(["fit", *arguments, *longer, "--resume.allow=trainer.max_epochs"]) == 0
    assert {row.round for row in ImageTable.read(run / "images.csv").of("val")} == {1, 2, 3}


def test_central_distillation_uses_the_pooled_teacher(tiny_run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((tiny_run.parents[1] / "tiny.yaml").read_text())
    del config["federation"]
    config["trainer"] |= {"max_epochs": 1}
    config["model"]["init_args"]["teacher"]["init_args"]["store"] = str(tmp_path / "store")
    (tmp_path / "central.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "central.yaml"), "--run_dir", str(run)]) == 0
    stored = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "store").iterdir()}
    assert stored == {"all-clients", "maps"}
    assert [path.name.rsplit("-", 1)[0] for path in (tmp_path / "store/maps").glob("[!.]*")] == ["all-clients"]
    arms = {(row.arm, row.model) for row in ImageTable.read(run / "images.csv").of("test")}
    assert arms == {("", "teacher"), ("pooled", "student")}


@pytest.mark.parametrize("role", slow_but(["teacher"], ["student", "teacher"]))
def test_any_smp_network_is_a_backbone_from_yaml(tiny_run: Path, tmp_path: Path, role: str) -> None:
    path = "--model.network" if role == "student" else "--model.teacher.module.network"
    network = tmp_path / "network.yaml"
    network.write_text(
        "class_path: segmentation_models_pytorch.Unet\n"
        "init_args: {encoder_name: tu-mobilenetv3_small_050, encoder_weights: null}\n"
    )
    assert command(tiny_run, "fit", tmp_path / "run", f"{path}={network}", "--trainer.fast_dev_run=true") == 0
    assert not (tmp_path / "run").exists()


def test_teachers_alone(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert command(tiny_run, "teachers", tmp_path / "run", f"--model.teacher.store={store}") == 0
    assert sorted(path.name.rsplit("-", 1)[0] for path in store.iterdir()) == ["hospital-a", "hospital-b"]
    assert command(tiny_run, "teachers", tmp_path / "run", f"--model.teacher.store={store}") == 0
    assert capsys.readouterr().out.count("found in") == 2  # teachers only: their maps are made by fit
    assert not (tmp_path / "run").exists()
