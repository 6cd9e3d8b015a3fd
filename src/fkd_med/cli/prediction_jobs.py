"""What `fkd predict` segments and where the masks go: found, named and checked before the first image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fkd_med.data import FederatedDataModule
from fkd_med.data.decoding import IMAGE_SUFFIXES, irregular, unread
from fkd_med.data.finding import files_below
from fkd_med.data.records import listing
from fkd_med.errors import ConfigError, DataError

MARK = "_overlay"


@dataclass(frozen=True)
class Job:
    """One image to segment.

    Attributes:
        image: The file.
        target: Where its mask goes: below the output folder, without suffix.
        client: The hospital it belongs to, if that is known.
    """

    image: Path
    target: str
    client: str | None = None


def hospital_images(data: FederatedDataModule, client: str | None) -> list[Job]:
    """Return the test images of a data set, hospital by hospital, or those of one `client`."""
    data.prepare_data()
    data.setup("test")
    if client is not None:
        data.manifest.check_client(client, str(data.root))
    return [
        Job(record.image, f"{name}/{record.id}", name)
        for name in data.manifest.clients()
        if client in (None, name)
        for record in data.client_test_dataloader(name).dataset.records  # type: ignore[attr-defined]
    ]


def images_in(source: Path, output: Path) -> tuple[list[Job], list[str]]:
    """Find the images in a folder and its sub-folders, or one image.

    Args:
        source: A folder or an image file.
        output: Where masks will go; if it lies inside `source`, its files are not taken for new images.

    Returns:
        The jobs, and what is wrong with files of formats that are not read.

    Raises:
        DataError: There is no image.
        ConfigError: Masks would go among the images.
    """
    if source.is_file():
        return [Job(source, source.stem)], []
    if not source.is_dir():
        raise DataError(f"--data.images {source}: there is no such folder or file.")
    if output.resolve() == source.resolve():
        raise ConfigError(f"--output {output} is the folder of the images: choose another, so that none is lost.")
    found, faults = [], []
    for path in files_below(source):
        is_image = path.suffix.lower() in IMAGE_SUFFIXES
        if (is_image or not path.exists()) and (reason := irregular(path)):
            faults.append(f"{path}: {reason}.")
        elif not path.is_file() or output.resolve() in path.resolve().parents:
            continue
        elif reason := unread(path):
            faults.append(f"{path}: {reason}.")
        elif is_image:
            found.append(path)
    if not found:
        raise DataError("\n".join([f"{source}: no image (PNG, JPEG, TIFF, BMP) in it.", *faults[:5]]))
    return _named(found, source), faults


def _named(paths: Sequence[Path], folder: Path) -> list[Job]:
    """Name masks like their images; a.png and a.jpg in one folder become a.png.png and a.jpg.png."""
    stems = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    number = Counter(stem.casefold() for stem in stems)  # some file systems do not tell A from a
    jobs = []
    for path, stem in zip(paths, stems, strict=True):
        alone = number[stem.casefold()] == 1
        jobs.append(Job(path, stem if alone else path.relative_to(folder).as_posix()))
    if doubles := [job.image.name for job in jobs if number[job.target.casefold()] != 1]:
        print(f"{len(doubles)} images share a name; their masks keep the suffix: {listing(doubles)}")
    return jobs


def targets(job: Job, output: Path, overlays: bool) -> list[Path]:
    """Return the files of one image: its mask and, if wanted, its overlay."""
    names = [f"{job.target}.png", f"{job.target}{MARK}.png"]
    return [output / name for name in names[: 1 + overlays]]


def check_targets(jobs: Sequence[Job], output: Path, overlays: bool, overwrite: bool) -> None:
    """See that no two files of `jobs` are one, that none is an image, and none exists unless it may be replaced.

    Raises:
        ConfigError: Names the files.
    """
    files = [target for job in jobs for target in targets(job, output, overlays)]
    number = Counter(str(target).casefold() for target in files)
    if doubles := [str(target) for target in files if number[str(target).casefold()] > 1]:
        raise ConfigError(f"Several images would be written to one file: {listing(doubles)}. Rename them.")
    existing = [target for target in files if os.path.lexists(target)]
    images = {_identity(job.image) for job in jobs if job.image.exists()}
    if lost := [str(target) for target in existing if target.exists() and _identity(target) in images]:
        raise ConfigError(f"Masks would overwrite images: {listing(lost)}. Choose another --output.")
    if existing and not overwrite:
        raise ConfigError(
            f"{len(existing)} files exist already in {output}: {listing([path.name for path in existing])}. "
            "Replace them with --overwrite, or choose another --output."
        )


def _identity(path: Path) -> tuple[int, int]:
    """What makes two paths the same file, whatever links lead there."""
    status = path.stat()
    return status.st_dev, status.st_ino
