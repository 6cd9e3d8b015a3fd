"""Help that reads well: every command and key explains itself, and nothing else is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fkd_med.cli import COMMANDS, main


@pytest.fixture(autouse=True)
def _wide_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command prints on standard output, which must succeed without a word on the other."""
    code = main(arguments)
    printed = capsys.readouterr()
    assert code == 0 and printed.err == "", printed.err
    return printed.out


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    assert text == shown(capsys) == shown(capsys, "help")
    assert re.findall(r"^  ([a-z-]+)  ", text, re.MULTILINE) == list(COMMANDS)
    assert "fkd fit --config configs/quickstart.yaml" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"fkd-med \d+\.\d+\.\d+\S*\n", shown(capsys, "--version"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = shown(capsys, command, "--help")
    assert text.startswith("usage: ") and command in text.splitlines()[0]
    assert not re.search(r"(/home|/root|/work|/tmp)/", text), "a path of this machine"
    assert "Traceback" not in text
    assert not [path for path in tmp_path.iterdir()], "help writes nothing"


def test_fit_explains_our_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "fit", "--help")
    explained = {
        "--run_dir": "Folder of the run",
        "--overwrite": "Replace an earlier run",
        "--test_after_fit": "Test the best weights",
        "--federation": "one communication round",
    }
    for key, words in explained.items():
        assert re.search(rf"^ *{key}\b", text, re.MULTILINE), key
        assert words in text, words
    assert "--ckpt_path" in text and "--print_config" in text


def test_federation_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "fit", "--federation.help")
    for key, words in {
        "rounds": "communication rounds",
        "local_epochs": "epochs over its own training images",
        "local_steps": "optimizer steps per round",
        "aggregator": "null is local-only",
        "fraction": "share of the clients",
        "optimizer_state": "starts afresh each round",
        "client_callbacks": "Lightning callbacks",
        "share_teachers": "the partners' consent",
        "local_baseline": "train each client alone",
        "threads": "CPU threads",
    }.items():
        entry = re.search(rf"^ *--federation\.{key} .*?(?=^ *--federation|\Z)", text, re.MULTILINE | re.DOTALL)
        assert entry and words in " ".join(entry[0].split()), key


@pytest.mark.parametrize(
    ("key", "cls", "words"),
    [
        ("data", "fkd_med.data.FederatedDataModule", "Folder of the data set"),
        ("model", "fkd_med.modules.DistillationModule", "a weight of 0 turns a term off"),
        ("model", "fkd_med.modules.SegmentationModule", "Dice plus cross-entropy when left out"),
    ],
)
def test_classes_explain_their_keys(key: str, cls: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(capsys, "fit", f"--{key}.help", cls).split())
    assert words in text


@pytest.mark.parametrize("command", ["fti", "compair", "chek-data"])
def test_misspelt_command_gets_a_hint(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    printed = capsys.readouterr()
    nearest = {"fti": "fit", "compair": "compare", "chek-data": "check-data"}[command]
    assert f"`fkd {nearest}`" in printed.err and "Traceback" not in printed.err
