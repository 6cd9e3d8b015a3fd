"""Whether two runs mean the same image by the same name: their manifests carry the SHA-256 of each image and mask."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from fkd_med.evaluation.rows import ImageRow

Hashes = Mapping[tuple[str, str], str]  # (client, id) -> SHA-256


def read_hashes(manifest: Path) -> Hashes:
    """Return what a run's manifest.csv knows of its images; nothing without one, with a warning if it is unreadable."""
    if not manifest.is_file():
        return {}
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            return {(row["client"], row["id"]): row["sha256"] for row in csv.DictReader(file)}
    except (OSError, KeyError, csv.Error, UnicodeDecodeError) as error:
        warnings.warn(
            f"{manifest} cannot be read ({error!r}): its images are taken for those of the same name.", stacklevel=2
        )
        return {}


def unchanged(rows: Sequence[ImageRow], ours: Hashes, theirs: Hashes) -> list[ImageRow]:
    """Return the rows whose image and mask are the same in both runs, or of which one run knows nothing."""
    changed = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
    changed &= {(row.client, row.id) for row in rows}
    if changed:
        warnings.warn(
            f"{len(changed)} images of the same name are other images or have other masks (manifest.csv): left out.",
            stacklevel=2,
        )
    return [row for row in rows if (row.client, row.id) not in changed]
