"""Images without masks that nobody owns: what a server may distil on, and what clients may exchange answers about.

They are read, fitted and normalised exactly as the clients' images are. One that is also a client's would make every
score a lie, so it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fkd_med.data.datasets import CACHE_BYTES, Item
from fkd_med.data.decoding import IMAGE_SUFFIXES, read_header, unread
from fkd_med.data.finding import files_below, find_images
from fkd_med.data.geometry import fit_image
from fkd_med.data.images import pixel_digest, read_image
from fkd_med.data.preprocessing import Preprocessing
from fkd_med.data.progress import with_progress
from fkd_med.data.records import Record, listing
from fkd_med.errors import DataError
from fkd_med.ranks import is_first_rank

Size = tuple[int, int]


class PublicImages(Dataset[Item]):
    """Items of a batch without masks: image (C, S, S) and id; sorted by id, never augmented.

    Every file is decoded once, here, so a damaged one shows before any work; up to 1 GiB of fitted images is kept.

    Args:
        files: Image files by id.
        preprocessing: That of the clients' images.

    Raises:
        DataError: A file is damaged, cut short or no image; names it.
    """

    def __init__(self, files: dict[str, Path], preprocessing: Preprocessing) -> None:
        self.files = dict(sorted(files.items()))
        self.preprocessing = preprocessing
        self.pixels: dict[Size, dict[str, str]] = {}
        """Ids of the images by the hash of their pixels, by (height, width)."""
        self._kept: dict[str, NDArray[np.float32]] = {}
        self._ids = list(self.files)
        for name in with_progress(self._ids, "Reading public images", at_least=100):
            self._read(name)

    @property
    def ids(self) -> list[str]:
        """The ids of the images, in order."""
        return list(self._ids)

    @property
    def digest(self) -> str:
        """Hash of all ids and pixels: the same images under the same names."""
        pixels = [sorted([name, pixel] for pixel, name in alike.items()) for alike in self.pixels.values()]
        return hashlib.sha256(json.dumps([self._ids, sorted(pixels)]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Item:
        name = self._ids[index]
        image = self._kept[name] if name in self._kept else self.preprocessing.read(self.files[name])[0]
        return {"image": self.preprocessing.tensor(image), "id": name}

    def _read(self, name: str) -> None:
        whole = read_image(self.files[name], 3)
        self.pixels.setdefault(whole.shape[:2], {}).setdefault(pixel_digest(whole), name)
        side, channels = self.preprocessing.image_size, self.preprocessing.in_channels
        if (len(self._kept) + 1) * side * side * channels * 4 <= CACHE_BYTES:
            image = whole if channels == 3 else read_image(self.files[name], channels)
            self._kept[name] = fit_image(image, side, self.preprocessing.resize)


def read_public(folder: str | Path, preprocessing: Preprocessing, records: Sequence[Record]) -> PublicImages:
    """Read a folder of public images, or its sub-folder ``images`` where there is one.

    Args:
        folder: ``data.public``; searched with its sub-folders.
        preprocessing: That of the clients' images.
        records: The images of all clients and splits, none of which may be among the public ones.

    Raises:
        DataError: No such folder; no image in it; a damaged file; an image with the pixels of a client's.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"data.public: {root}: no such folder. Name a folder of images that belong to no client.")
    root = root / "images" if (root / "images").is_dir() else root
    if not any(path.suffix.lower() in IMAGE_SUFFIXES or unread(path) for path in files_below(root)):
        raise DataError(f"data.public: {root}: no image (PNG, JPEG, TIFF, BMP) in it. Put some there, or leave it out.")
    images = PublicImages(find_images(root), preprocessing)
    if is_first_rank():  # of several processes the first would end all of them
        _refuse_shared(images, records)
    return images


def _refuse_shared(images: PublicImages, records: Sequence[Record]) -> None:
    """Refuse public images that a client has too, byte for byte or in another lossless format."""
    shared = [f"{images.files[name]} (= {record.image})" for name, record in _shared(images, records)]
    if shared:
        raise DataError(
            f"data.public: {len(shared)} public images are also a client's (train, val or test): {listing(shared)}. "
            "What is measured on them would be worthless: remove them from the public folder."
        )


def _shared(images: PublicImages, records: Sequence[Record]) -> Iterable[tuple[str, Record]]:
    for record in with_progress(records, "Comparing with public images", at_least=100):
        alike = images.pixels.get(read_header(record.image).size)
        if alike is not None and (name := alike.get(pixel_digest(read_image(record.image, 3)))) is not None:
            yield name, record
