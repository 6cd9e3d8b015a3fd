"""Opening image files: which formats are read or refused, what a header says, and what goes wrong with a file.

Pillow reads; OpenCV reads 16-bit colour, which Pillow would cut to 8 bits without a word.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fkd_med.errors import DataError
from fkd_med.files import open_regular

_PHOTOS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp", ".jp2")
IMAGE_SUFFIXES = frozenset((*_PHOTOS, ".pgm", ".ppm", ".pbm", ".pnm"))
MAX_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs

_DICOM = "DICOM is not read. Write PNG files, 16 bit where the film has more than 8: dcmj2pnm +on2 {name} {stem}.png"
_VOLUME = (
    "volumes are not read. Write each slice as a PNG file (nibabel or SimpleITK, then Pillow) and give the slices of "
    "one scan the same `patient` in clients.csv"
)
_REFUSED = {
    ".dcm": _DICOM,
    ".dicom": _DICOM,
    ".ima": _DICOM,
    ".nii": _VOLUME,
    ".nii.gz": _VOLUME,
    ".mha": _VOLUME,
    ".mhd": _VOLUME,
    ".nrrd": _VOLUME,
}
GREY_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_ORIENTATION = 274
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its pixels are read.

    Attributes:
        size: (height, width) after the orientation tag.
        mode: Pillow's name of the pixel layout: ``L``, ``RGB``, ``P``, ``RGBA``, ``I;16``, ...
        bits: Bits per sample: 1, 8, 16 or 32.
    """

    size: tuple[int, int]
    mode: str
    bits: int


def refused(path: Path) -> str | None:
    """Return why a file of this name is not read and what to do, or None when its suffix is not a refused one."""
    name = path.name.lower()
    reason = next((text for suffix, text in _REFUSED.items() if name.endswith(suffix)), None)
    return reason.format(name=path.name, stem=path.stem) if reason else None


def unread(path: Path) -> str | None:
    """As `refused`, and look for DICOM's mark in files that are no image by their suffix: scanners write IM0001."""
    if (reason := refused(path)) or path.suffix.lower() in IMAGE_SUFFIXES:
        return reason
    try:
        with open_regular(path) as file:
            return _DICOM.format(name=path.name, stem=path.stem) if _is_dicom(file.read(132)) else None
    except OSError:
        return None


def _is_dicom(head: bytes) -> bool:
    """Return whether a file that begins like this is DICOM."""
    return head[128:132] == b"DICM"


def irregular(path: Path) -> str | None:
    """Return why a file cannot be read and what to do when it is a broken link, a pipe, a socket or a device.

    Opening a pipe would wait for ever for somebody to write into it.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link that leads to no file or folder. Mend it or remove it"
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return f"{kinds.get(stat.S_IFMT(mode), 'a device')}, not a file. Remove it"


def read_header(path: Path) -> Header:
    """Read size, mode and bit depth of an image, in most cases without its pixels, and see that it is whole.

    PNG and JPEG files that end as they should are trusted; any other file is decoded to find out.

    Raises:
        DataError: The file is missing, is no image, is cut short, or is too large.
    """
    with opened(path) as image:
        header = _header(image)
        if not _ends_well(path, image.format):
            image.load()
        return header


def _ends_well(path: Path, kind: str | None) -> bool:
    ends = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return kind in ends and file.read().endswith(ends[kind])


def _header(image: Image.Image) -> Header:
    width, height = image.size
    tag = 1
    if isinstance(image, TiffImageFile):  # Pillow's versions differ in whether `size` already follows the tag
        tags: Any = image.tag_v2
        width, height, tag = tags.get(256, width), tags.get(257, height), tags.get(_ORIENTATION, 1)
    elif "exif" in image.info:  # getexif() alone would decode the whole of a PNG
        tag = image.getexif().get(_ORIENTATION, 1)
    size = (width, height) if tag in (5, 6, 7, 8) else (height, width)
    bits = 16 if ";16" in _raw_mode(image) else {"1": 1, "I": 32, "F": 32}.get(image.mode, 8)
    return Header(size, image.mode, bits)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a file lazily; whatever Pillow raises in the block becomes a DataError that names the file."""
    if reason := refused(path):
        raise DataError(f"{path}: {reason}.")
    try:
        # Not by name: from a name Pillow maps uncompressed TIFF files to memory and scrambles those to be turned.
        with path.open("rb") as file, Image.open(file) as image:
            _check_shape(path, image)
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {str(error).rstrip('.')}. Cut it into tiles or make it smaller.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: {_why_unknown(path)}") from error
    except _BROKEN as error:
        raise DataError(f"{path}: damaged or unreadable image ({error}). Copy it again or remove it.") from error


def _why_unknown(path: Path) -> str:
    head = path.read_bytes()[:132]
    if not head:
        return "the file is empty. Copy it again or remove it."
    if _is_dicom(head):
        return _DICOM.format(name=path.name, stem=path.stem) + "."
    return "not an image this program reads (PNG, JPEG, TIFF, BMP), or damaged. Convert or remove it."


def _check_shape(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(f"{path}: {width}x{height} pixels cannot be used. Cut it into tiles or make it smaller.")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in ("TIFF", "GIF", "WEBP", "PNG"):
        raise DataError(f"{path}: holds {frames} pictures. Save the one to use, or each, as a file of its own.")
    if isinstance(image, TiffImageFile) and ";16" in _raw_mode(image) and image.tag_v2.get(262) == 0:
        raise DataError(f"{path}: a 16-bit TIFF whose 0 is white is not read. Save it with 0 as black.")


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the samples in the file, such as ``RGB;16B``; '' when it does not tell."""
    tiles: Any = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def is_deep_colour(image: Image.Image) -> bool:
    """Return whether the file has 16-bit colour, or grey with alpha, which Pillow would cut to 8 bits."""
    return ";16" in _raw_mode(image) and image.mode not in GREY_DEEP


def deep_colour(path: Path, image: Image.Image) -> NDArray[Any]:
    """Read 16-bit colour (H, W, 3) with OpenCV; grey with alpha comes back as three equal channels."""
    is_tiff, tag = image.format == "TIFF", image.getexif().get(_ORIENTATION, 1)
    image.load()  # OpenCV returns half a picture from a truncated file, without a word; this raises
    raw = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if raw is None or raw.ndim != 3 or raw.dtype != np.uint16:
        raise DataError(f"{path}: this kind of 16-bit colour is not read. Save it as a 16-bit RGB PNG.")
    values = np.ascontiguousarray(raw[..., 2::-1])
    return values if is_tiff else _upright(values, tag)  # OpenCV turns TIFF itself


def _upright(values: NDArray[Any], tag: int) -> NDArray[Any]:
    """Apply an EXIF orientation (1 to 8) to an (H, W, C) array."""
    if tag in (5, 6, 7, 8):
        values = values.transpose(1, 0, 2)
    if tag in (2, 3, 6, 7):
        values = values[:, ::-1]
    if tag in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values)
