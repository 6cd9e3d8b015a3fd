"""Finding image files in folders and their sub-folders, through links too: a set may lie on several disks.

The name of a file is its path below the folder without the suffix, with ``/`` between folders and in composed Unicode
(NFC), so that names written on a Mac match those of a CSV file.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fkd_med.data.decoding import IMAGE_SUFFIXES, irregular, unread
from fkd_med.data.records import is_writable_name
from fkd_med.errors import DataError

Fault = tuple[Path, str]
_listed: ContextVar[list[Fault] | None] = ContextVar("listed", default=None)


@contextmanager
def listed_faults() -> Iterator[list[Fault]]:
    """List the files that `find_images` cannot use and leave them out, in the block, instead of raising DataError."""
    found: list[Fault] = []
    token = _listed.set(found)
    try:
        yield found
    finally:
        _listed.reset(token)


def find_images(folder: Path, besides: Path | None = None) -> dict[str, Path]:
    """Find the image files in `folder` and its sub-folders, by name and sorted by it.

    Hidden files, and others without an image's suffix, are passed over.

    Args:
        folder: Where to search.
        besides: A folder inside it not to be searched.

    Raises:
        DataError: No such folder; no image in it; DICOM (with or without a suffix) or volumes in it; two files of one
            name; a name that no table can hold; a broken link, a pipe or the like.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Check data.root and the names of its folders.")
    found: dict[str, Path] = {}
    faults: list[Fault] = []
    for path in files_below(folder, besides):
        if fault := _fault(path):
            faults.append((path, f"{path}: {fault}."))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
            if not is_writable_name(name):
                faults.append((path, f"{str(path)!a}: a name with control characters or not in UTF-8. Rename it."))
            elif name in found:
                both = f"{path} and {found[name].name} have one name"
                faults.append((path, f"{both}, so they cannot be told apart. Rename one."))
            else:
                found[name] = path
    listed = _listed.get()
    if faults and (listed is None or not found):
        raise DataError(faults[0][1])
    if listed is not None:
        listed += faults
    if not found:
        raise DataError(f"{folder}: no image (PNG, JPEG, TIFF, BMP) in it. Check data.root and the layout.")
    return dict(sorted(found.items()))


def files_below(folder: Path, besides: Path | None = None) -> list[Path]:
    """Return what is no folder in `folder` and its sub-folders, sorted, without hidden names.

    Links to folders are followed, but for those that lead in a circle: to a folder on the way to them, or around it.

    Args:
        folder: Where to search.
        besides: A folder inside it not to be searched.

    Raises:
        DataError: A folder that may not be read.
    """
    return sorted(_below(folder, (folder.resolve(),), None if besides is None else besides.resolve()))


def real_folders(files: Iterable[Path]) -> list[str]:
    """Return where files lie, with links resolved: the folder around all of them, and those that links lead to."""
    places = {path.parent for path in files}
    around = {Path(os.path.commonpath(places))} if places else set()
    return sorted({os.path.realpath(place) for place in places | around})


def _below(folder: Path, way: tuple[Path, ...], besides: Path | None) -> Iterator[Path]:
    try:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}). Change its permissions or remove it.") from error
    for path in inside:
        if not path.is_dir():
            yield path
        elif (real := path.resolve()) != besides and not any(passed.is_relative_to(real) for passed in way):
            yield from _below(path, (*way, real), besides)


def _fault(path: Path) -> str | None:
    """Return why a file that is or may be an image cannot be used; None for others, and for files to be read."""
    is_image = path.suffix.lower() in IMAGE_SUFFIXES
    if is_image or not path.exists():  # a broken link of any name may have been a folder of images
        return irregular(path)
    return unread(path)
