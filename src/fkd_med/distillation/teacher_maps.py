"""A teacher's answers on disk: one float16 map per image and tap, made once and read in every epoch.

A cache is a folder that is there whole or not at all, and is trusted only if its checksums agree; map_files.py says
what it holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fkd_med.distillation.atomic_folder import atomic_folder, disk_errors_of, remove_leftover_folders
from fkd_med.distillation.map_files import DTYPE, INDEX_FILE, Index, Shape, TapFile, TapWriter, maps_bytes
from fkd_med.errors import RunError
from fkd_med.files import atomic_write_text

__all__ = ["TeacherMaps", "maps_bytes", "write_maps"]

Answers = Iterable[tuple[str, Mapping[str, NDArray[Any]]]]
_LARGEST = float(np.finfo(np.float16).max)
_BESIDES = 2**20  # bytes that headers, index and folders may take


class TeacherMaps:
    """Reads a teacher's maps by image id, from files mapped into memory.

    Crosses to another process as its path only, and maps the files when the first image is read; a fork shares the
    mapping. `TeacherMaps.open` and `write_maps` give one whose files are whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def open(cls, folder: Path, key: str) -> TeacherMaps | None:
        """Return the maps in `folder`; ``None`` if there are none, or damaged ones, or those of another key.

        Every byte is read, for the checksums.

        Args:
            folder: where `write_maps` put them.
            key: what they must have been made from.
        """
        maps = cls(folder)
        index = Index.read(maps.folder)
        if index is None or index.key != key:
            return None
        if not all(tap.is_whole(maps.folder, len(index.ids)) for tap in index.taps):
            return None
        maps._index = index
        return maps

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the taps, as in the maps that `read` returns."""
        return tuple(tap.name for tap in self._index.taps)

    def __len__(self) -> int:
        return len(self._index.ids)

    def __contains__(self, id: object) -> bool:
        return id in self._rows

    def read(self, id: str) -> dict[str, NDArray[np.float16]]:
        """Return an image's maps (C,h,w) by tap: copies, which keep no part of the files in memory.

        Raises:
            KeyError: there are no maps of this image.
            RunError: the files have vanished or changed since they were opened.
        """
        if id not in self._rows:
            raise KeyError(f"no teacher's maps of image {id!r} in {self.folder}")
        row = self._rows[id]
        return {name: rows[row].astype(np.float16) for name, rows in self._mapped.items()}

    def __reduce__(self) -> tuple[type[TeacherMaps], tuple[Path]]:
        return TeacherMaps, (self.folder,)

    @cached_property
    def _index(self) -> Index:
        index = Index.read(self.folder)
        if index is None:
            raise self._lost()
        return index

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self._index.ids)}

    @cached_property
    def _mapped(self) -> dict[str, NDArray[np.float16]]:
        try:
            mapped = {tap.name: tap.mapped(self.folder, len(self)) for tap in self._index.taps}
        except (OSError, ValueError) as error:
            raise self._lost() from error
        if Index.read(self.folder) != self._index:  # rewritten since: these rows may be of other images
            raise self._lost()
        return mapped

    def _lost(self) -> RunError:
        return RunError(f"The teacher's maps in {self.folder} have vanished or changed. Run again: they are remade.")


def write_maps(
    folder: Path,
    key: str,
    description: dict[str, Any],
    ids: Sequence[str],
    shapes: Mapping[str, Shape],
    answers: Answers,
) -> TeacherMaps:
    """Write a teacher's maps to `folder`, in place of whatever is there, holding one image in memory.

    Values beyond the range of float16 become its largest. One process writes; after an error or an interrupt
    `folder` is what it was, and nothing is left beside it.

    Args:
        folder: the cache; its parents are made.
        key: what the maps are made from; `TeacherMaps.open` asks for it.
        description: the key in words, for people.
        ids: the images, each once.
        shapes: (C, h, w) of each tap.
        answers: an image's id and its maps (C,h,w) by tap, each image once, in any order.

    Raises:
        ValueError: there are no images, or the answers are not those asked for; names image and tap.
        RunError: too little space, or the folder cannot be written; names it and the remedy.
    """
    folder = Path(folder)
    shapes = {name: _shape(name, shape) for name, shape in shapes.items()}
    if not ids or not shapes:
        raise ValueError(f"a teacher's maps need images and taps, not {len(ids)} images and {len(shapes)} taps")
    words = json.loads(json.dumps(description, default=str))  # now, rather than after an hour of forward passes
    remove_leftover_folders(folder.parent)
    _require_space(folder, maps_bytes(len(ids), shapes) + _BESIDES)
    with atomic_folder(folder) as new:
        order, taps = _write_taps(folder, new, ids, shapes, answers)
        atomic_write_text(new / INDEX_FILE, Index(key, order, taps).to_json(words))
    return TeacherMaps(folder)


def _write_taps(
    folder: Path, new: Path, ids: Sequence[str], shapes: Mapping[str, Shape], answers: Answers
) -> tuple[tuple[str, ...], tuple[TapFile, ...]]:
    """Write each answer to the files of its taps; return the order they came in, and the finished files."""
    order: list[str] = []
    taps: list[TapWriter] = []
    with ExitStack() as files:
        with disk_errors_of(folder):
            for number, (name, shape) in enumerate(shapes.items()):
                taps.append(TapWriter(new, number, name, shape))
                files.enter_context(taps[-1].file)
                taps[-1].write(TapFile.header(len(ids), shape))
        for id, maps in _exactly(ids, answers):
            rows = [_as_half(id, tap.name, maps, shapes) for tap in taps]
            with disk_errors_of(folder):
                for tap, row in zip(taps, rows, strict=True):
                    tap.write(row.tobytes())
            order.append(id)
        with disk_errors_of(folder):
            return tuple(order), tuple(tap.finish() for tap in taps)


def _shape(name: str, shape: Sequence[int]) -> Shape:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"tap {name!r} has maps of shape {tuple(shape)}; they must be (C, h, w)")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _exactly(ids: Sequence[str], answers: Answers) -> Iterator[tuple[str, Mapping[str, NDArray[Any]]]]:
    """Pass the answers on, and insist that each of `ids` comes once."""
    awaited = dict.fromkeys(ids)
    if len(awaited) < len(ids):
        raise ValueError(f"image {next(id for id in awaited if list(ids).count(id) > 1)!r} is asked for twice")
    known = set(awaited)
    for id, maps in answers:
        if id not in awaited:
            raise ValueError(f"image {id!r} was answered twice" if id in known else f"image {id!r} is not awaited")
        del awaited[id]
        yield id, maps
    if awaited:
        raise ValueError(f"no answer for image {next(iter(awaited))!r} ({len(awaited)} of {len(ids)} are missing)")


def _as_half(id: str, tap: str, maps: Mapping[str, NDArray[Any]], shapes: Mapping[str, Shape]) -> NDArray[np.float16]:
    """Return the map (C,h,w) of one tap as float16, without infinities."""
    if set(maps) != set(shapes):
        raise ValueError(f"image {id!r} was answered for the taps {sorted(maps)}, not {sorted(shapes)}")
    values = np.asarray(maps[tap])
    if values.shape != shapes[tap]:
        raise ValueError(f"image {id!r}, tap {tap!r}: a map of shape {values.shape}, not {shapes[tap]}")
    half: NDArray[np.float16] = np.clip(values, -_LARGEST, _LARGEST).astype(DTYPE)
    return half


def _require_space(folder: Path, needed: int) -> None:
    with disk_errors_of(folder):
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        free = shutil.disk_usage(parent).free
    if free < needed:
        raise RunError(
            f"The teacher's maps need {needed / 1e6:,.1f} MB in {folder}, and {free / 1e6:,.1f} MB are free there. "
            "Free some space, choose another `model.teacher.store`, or set `model.teacher_cache: off`."
        )
