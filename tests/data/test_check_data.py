"""The report before a long run: counts, contents, leaks, damaged files, the contact sheet."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fkd_med.data.check import check_data, collected_warnings, render
from fkd_med.data.contact_sheet import contact_sheet
from fkd_med.data.manifest import Manifest, ManifestRow
from fkd_med.data.masks import MaskCoding
from fkd_med.data.records import Record

CODING = MaskCoding(1, (0, 255))
WHERE = {"1": ("north", "train"), "2": ("north", "test"), "3": ("süd [x]", "train"), "4": ("süd [x]", "val")}


def write(folder: Path, name: str, size: tuple[int, int] = (20, 10), drawn: int = 4, mode: str = "RGB") -> Record:
    noise = np.random.default_rng(int(name)).integers(0, 100, (size[1], size[0], 3), dtype=np.uint8)
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[:drawn, :5] = 255
    Image.fromarray(noise).convert(mode).save(folder / f"{name}.png")
    Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return Record(name, folder / f"{name}.png", folder / f"{name}_mask.png", None, f"p{name}")


def manifest() -> Manifest:
    return Manifest(ManifestRow(i, c, s, f"p{i}", "") for i, (c, s) in WHERE.items())


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    sizes = {"3": (30, 10)}
    return [write(tmp_path, name, sizes.get(name, (20, 10)), drawn=0 if name == "4" else 4) for name in WHERE]


def test_counts_and_contents(records: list[Record]) -> None:
    report = check_data(records, manifest(), CODING)
    north, south = report.clients
    assert (north.client, dict(north.images), dict(north.patients)) == (
        "north",
        {"train": 1, "test": 1},
        {"train": 1, "test": 1},
    )
    assert dict(north.sizes) == {(20, 10): 2} and dict(north.modes) == {"colour, 8 bit": 2}
    assert dict(north.mask_values) == {0: 360, 255: 40}
    assert north.foreground == pytest.approx(0.1) and north.empty == 0
    assert south.foreground == pytest.approx((20 / 300 + 0) / 2) and south.empty == 1
    assert dict(south.sizes) == {(30, 10): 1, (20, 10): 1}
    assert report.errors == [] and report.duplicates == []
    assert any("north has no image in val" in line for line in report.warnings)
    assert any("patient of its own" in line for line in report.warnings)


def test_one_picture_in_two_formats_and_two_hospitals_is_a_leak(records: list[Record], tmp_path: Path) -> None:
    Image.open(records[1].image).save(tmp_path / "copy.bmp")
    records[3] = Record("4", tmp_path / "copy.bmp", records[3].mask)
    report = check_data(records, manifest(), CODING)
    assert report.duplicates == [["2", "4"]]
    for what in ("split", "client"):
        assert any(f"1 pictures are in more than one {what}: 2 (north, test) = 4" in line for line in report.warnings)
    # One `patient` for both would be refused, as a patient at more than one client.
    (across,) = (line for line in report.warnings if "more than one client" in line)
    assert "Remove the copies from all clients but one" in across and "`patient`" not in across


def test_damaged_files_are_listed_not_raised(records: list[Record]) -> None:
    records[0].image.write_bytes(records[0].image.read_bytes()[:150])
    assert records[2].mask is not None
    Image.new("L", (5, 5)).save(records[2].mask)
    report = check_data([*records[:3], Record("9", Path("x"))], manifest(), CODING)
    assert len(report.errors) == 3
    for line, part in zip(report.errors, ["1.png: damaged", "3_mask.png: its size", "4: in the manifest"], strict=True):
        assert part in line
    assert any("1 images are not in the manifest" in line for line in report.warnings)


def test_mixed_kinds_and_absent_classes_are_told(records: list[Record], tmp_path: Path) -> None:
    write(tmp_path, "1", mode="L")
    Image.fromarray(np.full((10, 30), 7, np.uint8)).save(tmp_path / "3_mask.png")
    report = check_data(records, manifest(), MaskCoding(4, (0, 255, 7, 9)), notes=["left out 3"])
    assert report.warnings[0] == "left out 3"
    assert any("north mixes kinds of images: 1 grey, 8 bit, 1 colour" in line for line in report.warnings)
    # A class that nobody has is one warning of `find_coding`, not one for each client.
    assert any("north has no pixel of class 2." in line for line in report.warnings)
    assert report.clients[0].modes["grey, 8 bit"] == 1


def test_rendered_report_shows_it_all(records: list[Record]) -> None:
    records[0].image.unlink()
    console = Console(file=io.StringIO(), width=200)
    render(check_data(records, manifest(), CODING), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("north", "süd [x]", "20x10 (1)", "0, 255", "10.0%", "colour, 8 bit (1)", "1.png: no such file", "all"):
        assert part in text


def test_warnings_of_layouts_are_collected() -> None:
    with collected_warnings() as notes:
        logging.getLogger("fkd_med.data.layouts").warning("Left out %d.", 3)
    logging.getLogger("fkd_med.data.layouts").warning("after")
    assert notes == ["Left out 3."]


def test_contact_sheet_shows_images_with_contours(records: list[Record], tmp_path: Path) -> None:
    for name in WHERE:
        mask = np.zeros((10, 20), np.uint8)
        mask[3:7, 5:15] = 255
        Image.new("RGB", (20, 10), (200, 0, 0)).save(tmp_path / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
    records[1].image.write_bytes(b"damaged")
    contact_sheet(records, manifest(), CODING, tmp_path / "out" / "sheet.png", per_client=3)
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png")).astype(int)
    red = (sheet == [200, 0, 0]).all(-1)
    green = (sheet == [0, 230, 118]).all(-1)
    columns, rows = sheet.shape[1] // 3, sheet.shape[0]
    # Three pictures of 200x100 (the fourth is damaged), each with the outline of a 100x40 rectangle.
    assert 3 * (200 * 100 - 400) < red.sum() < 3 * 200 * 100
    assert 3 * 250 < green.sum() < 3 * 300
    assert not green[:, 2 * columns :].any() and green[: rows // 2].any() and green[rows // 2 :].any()
