"""Synthetic hospitals: images with lesions over tissue, so that everything runs without a download.

Not a simulation of any organ. What matters is that the task has the difficulties of a real one: lesions of
varied size, shape and contrast (some faint, with blurred borders), things that look like lesions and are not
(highlights, vessels, shadows), patients with several similar images, and a different look and mix of lesions
per hospital, so that a model trained at one hospital alone loses to one trained by all.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fkd_med.data.layouts import FolderPair, Layout
from fkd_med.data.pairing import OnMissing
from fkd_med.data.phantom_images import Look, paint
from fkd_med.data.records import Record
from fkd_med.errors import ConfigError, DataError

MARKER = "phantoms.json"
VERSION = 2  # raise it when a change alters the pixels
IMAGES_PER_PATIENT = 4
_OURS = re.compile(r"(images|masks)/[^/\\]+\.png|clients\.csv")


class Phantoms(Layout):
    """Synthetic hospitals, written below the root on first use and read as images and masks folders.

    Args:
        hospitals: Number of hospitals, each with a look of its own.
        images: Images per hospital: one number for all or one per hospital; four images to a patient.
        size: Side of the square images, in pixels.
        seed: Other seeds give other hospitals.

    Raises:
        ConfigError: Numbers that make no hospital.
    """

    def __init__(self, hospitals: int = 3, images: int | list[int] = 48, size: int = 96, seed: int = 0) -> None:
        counts = [images] * hospitals if isinstance(images, int) else list(images)
        if hospitals < 1 or len(counts) != hospitals or min(counts, default=0) < 1 or size < 32:
            raise ConfigError(
                f"data.layout: Phantoms(hospitals={hospitals}, images={images}, size={size}) makes no hospitals: "
                "at least 1 hospital, 1 image in each (one number, or as many as there are hospitals) and 32 pixels."
            )
        self.counts = counts
        self.size = size
        self.seed = seed

    def records(self, root: Path, on_missing: OnMissing = "error") -> list[Record]:
        """Return one record per image, with hospital and patient."""
        return FolderPair().records(root, on_missing)

    def prepare(self, root: Path) -> None:
        """Write the files unless they are there; equal arguments give equal bytes.

        Interrupted or incomplete folders are completed, phantoms of other arguments replaced.

        Raises:
            DataError: `root` holds files that are not phantoms.
        """
        marker = root / MARKER
        parameters = {"version": VERSION, "images": self.counts, "size": self.size, "seed": self.seed}
        found = _read_marker(root, marker)
        if found.get("parameters") == parameters and _complete(root, found["files"]):
            return
        for name in found["files"]:
            (root / name).unlink(missing_ok=True)
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        # The marker comes first, without sizes, so that a folder left half-written is known as ours.
        names = self._names()
        paths = [f"{folder}/{name}.png" for name, _, _ in names for folder in ("images", "masks")] + ["clients.csv"]
        _write(marker, json.dumps({"parameters": parameters, "files": dict.fromkeys(paths)}).encode())
        self._write_images(root, names)
        rows = "".join(f"{name},{client},{patient}\n" for name, client, patient in names)
        _write(root / "clients.csv", f"id,client,patient\n{rows}".encode())
        sizes = {path: (root / path).stat().st_size for path in paths}
        _write(marker, json.dumps({"parameters": parameters, "files": sizes}).encode())

    def _names(self) -> list[tuple[str, str, str]]:
        """Return (id, client, patient) of every image, hospital by hospital."""
        names = []
        for hospital, count in enumerate(self.counts):
            client = f"hospital-{chr(97 + hospital)}" if len(self.counts) <= 26 else f"hospital-{hospital:03d}"
            for image in range(count):
                patient = f"{client}-p{image // IMAGES_PER_PATIENT:03d}"
                names.append((f"{patient}-{image % IMAGES_PER_PATIENT}", client, patient))
        return names

    def _write_images(self, root: Path, names: list[tuple[str, str, str]]) -> None:
        looks = {client: Look.draw(self.seed, number) for number, client in enumerate(sorted({c for _, c, _ in names}))}
        for name, client, patient in names:
            image, mask = paint(looks[client], self.size, self.seed, patient, name)
            for folder, pixels in (("images", image[..., ::-1]), ("masks", mask)):  # cv2 writes BGR
                _write(root / folder / f"{name}.png", cv2.imencode(".png", np.ascontiguousarray(pixels))[1].tobytes())


def _read_marker(root: Path, marker: Path) -> dict[str, Any]:
    """Return the marker's content, an empty one for an empty folder; refuse a folder that is not ours."""
    if marker.is_file():
        try:
            content: dict[str, Any] = json.loads(marker.read_bytes())
            if all(_OURS.fullmatch(name) for name, _ in content["files"].items()):  # may be deleted
                return content
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise DataError(f"{marker}: not a marker that phantoms wrote; delete the folder or choose another data.root.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(
            f"{root}: holds files that are not phantoms; choose another data.root for Phantoms, "
            "or the layout of the images that lie there (data.layout: FolderPair)."
        )
    return {"parameters": None, "files": {}}


def _complete(root: Path, files: dict[str, int | None]) -> bool:
    """Whether every file is there with the size it was written with."""
    return all((root / path).is_file() and (root / path).stat().st_size == size for path, size in files.items())


def _write(path: Path, data: bytes) -> None:
    # Replaced as a whole: another process preparing the same folder writes the same bytes.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
