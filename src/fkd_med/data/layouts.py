"""Where a data set's files lie on disk: folders in, records out.

A layout only finds files; it opens none of them. Names in `clients.csv` are looked up among the files found, never
made into paths, so a file from elsewhere cannot reach outside the root.
"""

from __future__ import annotations

import bisect
import logging
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from fkd_med.data.finding import find_images
from fkd_med.data.pairing import OnMissing, pair, read_clients, report_missing, with_sites
from fkd_med.data.records import Record, listing
from fkd_med.errors import DataError

_log = logging.getLogger(__name__)

# First frame of each of CVC-ClinicDB's 29 video sequences (Bernal et al. 2015); the last ends with frame 612.
_CVC_STARTS = [1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298]
_CVC_STARTS += [318, 343, 364, 384, 409, 429, 448, 467, 479, 504, 529, 547, 572, 592]
_CVC_FRAMES = 612


class Layout(ABC):
    """How a data set lies on disk."""

    @abstractmethod
    def records(self, root: Path, on_missing: OnMissing = "error") -> list[Record]:
        """Return the set's records, sorted by id.

        Args:
            root: Folder of the data set.
            on_missing: ``error``; ``skip`` to leave out images without mask and masks without image; ``unlabelled`` to
                keep images without mask.

        Raises:
            DataError: Folders, files or `clients.csv` are not as this layout needs them; says what to change.
        """

    def prepare(self, root: Path) -> None:  # noqa: B027 - most layouts have nothing to prepare
        """Make what must be there before `records`; nothing for files that exist already."""


class FolderPair(Layout):
    """A folder of images and one of masks, and optionally who they came from.

    An image and its mask have the same name, in folders that may have sub-folders: ``images/a/1.jpg`` and
    ``masks/a/1.png`` are image ``a/1``. Sub-folders say nothing about clients or patients; `clients.csv` does.
    Images and masks may share one folder when `mask_suffix` tells them apart.

    Args:
        images: Folder of images below the root.
        masks: Folder of masks below the root.
        clients: CSV file below the root with the columns id, client, patient and optionally split. Without the
            file there are no natural clients and every image is a patient of its own.
        mask_suffix: What a mask's name has after its image's name, as ``_mask`` in ``1_mask.png``.
    """

    def __init__(
        self, images: str = "images", masks: str = "masks", clients: str = "clients.csv", mask_suffix: str = ""
    ) -> None:
        self.images = images
        self.masks = masks
        self.clients = clients
        self.mask_suffix = mask_suffix

    def records(self, root: Path, on_missing: OnMissing = "error") -> list[Record]:
        """Return the set's records, sorted by id. See `Layout.records`."""
        root = existing(root)
        image_folder, mask_folder, table = root / self.images, root / self.masks, root / self.clients
        masks = find_images(mask_folder)
        if image_folder == mask_folder and not self.mask_suffix:
            raise DataError("FolderPair: images and masks in one folder need a mask_suffix that tells them apart.")
        if image_folder == mask_folder:
            images = {name: path for name, path in masks.items() if not name.endswith(self.mask_suffix)}
            masks = {name: path for name, path in masks.items() if name not in images}
        else:
            images = find_images(image_folder, besides=mask_folder)
        pairs = pair(images, masks, on_missing, lambda name: name + self.mask_suffix)
        if not self.clients or not os.path.lexists(table):  # a broken link is a lost table, not none
            return [Record(name, image, mask) for name, (image, mask) in pairs.items()]
        return with_sites(pairs, read_clients(table), set(images), table, on_missing)


class CVCClinicDB(Layout):
    """CVC-ClinicDB, 612 frames of 29 colonoscopy videos: the public download or an images + masks folder.

    The download is ``Original/<n>`` and ``Ground Truth/<n>`` (TIFF or PNG; also below ``PNG/`` or ``TIF/``). The
    sequence a frame belongs to, found from its number, is its patient; there are no natural clients. Any other root
    is read as `FolderPair` reads it.

    Source: Bernal et al. 2015, WM-DOVA maps, Computerized Medical Imaging and Graphics 43.
    """

    def records(self, root: Path, on_missing: OnMissing = "error") -> list[Record]:
        """Return the set's records, sorted by id. See `Layout.records`."""
        root = existing(root)
        public = _first_with(root, ("", "PNG", "TIF", "CVC-ClinicDB"), "Original")
        if public is None:
            return FolderPair().records(root, on_missing)
        pairs = pair(find_images(public / "Original"), find_images(public / "Ground Truth"), on_missing)
        return [Record(name, image, mask, None, cvc_sequence(name, image)) for name, (image, mask) in pairs.items()]


class ChestXrayMasks(Layout):
    """Chest X-ray Masks and Labels, lungs from two hospitals: the public download or an images + masks folder.

    The download is ``CXR_png/`` and ``masks/``, where Shenzhen's masks are ``<id>_mask.png`` and Montgomery's
    ``<id>.png``; the two hospitals are clients, every film a patient. The set is known for films without mask: they
    are left out, and counted in the log, unless they are to be kept as unlabelled. Any other root is read as
    `FolderPair` reads it.

    Source: Jaeger et al. 2014, Quantitative Imaging in Medicine and Surgery 4(6).
    """

    _HOSPITALS: ClassVar[dict[str, str]] = {"CHNCXR": "shenzhen", "MCUCXR": "montgomery"}

    def records(self, root: Path, on_missing: OnMissing = "error") -> list[Record]:
        """Return the set's records, sorted by id. See `Layout.records`."""
        root = existing(root)
        public = _first_with(root, ("", "Lung Segmentation", "data", "data/Lung Segmentation"), "CXR_png")
        if public is None:
            return FolderPair().records(root, on_missing)
        films, keeps = find_images(public / "CXR_png"), on_missing == "unlabelled"
        masks = {name.removesuffix("_mask"): path for name, path in find_images(public / "masks").items()}
        self._check_names(films)
        report_missing([path for name, path in masks.items() if name not in films], "masks without image", on_missing)
        pairs = {name: (path, masks.get(name)) for name, path in films.items() if keeps or name in masks}
        if len(pairs) < len(films):
            bare = [name for name in films if name not in masks]
            _log.warning("%s: %d films without mask are not used: %s.", public, len(bare), listing(bare))
        if not films.keys() & masks.keys():
            raise DataError(f"{public}: none of {len(films)} films in CXR_png has a mask in masks.")
        return [Record(name, *pairs[name], self._HOSPITALS[name.split("_")[0]]) for name in pairs]

    def _check_names(self, films: dict[str, Path]) -> None:
        strange = [str(path) for name, path in films.items() if name.split("_")[0] not in self._HOSPITALS]
        if strange:
            raise DataError(
                f"{len(strange)} films are not named CHNCXR_* (Shenzhen) or MCUCXR_* (Montgomery): {listing(strange)}. "
                "Remove them, or use the FolderPair layout with a clients.csv."
            )


def existing(root: Path) -> Path:
    """Return `root` as a path.

    Raises:
        DataError: There is no such folder, or it is empty.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root: {root}: no such folder. Give the data set with --data.root DIR.")
    if not any(root.iterdir()):
        raise DataError(f"data.root: {root}: the folder is empty. Put the data set there, or name another.")
    return root


def cvc_sequence(name: str, image: Path) -> str:
    """Return the video sequence, ``seq01`` to ``seq29``, of the CVC-ClinicDB frame of this number.

    Raises:
        DataError: The name is not a number between 1 and 612.
    """
    if not name.isdecimal() or not 1 <= int(name) <= _CVC_FRAMES:
        raise DataError(
            f"{image}: CVC-ClinicDB's frames are numbered 1 to {_CVC_FRAMES}. Remove this file, or use the FolderPair "
            "layout with a clients.csv."
        )
    return f"seq{bisect.bisect_right(_CVC_STARTS, int(name)):02d}"


def _first_with(root: Path, places: tuple[str, ...], folder: str) -> Path | None:
    return next((root / place for place in places if (root / place / folder).is_dir()), None)
