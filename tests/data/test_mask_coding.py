"""The coding of masks is found over the whole set; a drawn mask never reads black."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fkd_med.data.images import read_mask
from fkd_med.data.masks import MaskCoding, scan_masks
from fkd_med.data.records import Record
from fkd_med.errors import ConfigError, DataError

SQUARE = np.zeros((12, 14), np.uint8)
SQUARE[2:8, 3:9] = 1


def records(folder: Path, *masks: np.ndarray, suffix: str = ".png") -> list[Record]:
    found = []
    for number, mask in enumerate(masks):
        image, path = folder / f"image{number}.png", folder / f"mask{number}{suffix}"
        Image.fromarray(np.zeros(mask.shape, np.uint8)).save(image)
        Image.fromarray(mask).save(path)
        found.append(Record(str(number), image, path))
    return found


def blob(radius: int, row: int = 40, column: int = 45) -> np.ndarray:
    """Return a disc of ones in 80 x 150 pixels."""
    rows, columns = np.mgrid[:80, :150]
    return ((rows - row) ** 2 + (columns - column) ** 2 < radius**2).astype(np.uint8)


def resized(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BICUBIC))


def decoded(record: Record, coding: MaskCoding) -> np.ndarray:
    assert record.mask is not None
    return coding.apply(read_mask(record.mask))


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("top", [1, 255, 65535])
def test_binary_masks_read_as_drawn(tmp_path: Path, top: int, classes: int) -> None:
    kind = np.uint16 if top > 255 else np.uint8
    found = records(tmp_path, SQUARE.astype(kind) * top, np.zeros_like(SQUARE, kind))
    coding = scan_masks(found, classes)
    assert coding == MaskCoding(classes, (0, top))
    assert decoded(found[0], coding).dtype == np.int64
    np.testing.assert_array_equal(decoded(found[0], coding), SQUARE)
    np.testing.assert_array_equal(decoded(found[1], coding), 0)


@pytest.mark.parametrize("mode", ["1", "P"])
def test_binary_masks_of_one_bit_and_palette(tmp_path: Path, mode: str) -> None:
    found = records(tmp_path, SQUARE * 255)
    assert found[0].mask is not None
    if mode == "1":
        Image.fromarray(SQUARE * 255).convert("1").save(found[0].mask)
    else:
        picture = Image.fromarray(SQUARE, mode="P")
        picture.putpalette([0, 0, 0, 200, 30, 30])
        picture.save(found[0].mask)
    np.testing.assert_array_equal(decoded(found[0], scan_masks(found)), SQUARE)


def test_grey_borders_go_to_the_nearer_side(tmp_path: Path) -> None:
    mask = SQUARE * 255
    mask[2, 3:9], mask[7, 3:9] = 100, 180
    found = records(tmp_path, mask)
    expected = SQUARE.copy()
    expected[2, 3:9] = 0
    np.testing.assert_array_equal(decoded(found[0], scan_masks(found)), expected)


def test_jpeg_noise_is_not_foreground(tmp_path: Path) -> None:
    big = np.kron(SQUARE, np.ones((9, 9), np.uint8))
    found = records(tmp_path, big * 255, suffix=".jpg")
    assert (decoded(found[0], scan_masks(found)) != big).mean() < 0.005


def test_a_0_1_file_among_0_255_files_is_an_error_not_black(tmp_path: Path) -> None:
    found = records(tmp_path, SQUARE * 255, SQUARE, SQUARE * 255)
    with pytest.raises(DataError, match=r"1 of 3 masks .*mask1\.png.*Rewrite"):
        scan_masks(found)


def test_a_single_16_bit_file_does_not_black_out_the_rest(tmp_path: Path) -> None:
    found = records(tmp_path, SQUARE * 255, SQUARE.astype(np.uint16) * 65535)
    with pytest.raises(DataError, match=r"mask0\.png"):
        scan_masks(found)


def test_all_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="All 2 masks are empty"):
        scan_masks(records(tmp_path, SQUARE * 0, SQUARE * 0))
    with pytest.raises(DataError, match="All 1 masks are empty"):
        scan_masks(records(tmp_path, SQUARE * 0), classes=3)


def test_no_masks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No image"):
        scan_masks([Record("a", tmp_path / "a.png")])


def test_classes_under_a_binary_setting_are_an_error(tmp_path: Path) -> None:
    mask = SQUARE * 255
    mask[3:8, 10:14] = 128  # a second organ, not a border
    found = records(tmp_path, mask)
    with pytest.raises(DataError, match=r"values 128 between 0 and 255.*class_values"):
        scan_masks(found)
    np.testing.assert_array_equal(decoded(found[0], scan_masks(found, 1, [0, 255])), mask > 127)


@pytest.mark.parametrize("values", [(1, 255), (20, 255), (240, 255), (1, 2, 20)])
@pytest.mark.parametrize("blurred", [False, True])
def test_a_class_near_an_end_is_not_read_as_that_end(tmp_path: Path, values: tuple[int, ...], blurred: bool) -> None:
    """As a lesion of 1 inside a rim of 255 that is to be ignored, which would be read as background."""
    mask = blob(30) * values[0]
    for number, value in enumerate(values[1:]):
        mask[blob(12, 40, 95 + 30 * number) > 0] = value
    found = records(tmp_path, resized(mask, 120, 64) if blurred else mask)
    with pytest.raises(DataError, match=rf"regions of values .*{values[-2]}.* between 0 and .*data\.class_values"):
        scan_masks(found)


@pytest.mark.parametrize("rim", [1, 2, 5])
def test_a_lesion_of_1_in_a_rim_of_255(tmp_path: Path, rim: int) -> None:
    mask = blob(30 + rim) * 255
    mask[blob(30) > 0] = 1
    without_rim = blob(30)
    with pytest.raises(DataError, match="regions of values 1 between 0 and 255"):
        scan_masks(records(tmp_path, mask, without_rim))


@pytest.mark.parametrize("quality", [20, 28, 40, 75, 95])
@pytest.mark.parametrize("radius", [12, 30])
def test_jpeg_masks_read_as_drawn_at_any_size(tmp_path: Path, quality: int, radius: int) -> None:
    """Low qualities move the whole of an end, 20 to 253 and 40 to 1, and leave a few pixels where it was."""
    drawn = blob(radius) * 255
    Image.fromarray(drawn).save(tmp_path / "drawn.jpg", quality=quality)
    kept = np.asarray(Image.open(tmp_path / "drawn.jpg"))
    for size in ((150, 80), (95, 50), (375, 200)):
        found = records(tmp_path, resized(kept, *size))
        assert (decoded(found[0], scan_masks(found)) != (resized(drawn, *size) > 127)).mean() < 0.01


@pytest.mark.parametrize("width", [2, 10, 25])
def test_soft_edges_are_no_classes(tmp_path: Path, width: int) -> None:
    """A slope has solid bands of the values near its ends, and as many pixels of the values beside them."""
    drawn = np.zeros((300, 300), np.uint8)
    drawn[80:220, 80:220] = 1
    found = records(tmp_path, cv2.GaussianBlur(drawn * 255, (0, 0), width))
    assert (decoded(found[0], scan_masks(found)) != drawn).mean() < 0.03


def test_multi_class_by_index_and_by_value(tmp_path: Path) -> None:
    mask = SQUARE.copy()
    mask[9:, :] = 2
    found = records(tmp_path, mask)
    assert scan_masks(found, 3).values == (0, 1, 2)
    np.testing.assert_array_equal(decoded(found[0], scan_masks(found, 3)), mask)
    cup = np.array([255, 128, 0], np.uint8)[mask]  # background 255, rim 128, cup 0
    found = records(tmp_path, cup)
    np.testing.assert_array_equal(decoded(found[0], scan_masks(found, 3, [255, 128, 0])), mask)


def test_a_class_that_no_mask_has_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = records(tmp_path, SQUARE, SQUARE * 2)
    assert scan_masks(found, 3).values == (0, 1, 2) and not caplog.records
    assert scan_masks(found, 4).values == (0, 1, 2, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "No mask of the whole set has value 3, of the 4 classes whose values are 0, 1, 2, 3. Is data.classes right?"
    ]


def test_inverted_binary_masks_by_value(tmp_path: Path) -> None:
    found = records(tmp_path, (1 - SQUARE) * 255)
    np.testing.assert_array_equal(decoded(found[0], scan_masks(found, 1, [255, 0])), SQUARE)


@pytest.mark.parametrize(("classes", "values"), [(3, None), (3, [0, 1, 7]), (1, [0, 1])])
def test_unexpected_values_name_file_and_value(tmp_path: Path, classes: int, values: list[int] | None) -> None:
    found = records(tmp_path, SQUARE, SQUARE * 9)
    with pytest.raises(DataError, match=r"Unexpected values 9 in 1 of 2 masks.*mask1\.png \(9\)"):
        scan_masks(found, classes, values)


@pytest.mark.parametrize(("classes", "values"), [(3, [0, 1]), (1, [0]), (2, [5, 5])])
def test_class_values_must_go_with_classes(tmp_path: Path, classes: int, values: list[int]) -> None:
    with pytest.raises(ConfigError, match="class_values"):
        scan_masks(records(tmp_path, SQUARE), classes, values)


def test_sizes_must_agree(tmp_path: Path) -> None:
    found = records(tmp_path, *[SQUARE * 255] * 8)
    for record in found[:7]:
        Image.new("L", (12, 14)).save(record.image)
    with pytest.raises(DataError, match=r"7 masks .*image0\.png 12x14 with .*mask0\.png 14x12.* and 2 more"):
        scan_masks(found)


def test_a_truncated_image_is_found_with_the_masks(tmp_path: Path) -> None:
    found = records(tmp_path, SQUARE)
    noise = np.random.default_rng(0).integers(0, 255, SQUARE.shape, dtype=np.uint8)
    Image.fromarray(noise).save(found[0].image)
    found[0].image.write_bytes(found[0].image.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"image0\.png.*damaged"):
        scan_masks(found)


def test_of_several_processes_the_first_alone_reads_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All need the masks' coding; one is enough to find a damaged image, and it takes long."""
    found = records(tmp_path, SQUARE)
    found[0].image.write_bytes(b"rubbish")
    monkeypatch.setattr("fkd_med.data.masks.is_first_rank", lambda: False)
    assert scan_masks(found) == MaskCoding(1, (0, 1))
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"image0\.png"):
        scan_masks(found)


def test_apply_refuses_values_it_has_not_seen() -> None:
    with pytest.raises(DataError, match=r"new\.png: values 5 "):
        MaskCoding(3, (0, 1, 2)).apply(np.array([[5]]), "new.png")


def test_coding_survives_json() -> None:
    coding = MaskCoding(3, (0, 128, 255))
    assert MaskCoding.from_dict(json.loads(json.dumps(coding.to_dict()))) == coding
