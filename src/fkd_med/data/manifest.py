"""Which image went to which client and split, as a file: `manifest.csv`, which a later run can be given back.

Each row carries the SHA-256 of its image and mask, so a run on changed data stops instead of comparing apples with
pears, and a patient can lie in one client and one split only.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from fkd_med.data.progress import with_progress
from fkd_med.data.records import Record, check_client_name, check_distinct_clients, is_writable_name, listing
from fkd_med.errors import DataError
from fkd_med.files import atomic_write_text, open_regular

SPLITS = ("train", "val", "test")
UNLABELLED = "unlabelled"  # trained on, but by what a teacher says of it: without a mask, or with one that is not used
_REMEDY = "Restore the files it was made from; a new run without data.manifest deals the images anew."
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ManifestRow:
    """One image: client, split (``train``, ``val``, ``test`` or ``unlabelled``), patient, and the hash of its files."""

    id: str
    client: str
    split: str
    patient: str
    sha256: str


COLUMNS = tuple(field.name for field in fields(ManifestRow))


class Manifest:
    """The rows of `manifest.csv`, checked: unique ids, known splits, every patient in one client and one split.

    Args:
        rows: The rows, in any order; kept sorted by client and id.
        source: Where they come from, for messages.

    Raises:
        DataError: The rows are empty or break one of these rules; names the ids, patients or clients.
    """

    def __init__(self, rows: Iterable[ManifestRow], source: Path | str = "manifest") -> None:
        self.rows: tuple[ManifestRow, ...] = tuple(sorted(rows, key=lambda row: (row.client, row.id)))
        self.source = source
        if not self.rows:
            raise DataError(f"{source}: no rows. {_REMEDY}")
        _check_names(self.rows, source)
        _check_patients(self.rows, source)

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.rows == other.rows

    def __hash__(self) -> int:
        return hash(self.rows)

    def clients(self) -> list[str]:
        """Return the names of the clients, sorted."""
        return sorted({row.client for row in self.rows})

    def of(self, client: str | None, split: str) -> list[ManifestRow]:
        """Return the rows of one client (None: of all) in one split, sorted by client and id."""
        return [row for row in self.rows if row.split == split and client in (None, row.client)]

    def check_client(self, client: str, where: str) -> None:
        """Refuse a client that is not here; DataError names it, `where` it was looked for, and the nearest."""
        known = self.clients()
        if client not in known:
            close = difflib.get_close_matches(client, known, cutoff=0.5) or known[:10]
            raise DataError(
                f"data.client: {where} has no client named {client!r}; did you mean {' or '.join(map(repr, close))}?"
            )

    def digest(self, client: str | None, splits: Iterable[str], around: Any) -> str:
        """Return a SHA-256 over the files of a client (None: of all) in some splits; no paths.

        Args:
            client: The client.
            splits: The splits, in order.
            around: What else is to be told apart, in plain containers: how the files are read.
        """
        rows = [(row.split, row.id, row.sha256) for split in splits for row in self.of(client, split)]
        return hashlib.sha256(json.dumps([around, rows], sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a `manifest.csv`.

        Raises:
            DataError: The file is missing, lacks a column or breaks a rule of the manifest.
        """
        try:
            with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
                rows = [] if missing else [ManifestRow(*(row[name] or "" for name in COLUMNS)) for row in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: the manifest cannot be read ({error}). {_REMEDY}") from error
        if missing:
            raise DataError(f"{path}: the manifest lacks the columns {listing(missing)}. {_REMEDY}")
        return cls(rows, path)

    def write(self, path: Path) -> None:
        """Write the rows as CSV (id, client, split, patient, sha256); the file is whole or not there."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(astuple(row) for row in self.rows)
        atomic_write_text(path, text.getvalue())

    def verify(self, records: Iterable[Record]) -> None:
        """Check that every row has its image and mask on disk, unchanged. Images not in the manifest are not used.

        Raises:
            DataError: Images are missing or differ from the hash; names the first few and counts the rest.
        """
        found = {record.id: record for record in records}
        gone = [row.id for row in self.rows if row.id not in found]
        if gone:
            raise DataError(f"{self.source}: {len(gone)} images are not in the data: {listing(gone)}. {_REMEDY}")
        rows = with_progress(self.rows, "Checking files")
        changed = [str(found[row.id].image) for row in rows if hash_record(found[row.id]) != row.sha256]
        if changed:
            raise DataError(
                f"{self.source}: {len(changed)} images or masks have changed since it was written: "
                f"{listing(changed)}. {_REMEDY}"
            )
        if len(found) > len(self.rows):
            number = len(found) - len(self.rows)
            _log.warning(
                "%s: %d images are not in it and not used.%s", self.source, number, self._joined(found.values())
            )

    def _joined(self, records: Iterable[Record]) -> str:
        """Say which hospitals, where the data name them, are not in it."""
        named, known = {record.client for record in records if record.client}, set(self.clients())
        if not named & known or named <= known:
            return ""
        return f" Nor is {listing(sorted(named - known))}: hospitals join by a new run, without data.manifest."


def hash_record(record: Record) -> str:
    """Return the SHA-256 (hex) of the image's bytes followed by the mask's, if it has one.

    Raises:
        DataError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for path in (record.image, record.mask):
        if path is not None:
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error}).") from error
    return digest.hexdigest()


def _check_names(rows: tuple[ManifestRow, ...], source: Path | str) -> None:
    twice = [name for name, number in Counter(row.id for row in rows).items() if number > 1]
    if twice:
        raise DataError(f"{source}: images listed more than once: {listing(twice)}. Keep one row for each.")
    strange = [text for row in rows for text in (row.id, row.patient, row.sha256) if not is_writable_name(text)]
    if strange:
        raise DataError(f"{source}: names with control characters or not in UTF-8: {listing(strange)}. {_REMEDY}")
    known = (*SPLITS, UNLABELLED)
    wrong = [f"{row.id} ({row.split!r})" for row in rows if row.split not in known]
    if wrong:
        raise DataError(f"{source}: the split must be one of {', '.join(known)}; wrong for {listing(wrong)}.")
    clients = {row.client for row in rows}
    for client in clients:
        check_client_name(client, str(source))
    check_distinct_clients(clients, str(source))


def _check_patients(rows: tuple[ManifestRow, ...], source: Path | str) -> None:
    """Refuse patients on both sides of a border: their images are near-duplicates, so the test would be a memory."""
    places: dict[str, dict[str, set[str]]] = {"client": defaultdict(set), "split": defaultdict(set)}
    for row in rows:
        places["client"][row.patient].add(row.client)
        places["split"][row.patient].add("train" if row.split == UNLABELLED else row.split)
    for what, of_patient in places.items():
        parted = [f"{name} ({', '.join(sorted(at))})" for name, at in sorted(of_patient.items()) if len(at) > 1]
        if parted:
            raise DataError(
                f"{source}: patients in more than one {what}: {listing(parted)}. All images of a patient belong to "
                f"one {what}; if these are different people, give them different names in clients.csv."
            )
