"""Hospitals with images that nobody has drawn masks for, from the command line."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from fkd_med.cli import main
from fkd_med.evaluation import ImageTable


@pytest.fixture
def data(tiny_run: Path, tmp_path: Path) -> tuple[Path, set[str]]:
    """The phantoms of the tiny run as a folder of its own, without the masks of one patient of each hospital."""
    root = tmp_path / "mine"
    for part in ("images", "masks"):
        shutil.copytree(tiny_run.parents[1] / "phantoms" / part, root / part)
    shutil.copy(tiny_run.parents[1] / "phantoms" / "clients.csv", root)
    rows = list(csv.DictReader((tiny_run / "manifest.csv").open()))
    bare = {next(r["patient"] for r in rows if (r["client"], r["split"]) == (c, "train")) for c in
            ("hospital-a", "hospital-b")}  # fmt: skip
    names = {row["id"] for row in rows if row["patient"] in bare}
    for name in names:
        (root / "masks" / f"{name}.png").unlink()
    return root, names


def test_a_federation_learns_from_images_without_masks(
    tiny_run: Path, data: tuple[Path, set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, names = data
    run = tmp_path / "run"
    given = ["--config", str(tiny_run.parents[1] / "tiny.yaml"), "--data.root", str(root), "--run_dir", str(run)]
    given += ["--data.layout", "fkd_med.data.FolderPair", "--federation.local_baseline", "false"]
    assert main(["fit", *given]) == 2
    assert "on_missing=unlabelled" in capsys.readouterr().err
    assert main(["check-data", "--data.root", str(root), "--data.on_missing", "unlabelled", "--data.batch_size", "4",
                 "--output", str(tmp_path / "look")]) == 0  # fmt: skip
    assert "unlabelled" in capsys.readouterr().out and (tmp_path / "look" / "contact_sheet.png").exists()
    given += ["--data.on_missing", "unlabelled"]
    assert main(["fit", *given, "--debug"]) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader((run / "manifest.csv").open()))
    assert {row["id"] for row in rows if row["split"] == "unlabelled"} == names
    trained = {c: sum(r["client"] == c and r["split"] in ("train", "unlabelled") for r in rows) for c in
               ("hospital-a", "hospital-b")}  # fmt: skip
    assert f"teacher maps of hospital-a: {trained['hospital-a']} images" in said
    assert not {row.id for row in ImageTable.read(run / "images.csv").rows} & names
    # Resumed when it is finished, scored again, and not with other batches.
    assert main(["fit", *given, "--ckpt_path", "last", "--debug"]) == 0
    assert main(["test", "--config", str(run / "config.yaml"), "--debug"]) == 0
    assert main(["fit", *given, "--ckpt_path", "last", "--data.unlabelled", "1"]) == 2
    assert "data.unlabelled" in capsys.readouterr().err
