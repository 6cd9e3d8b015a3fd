"""The manifest: what it refuses, that it survives the disk, and that changed files are noticed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from fkd_med.data.manifest import Manifest, ManifestRow, hash_record
from fkd_med.data.records import Record
from fkd_med.errors import DataError

ROWS = [
    ManifestRow("2", "b", "train", "p2", "x"),
    ManifestRow("1", "b", "train", "p1", "x"),
    ManifestRow("3", "a", "val", "p3", "x"),
    ManifestRow("ü, 4", "a", "test", "p4", "x"),
]


def test_rows_by_client_and_split_are_sorted() -> None:
    manifest = Manifest(ROWS)
    assert manifest.clients() == ["a", "b"]
    assert [row.id for row in manifest.of("b", "train")] == ["1", "2"]
    assert [row.id for row in manifest.of(None, "train")] == ["1", "2"]
    assert manifest.of("a", "train") == []
    assert [(row.client, row.id) for row in manifest.rows] == [("a", "3"), ("a", "ü, 4"), ("b", "1"), ("b", "2")]


def test_written_and_read_back(tmp_path: Path) -> None:
    Manifest(ROWS).write(tmp_path / "manifest.csv")
    assert (tmp_path / "manifest.csv").read_text(encoding="utf-8").splitlines()[:2] == [
        "id,client,split,patient,sha256",
        "3,a,val,p3,x",
    ]
    assert Manifest.read(tmp_path / "manifest.csv") == Manifest(ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.csv"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "2"}, r"more than once: 2\."),
        ({"split": "valid"}, r"1 \('valid'\)"),
        ({"patient": "p2", "split": "test"}, r"more than one split: p2 \(test, train\)"),
        ({"patient": "p3", "split": "val"}, r"more than one client: p3 \(a, b\)"),
        ({"client": "../x"}, "cannot name a client"),
        ({"client": ""}, "cannot name a client"),
        ({"client": "B"}, "the clients 'B' and 'b' differ only in how they are written"),
    ],
)
def test_rows_that_break_a_rule_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Manifest([ROWS[0], replace(ROWS[1], **changes), *ROWS[2:]])


def test_unreadable_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv"):
        Manifest.read(tmp_path / "gone.csv")
    for text, message in [("id,client,split\n", "lacks the columns patient, sha256"), ("", "lacks"), (None, "no rows")]:
        (tmp_path / "m.csv").write_text("id,client,split,patient,sha256\n" if text is None else text)
        with pytest.raises(DataError, match=rf"m\.csv.*{message}"):
            Manifest.read(tmp_path / "m.csv")


def test_verify_notices_changed_and_missing_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = []
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"image " + name.encode())
        (tmp_path / f"{name}_mask.png").write_bytes(b"mask " + name.encode())
        records.append(Record(name, tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png"))
    assert hash_record(records[0]) == hashlib.sha256(b"image amask a").hexdigest()
    manifest = Manifest(ManifestRow(r.id, "x", "train", r.patient, hash_record(r)) for r in records)
    manifest.verify(reversed(records))
    manifest.verify([*records, Record("new", tmp_path / "new.png")])
    with caplog.at_level("WARNING"):
        manifest.verify([*(replace(r, client="x") for r in records), Record("n", tmp_path / "n.png", client="north")])
    assert "1 images are not in it and not used. Nor is north: hospitals join by a new run" in caplog.text
    assert "1 images are not in it" in caplog.text
    with pytest.raises(DataError, match=r"1 images are not in the data: b\."):
        manifest.verify([records[0], records[2]])
    (tmp_path / "b_mask.png").write_bytes(b"mask B")
    with pytest.raises(DataError, match=r"1 images or masks have changed .*b\.png"):
        manifest.verify(records)
    (tmp_path / "b_mask.png").unlink()
    with pytest.raises(DataError, match=r"b_mask\.png"):
        manifest.verify(records)
