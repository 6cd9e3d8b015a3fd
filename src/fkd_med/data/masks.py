"""What the raw values of masks mean, found over the whole set: 0/1, 0/255 and 0/65535 files, or classes.

One file cannot tell: halving the range of a 0/1 file's *format* reads it black. So every mask is read once before
training, the coding is found from all of them, and whatever does not fit it is an error that names the files.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fkd_med.data.images import read_image, read_mask
from fkd_med.data.mask_regions import REGION_SHARE, further_regions
from fkd_med.data.progress import with_progress
from fkd_med.data.records import Record, listing
from fkd_med.errors import ConfigError, DataError
from fkd_med.ranks import is_first_rank

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskFacts:
    """What one mask file holds.

    Attributes:
        path: The file.
        size: (height, width), upright.
        pixels: Raw value -> number of pixels.
        solid: Raw value -> number of pixels whose 3x3 neighbourhood has that one value: regions, not borders.
    """

    path: Path
    size: tuple[int, int]
    pixels: dict[int, int]
    solid: dict[int, int]


@dataclass(frozen=True)
class MaskCoding:
    """Raw mask values to class indices.

    Attributes:
        classes: Number of logits the network is to have: 1 or 2 for binary sets.
        values: Raw value of class 0, 1, ...; binary sets have two, and greys between them go to the nearer.
    """

    classes: int
    values: tuple[int, ...]

    def apply(self, raw: NDArray[Any], source: Path | str = "mask") -> NDArray[np.int64]:
        """Return the class index of every pixel, int64 of the shape of `raw`.

        Args:
            raw: Integer mask (H, W) as `read_mask` gives it.
            source: The file, for the message.

        Raises:
            DataError: A value that belongs to no class (sets of more than two values).
        """
        wide = raw.astype(np.int64)
        if len(self.values) == 2:
            background, foreground = self.values
            return (np.abs(wide - foreground) < np.abs(wide - background)).astype(np.int64)
        order = np.argsort(self.values)
        known = np.asarray(self.values, dtype=np.int64)[order]
        place = np.minimum(np.searchsorted(known, wide), len(known) - 1)
        if not bool((known[place] == wide).all()):
            strange = sorted(set(np.unique(wide).tolist()) - set(self.values))
            raise DataError(f"{source}: values {_few(strange)} belong to no class; expected {_few(self.values)}.")
        return order[place].astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, fit for a checkpoint or JSON."""
        return {"classes": self.classes, "values": list(self.values)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> MaskCoding:
        """Rebuild what `to_dict` gave."""
        return cls(int(plain["classes"]), tuple(int(v) for v in plain["values"]))


def scan_masks(records: Iterable[Record], classes: int = 1, class_values: Sequence[int] | None = None) -> MaskCoding:
    """Read every mask once and find what its values mean; check, on the first rank, that each fits its image.

    With one or two classes and no `class_values`, background is 0 and foreground the set's largest value: 1, 255 or
    65535, whatever the files' format could hold. With more, values must be 0 to classes - 1. `class_values` gives the
    raw value of class 0, 1, ... instead; two of them also allow greys between (each goes to the nearer).

    Args:
        records: The whole set, all hospitals and splits; those without a mask are passed over.
        classes: Number of logits; 1 and 2 both mean background and foreground.
        class_values: Raw value of each class, in order; two when `classes` is 1.

    Raises:
        DataError: Unreadable masks, sizes unlike the image's, all masks empty, values outside the coding, or files
            with codings that differ; named by file.
        ConfigError: `class_values` does not go with `classes`.
    """
    with_masks = [record for record in records if record.mask is not None]
    facts = survey_masks(with_masks)
    if is_first_rank():  # the slowest part of a start; of several processes the first would end all of them
        check_sizes(with_masks, facts)
    return find_coding(facts, classes, class_values)


def survey_masks(records: Iterable[Record]) -> list[MaskFacts]:
    """Read every mask and note its size and values, in the order of `records` that have one."""
    paths = [record.mask for record in records if record.mask is not None]
    return [_facts(path) for path in with_progress(paths, "Reading masks")]


def check_sizes(records: Sequence[Record], facts: Sequence[MaskFacts]) -> None:
    """Compare each mask's size with its image's, which is read in full: what is damaged shows now, not in the night.

    Args:
        records: Records with masks, in the order of `facts`.
        facts: What `survey_masks` found in them.

    Raises:
        DataError: An image cannot be read, or sizes differ; names the first few pairs and counts the rest.
    """
    wrong = []
    for record, mask in zip(with_progress(records, "Reading images"), facts, strict=True):
        height, width = read_image(record.image, 3).shape[:2]
        if (height, width) != mask.size:
            wrong.append(f"{record.image.name} {width}x{height} with {mask.path} {mask.size[1]}x{mask.size[0]}")
    if wrong:
        raise DataError(
            f"{len(wrong)} masks do not have the size of their image (width x height, upright): {listing(wrong)}. "
            "Export these masks again at the image's own size and orientation."
        )


def find_coding(facts: Sequence[MaskFacts], classes: int, class_values: Sequence[int] | None = None) -> MaskCoding:
    """Find the coding of a set from what `survey_masks` noted. Arguments and errors as `scan_masks`."""
    number = max(classes, 2)
    if class_values is not None and (len(class_values) != number or len(set(class_values)) != number):
        raise ConfigError(
            f"data.class_values: {number} different values are needed for classes: {classes}, one per class with the "
            f"background first; got {list(class_values)}."
        )
    if not facts:
        raise DataError("No image of this set has a mask. Training needs them; for predictions alone use fkd predict.")
    values = tuple(class_values) if class_values is not None else _usual_values(facts, number)
    coding = MaskCoding(classes, values)
    _refuse_strange(facts, values)
    if number == 2 and class_values is None:
        _refuse_hidden_classes(facts, coding)
    if number == 2:
        _refuse_mixed(facts, coding)
    if all(_is_empty(mask, coding) for mask in facts):
        raise DataError(
            f"All {len(facts)} masks are empty (first: {facts[0].path}). Check that data.root names the folder with "
            "the drawn masks and that they were exported with their regions."
        )
    if number > 2:
        _tell_of_absent_classes(facts, coding)
    return coding


def _facts(path: Path) -> MaskFacts:
    raw = read_mask(path)
    view = raw if raw.dtype in (np.uint8, np.uint16) else raw.astype(np.float32)
    kernel = np.ones((3, 3), np.uint8)
    same = (cv2.erode(view, kernel) == cv2.dilate(view, kernel))[1:-1, 1:-1]
    return MaskFacts(path, (raw.shape[0], raw.shape[1]), _count(raw), _count(raw[1:-1, 1:-1][same]))


def _count(values: NDArray[Any]) -> dict[int, int]:
    found, number = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), number.tolist(), strict=True))


def _usual_values(facts: Sequence[MaskFacts], number: int) -> tuple[int, ...]:
    if number > 2:
        return tuple(range(number))
    return (0, max(1, *(max(mask.pixels) for mask in facts)))


def _refuse_strange(facts: Sequence[MaskFacts], values: tuple[int, ...]) -> None:
    """Refuse values outside the classes; between two, any grey is a border."""
    strange: Counter[int] = Counter()
    files = []
    for mask in facts:
        inside = range(min(values), max(values) + 1) if len(values) == 2 else values
        here = [value for value in mask.pixels if value not in inside]
        strange.update(here)
        if here:
            files.append(f"{mask.path} ({_few(sorted(here))})")
    if not strange:
        return
    lossy = any(mask.path.suffix.lower() in (".jpg", ".jpeg") for mask in facts)
    hint = " JPEG blurs class values: export masks as PNG." if lossy and len(values) > 2 else ""
    raise DataError(
        f"Unexpected values {_few(sorted(strange))} in {len(files)} of {len(facts)} masks; the classes are "
        f"{_few(values)}. Set data.classes, or data.class_values with the raw value of each class.{hint} "
        f"Files: {listing(files)}."
    )


def _refuse_mixed(facts: Sequence[MaskFacts], coding: MaskCoding) -> None:
    """Refuse a set in which a drawn mask would read black, as 0/1 files among 0/255 files would."""
    if coding.values[0] != 0:
        return
    lost = [
        f"{mask.path} ({_few(sorted(mask.pixels))})"
        for mask in facts
        if max(mask.pixels) > 0 and _is_empty(mask, coding) and (max(mask.pixels) == 1 or any(mask.solid.keys() - {0}))
    ]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(facts)} masks are drawn with other values than the rest, whose foreground is "
            f"{coding.values[1]}, and would read as empty: {listing(lost)}. Rewrite them with the same two values."
        )


def _refuse_hidden_classes(facts: Sequence[MaskFacts], coding: MaskCoding) -> None:
    """Refuse values beside background and foreground that fill regions; masks that read as empty are not looked at."""
    top = coding.values[1]
    regions: Counter[int] = Counter()
    for mask in facts:
        if not _is_empty(mask, coding):
            regions.update(further_regions(mask.pixels, mask.solid, top))
    foreground = sum(n for mask in facts for value, n in mask.pixels.items() if value > 0)
    if sum(regions.values()) > REGION_SHARE * foreground:
        raise DataError(
            f"The masks have regions of values {_few(sorted(regions))} between 0 and {top}, which is more than "
            "background and foreground. Give data.classes and data.class_values for each; if these values are no "
            f"classes, data.class_values: [0, {top}] counts each with the nearer of the two."
        )


def _tell_of_absent_classes(facts: Sequence[MaskFacts], coding: MaskCoding) -> None:
    """Warn, once for the whole set, of classes that no mask has: nobody would learn or score them."""
    absent = [value for value in coding.values if not any(value in mask.pixels for mask in facts)]
    if absent and is_first_rank():
        _log.warning(
            "No mask of the whole set has value %s, of the %d classes whose values are %s. Is data.classes right?",
            _few(absent), len(coding.values), _few(coding.values),
        )  # fmt: skip


def _is_empty(mask: MaskFacts, coding: MaskCoding) -> bool:
    return not bool(coding.apply(np.asarray(list(mask.pixels), dtype=np.int64), mask.path).any())


def _few(values: Iterable[int]) -> str:
    return listing([str(value) for value in values], show=8)
