"""`fkd phantoms`: what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fkd_med.cli import main


def test_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made" / "here"
    assert main(["phantoms", str(folder), "--hospitals", "2", "--images", "[5,8]", "--size", "40"]) == 0
    assert str(folder) in (said := capsys.readouterr().out)
    assert "13 images with masks of 4 patients in 2 hospitals" in said
    rows = [line.split(",") for line in (folder / "clients.csv").read_text().splitlines()[1:]]
    assert [client for _, client, _ in rows] == ["hospital-a"] * 5 + ["hospital-b"] * 8
    for name, _, _ in rows:
        image, mask = (np.asarray(Image.open(folder / kind / f"{name}.png")) for kind in ("images", "masks"))
        assert image.shape == (40, 40, 3) and mask.shape == (40, 40) and set(np.unique(mask)) <= {0, 255}


def test_seed_decides_the_pixels(tmp_path: Path) -> None:
    images = {}
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["phantoms", str(tmp_path / folder), "--images=4", "--size=32", "--seed", seed]) == 0
        images[folder] = next((tmp_path / folder / "images").glob("*.png")).read_bytes()
    assert images["a"] == images["b"] != images["c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hospitals", "0"], "makes no hospitals"),
        (["--size", "large"], "size"),
        (["--clients", "3"], "clients"),
        ([], "holds files that are not phantoms"),
    ],
)
def test_refusals_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    assert main(["phantoms", str(folder), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fkd: error: ") and message in said and "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["phantoms", str(tmp_path / "file" / "below"), "--images=4"]) == 2
    assert "A part of that path is a file" in capsys.readouterr().err


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["phantoms", "--help"]) == 0
    said = capsys.readouterr().out
    for part in ("fkd phantoms", "DIR", "--hospitals", "--images", "--size", "--seed", "default: 96"):
        assert part in said
