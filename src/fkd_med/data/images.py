"""Image and mask files to arrays: bit depths, palettes, alpha and orientation are settled here.

Everything here depends on one file alone, never on the set it belongs to, so prediction on a single image sees the
pixels that training saw. What a mask's raw values *mean* is decided over the whole set, in ``masks.py``.

EXIF and TIFF orientation is applied to images and masks alike, each by its own tag: a mask without a tag is taken to
be drawn on the upright picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fkd_med.data.decoding import GREY_DEEP, deep_colour, is_deep_colour, opened
from fkd_med.errors import DataError

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as in Pillow's and OpenCV's grey


def read_image(path: Path, channels: int) -> NDArray[np.float32]:
    """Read an image as float32 (H, W, channels) between 0 and 1.

    Alpha is dropped (not blended). Grey becomes three equal channels; colour becomes one by BT.601 luminance.
    Eight bits are divided by 255. Files of 16 bits often hold 10, 12 or 14: they are divided by the smallest of
    255, 1023, 4095, 16383 and 65535 that is not below the image's maximum, so a 12-bit film is not nearly black.
    The price: a dark image of a truly 16-bit set may be read up to four times brighter than its neighbours.

    Args:
        path: PNG, JPEG, TIFF, BMP, GIF or WebP file of one picture.
        channels: 1 or 3.

    Raises:
        DataError: The file is missing, damaged, of a refused format, too large, or its values have no known range.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    with opened(path) as image:
        values = deep_colour(path, image) if is_deep_colour(image) else _shallow(image)
        scaled = _scale(values, path)
    if scaled.ndim == 2:
        return np.ascontiguousarray(np.repeat(scaled[..., None], channels, axis=2))
    return scaled if channels == 3 else (scaled @ _LUMINANCE)[..., None]


def read_mask(path: Path) -> NDArray[Any]:
    """Read a mask's raw values as an integer array (H, W): uint8, uint16 or int32, as stored.

    Grey files give their grey value (one-bit files 0 and 255, as image programs show and shrink them). Palette files
    give the palette index, unless the whole palette is grey with a distinct value per index used: then the grey
    value, since programs that shrink files turn grey masks into those. Colour files must have equal channels.

    Raises:
        DataError: As `read_image`; or a coloured mask, one drawn in the alpha channel, or one of fractions.
    """
    with opened(path) as image:
        if is_deep_colour(image):
            return _equal_channels(deep_colour(path, image), path)
        image = ImageOps.exif_transpose(image)
        if image.mode == "P":
            return _palette_values(image)
        if image.mode in GREY_DEEP:
            return _integral(np.asarray(image), path)
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))
        if image.mode in ("LA", "PA", "RGBA"):
            return _without_alpha(image, path)
        return _equal_channels(np.asarray(image.convert("RGB")), path)


def normalise(image: NDArray[np.float32], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Return ``(image - mean) / std`` per channel of an (H, W, C) image, as float32."""
    centred = image - np.asarray(mean, dtype=np.float32)
    return np.asarray(centred / np.asarray(std, dtype=np.float32), dtype=np.float32)


def pixel_digest(image: NDArray[np.float32]) -> str:
    """Return a hash of what `read_image` gave: equal for one picture saved twice without loss, in any formats."""
    return hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).hexdigest()


def _shallow(image: Image.Image) -> NDArray[Any]:
    """Return upright pixels: (H, W) of grey at any depth or (H, W, 3) of 8-bit colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode in GREY_DEEP:
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))


def _scale(values: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """Bring pixels of any depth between 0 and 1."""
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(255)
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise DataError(f"{path}: floating-point pixels outside 0 to 1. Save it with 8 or 16 bits.")
        return values.astype(np.float32)
    if low < 0 or high > 65535:
        raise DataError(f"{path}: values from {low:.0f} to {high:.0f}. Window it and save it with 8 or 16 bits.")
    full = next(2**k - 1 for k in (8, 10, 12, 14, 16) if high <= 2**k - 1)
    return values.astype(np.float32) / np.float32(full)


def _palette_values(image: Image.Image) -> NDArray[Any]:
    indices = np.asarray(image)
    palette = np.asarray(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    used = np.unique(indices)
    is_grey = bool((palette == palette[:, :1]).all()) and used[-1] < len(palette)
    if is_grey and len(np.unique(palette[used, 0])) == len(used):
        return np.asarray(palette[:, 0][indices])
    return indices


def _without_alpha(image: Image.Image, path: Path) -> NDArray[Any]:
    colours, alpha = np.asarray(image.convert("RGB")), np.asarray(image.getchannel("A"))
    values = _equal_channels(colours, path)
    if values.min() == values.max() and alpha.min() != alpha.max():
        raise DataError(f"{path}: this mask is drawn in its alpha channel. Save it as grey, one value per class.")
    return values


def _equal_channels(colours: NDArray[Any], path: Path) -> NDArray[Any]:
    if not bool((colours == colours[..., :1]).all()):
        raise DataError(f"{path}: a colour mask; its classes cannot be told. Save it as grey, one value per class.")
    return np.ascontiguousarray(colours[..., 0])


def _integral(values: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return 16- and 32-bit grey as integers."""
    if values.dtype == np.uint16:
        return values
    whole = values.astype(np.int32)
    if not bool((whole == values).all()):
        raise DataError(f"{path}: a mask of fractions. Save it as grey, one whole number per class.")
    return whole
