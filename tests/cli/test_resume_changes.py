"""A resume with another configuration says what changed, and refuses what would make it another run."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import yaml

from fkd_med.checkpoints import read_checkpoint, write_checkpoint
from fkd_med.cli import main
from fkd_med.cli.configuration import Plan
from fkd_med.cli.resume import accepted_changes
from fkd_med.rundir import RunDir

QUICK = ("--federation.local_baseline=false", "--test_after_fit=false")
TWO = ("--federation.rounds=3", "--federation.aggregator=fkd_med.aggregation.FedAvgM", "--data.num_workers=1")


class Stopped(Exception):
    """What would be built now is another test's."""


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run of two rounds; its last.ckpt can be resumed, and there is nothing left to do."""
    for name in ("config.yaml", "manifest.csv", ".fkd-run", "checkpoints"):
        copy = shutil.copytree if (tiny_run / name).is_dir() else shutil.copy
        (tmp_path / "run").mkdir(exist_ok=True)
        copy(tiny_run / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.fixture
def checked(tiny_run: Path, run: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Resume up to where everything would be built; returns the exit code, 0 if it would go on."""

    def stop(*args: object) -> None:
        raise Stopped

    monkeypatch.setattr("fkd_med.cli.lightning.FkdCLI.instantiate_classes", stop)

    def resume(*options: str, config: Path = tiny_run.parents[1] / "tiny.yaml") -> int:
        arguments = ["fit", "--config", str(config), "--run_dir", str(run), "--ckpt_path=last", *options]
        code = main(arguments)
        return 0 if code == 1 else code

    return resume


def text(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_the_same_configuration_says_nothing(checked, run, tmp_path, capsys, monkeypatch) -> None:
    assert checked() == 0
    assert checked(config=run / "config.yaml") == 0
    monkeypatch.chdir(run.parent)
    assert checked(f"--data.root=./../{tmp_path.name}/gone/../../{relative(run, tmp_path)}") == 0
    assert checked(f"--data.manifest={run / 'manifest.csv'}", f"--checkpoint.dirpath={run / 'checkpoints'}") == 0
    assert checked("--federation.threads=1", "--trainer.callbacks=lightning.pytorch.callbacks.RichProgressBar") == 0
    assert "changed" not in text(capsys)


def relative(run: Path, tmp_path: Path) -> str:
    """The data's folder as it is seen from the folder above the temporary one."""
    root = Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["root"])
    return str(root.relative_to(tmp_path.parent))


def test_what_may_change_is_told_and_goes_on(checked, capsys) -> None:
    harmless = ("--data.num_workers=2", "--federation.uplink_mbps={hospital-a: 5, hospital-b: 6}")
    assert checked(*harmless, "--trainer.max_time=00:01:00:00", "--test_after_fit=false") == 0
    out = text(capsys)
    assert "goes on with a changed configuration" in out
    for line in (
        "  data.num_workers: 0 -> 2\n",
        "  test_after_fit: true -> false\n",
        "  federation.uplink_mbps: 10.0 -> ",
    ):
        assert out.count(line) == 1


DECIDE = {
    "--model.optimizer.lr=0.01": "model.optimizer.lr: 0.005 -> 0.01",
    "--model.teacher.epochs=2": "model.teacher.epochs: 1 -> 2",
    "--data.batch_size=2": "data.batch_size: 4 -> 2",
    "--data.augmentation=false": "data.augmentation: true -> false",
    "--federation.rounds=3": "federation.rounds: 2 -> 3",
    "--federation.threads=2": "federation.threads: 1 -> 2",
    "--federation.firewall.median_factor=3": "federation.firewall.median_factor: 10.0 -> 3.0",
    "--federation.aggregator=fkd_med.aggregation.FedAvgM": "federation.aggregator: fkd_med.aggregation.FedAvg -> ",
    "--federation.client_rules=[fkd_med.federated.FedProx]": "federation.client_rules: null -> [fkd_med.federated.Fed",
    "--trainer.precision=bf16-mixed": "trainer.precision: null -> bf16-mixed",
    "--trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches: 1 -> 2",
    "--trainer.devices=2": "trainer.devices: auto -> '2'",
    "--trainer.callbacks=lightning.pytorch.callbacks.OnExceptionCheckpoint": "trainer.callbacks: null -> [lightning",
    "--trainer.callbacks.dirpath=x": "trainer.callbacks: null -> [lightning",
    "--checkpoint.monitor=val/loss": "checkpoint.monitor: val/dice -> val/loss",
}


def test_what_decides_is_refused_with_its_line_and_the_remedy(checked, run, capsys) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert checked(*DECIDE) == 2
    error = text(capsys)
    for line in DECIDE.values():
        assert error.count(f"  {line}") == 1 and f"--resume.allow {line.partition(':')[0]}" in error
    assert str(run / "config.yaml") in error and "--run_dir" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    keys = {line.partition(":")[0] for line in DECIDE.values()}
    assert checked(*DECIDE, f"--resume.allow=[{', '.join(keys)}]") == 0


@pytest.mark.slow
def test_all_changes_are_listed_and_each_is_accepted_by_name(checked, capsys) -> None:
    assert checked(*TWO) == 2
    error = text(capsys)
    assert "data.num_workers: 0 -> 1  (this may change)" in error
    assert "accept: --resume.allow federation.rounds --resume.allow federation.aggregator\n" in error
    assert checked(*TWO, "--resume.allow=federation.rounds") == 2
    assert "accept: --resume.allow federation.aggregator\n" in text(capsys)
    for allowed in (["--resume.allow=federation"], ["--resume.allow=federation.rounds,federation.aggregator"]):
        assert checked(*TWO, *allowed) == 0
    assert checked(*TWO, "--resume.allow", "federation.rounds", "--resume.allow=federation.init_args.aggregator") == 0


@pytest.mark.slow
def test_the_settings_of_an_aggregator_are_compared(checked, run, capsys) -> None:
    aggregator = "federation:\n  init_args:\n    aggregator:\n      class_path: fkd_med.aggregation.TrimmedMean\n"
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["federation"]["init_args"]["aggregator"] = {
        "class_path": "fkd_med.aggregation.TrimmedMean", "init_args": {"fraction": 0.1},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    overlay = run.parent / "trimmed.yaml"
    overlay.write_text(f"{aggregator}      init_args: {{fraction: 0.2}}\n")
    assert checked("--config", str(overlay)) == 2
    assert "federation.aggregator.fraction: 0.1 -> 0.2" in text(capsys)
    overlay.write_text(f"{aggregator}      init_args: {{fraction: 0.1}}\n")
    assert checked("--config", str(overlay)) == 0


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("federation.round", "no such key. Did you mean federation.rounds"),
        pytest.param("data.numworkers", "data.num_workers", marks=pytest.mark.slow),
        ("data.num_workers", "it is as the run has it. Changed: federation.rounds."),
        pytest.param("xyz", "docs/configuration.md", marks=pytest.mark.slow),
    ],
)
def test_an_allowance_for_nothing_is_an_error(checked, capsys, key, words) -> None:
    assert checked("--federation.rounds=3", "--resume.allow=federation.rounds", f"--resume.allow={key}") == 2
    assert f"--resume.allow {key}: " in (error := text(capsys)) and words in error


def test_a_run_does_not_become_shorter(checked, run, capsys) -> None:
    """Lightning would say that current_epoch is 2 and max_epochs 1."""
    assert checked("--federation.rounds=1", "--resume.allow=federation.rounds") == 2
    error = text(capsys)
    assert f"federation.rounds is 1, and the run {run} has closed 2: give 2 or more" in error
    assert error.count("\n") == 1


def test_an_allowance_without_a_resume_is_an_error(tiny_run, tmp_path, capsys) -> None:
    arguments = ["--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(tmp_path / "new")]
    assert main(["fit", *arguments, "--resume.allow=data"]) == 2
    assert "nothing is resumed" in text(capsys)


def test_defaults_of_a_newer_version_are_no_change(checked, run, capsys) -> None:
    """Keys that the stored file lacks have the value that this version gives them."""
    stored = yaml.safe_load((run / "config.yaml").read_text())
    for part, name in (
        (stored["federation"]["init_args"], "downlink_mbps"), (stored["federation"]["init_args"], "firewall"),
        (stored["model"]["init_args"], "losses"), (stored["trainer"], "inference_mode"), (stored, "test_after_fit"),
        (stored["checkpoint"], "save_on_exception"), (stored["data"]["init_args"], "in_channels"),
    ):  # fmt: skip
        del part[name]
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert checked() == 0
    assert "changed" not in text(capsys)


def test_an_unreadable_configuration_of_the_run_is_refused(checked, run, capsys) -> None:
    path = run / "config.yaml"
    good = path.read_text()
    path.write_text(good + "no_such_key: 1\n")
    assert checked() == 2
    assert str(path) in (error := text(capsys)) and "'no_such_key' is unknown" in error
    path.write_text(good[:40])
    assert checked() == 2
    assert "cannot be read" in text(capsys)
    path.unlink()
    assert checked() == 2
    assert "is not there" in text(capsys)


@pytest.mark.slow
def test_an_open_number_of_threads_is_what_the_run_used(checked, run, capsys) -> None:
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["federation"]["init_args"]["threads"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert checked("--federation.threads=1") == 0
    assert "changed" not in text(capsys)
    assert checked("--federation.threads=2") == 2
    assert "federation.threads: 1 -> 2" in text(capsys)


@pytest.mark.slow
def test_an_accepted_change_is_recorded_and_the_same_command_works_again(tiny_run, run, capsys) -> None:
    started = (run / "config.yaml").read_text()
    options = (
        "--ckpt_path=last",
        "--federation.rounds=3",
        "--federation.local_baseline=false",
        "--test_after_fit=false",
    )
    arguments = ["fit", "--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(run), *options]
    assert main([*arguments, "--resume.allow=federation.rounds"]) == 0
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert (run / "config-started.yaml").read_text() == started
    assert yaml.safe_load((run / "config.yaml").read_text())["federation"]["init_args"]["rounds"] == 3
    rows = list(csv.DictReader((run / "config-changes.csv").open()))
    found = {row["key"]: (row["after"], row["old"], row["new"]) for row in rows}
    assert found == {
        "federation.rounds": ("2", "2", "3"), "federation.local_baseline": ("2", "true", "false"),
        "test_after_fit": ("2", "true", "false"),
    }  # fmt: skip
    capsys.readouterr()
    assert main([*arguments, "--resume.allow=federation.rounds"]) == 0, "as a script that restarts it would"
    assert "changed configuration" not in text(capsys)
    assert main([*arguments, "--federation.rounds=2"]) == 2, "the configuration in force is what counts now"


def test_a_kill_before_the_new_configuration_costs_and_doubles_nothing(tiny_run, run, capsys, monkeypatch) -> None:
    """Of a run with all rounds closed, too: no training begins, and its configuration still is the one in force."""
    arguments = ["fit", "--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(run), "--ckpt_path=last"]
    arguments += [*QUICK, "--data.num_workers=1"]

    def killed(path: Path, text: str) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("fkd_med.cli.lightning.atomic_write_text", killed)
        assert main(arguments) == 1
    noted = (run / "config-changes.csv").read_text()
    assert noted.count("\n") == 4, "a head and three keys"
    assert main(arguments) == 0
    assert (run / "config-changes.csv").read_text() == noted
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["init_args"]["num_workers"] == 1 and config["test_after_fit"] is False
    arguments[-1] = "--data.num_workers=0"
    assert main(arguments) == 0
    last = (run / "config-changes.csv").read_text().removeprefix(noted)
    assert last.endswith(",data.num_workers,1,0\n") and last.count("\n") == 1


def test_without_federation_too(tiny_run, tmp_path, capsys) -> None:
    config = yaml.safe_load((tiny_run.parents[1] / "tiny.yaml").read_text())
    del config["federation"]
    config["model"] = config["model"]["init_args"]["teacher"]["init_args"]["module"]
    config["trainer"] |= {"max_epochs": 1}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", str(tmp_path / "plain.yaml"), "--run_dir", str(tmp_path / "run")]
    assert main([*arguments, "--test_after_fit=false"]) == 0
    assert main([*arguments, "--ckpt_path=last", "--trainer.max_epochs=2", "--model.optimizer.lr=0.1"]) == 2
    error = text(capsys)
    assert main([*arguments, "--ckpt_path=last", "--trainer.max_epochs=0"]) == 2
    assert "trainer.max_epochs is 0, and the run " in (shorter := text(capsys)) and "has closed 1: give 1" in shorter
    assert "trainer.max_epochs: 1 -> 2" in error and "model.optimizer.lr: 0.005 -> 0.1" in error
    assert main([*arguments, "--ckpt_path=last", "--federation.rounds=2"]) == 2, "a federation out of nowhere"
    assert "federation: null -> fkd_med.federated.Federation" in text(capsys)
    options = ("--ckpt_path=last", "--test_after_fit=false", "--trainer.max_epochs=2")
    assert main([*arguments, *options, "--resume.allow=trainer.max_epochs"]) == 0
    (row,) = csv.DictReader((tmp_path / "run" / "config-changes.csv").open())
    assert (row["after"], row["key"], row["old"], row["new"]) == ("1", "trainer.max_epochs", "1", "2")


def test_a_new_root_must_hold_the_images_of_the_manifest(checked, run, tiny_run, tmp_path, capsys) -> None:
    """Data that moved are no other data: their contents are compared with the run's manifest."""
    shutil.copytree(tiny_run.parents[1] / "phantoms", tmp_path / "moved")
    assert checked(f"--data.root={tmp_path / 'moved'}") == 0
    assert f"-> {tmp_path / 'moved'}" in text(capsys)
    (run / "manifest.csv").unlink()
    assert checked(f"--data.root={tmp_path / 'moved'}") == 2, "nothing would compare them"


def test_checking_needs_a_plan_that_resumes() -> None:
    """A first start compares nothing, and reads no file."""
    from jsonargparse import ArgumentParser, Namespace

    config = Namespace(fit=Namespace(resume=Namespace(allow=None)))
    plan = Plan(RunDir("nowhere"), None, None, False, set())
    assert accepted_changes(ArgumentParser(), config, plan) == []


def of_two_processes(run: Path, devices: object) -> None:
    """Make the run one of two processes, with `devices` in its configuration."""
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(last)
    assert checkpoint["fkd_med"]["processes"] == 1
    checkpoint["fkd_med"]["processes"] = 2
    write_checkpoint(checkpoint, last)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["devices"] = devices
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.mark.slow
def test_another_number_of_processes_is_another_run(checked, capsys) -> None:
    assert checked("--trainer.devices=2") == 2
    assert "trainer.devices: auto -> '2'" in text(capsys)
    assert checked("--trainer.devices=1") == 0  # what auto was
    assert "changed" not in text(capsys)


@pytest.mark.slow
def test_devices_left_open_are_counted(tiny_run, run, checked, monkeypatch, capsys) -> None:
    of_two_processes(run, "auto")
    assert checked("--trainer.devices=2") == 0  # what auto was
    assert "changed" not in text(capsys)
    assert checked("--trainer.devices=1") == 2
    assert "trainer.devices: auto -> '1'" in text(capsys)
    monkeypatch.undo()
    same = ["fit", f"--config={tiny_run.parents[1] / 'tiny.yaml'}", f"--run_dir={run}", "--ckpt_path=last", *QUICK]
    before = (run / "config.yaml").read_bytes()
    assert main(same) == 2
    assert "had 2 processes and would go on with 1, which changes bits: give --trainer.devices 2" in text(capsys)
    assert (run / "config.yaml").read_bytes() == before
    meant = [*same, "--trainer.devices=1", "--resume.allow=trainer.devices"]
    assert main(meant) == 0, text(capsys)
    assert main(meant) == 0, text(capsys)
