"""A contact sheet: a few images of every client with their masks' contours, to see what a table cannot show."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fkd_med.data.images import read_image, read_mask
from fkd_med.data.manifest import Manifest, ManifestRow
from fkd_med.data.masks import MaskCoding
from fkd_med.data.records import Record
from fkd_med.errors import DataError
from fkd_med.files import atomic_write_bytes

_CELL = 200  # pixels, the longer side of an image
_GAP = 6
_LINE = 18  # pixels, height of a line of text
_INK, _PAPER, _PALE = (30, 30, 30), (255, 255, 255), (110, 110, 110)
# Okabe and Ito's palette: told apart by readers who see colours differently.
_CONTOURS = [(0, 230, 118), (230, 159, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (213, 94, 0)]


def contact_sheet(
    records: Iterable[Record], manifest: Manifest, coding: MaskCoding, path: Path, per_client: int = 6
) -> None:
    """Write a PNG: one row per client, a few of its images each, contours of their masks drawn on them.

    The images are spread evenly over the client's, in order of their ids.

    Args:
        records: The records of the set.
        manifest: Who holds what.
        coding: What `scan_masks` found.
        path: The PNG file to write.
        per_client: Images per row.

    Raises:
        RunError: The sheet cannot be written. A damaged image is an empty cell; `check_data` names it.
    """
    by_id = {record.id: record for record in records}
    strips = []
    for client in manifest.clients():
        rows = [row for row in manifest.rows if row.client == client]
        cells = [(f"{row.id} ({row.split})", _picture(by_id[row.id], coding)) for row in _spread(rows, per_client)]
        strips.append(_strip(f"{client}: {len(rows)} images", cells, per_client))
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), _PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    data = io.BytesIO()
    sheet.save(data, "PNG")
    atomic_write_bytes(path, data.getvalue())


def _spread(rows: Sequence[ManifestRow], number: int) -> list[ManifestRow]:
    places = np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def _strip(title: str, cells: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Return one client's row: its title, its pictures and a label under each."""
    tallest = max(picture.height for _, picture in cells)
    strip = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, tallest + 2 * _LINE + 3 * _GAP), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((_GAP, _GAP), title, _INK, _font(14))
    for column, (label, picture) in enumerate(cells):
        left, top = _GAP + column * (_CELL + _GAP), _GAP + _LINE + 2
        strip.paste(picture, (left, top))
        draw.text((left, top + picture.height + 1), _fitted(label, _font(11)), _PALE, _font(11))
    return strip


def _picture(record: Record, coding: MaskCoding) -> Image.Image:
    """Return the image at the size of a cell with its mask's contours; a pale cell for a damaged file."""
    try:
        image = read_image(record.image, 3)
        indices = None if record.mask is None else coding.apply(read_mask(record.mask)).astype(np.uint8)
    except DataError:
        return Image.new("RGB", (_CELL, _CELL), _PALE)
    height, width = image.shape[:2]
    scale = _CELL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = np.clip(np.rint(cv2.resize(image, size, interpolation=method) * 255), 0, 255).astype(np.uint8)
    if indices is not None:
        _draw_contours(small, cv2.resize(indices, size, interpolation=cv2.INTER_NEAREST))
    return Image.fromarray(small)


def _draw_contours(picture: NDArray[np.uint8], indices: NDArray[Any]) -> None:
    """Draw each class's outline, in its colour, on a picture (H, W, 3) in place."""
    for index in np.unique(indices[indices > 0]).tolist():
        outlines, _ = cv2.findContours((indices == index).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, _CONTOURS[(index - 1) % len(_CONTOURS)], 1)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font, which has the letters of most languages' names."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _fitted(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Shorten `text` in front until it fits a cell."""
    if font.getlength(text) <= _CELL:
        return text
    while len(text) > 1 and font.getlength("…" + text) > _CELL:
        text = text[1:]
    return "…" + text
