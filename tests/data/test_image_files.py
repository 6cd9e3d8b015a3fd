"""Every kind of image and mask file, made by hand, and what must not be read."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fkd_med.data.decoding import read_header
from fkd_med.data.images import normalise, read_image, read_mask
from fkd_med.errors import DataError

COLOUR = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [0, 0, 0], [255, 255, 255]]], np.uint8)
GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
ORIENTED = {  # tag -> upright picture of GREY, worked out by hand from the EXIF standard
    1: [[0, 51, 102], [153, 204, 255]],
    2: [[102, 51, 0], [255, 204, 153]],
    3: [[255, 204, 153], [102, 51, 0]],
    4: [[153, 204, 255], [0, 51, 102]],
    5: [[0, 153], [51, 204], [102, 255]],
    6: [[153, 0], [204, 51], [255, 102]],
    7: [[255, 102], [204, 51], [153, 0]],
    8: [[102, 255], [51, 204], [0, 153]],
}


def write_tiff(path: Path, pixels: np.ndarray, orientation: int = 1, photometric: int | None = None) -> Path:
    """Write an uncompressed little-endian TIFF, as Pillow cannot for 16-bit colour."""
    height, width, *rest = pixels.shape
    samples, data = (rest or [1])[0], pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    bits = 8 * pixels.dtype.itemsize
    meaning = photometric if photometric is not None else (2 if samples == 3 else 1)
    after = 8 + len(data) + 2 + 12 * 10 + 4
    tags = [(256, 1, width), (257, 1, height), (258, samples, after if samples == 3 else bits), (259, 1, 1)]
    tags += [(262, 1, meaning), (273, 1, 8), (274, 1, orientation), (277, 1, samples), (278, 1, height)]
    tags += [(279, 1, len(data))]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, 4 if n == 1 else 3, n, v) for t, n, v in tags)
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ifd + bytes(4) + struct.pack("<3H", *[bits] * 3)
    )
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".TIFF"])
def test_colour_is_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bild ü{suffix}"
    Image.fromarray(COLOUR).save(path)
    image = read_image(path, 3)
    assert image.dtype == np.float32 and image.flags.c_contiguous
    np.testing.assert_allclose(image, COLOUR / 255, atol=1e-6)


def test_jpeg_is_read_in_rgb_order(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (250, 20, 20)).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg", 3)[8, 8], np.array([250, 20, 20]) / 255, atol=0.02)


def test_grey_becomes_three_channels_and_colour_one(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    Image.fromarray(COLOUR).save(tmp_path / "colour.png")
    np.testing.assert_allclose(read_image(tmp_path / "grey.png", 3), np.dstack([GREY] * 3) / 255, atol=1e-6)
    np.testing.assert_allclose(read_image(tmp_path / "grey.png", 1)[..., 0], GREY / 255, atol=1e-6)
    luminance = (0.299 * COLOUR[..., 0] + 0.587 * COLOUR[..., 1] + 0.114 * COLOUR[..., 2]) / 255
    single = read_image(tmp_path / "colour.png", 1)
    assert single.shape == (2, 3, 1)
    np.testing.assert_allclose(single[..., 0], luminance, atol=1e-6)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([COLOUR, np.zeros((2, 3), np.uint8)])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([GREY, np.zeros((2, 3), np.uint8)])).save(tmp_path / "la.png")
    np.testing.assert_allclose(read_image(tmp_path / "rgba.png", 3), COLOUR / 255, atol=1e-6)
    np.testing.assert_allclose(read_image(tmp_path / "la.png", 1)[..., 0], GREY / 255, atol=1e-6)


def test_palette_image_has_its_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    picture.save(tmp_path / "p.png")
    expected = np.array([[[255, 0, 0], [0, 255, 0]], [[10, 20, 30], [0, 255, 0]]]) / 255
    np.testing.assert_allclose(read_image(tmp_path / "p.png", 3), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("highest", "scale"), [(0, 255), (255, 255), (256, 1023), (4000, 4095), (16000, 16383), (16384, 65535)]
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_by_the_bits_in_use(tmp_path: Path, highest: int, scale: int, suffix: str) -> None:
    values = np.array([[0, highest // 2, highest]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(read_image(tmp_path / f"a{suffix}", 1)[..., 0], values / scale, atol=1e-6)


def test_sixteen_bit_colour_keeps_its_bits(tmp_path: Path) -> None:
    values = COLOUR.astype(np.uint16) * 16 + 3
    cv2.imwrite(str(tmp_path / "a.png"), values[..., ::-1])
    write_tiff(tmp_path / "a.tif", values)
    for name in ("a.png", "a.tif"):
        np.testing.assert_allclose(read_image(tmp_path / name, 3), values / 4095, atol=1e-6)
        assert read_header(tmp_path / name).bits == 16


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_applied_to_images_and_masks(tmp_path: Path, tag: int) -> None:
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.kron(GREY, np.ones((16, 16), np.uint8))).save(tmp_path / "a.jpg", exif=exif, quality=100)
    write_tiff(tmp_path / "a.tif", GREY, tag)
    write_tiff(tmp_path / "deep.tif", np.dstack([GREY.astype(np.uint16) * 257] * 3), tag)
    upright = np.array(ORIENTED[tag])
    for name in ("a.png", "a.tif", "deep.tif"):
        np.testing.assert_allclose(read_image(tmp_path / name, 1)[..., 0], upright / 255, atol=1e-5)
        np.testing.assert_array_equal(read_mask(tmp_path / name), upright * (257 if name == "deep.tif" else 1))
        assert read_header(tmp_path / name).size == upright.shape
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg", 1)[8::16, 8::16, 0], upright / 255, atol=0.01)
    assert read_header(tmp_path / "a.jpg").size == tuple(16 * side for side in upright.shape)


def test_sixteen_bit_colour_png_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([GREY.astype(np.uint16) * 257] * 3))
    data = (tmp_path / "a.png").read_bytes()
    extra = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data[:33] + extra + data[33:])
    np.testing.assert_allclose(read_image(tmp_path / "a.png", 1)[..., 0], np.array(ORIENTED[6]) / 255, atol=1e-5)


def test_float_tiff_between_0_and_1_only(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5]], np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_allclose(read_image(tmp_path / "a.tif", 1)[..., 0], [[0, 0.5]])
    for value in (1.5, np.nan):
        Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "b.tif")
        with pytest.raises(DataError, match=r"b\.tif.*8 or 16 bits"):
            read_image(tmp_path / "b.tif", 1)


def test_signed_values_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-1000, 50]], np.int32)).save(tmp_path / "ct.tif")
    with pytest.raises(DataError, match=r"ct\.tif.*-1000.*Window"):
        read_image(tmp_path / "ct.tif", 1)


@pytest.mark.parametrize("name", ["a.dcm", "A.DICOM", "a.nii", "a.nii.gz"])
def test_medical_formats_are_refused_with_the_conversion(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}.*(dcmj2pnm|nibabel)"):
        read_image(tmp_path / name, 1)


def test_dicom_without_its_suffix_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(128) + b"DICM" + bytes(50))
    with pytest.raises(DataError, match="DICOM"):
        read_image(tmp_path / "a.png", 1)


@pytest.mark.parametrize("read", [lambda p: read_image(p, 3), read_mask, read_header])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", "-deep.png"])
def test_truncated_files_are_errors(tmp_path: Path, read, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut{suffix}"
    cv2.imwrite(str(path), noise.astype(np.uint16) * 200 if "deep" in suffix else noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"cut{suffix}.*damaged"):
        read(path)


def test_a_file_with_a_tail_after_its_end_is_whole(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + b"written by a camera")
    assert read_header(tmp_path / "a.jpg").size == (2, 3)


def test_other_unreadable_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    Image.new("1", (40_000, 10_000)).save(tmp_path / "huge.png")
    frames = [Image.fromarray(GREY), Image.fromarray(GREY)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    write_tiff(tmp_path / "white.tif", GREY.astype(np.uint16), photometric=0)
    for name, why in [
        ("gone.png", "no such file"),
        ("empty.png", "the file is empty"),
        ("text.png", "not an image"),
        ("huge.png", "smaller"),
        ("stack.tif", "2 pictures"),
        ("white.tif", "0 is white"),
        ("", "director"),
    ]:
        with pytest.raises(DataError, match=rf"{name}.*{why}"):
            read_image(tmp_path / name, 3)


def test_masks_of_grey_files_are_their_values(tmp_path: Path) -> None:
    for name, values in [("a.png", np.uint8([[0, 1, 2]])), ("b.tif", np.uint16([[0, 300, 65535]]))]:
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), values)
    Image.fromarray(np.array([[0, 7]], np.int32)).save(tmp_path / "c.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "c.tif"), [[0, 7]])
    Image.fromarray(np.array([[0, 2]], np.float32)).save(tmp_path / "d.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "d.tif"), [[0, 2]])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_one_bit_masks_are_0_and_255(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.uint8([[0, 255, 255]])).convert("1").save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"a{suffix}"), [[0, 255, 255]])


@pytest.mark.parametrize(
    ("palette", "expected"),
    [
        ([0, 0, 0, 128, 0, 0, 0, 128, 0], [[0, 1, 2]]),  # coloured classes: the index
        ([0, 0, 0, 100, 100, 100, 255, 255, 255], [[0, 100, 255]]),  # a shrunken grey file: its greys
        ([0, 0, 0, 0, 0, 0, 0, 0, 0], [[0, 1, 2]]),  # greys that tell nothing: the index
    ],
)
def test_palette_masks(tmp_path: Path, palette: list[int], expected: list[list[int]]) -> None:
    picture = Image.fromarray(np.uint8([[0, 1, 2]]), mode="P")
    picture.putpalette(palette)
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), expected)


def test_colour_masks_need_equal_channels(tmp_path: Path) -> None:
    equal = np.dstack([GREY] * 3)
    Image.fromarray(equal).save(tmp_path / "rgb.png")
    Image.fromarray(np.dstack([equal, np.full((2, 3), 255, np.uint8)])).save(tmp_path / "rgba.png")
    Image.fromarray(COLOUR).save(tmp_path / "colour.png")
    white = np.full((2, 3, 3), 255, np.uint8)
    Image.fromarray(np.dstack([white, GREY])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "rgb.png"), GREY)
    np.testing.assert_array_equal(read_mask(tmp_path / "rgba.png"), GREY)
    with pytest.raises(DataError, match=r"colour\.png.*colour mask"):
        read_mask(tmp_path / "colour.png")
    with pytest.raises(DataError, match=r"alpha\.png.*alpha channel"):
        read_mask(tmp_path / "alpha.png")


def test_fractional_masks_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5]], np.float32)).save(tmp_path / "soft.tif")
    with pytest.raises(DataError, match=r"soft\.tif.*fractions"):
        read_mask(tmp_path / "soft.tif")


def test_normalise_works_per_channel() -> None:
    image = np.array([[[0.5, 0.5, 1.0]]], np.float32)
    result = normalise(image, [0.5, 0.25, 0.0], [1.0, 0.5, 2.0])
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [[[0.0, 0.5, 0.5]]])
