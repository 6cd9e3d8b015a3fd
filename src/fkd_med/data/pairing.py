"""Pairing images with masks by name, and reading `clients.csv`: what all layouts share."""

from __future__ import annotations

import csv
import io
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from fkd_med.data.records import Record, check_client_name, check_distinct_clients, listing
from fkd_med.errors import DataError
from fkd_med.files import open_regular

OnMissing = Literal["error", "skip", "unlabelled"]
Pairs = dict[str, tuple[Path, Path | None]]
SPLITS = ("train", "val", "test", "unlabelled")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """One row of `clients.csv`; `client` and `split` are None where the file leaves them open."""

    client: str | None
    patient: str
    split: str | None


def pair(
    images: dict[str, Path],
    masks: dict[str, Path],
    on_missing: OnMissing,
    mask_name: Callable[[str], str] = str,
) -> Pairs:
    """Pair images with masks by name.

    Args:
        images: Name -> file.
        masks: Name -> file.
        on_missing: ``error``; ``skip`` to leave out what has no partner and log how many; ``unlabelled`` to keep images
            without a mask (a mask without an image is an error still).
        mask_name: Name of the mask of the image of this name.

    Raises:
        DataError: An image without mask or a mask without image (unless skipping), or nothing pairs at all.
    """
    lonely_images = [path for name, path in images.items() if mask_name(name) not in masks]
    wanted = {mask_name(name) for name in images}
    lonely_masks = [path for name, path in masks.items() if name not in wanted]
    pairs: Pairs = {name: (path, masks[mask_name(name)]) for name, path in images.items() if mask_name(name) in masks}
    if not pairs:
        raise DataError(
            f"None of {len(images)} images has a mask of its name: {listing([p.name for p in images.values()], 3)}; "
            f"masks: {listing([p.name for p in masks.values()], 3)}. {_naming(images, masks)}"
        )
    if on_missing != "unlabelled":
        learn = ", or learn from them without with --data.on_missing=unlabelled"
        report_missing(lonely_images, "images without mask", on_missing, learn)
    report_missing(lonely_masks, "masks without image", on_missing)
    if on_missing == "unlabelled":
        return {name: pairs.get(name, (path, None)) for name, path in images.items()}
    return pairs


def _naming(images: Iterable[str], masks: Iterable[str]) -> str:
    """Return how to tell which mask is whose: by the suffix that most of the first masks have after an image's name."""
    some = list(islice(images, 100))
    suffixes = Counter(mask.removeprefix(name) for mask in masks for name in some if mask.startswith(name))
    suffix = suffixes.most_common(1)[0][0] if suffixes else "SUFFIX"
    given = f" --data.layout.mask_suffix={suffix}" if suffix else ""
    return f"Rename them, or say what masks have after their image's name: --data.layout=FolderPair{given}"


def report_missing(paths: list[Path], what: str, on_missing: OnMissing, otherwise: str = "") -> None:
    """Raise DataError for files without a partner, or log how many are left out; `otherwise` is one more remedy."""
    if not paths:
        return
    files = f"{len(paths)} {what}: {listing([str(path) for path in paths])}"
    if on_missing != "skip":
        raise DataError(f"{files}. Add what is missing, leave these out with --data.on_missing=skip{otherwise}.")
    _log.warning("Left out %s.", files)


def read_clients(path: Path) -> dict[str, Site]:
    """Read `clients.csv`: columns id, client, patient and, if wanted, split.

    The client column may be empty throughout: then only patients are known. An empty patient means the id.

    Raises:
        DataError: Unreadable, columns missing, no rows, ids listed twice, some clients or splits empty, unknown
            split, a name that cannot name a client, or two that differ only in how they are written.
    """
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [{key: (row.get(key) or "").strip() for key in header} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text with commas ({error}).") from error
    missing = [name for name in ("id", "client", "patient") if name not in header]
    if missing:
        raise DataError(
            f"{path}: lacks the columns {listing(missing)}; it has {listing(header) or 'none'}. Write a first line "
            "id,client,patient (separated by commas; split may follow), then one line per image."
        )
    ids = [unicodedata.normalize("NFC", row["id"]) for row in rows]
    twice = sorted(name for name, number in Counter(ids).items() if number > 1)
    if twice:
        raise DataError(f"{path}: ids listed more than once: {listing(twice)}. Keep one line per image.")
    for column in ("client", "split"):
        open_ids = [name for name, row in zip(ids, rows, strict=True) if not row.get(column)]
        if open_ids and len(open_ids) < len(ids):
            raise DataError(f"{path}: the {column} is empty for {listing(open_ids)}. Fill it for all images or none.")
    check_distinct_clients((row["client"] for row in rows), str(path))
    return {name: _site(row, name, path) for name, row in zip(ids, rows, strict=True)}


def with_sites(
    pairs: Pairs,
    sites: dict[str, Site],
    known: set[str],
    source: Path,
    on_missing: OnMissing,
) -> list[Record]:
    """Make the records of `pairs` with the client, patient and split of `clients.csv`.

    Args:
        pairs: Name -> image and mask, if it has one.
        sites: Name -> row of `clients.csv`.
        known: Names of all images, also of those left out of `pairs`; other ids in the file are mistakes.
        source: The file, for messages.
        on_missing: ``skip`` leaves out images that the file does not list and ids that have no image.

    Raises:
        DataError: Ids without image or images without id, unless skipping.
    """
    unknown = sorted(sites.keys() - known)
    unlisted = sorted(pairs.keys() - sites.keys())
    for names, what in ((unknown, "ids without an image"), (unlisted, "images that are not in it")):
        if names and on_missing != "skip":
            raise DataError(
                f"{source}: {len(names)} {what}: {listing(names)}. Ids are the images' names without suffix, with "
                "'/' after a sub-folder. Correct the file, or leave these out with --data.on_missing=skip."
            )
        if names:
            _log.warning("%s: left out %d %s: %s.", source, len(names), what, listing(names))
    if not pairs.keys() & sites.keys():
        raise DataError(f"{source}: none of its ids is the name of an image with a mask.")
    return [
        Record(name, image, mask, sites[name].client, sites[name].patient, sites[name].split)
        for name, (image, mask) in pairs.items()
        if name in sites
    ]


def _site(row: dict[str, str], name: str, path: Path) -> Site:
    split, client = row.get("split") or None, row["client"] or None
    if split is not None and split not in SPLITS:
        raise DataError(f"{path}: {name}: the split {split!r} is not one of {', '.join(SPLITS)}.")
    return Site(check_client_name(client, f"{path}: {name}") if client else None, row["patient"], split)
