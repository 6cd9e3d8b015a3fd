"""`fkd reproduce` as a user gives it: the tiny preset, the second run, pieces, tables alone, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fkd_med.cli import main
from fkd_med.locks import locked
from fkd_med.study import runner

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = ["reproduce", "--config", str(CONFIGS / "paper.yaml"), "--preset", "tiny", "--output", "made"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Work in an empty folder, with runs in this process: importing the stack for each would take minutes."""
    monkeypatch.chdir(tmp_path)
    given: list[list[str]] = []

    def here(processes: runner.Processes, arguments: list[str], seconds: float | None, log: Path | None) -> int:
        given.append(arguments)
        return main(arguments)

    monkeypatch.setattr(runner.Processes, "__call__", here)
    return given


def test_tiny_makes_every_table_once(launched: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY) == 0
    text = Path("made/RESULTS.md").read_text()
    for said in ("local student", "pooled student", "FedAvg teacher", "FKD as published", "FKD, ours: its teachers"):
        assert said in text
    assert "gain of distillation" in text and "Student beside teachers" in text and "hospital-c" in text
    assert "missing" not in text
    assert {"RESULTS.md", "results.csv", "differences.png", "dice_over_bytes.png", "learning_curves.png"} <= set(
        names("made")
    )
    runs = len(launched)
    assert runs == 6
    before = Path("made/results.csv").read_bytes()
    Path("made/results.csv").unlink()
    assert main(TINY) == 0 and len(launched) == runs, "finished runs are not run again"
    assert Path("made/results.csv").read_bytes() == before
    capsys.readouterr()
    assert main([*TINY, "--tables", "--seeds", "1"]) == 0
    assert "Finished and not asked for, so in no table: cvc/fedavg/seed-0, cvc/local/seed-0" in capsys.readouterr().out
    assert main([*TINY, "--tables", "--seeds", "0", "1"]) == 0 and len(launched) == runs
    said = capsys.readouterr().out
    assert "cvc resunet ours seed 1" in said.partition("Missing:")[2]
    with locked(Path("made/.fkd-study-lock"), "The study"):  # as while it runs
        assert main([*TINY, "--tables", "--split", "val"]) == 0
        assert main(TINY) == 2 and "in use by this very process" in capsys.readouterr().err
    assert Path("made/RESULTS-val.md").exists()
    assert (
        main([*TINY, "--tables", "--keep", "made/kept"]) == 2
        and "is in the study's own folder" in capsys.readouterr().err
    )
    assert main([*TINY, "--tables", "--keep", "kept"]) == 0 and "the rows of 6 runs in kept" in capsys.readouterr().out
    shutil.rmtree("made/phantoms")
    assert main([*TINY, "--tables", "--output", "kept"]) == 0
    assert Path("kept/results.csv").read_bytes() == before
    assert "another configuration" not in capsys.readouterr().out
    definition = Path("kept/cvc/fedavg/seed-0/definition.yaml")
    definition.write_text(definition.read_text().replace("rounds: 1", "rounds: 2"))
    assert main([*TINY, "--tables", "--output", "kept"]) == 0
    said = "another configuration than today's: cvc fedavg seed 0 (settings.federation.rounds)"
    assert said in capsys.readouterr().out and said in Path("kept/RESULTS.md").read_text().replace("**", "")


def test_time_that_is_up_has_its_own_code(launched: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--minutes", "0"]) == 143
    assert not launched and "6 runs are left. The same command goes on." in capsys.readouterr().out


def test_a_failed_run_is_named_and_the_others_are_made(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = runner.Processes.__call__

    def one_fails(processes: runner.Processes, arguments: list[str], *rest: Any) -> int | None:
        return 1 if "local_student" in arguments[2] else inside(processes, arguments, *rest)

    monkeypatch.setattr(runner.Processes, "__call__", one_fails)
    assert main([*TINY, "--arms", "local", "fedavg"]) == 3
    said = capsys.readouterr().out
    assert "Failed with exit code 1: cvc local seed 0" in said
    assert "FedAvg student" in Path("made/RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tinny"], "no 'tinny'. Did you mean tiny?"),
        (["--preset", "cpu"], "The images of CVC-ClinicDB are not here"),
        (["--data", "cvc"], "--data cvc: give NAME=FOLDER"),
        (["--data", "cvc=a", "cvc=b"], "--data names 'cvc' twice"),
        (["--seeds", "1", "1"], "--seeds has [1] more than once"),
        (["--arms", "mine"], "--arms: there is no 'mine'"),
        (["--config", str(CONFIGS / "quickstart.yaml")], "is not a study: it has no `arms`"),
        (["--config", "nowhere.yaml"], "there is no such file"),
        (["--minutes", "soon"], "minutes"),
        (["--tables"], "--output made is no folder"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    arguments: list[str], message: str, launched: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not launched and not names(tmp_path)


def test_finished_runs_that_cannot_be_read_are_told_before_others_run(
    launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("made/cvc/fedavg/seed-0/run")
    run.mkdir(parents=True)
    (run / "images.csv").write_text("model,arm,split,round,client,id,dice,iou,hd95,empty\n")
    (run.parent / "outcome.yaml").write_text("finished: true\n")
    assert main([*TINY, "--arms", "fedavg", "local"]) == 2
    assert "lacks the column `patient`" in capsys.readouterr().err and not launched


def test_a_preset_for_a_machine_that_is_not_here(launched: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((CONFIGS / "paper.yaml").read_text())
    content["presets"]["tiny"]["settings"]["all"]["trainer"]["accelerator"] = "tpu"
    shutil.copytree(CONFIGS, "configs")
    Path("configs/study.yaml").write_text(yaml.safe_dump(content))
    assert main([*TINY, "--config", "configs/study.yaml"]) == 2
    said = capsys.readouterr().err
    assert "trainer.accelerator, in the preset's settings, is 'tpu'" in said and "`auto` or `cpu`" in said
    assert not launched and not Path("made").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"differences": [{"label": "gain", "of": "ours", "over": "fedavq"}]}, "Did you mean fedavg?"),
        ({"arms": {"ours": {"label": "x", "configs": ["nowhere.yaml"]}}, "differences": []}, "nowhere.yaml"),
        ({"presets": {"tiny": {"seeds": [0], "settings": [1]}}}, "presets.tiny.settings must be groups"),
        ({"presets": {"tiny": {"seeds": "many"}}}, "seeds"),
        ({"color": "red"}, "color"),
    ],
)
def test_a_wrong_study_names_the_key(
    change: dict[str, object], message: str, launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((CONFIGS / "paper.yaml").read_text())
    content["presets"] = {"tiny": {"seeds": [0]}}
    Path("study.yaml").write_text(yaml.safe_dump({**content, **change}))
    assert main([*TINY, "--config", "study.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not launched and names(".") == ["study.yaml"]


def test_a_damaged_file_of_an_arm_is_named(launched: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    for broken in ("data:\n\troot: x\n", "- data\n"):
        Path("arm.yaml").write_text(broken)
        Path("study.yaml").write_text(yaml.safe_dump(
            {"data": {"x": {"label": "X", "configs": "x", "root": "."}}, "teachers": {"t": "T"}, "differences": [],
             "arms": {"a": {"label": "A", "configs": ["arm.yaml"]}}, "presets": {"tiny": {"seeds": [0]}}}))  # fmt: skip
        assert main([*TINY, "--config", "study.yaml"]) == 2
        assert "arm.yaml" in capsys.readouterr().err and not launched and not Path("made").exists()


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())
