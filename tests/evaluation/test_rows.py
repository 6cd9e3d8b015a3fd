"""images.csv: exact, append-only, and none the worse for a crash."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fkd_med.errors import RunError
from fkd_med.evaluation import ImageRow, ImageTable, group_arms

ROW = ImageRow("student", "federated", "val", 0, "hospital-a", "img1", 0.5, 1 / 3, None, "")


def test_rows_of_an_older_version_say_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    path.write_text("model,arm,split,round,client,id,dice,iou,hd95,empty\n")
    with pytest.raises(RunError, match=r"lacks the column `patient`.*manifest.csv"):
        ImageTable.read(path)
    with pytest.raises(RunError, match="lacks the column `patient`"):
        ImageTable.append(path, [ROW])


def test_reads_back_exactly(tmp_path: Path) -> None:
    rng = random.Random(1)
    names = ["Zürich, Nord", 'the "best"', "病院", "a;b", " padded ", "line\u2028separator", "-", "x" * 300]
    rows = [
        ImageRow("teacher", names[i % 8], "test", i - 1, names[(i + 3) % 8], f"{names[i % 5]}/{i}", rng.random(),
                 1e-17 * i, rng.random() * 400 if i % 3 else None, ("", "prediction", "truth", "both")[i % 4],
                 ("", names[i % 7])[i % 2])
        for i in range(64)
    ]  # fmt: skip
    path = tmp_path / "run" / "images.csv"
    ImageTable.append(path, rows[:40])
    ImageTable.append(path, iter(rows[40:]))
    assert list(ImageTable.read(path)) == rows
    assert path.read_text().startswith("model,arm,split,round,client,id,patient,dice,iou,hd95,empty\n")
    assert path.read_text().count("model,arm") == 1


def test_numpy_scores_are_written_as_numbers(tmp_path: Path) -> None:
    row = replace(ROW, dice=np.float32(0.1), iou=np.float64(0.2), hd95=np.float32(3.3))
    ImageTable.append(tmp_path / "images.csv", [row])
    read = ImageTable.read(tmp_path / "images.csv").rows[0]
    assert (read.dice, read.iou, read.hd95) == (float(np.float32(0.1)), 0.2, float(np.float32(3.3)))


def test_a_row_counts_once_and_the_last_writing_wins(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    ImageTable.append(path, [ROW, ROW, replace(ROW, id="img2")])
    assert len(path.read_text().splitlines()) == 3
    ImageTable.append(path, [replace(ROW, dice=0.75)])
    assert [(r.id, r.dice) for r in ImageTable.read(path)] == [("img2", 0.5), ("img1", 0.75)]


def test_a_torn_last_line_is_left_out_then_removed(tmp_path: Path) -> None:
    whole = tmp_path / "images.csv"
    ImageTable.append(whole, [ROW, replace(ROW, id="größe"), replace(ROW, id="img3", hd95=12.345)])
    data = whole.read_bytes()
    header, first, second, _ = data.splitlines(keepends=True)
    torn = tmp_path / "torn.csv"
    ends = {0, len(header), len(header + first), len(header + first + second)}
    for length in sorted({*range(0, len(data), 5), *ends, *(e - 1 for e in ends if e), *(e + 1 for e in ends)}):
        torn.write_bytes(data[:length])
        complete = sum(length >= len(b) for b in (header + first, header + first + second))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(ImageTable.read(torn)) == complete
            ImageTable.append(torn, [replace(ROW, id="next")])
        assert [str(w.message).split("; it is ")[1] for w in caught] == (
            [] if length in ends else ["left out.", "removed."]
        )
        assert torn.read_bytes().count(b"model,arm") == 1
        assert [r.id for r in ImageTable.read(torn)] == [*["img1", "größe"][:complete], "next"]


def test_editors_may_add_a_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    ImageTable.append(path, [ROW])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    ImageTable.append(path, [replace(ROW, id="img2")])
    assert [r.id for r in ImageTable.read(path)] == ["img1", "img2"]


@pytest.mark.parametrize("content", [b"id,client,patient\n1,a,b\n", b"hello", b"\n", b"\x89PNG\r\n\x1a\n\x00"])
def test_foreign_files_are_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images.csv"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"not the images\.csv of a run"):
        ImageTable.read(path)
    with pytest.raises(RunError, match=r"not the images\.csv of a run"):
        ImageTable.append(path, [ROW])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line", ["student,a,val", "s,a,val,x,c,i,1.0,1.0,,", 's,a,val,0,"c,i,1.0,1.0,,', "s,a,val,0,c,i,1,1,,no"]
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "images.csv"
    ImageTable.append(path, [ROW])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RunError, match=r"images.csv, line 3 cannot be read"):
        ImageTable.read(path)


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"does not exist.*fkd test"):
        ImageTable.read(tmp_path / "images.csv")


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\0b", "a\udcffb"])
def test_names_that_cannot_be_written_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="rename it"):
        ImageTable.append(tmp_path / "images.csv", [ROW, replace(ROW, id=name)])
    assert not (tmp_path / "images.csv").exists()


def test_resume_drops_later_rounds_only(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    ImageTable.drop_after(path, 3)
    assert not path.exists()
    rounds = [-1, 0, 1, 2, 3, 4]
    ImageTable.append(path, [replace(ROW, round=r) for r in rounds])
    ImageTable.drop_after(path, 2)
    assert [r.round for r in ImageTable.read(path)] == [-1, 0, 1, 2]
    ImageTable.append(path, [replace(ROW, round=3)])
    assert [r.round for r in ImageTable.read(path)] == [-1, 0, 1, 2, 3]


def test_a_split_that_is_scored_again_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    ImageTable.drop_split(path, "test")
    assert not path.exists()
    ImageTable.append(path, [ROW, replace(ROW, split="test"), replace(ROW, round=9)])
    ImageTable.drop_split(path, "test")
    assert [row.round for row in ImageTable.read(path)] == [ROW.round, 9]


def test_latest_takes_the_last_written_round_of_each_client(tmp_path: Path) -> None:
    test = replace(ROW, split="test")
    table = ImageTable((
        replace(test, round=9), replace(test, round=9, id="only in the first test"), replace(test, round=4),
        replace(test, round=2, client="hospital-b"), replace(ROW, round=11), replace(test, arm="local-only", round=7),
    ))  # fmt: skip
    latest = [(r.arm, r.client, r.round) for r in table.latest("test")]
    assert latest == [("federated", "hospital-a", 4), ("federated", "hospital-b", 2), ("local-only", "hospital-a", 7)]


def test_arms_get_readable_names() -> None:
    rows = [replace(ROW, model="teacher", arm="local"), ROW, replace(ROW, arm=""), replace(ROW, id="img2")]
    assert {name: len(r) for name, r in group_arms(rows).items()} == {
        "local teacher": 1,
        "federated student": 2,
        "student": 1,
    }
