"""`fkd compare`: arms side by side, paired, plotted; bad runs named."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fkd_med.errors import RunError
from fkd_med.evaluation import ImageRow, ImageTable, compare
from fkd_med.evaluation.history import read_bytes, read_curve
from fkd_med.evaluation.plots import plot_bytes

CLIENTS = ("a", "b")


def write_run(
    run: Path, arm: str, gain: float, *, rounds: int = 3, bytes_per_message: int = 0, teacher: bool = False
) -> Path:
    base = np.random.default_rng(0).random((2, 12)) / 2
    rows = []
    for k, client in enumerate(CLIENTS):
        for i in range(12):
            dice = base[k, i] + (gain if client == "a" else 0.0) + 0.001 * (i % 2 - 0.5)
            rows.append(ImageRow("student", arm, "test", rounds - 1, client, f"t{i}", dice, dice / 2, 5.0, ""))
            if teacher:
                rows.insert(0, ImageRow("teacher", "local", "test", -1, client, f"t{i}", 0.9, 0.8, 2.0, ""))
        for r in range(rounds):
            rows.append(ImageRow("student", arm, "val", r, client, "v", 0.2 * r + gain + 0.1 * k, 0.1, None, ""))
    ImageTable.append(run / "images.csv", rows)
    if bytes_per_message:
        lines = [
            f"{r},{c},{d},state,{bytes_per_message}" for r in range(rounds) for c in CLIENTS for d in ("up", "down")
        ]
        (run / "ledger.csv").write_text("\n".join(["round,client,direction,section,bytes", *lines]) + "\n")
    return run


def test_differences_are_against_the_first_student(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "plain", "fedavg", 0.0, teacher=True, bytes_per_message=1_000_000),
        write_run(tmp_path / "better", "fkd", 0.1, teacher=True, bytes_per_message=250_000),
    ]
    comparison = compare(runs, tmp_path / "out")
    assert [arm.name for arm in comparison.arms] == ["fedavg student", "local teacher", "fkd student"]  # one teacher
    fkd = comparison.arms[2]
    assert fkd.difference is not None and comparison.arms[0].difference is None
    assert fkd.difference.clients["a"].estimate == pytest.approx(0.1) and fkd.difference.clients["a"].excludes_zero
    assert fkd.difference.clients["b"].estimate == pytest.approx(0.0) and not fkd.difference.clients["b"].excludes_zero
    assert fkd.difference.mean.estimate == pytest.approx(0.05)
    marked = [(row[1], row[-1]) for row in comparison.details.rows]
    assert marked[2] == ("fkd student", "*") and marked[5] == ("fkd student", "")
    assert comparison.overview.rows[2][:2] == ["fkd student", "24"]


def test_files(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "local", "local-only", 0.0),
        write_run(tmp_path / "fkd", "fkd", 0.1, bytes_per_message=500_000),
    ]
    comparison = compare(runs, tmp_path / "out")
    assert [f.name for f in comparison.files] == [
        "compare.csv",
        "compare.md",
        "dice_over_rounds.png",
        "dice_over_bytes.png",
    ]
    assert all(Image.open(f).size == (1200, 675) for f in comparison.files[2:])
    with comparison.files[0].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(r["hospital"], r["arm"]) for r in table][:2] == [("a", "local-only student"), ("a", "fkd student")]
    assert float(table[1]["difference"]) == pytest.approx(0.1) and table[1]["excludes_0"] == "1"
    assert (
        table[0]["difference"] == ""
        and None not in table[0]
        and float(table[-1]["dice"]) == comparison.arms[1].dice.mean.estimate
    )
    text = comparison.files[1].read_text()
    assert "![dice over rounds](dice_over_rounds.png)" in text and "fkd student" in text
    fkd, local = comparison.arms[1].curve, comparison.arms[0].curve
    assert fkd is not None and local is not None and local.megabytes is None
    assert list(fkd.rounds) == [0, 1, 2] and list(fkd.megabytes or ()) == [2.0, 4.0, 6.0]
    assert list(fkd.mean) == pytest.approx([0.15, 0.35, 0.55]) and list(fkd.worst) == pytest.approx([0.1, 0.3, 0.5])


def test_patients_are_counted_and_too_few_have_no_interval(tmp_path: Path) -> None:
    rows = [
        ImageRow(
            "student", "federated", "test", 0, client, f"{client}{i}", 0.05 * i, 0.04 * i, 3.0, "", f"{client}{i // 3}"
        )
        for client in "ab"
        for i in range(15)
    ]
    ImageTable.append(tmp_path / "run" / "images.csv", rows)
    comparison = compare([tmp_path / "run"], tmp_path / "out")
    with (tmp_path / "out" / "compare.csv").open() as file:
        found = {line["hospital"]: (line["n"], line["n_patients"], line["dice_low"]) for line in csv.DictReader(file)}
    assert found["a"] == ("15", "5", "") and found["mean of hospitals"][:2] == ("30", "10")
    assert float(found["mean of hospitals"][2]) < 0.35
    assert next(line[2:6] for line in comparison.details.rows) == ["15", "5", "0.350", "too few"]


def test_shared_teachers_stand_at_the_start_of_the_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "fkd", 0.0, rounds=4, bytes_per_message=250_000)
    table = ImageTable.read(run / "images.csv")
    rows = [row for row in table.of("val") if row.round > 0]
    lines = (run / "ledger.csv").read_text().splitlines()
    kept = [line for line in lines[1:] if not line.startswith("0,")]
    teachers = ["0,a,up,teacher,7000000", "0,b,down,teacher,7000000"]
    (run / "ledger.csv").write_text("\n".join([lines[0], *teachers, *kept]) + "\n")
    curve = read_curve(rows, run / "ledger.csv")
    assert curve is not None and list(curve.rounds) == [1, 2, 3]
    assert list(curve.megabytes or ()) == [15.0, 16.0, 17.0]
    plot_bytes({"ensemble": curve}, tmp_path / "bytes.png")
    assert (tmp_path / "bytes.png").stat().st_size > 0


def test_nothing_is_written_without_output(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "fkd", 0.0)
    before = sorted(tmp_path.rglob("*"))
    assert compare([run]).files == [] and sorted(tmp_path.rglob("*")) == before


def test_equal_names_get_their_folders(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "x" / "run", "fkd", 0.0),
        write_run(tmp_path / "y" / "run", "fkd", 0.1),
        write_run(tmp_path / "z", "fedavg", 0.2),
    ]
    names = [arm.name for arm in compare(runs).arms]
    assert names == ["fkd student (x/run)", "fkd student (y/run)", "fedavg student"]
    again = compare([runs[0], write_run(tmp_path / "copy", "fkd", 0.0)])  # the same scores, still two runs
    assert [arm.name for arm in again.arms] == ["fkd student (run)", "fkd student (copy)"]


def test_bad_runs_are_named(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", "fkd", 0.0)
    with pytest.raises(RunError, match="nowhere is not a folder"):
        compare([good, tmp_path / "nowhere"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(RunError, match=r"bare/images.csv does not exist"):
        compare([good, tmp_path / "bare"])
    (tmp_path / "bare" / "images.csv").touch()
    with pytest.raises(RunError, match=r"bare/images.csv has no test rows"):
        compare([good, tmp_path / "bare"])
    with pytest.raises(RunError, match="named twice"):
        compare([good, tmp_path / "bare" / ".." / "good"])
    with pytest.raises(RunError, match="Nothing to compare"):
        compare([])


def test_other_images_are_named(tmp_path: Path) -> None:
    good, other, partly = write_run(tmp_path / "good", "fkd", 0.0), tmp_path / "other", tmp_path / "partly"
    row = ImageRow("student", "x", "test", 0, "a", "elsewhere", 0.5, 0.4, 1.0, "")
    ImageTable.append(other / "images.csv", [row])
    with pytest.raises(RunError, match=r"x student against fkd student: .*24 and 1 scored images, 0"):
        compare([good, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first = [r for r in ImageTable.read(good / "images.csv").of("test") if r.client == "a"]
    ImageTable.append(
        partly / "images.csv", [ImageRow("student", "x", "test", 0, r.client, r.id, 0.5, 0.4, 1.0, "") for r in first]
    )
    with pytest.warns(UserWarning, match="x student against fkd student: .*24 and 12 scored images, 12"):
        comparison = compare([good, partly])
    assert comparison.arms[1].interval("b") is None


@pytest.mark.parametrize("text", ["", "round,bytes\nx,1\n", "a,b\n1,2\n", "round,bytes\n1\n"])
def test_an_unreadable_ledger_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.csv").write_text(text)
    if text:
        with pytest.warns(UserWarning, match="ledger.csv cannot be read"):
            assert read_bytes(tmp_path / "ledger.csv") == {}
    assert read_bytes(tmp_path / "absent.csv") == {}


def test_ledger_columns_may_come_in_any_order_and_number(tmp_path: Path) -> None:
    (tmp_path / "ledger.csv").write_text("bytes,cumulative,round,client\n10,10,0,a\n5,15,0,b\n7,22,1,a\n")
    assert read_bytes(tmp_path / "ledger.csv") == {0: 15, 1: 7}


def test_the_reference_does_not_change_when_a_run_is_tested_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "federated", 0.1, teacher=True)
    write_run(run, "local-only", 0.0)
    again = [row for row in ImageTable.read(run / "images.csv").of("test", arm="federated")]
    assert compare([run]).arms[0].name == "federated student"
    ImageTable.append(run / "images.csv", again)
    assert [arm.name for arm in compare([run]).arms] == ["federated student", "local teacher", "local-only student"]
    alone = write_run(tmp_path / "alone", "local-only", 0.0)
    assert compare([alone, run]).arms[0].run == alone


def manifest(run: Path, changed: int) -> None:
    rows = [f"t{i},{c},test,p{i},{'x' if i < changed else 'y'}{c}{i}" for c in CLIENTS for i in range(12)]
    (run / "manifest.csv").write_text("\n".join(["id,client,split,patient,sha256", *rows]) + "\n")


def test_images_of_the_same_name_must_be_the_same(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "plain", "fedavg", 0.0), write_run(tmp_path / "better", "fkd", 0.1)]
    manifest(runs[0], changed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(runs)  # one of them knows nothing of its images
    manifest(runs[1], changed=2)
    with pytest.warns(UserWarning, match="fkd student against fedavg student: 4 images .* other masks") as said:
        difference = compare(runs).arms[1].difference
    assert "24 and 20 scored images, 20 of them in both" in str(said[1].message)
    assert difference is not None and difference.clients["a"].patients == 10
    manifest(runs[1], changed=12)
    with pytest.warns(UserWarning), pytest.raises(RunError, match="fkd student against fedavg student: Arms without"):
        compare(runs)
    (runs[1] / "manifest.csv").write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="manifest.csv cannot be read"):
        compare(runs)
