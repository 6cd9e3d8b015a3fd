"""`fkd compare`: tables on the screen, files in a folder of their own, clear errors."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fkd_med.cli import main
from fkd_med.cli.compare import default_output
from fkd_med.evaluation import ImageRow, ImageTable

Said = pytest.CaptureFixture[str]


def write_run(run: Path, arm: str, gain: float, names: int = 12) -> Path:
    rows = [
        ImageRow("student", arm, "test", 3, client, f"{client}-{i}", 0.3 + gain + 0.01 * i, 0.2, 5.0, "")
        for client in ("a", "b")
        for i in range(names)
    ]
    ImageTable.append(run / "images.csv", rows)
    return run


def test_tables_are_printed_and_files_written(tmp_path: Path, capsys: Said) -> None:
    plain, better = write_run(tmp_path / "plain", "fedavg", 0.0), write_run(tmp_path / "better", "fkd", 0.125)
    assert main(["compare", str(plain), str(better), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for part in ("fedavg student", "fkd student", "+12.50", "reference", "compare.md", str(tmp_path / "out")):
        assert part in said
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        differences = [row["difference"] for row in csv.DictReader(file) if row["arm"] == "fkd student"]
    assert [float(value) for value in differences] == pytest.approx([0.125] * 3)


def test_a_real_run_and_the_default_folder(tiny_run: Path, tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "tiny").mkdir()
    for name in ("images.csv", "ledger.csv"):
        (tmp_path / "tiny" / name).write_bytes((tiny_run / name).read_bytes())
    assert main(["compare", str(tmp_path / "tiny")]) == 0
    said = capsys.readouterr().out
    for part in ("federated student", "local-only student", "teacher", "hospital-b", "mean of hospitals"):
        assert part in said
    made = sorted(path.name for path in (tmp_path / "comparisons" / "tiny").iterdir())
    assert made == ["compare.csv", "compare.md", "dice_over_bytes.png", "dice_over_rounds.png"]


def test_default_folders_tell_comparisons_apart(tmp_path: Path) -> None:
    assert default_output([tmp_path / "a", tmp_path / "b"]) == tmp_path / "comparisons" / "a-vs-b"
    same = [default_output([tmp_path / x / "run", tmp_path / y / "run"]) for x, y in (("1", "2"), ("1", "3"))]
    assert same[0] != same[1]
    assert len(default_output([tmp_path / f"a-rather-long-name-{i}" for i in range(50)]).name) <= 100


def test_other_images_are_warned_of_in_one_line(tmp_path: Path, capsys: Said) -> None:
    runs = [write_run(tmp_path / "x", "fedavg", 0.0), write_run(tmp_path / "y", "fkd", 0.1, names=10)]
    assert main(["compare", *map(str, runs), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "Warning: fkd student against fedavg student" in said.out and "UserWarning" not in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere is not a folder"), (["bare"], "images.csv does not exist"), ([], "runs")],
)
def test_runs_that_cannot_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    assert main(["compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fkd: error: ") and message in said
    assert [path.name for path in tmp_path.rglob("*")] == ["bare"]


def test_output_that_cannot_be_written(tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "file").write_text("")
    run = write_run(tmp_path / "x", "fedavg", 0.0)
    assert main(["compare", str(run), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "A part of that path is a file" in capsys.readouterr().err
