"""Images and masks: damaged, of a strange kind, or no files at all; each as training and as prediction meet it."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from hostile_place import Case, Place
from PIL import Image

Spoil = Callable[[Path], object]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def halved(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def cut_jpeg(path: Path) -> None:
    data = cv2.imencode(".jpg", pixels(path))[1].tobytes()
    path.write_bytes(data[: len(data) // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def hollow_png(path: Path, width: int, height: int) -> None:
    """Announce a size and hold next to nothing, with right checksums and a right end."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 50))]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in [*chunks, (b"IEND", b"")]:
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(data)


def floats(path: Path, value: float) -> None:
    image = np.full((32, 32), 0.5, np.float32)
    image[3, 4] = value
    Image.fromarray(image).save(path, format="TIFF")


def animated(path: Path) -> None:
    frames = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in (0, 90)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def in_loop(path: Path) -> None:
    other = path.with_name("other.png")
    path.symlink_to(other)
    other.symlink_to(path)


BAD: dict[str, tuple[Spoil, str]] = {
    "PNG cut": (cut, "damaged"),
    "JPEG cut": (cut_jpeg, "damaged"),
    "PNG with a flipped byte": (flipped, "damaged"),
    "text": (lambda path: path.write_text("no image\n" * 50), "not an image"),
    "empty file": (lambda path: path.write_bytes(b""), "empty"),
    "60000 x 60000 announced": (lambda path: hollow_png(path, 60000, 60000), "pixels"),
    "hollow PNG": (lambda path: hollow_png(path, 32, 32), "damaged"),
    "no width": (lambda path: hollow_png(path, 0, 32), ""),
    "NaN": (lambda path: floats(path, float("nan")), "floating-point"),
    "infinity": (lambda path: floats(path, float("inf")), "floating-point"),
    "animated": (animated, "2 pictures"),
    "pipe": (lambda path: replaced(path, os.mkfifo), "pipe"),
    "socket": (lambda path: replaced(path, a_socket), "socket"),
    "link to nothing": (lambda path: replaced(path, lambda p: p.symlink_to("gone.png")), "link"),
    "links in a circle": (lambda path: replaced(path, in_loop), "link"),
    "DICOM": (lambda path: path.write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 200), "DICOM"),
}


def deep(path: Path) -> None:
    cv2.imwrite(str(path), pixels(path).astype(np.uint16) * 257)


def with_mode(mode: str, kind: str = "PNG") -> Spoil:
    return lambda path: Image.open(path).convert(mode).save(path, format=kind)


GOOD: dict[str, Spoil] = {
    "16 bit colour": deep,
    "16 bit grey": lambda path: cv2.imwrite(str(path), pixels(path)[..., 0].astype(np.uint16) * 257),
    "CMYK": with_mode("CMYK", "JPEG"),
    "palette": with_mode("P"),
    "alpha": with_mode("RGBA"),
    "one bit": with_mode("1"),
    "float TIFF": lambda path: floats(path, 0.25),
}


def fit_image(spoil: Spoil) -> Callable[[Place], list[str]]:
    def prepare(place: Place) -> list[str]:
        spoil(place.images[5])
        return place.fit()

    return prepare


def predict_image(spoil: Spoil) -> Callable[[Place], list[str]]:
    def prepare(place: Place) -> list[str]:
        spoil(place.images[5])
        return place.predict()

    return prepare


def fit_mask(spoil: Spoil) -> Callable[[Place], list[str]]:
    def prepare(place: Place) -> list[str]:
        spoil(place.masks[5])
        return place.fit()

    return prepare


# --- masks and odd sizes ----------------------------------------------------------------------------------------------


def turned(path: Path) -> None:
    """A photo whose tag says that it lies on its side; its mask is drawn upright."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(path, format="JPEG", exif=exif)


def turned_photo(place: Place) -> list[str]:
    turned(place.images[5])
    cv2.imwrite(str(place.masks[5]), np.full((24, 32), 255, np.uint8))
    return place.fit()


def all_good(place: Place) -> list[str]:
    """Every good kind in one set, and a picture of one pixel."""
    for path, spoil in zip(place.images, GOOD.values(), strict=False):
        spoil(path)
    for path in (place.images[-1], place.masks[-1]):
        cv2.imwrite(str(path), np.full((1, 1), 255, np.uint8))
    return place.fit()


def all_empty(place: Place) -> list[str]:
    for path in place.masks:
        cv2.imwrite(str(path), np.zeros((32, 32), np.uint8))
    return place.fit()


def two_masks(place: Place) -> list[str]:
    place.masks[5].with_suffix(".tif").write_bytes(place.masks[5].read_bytes())
    return place.fit()


def folder_of_that_name(place: Place) -> list[str]:
    replaced(place.images[5], os.mkdir)
    return place.fit()


def grey_classes(path: Path) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[:12], mask[12:24] = 255, 128
    cv2.imwrite(str(path), mask)


def coloured(path: Path) -> None:
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:12, :, 2] = 255
    cv2.imwrite(str(path), mask)


MASKS = {
    "mask of another size": Case(fit_mask(lambda p: cv2.imwrite(str(p), np.zeros((30, 32), np.uint8))), ("32x30",)),
    "masks all empty": Case(all_empty, ("empty",)),
    "mask with three values": Case(fit_mask(grey_classes), ("128", "data.classes")),
    "mask missing": Case(fit_mask(os.remove), ("a5.png", "on_missing")),
    "two masks of an image": Case(two_masks, ("a5.tif", "a5.png", "Rename")),
    "mask in colours": Case(fit_mask(coloured), ("a5.png", "colour")),
    "mask of fractions": Case(fit_mask(lambda p: floats(p, 0.25)), ("a5.png", "fractions")),
    "mask cut": Case(fit_mask(halved), ("a5.png", "damaged")),
    "mask a pipe": Case(fit_mask(lambda p: replaced(p, os.mkfifo)), ("a5.png", "pipe")),
    "photo on its side, mask upright": Case(turned_photo, ("a5", "orientation")),
    "folder named like an image": Case(folder_of_that_name, ("a5.png",)),
}
FIT = (
    "PNG with a flipped byte", "text", "60000 x 60000 announced", "hollow PNG", "NaN", "animated", "pipe",
    "link to nothing",
)  # fmt: skip

IMAGES = {
    **{f"fit: {name}": Case(fit_image(BAD[name][0]), ("a5.png", BAD[name][1])) for name in FIT},
    **{f"predict: {name}": Case(predict_image(spoil), ("a5.png", says)) for name, (spoil, says) in BAD.items()},
    **{f"predict: {name}": Case(predict_image(spoil), code=0) for name, spoil in GOOD.items()},
    "fit: all good kinds": Case(all_good, code=0),
    **MASKS,
}
