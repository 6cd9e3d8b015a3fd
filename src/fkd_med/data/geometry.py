"""Fit images and masks to the working square, and undo it on maps.

Networks see squares of one size; test and predict compare and write at the original size. The rule is
deterministic and belongs to the datamodule (``data.image_size``, ``data.resize``), never to augmentation.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fkd_med.errors import ConfigError

ResizeMode = Literal["stretch", "letterbox"]


def fitted_box(height: int, width: int, size: int, mode: str) -> tuple[int, int, int, int]:
    """Return (top, left, height, width): where an image of this height and width lies in the working square.

    Args:
        height: Rows of the original, in pixels.
        width: Columns of the original, in pixels.
        size: Side of the working square, in pixels.
        mode: ``stretch`` fills the square; ``letterbox`` keeps the aspect ratio and centres.

    Raises:
        ConfigError: An unknown `mode`.
    """
    if mode == "stretch":
        return 0, 0, size, size
    if mode != "letterbox":
        raise ConfigError(f"data.resize: unknown mode {mode!r}; use one of {', '.join(get_args(ResizeMode))}.")
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - rows) // 2, (size - columns) // 2, rows, columns


def fit_image(image: NDArray[np.float32], size: int, mode: ResizeMode = "stretch") -> NDArray[np.float32]:
    """Fit an image (H, W, C) to (size, size, C): area average when shrinking, bilinear when growing.

    The letterbox is filled with 0 (black), before normalisation.
    """
    top, left, rows, columns = fitted_box(image.shape[0], image.shape[1], size, mode)
    resized = _resize_image(image, rows, columns)
    if (rows, columns) == (size, size):
        return resized
    square = np.zeros((size, size, image.shape[2]), dtype=resized.dtype)
    square[top : top + rows, left : left + columns] = resized
    return square


def fit_mask(mask: NDArray[Any], size: int, mode: ResizeMode = "stretch") -> NDArray[Any]:
    """Fit a mask (H, W) of any integer type to (size, size) by nearest neighbour; the letterbox is class 0."""
    height, width = mask.shape
    top, left, rows, columns = fitted_box(height, width, size, mode)
    # Pixel centres, as cv2 and torch place them for images (cv2's own INTER_NEAREST is half a pixel off).
    row = ((np.arange(rows) + 0.5) * height / rows).astype(np.intp)
    column = ((np.arange(columns) + 0.5) * width / columns).astype(np.intp)
    square = np.zeros((size, size), dtype=mask.dtype)
    square[top : top + rows, left : left + columns] = mask[row[:, None], column[None, :]]
    return square


def undo(maps: torch.Tensor, size: tuple[int, int], mode: ResizeMode = "stretch") -> torch.Tensor:
    """Bring float maps (C, S, S) from the working square back to (C, H0, W0), bilinearly.

    Args:
        maps: Logits or probabilities, float.
        size: The original (H0, W0).
        mode: The mode the image was fitted with; the letterbox's borders are cropped first.
    """
    height, width = size
    top, left, rows, columns = fitted_box(height, width, maps.shape[-1], mode)
    inside = maps[:, top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return inside
    return functional.interpolate(inside[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def _resize_image(image: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Shrink first (area), then grow (bilinear): an image may do one along each axis."""
    height, width, channels = image.shape
    resized = image
    smaller = (min(columns, width), min(rows, height))
    if smaller != (width, height):
        resized = cv2.resize(resized, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (columns, rows):
        resized = cv2.resize(resized, (columns, rows), interpolation=cv2.INTER_LINEAR)
    return resized.reshape(rows, columns, channels)  # cv2 drops a single channel
