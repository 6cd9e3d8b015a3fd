"""What the folder of a teacher's maps holds: maps.json, and for each tap a .npy file with the rows of all images.

Both carry checksums, and are read as if a stranger had put them there: nothing is unpickled, no header is parsed,
and no file is opened but those whose names are given here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]
INDEX_FILE = "maps.json"
DTYPE = np.dtype("<f2")
_FORMAT = {"format": "fkd-med teacher maps", "version": 1}


def maps_bytes(count: int, shapes: Mapping[str, Shape]) -> int:
    """Return the bytes that the maps of `count` images take on disk.

    Args:
        count: images.
        shapes: (C, h, w) of each tap.
    """
    return count * sum(prod(shape) for shape in shapes.values()) * DTYPE.itemsize


@dataclass(frozen=True)
class TapFile:
    """The file of one tap: a float16 array (N,C,h,w) with NumPy's header."""

    name: str
    shape: Shape
    file: str
    sha256: str

    @staticmethod
    def name_of(number: int) -> str:
        """Return the name of the file of the `number`-th tap: taps' own names need not be file names."""
        return f"tap-{number}.npy"

    @staticmethod
    def header(count: int, shape: Shape) -> bytes:
        """Return what the file of `count` images begins with."""
        text = io.BytesIO()
        layout = {"descr": DTYPE.str, "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(text, layout)
        return text.getvalue()

    def is_whole(self, folder: Path, count: int) -> bool:
        """Return whether the file is what was written. The header is compared and never parsed."""
        path, header = folder / self.file, self.header(count, self.shape)
        size = len(header) + maps_bytes(count, {self.name: self.shape})
        try:
            if not path.is_file() or path.stat().st_size != size:
                return False
            with open(path, "rb") as file:
                if file.read(len(header)) != header:
                    return False
                file.seek(0)
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError:
            return False

    def mapped(self, folder: Path, count: int) -> NDArray[np.float16]:
        """Return the file's array (N,C,h,w), mapped into memory read-only.

        Raises:
            OSError, ValueError: the file is gone or too short.
        """
        start = len(self.header(count, self.shape))
        return np.asarray(np.memmap(folder / self.file, DTYPE, mode="r", offset=start, shape=(count, *self.shape)))


class TapWriter:
    """A tap's file as it grows; its checksum grows with it."""

    def __init__(self, folder: Path, number: int, name: str, shape: Shape) -> None:
        self.name, self.shape = name, shape
        self.file = open(folder / TapFile.name_of(number), "xb", buffering=0)  # noqa: SIM115 (an ExitStack closes it)
        self._number, self._sha256 = number, hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Add bytes: first the header, then each image's map."""
        self._sha256.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]

    def finish(self) -> TapFile:
        """Make the file durable, and return what the index says of it."""
        os.fsync(self.file.fileno())
        return TapFile(self.name, self.shape, TapFile.name_of(self._number), self._sha256.hexdigest())


@dataclass(frozen=True)
class Index:
    """What `maps.json` says: what the maps were made from, whose each row is, and the files."""

    key: str
    ids: tuple[str, ...]
    taps: tuple[TapFile, ...]

    @classmethod
    def read(cls, folder: Path) -> Index | None:
        """Return the index of the maps in `folder`; ``None`` if there is none, or it is damaged or not ours."""
        path = folder / INDEX_FILE
        try:
            record = json.loads(path.read_bytes()) if path.is_file() else None
            return cls._from_record(record) if isinstance(record, dict) else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def to_json(self, description: dict[str, Any]) -> str:
        """Return the text of `maps.json`, with a checksum of its own."""
        record = json.loads(json.dumps({**_FORMAT, **asdict(self), "description": description}, default=str))
        return json.dumps({**record, "sha256": _digest(record)}) + "\n"

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> Index | None:
        if record.pop("sha256") != _digest(record) or any(record[name] != value for name, value in _FORMAT.items()):
            return None
        ids = tuple(record["ids"])
        taps = tuple(TapFile(**{**tap, "shape": tuple(tap["shape"])}) for tap in record["taps"])
        strings = (record["key"], *ids, *(text for tap in taps for text in (tap.name, tap.sha256)))
        sides = [side for tap in taps for side in tap.shape]
        if (
            all(isinstance(text, str) for text in strings)
            and all(isinstance(side, int) and side > 0 for side in sides)
            and all(len(tap.shape) == 3 and tap.file == TapFile.name_of(number) for number, tap in enumerate(taps))
            and len(set(ids)) == len(ids) > 0
            and len({tap.name for tap in taps}) == len(taps) > 0
        ):
            return cls(record["key"], ids, taps)
        return None


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
