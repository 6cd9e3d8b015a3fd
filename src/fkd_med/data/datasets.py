"""Images and masks as tensors of one size: read, fit, augment, normalise, in this order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from fkd_med.data.augmentation import Augmentation
from fkd_med.data.geometry import fit_mask
from fkd_med.data.images import read_mask
from fkd_med.data.masks import MaskCoding
from fkd_med.data.preprocessing import Preprocessing
from fkd_med.data.records import Record
from fkd_med.errors import DataError

CACHE_BYTES = 1 << 30
Item = dict[str, Any]
Fitted = tuple[NDArray[np.float32], NDArray[np.uint8], tuple[int, int]]
_STACKED = ("image", "mask", "coordinates")


class SampleReader:
    """Read images with masks, fitted; keeps what it read in memory up to 1 GiB, so epochs decode once.

    Data workers end with each epoch or fit and would each keep a copy: they read what the parent has kept, and
    keep nothing. Kept or not, the arrays are bit-identical.

    Args:
        preprocessing: Size and channels.
        coding: Raw mask values to class indices.
    """

    def __init__(self, preprocessing: Preprocessing, coding: MaskCoding) -> None:
        self.preprocessing = preprocessing
        self.coding = coding
        self._kept: dict[Path, Fitted] = {}
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_bytes": 0}

    def read(self, record: Record) -> Fitted:
        """Return image (S, S, C), class indices (S, S) and the original (H0, W0)."""
        if record.image in self._kept:
            return self._kept[record.image]
        image, size = self.preprocessing.read(record.image)
        fitted = image, self._fitted_mask(record, size), size
        needed = image.nbytes + fitted[1].nbytes
        if get_worker_info() is None and self._bytes + needed <= CACHE_BYTES:
            self._kept[record.image] = fitted
            self._bytes += needed
        return fitted

    def _fitted_mask(self, record: Record, size: tuple[int, int]) -> NDArray[np.uint8]:
        side = self.preprocessing.image_size
        if record.mask is None:  # an unlabelled image: nobody looks at it
            return np.zeros((side, side), np.uint8)
        return fit_mask(self.original_mask(record, size), side, self.preprocessing.resize)

    def original_mask(self, record: Record, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the class indices (H0, W0) of a record whose image has this `size`."""
        if record.mask is None:
            raise DataError(f"{record.image}: has no mask; add one, or skip it with data.on_missing=skip.")
        mask = self.coding.apply(read_mask(record.mask), record.mask).astype(np.uint8)
        if mask.shape != size:
            raise DataError(
                f"{record.mask}: the mask is {mask.shape[1]}x{mask.shape[0]} pixels, its image {record.image.name} "
                f"{size[1]}x{size[0]}. Export both at the same size."
            )
        return mask


class Maps(Protocol):
    """What a frozen teacher says about each image, before augmentation; data workers must be able to pickle it."""

    def read(self, id: str, /) -> Mapping[str, NDArray[np.float16]]:
        """Return the map (C, h, w) of each tap for one image."""


class SegmentationDataset(Dataset[Item]):
    """Items of a batch: image, mask, id, client, patient and original size (and the original mask, for testing).

    Indexed by (index, seed), as SeededSampler yields, an item is augmented with that seed; by a plain index it
    is not augmented. With maps, an item also has "teacher", the map of each tap for the image as it was, and when
    augmented "coordinates" (3, S, S): where its pixels lie in that image (see `Augmentation.with_coordinates`). If any
    record has no mask, items say whether they are "labelled"; the mask of one that is not is -1 everywhere.

    Args:
        records: Images and masks.
        clients: The client of each record.
        reader: Reads and fits them.
        augmentation: None for none.
        original: Whether items carry the mask at its original size.
        maps: A teacher's maps of these records; None for none.
    """

    def __init__(
        self,
        records: Sequence[Record],
        clients: Sequence[str],
        reader: SampleReader,
        augmentation: Augmentation | None = None,
        original: bool = False,
        maps: Maps | None = None,
    ) -> None:
        self.records = list(records)
        self.clients = list(clients)
        self.reader = reader
        self.augmentation = augmentation
        self.original = original
        self.maps = maps
        self.labelled = sum(record.mask is not None for record in self.records)

    @property
    def ids(self) -> list[str]:
        """The ids of the images, in order, without reading any."""
        return [record.id for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> Item:
        position, seed = index if isinstance(index, tuple) else (index, None)
        record = self.records[position]
        image, mask, size = self.reader.read(record)
        image, mask, coordinates = self._augment(image, mask, seed)
        item: Item = {
            "image": self.reader.preprocessing.tensor(image),
            "mask": torch.from_numpy(mask.astype(np.int64)),
            "id": record.id,
            "client": self.clients[position],
            "patient": record.patient,
            "size": size,
        }
        if self.labelled < len(self.records):
            item["labelled"] = record.mask is not None
            if record.mask is None:
                item["mask"].fill_(-1)
        if self.maps is not None:
            item["teacher"] = {tap: torch.from_numpy(array) for tap, array in self.maps.read(record.id).items()}
        if coordinates is not None:
            item["coordinates"] = torch.from_numpy(coordinates)
        if self.original:
            item["original"] = torch.from_numpy(self.reader.original_mask(record, size).astype(np.int64))
        return item

    def _augment(
        self, image: NDArray[np.float32], mask: NDArray[np.uint8], seed: int | None
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32] | None]:
        if self.augmentation is None or seed is None:
            return image, mask, None
        if self.maps is None:  # coordinates cost time
            return *self.augmentation(image, mask, seed), None
        return self.augmentation.with_coordinates(image, mask, seed)


class PredictionDataset(Dataset[Item]):
    """Items of a batch without masks: image, id (the file's stem), path, size.

    Args:
        paths: Image files.
        preprocessing: Taken from the checkpoint: ``Preprocessing.of(export_info)``.
    """

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.paths = list(paths)
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path = self.paths[index]
        image, size = self.preprocessing.read(path)
        return {
            "image": self.preprocessing.tensor(image),
            "id": path.stem,
            "client": "",
            "path": str(path),
            "size": size,
        }


def collate(items: Sequence[Item]) -> Item:
    """Stack images, masks, coordinates and the maps of each tap along N; everything else stays a list of N."""
    batch: Item = {name: [item[name] for item in items] for name in items[0]}
    for name in _STACKED:
        if name in batch:
            batch[name] = _stack(batch[name])
    if "teacher" in batch:
        batch["teacher"] = {tap: _stack([maps[tap] for maps in batch["teacher"]]) for tap in batch["teacher"][0]}
    return batch


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    # Not torch.stack: its threads wait for each other, tens of milliseconds where cores are busy.
    return torch.from_numpy(np.stack([tensor.numpy() for tensor in tensors]))
