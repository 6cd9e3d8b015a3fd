"""What is in a data set, before a long run is spent on it: counts, formats, masks, leaks.

Every image and mask is read in full, so a damaged file shows now and not in the night. Duplicates are found by a hash
of the pixels, which also sees one picture saved twice in different formats.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fkd_med.data.decoding import Header, read_header
from fkd_med.data.fault_lines import few_of_a_kind
from fkd_med.data.images import pixel_digest, read_image, read_mask
from fkd_med.data.manifest import SPLITS, UNLABELLED, Manifest, ManifestRow
from fkd_med.data.masks import MaskCoding
from fkd_med.data.progress import with_progress
from fkd_med.data.records import Record, listing
from fkd_med.errors import DataError

_NAMES = {"1": "grey", "L": "grey", "I": "grey", "I;16": "grey", "I;16B": "grey", "F": "grey", "LA": "grey + alpha"}
_NAMES |= {"RGB": "colour", "RGBA": "colour + alpha", "P": "palette", "CMYK": "colour (CMYK)"}
_ANY_FOREGROUND = MaskCoding(1, (0, 1))  # everything above 0


@dataclass
class ClientReport:
    """What one client holds.

    Attributes:
        client: Its name.
        images: Split -> number of images.
        patients: Split -> number of patients.
        sizes: (width, height) -> number of images.
        modes: Such as ``colour, 8 bit`` -> number of images.
        mask_values: Raw mask value -> number of pixels.
        class_shares: Class index -> mean over its images of the share of pixels; class 0 is background.
        empty: Number of images whose mask is empty.
    """

    client: str
    images: Counter[str] = field(default_factory=Counter)
    patients: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    mask_values: Counter[int] = field(default_factory=Counter)
    class_shares: dict[int, float] = field(default_factory=dict)
    empty: int = 0

    @property
    def foreground(self) -> float:
        """Mean share of pixels that are not background."""
        return sum(share for index, share in self.class_shares.items() if index > 0)


@dataclass
class DataReport:
    """What `check_data` found.

    Attributes:
        clients: One report per client, by name.
        coding: What mask values mean; None where that could not be found out.
        duplicates: Groups of ids with the same pixels.
        errors: What will stop a run, such as damaged files.
        warnings: What may spoil its results, such as one picture in two splits.
    """

    clients: list[ClientReport]
    coding: MaskCoding | None
    duplicates: list[list[str]]
    errors: list[str]
    warnings: list[str]


@dataclass
class _Seen:
    """One image, read."""

    row: ManifestRow
    header: Header
    pixels: str
    values: dict[int, int]
    shares: list[float] | None  # of classes; None without a mask


def check_data(
    records: Iterable[Record], manifest: Manifest, coding: MaskCoding | None, notes: Sequence[str] = ()
) -> DataReport:
    """Read every image and mask of the manifest and report what is there.

    Args:
        records: The records of the set.
        manifest: Who holds what; its hashes are not compared here, see `Manifest.verify`.
        coding: What `scan_masks` found; None if it found a fault: values above 0 then count as foreground.
        notes: Warnings to include, such as pairs the layout left out; see `collected_warnings`.

    Returns:
        The report; damaged files are among its errors instead of being raised.
    """
    by_id = {record.id: record for record in records}
    faults, seen = [], []
    for row in with_progress(manifest.rows, "Reading images and masks", at_least=100):
        one, found = _read(row, by_id, coding or _ANY_FOREGROUND)
        faults += found
        seen += [] if one is None else [one]
    clients = [_client_report(name, manifest, seen) for name in manifest.clients()]
    duplicates = _duplicates(seen)
    warnings = [*notes, *_leaks(seen, duplicates), *_oddities(clients, manifest)]
    if unused := len(by_id.keys() - {row.id for row in manifest.rows}):
        warnings.append(f"{unused} images are not in the manifest and not used.")
    errors = few_of_a_kind(faults)
    return DataReport(clients, coding, [[one.row.id for one in group] for group in duplicates], errors, warnings)


class _Collector(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what layouts log in the block (what they leave out), for `check_data`'s notes, instead of printing."""
    found: list[str] = []
    handler = _Collector(found)
    logger = logging.getLogger("fkd_med.data")
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def render(report: DataReport, console: Console | None = None) -> None:
    """Print a report: counts, then formats and masks per client, then errors and warnings."""
    console = console or Console()
    splits = [*SPLITS, *([UNLABELLED] if any(client.images[UNLABELLED] for client in report.clients) else [])]
    counts = Table("client", *splits, "patients of each", title="Images per client and split")
    for client in report.clients:
        patients = "/".join(str(client.patients[split]) for split in splits)
        counts.add_row(client.client, *(str(client.images[split]) for split in splits), patients)
    totals = [sum(client.images[split] for client in report.clients) for split in splits]
    patients = "/".join(str(sum(client.patients[split] for client in report.clients)) for split in splits)
    counts.add_section()
    counts.add_row("all", *map(str, totals), patients)
    console.print(counts)
    contents = Table("client", "sizes", "pixels", "mask values", "foreground", "empty masks", title="What they hold")
    for client in report.clients:
        contents.add_row(*_contents(client))
    console.print(contents)
    if report.coding is not None:
        meaning = ", ".join(f"{value} is class {index}" for index, value in enumerate(report.coding.values))
        console.print(f"Masks: {meaning}.", highlight=False)
    for kind, style, lines in (("Error", "bold red", report.errors), ("Warning", "yellow", report.warnings)):
        for line in lines:
            console.print(f"[{style}]{kind}:[/] ", end="")
            console.print(line, markup=False, highlight=False)


def _read(
    row: ManifestRow, records: dict[str, Record], coding: MaskCoding
) -> tuple[_Seen | None, list[tuple[Path, str]]]:
    """Return what an image and its mask hold, as far as they can be read, and what is wrong with either."""
    record = records.get(row.id)
    if record is None:
        return None, [(Path(row.id), f"{row.id}: in the manifest, but its image is not in the data.")]
    try:
        header, image = read_header(record.image), read_image(record.image, 3)
    except DataError as error:
        return None, [(record.image, str(error))]
    seen = _Seen(row, header, pixel_digest(image), {}, None)
    if record.mask is None:
        return seen, [] if row.split == UNLABELLED else [(record.image, f"{record.image}: has no mask.")]
    try:
        seen.values, seen.shares = _mask_contents(record.mask, image.shape[:2], coding)
    except DataError as error:
        return seen, [(record.mask, str(error))]
    return seen, []


def _mask_contents(path: Path, size: tuple[int, ...], coding: MaskCoding) -> tuple[dict[int, int], list[float]]:
    """Return the pixels of each raw value and the share of each class."""
    raw = read_mask(path)
    if raw.shape != size:
        sizes = f"{raw.shape[1]}x{raw.shape[0]}, not {size[1]}x{size[0]} (width x height, upright)"
        raise DataError(f"{path}: its size differs from its image's: {sizes}.")
    values, number = np.unique(raw, return_counts=True)
    indices = coding.apply(raw, path)
    shares = np.bincount(indices.ravel(), minlength=len(coding.values)) / indices.size
    return dict(zip(values.tolist(), number.tolist(), strict=True)), shares.tolist()


def _client_report(name: str, manifest: Manifest, seen: Iterable[_Seen]) -> ClientReport:
    rows = [row for row in manifest.rows if row.client == name]
    own = [one for one in seen if one.row.client == name]
    report = ClientReport(name)
    report.images.update(row.split for row in rows)
    report.patients.update(split for split, _ in {(row.split, row.patient) for row in rows})
    report.sizes.update((one.header.size[1], one.header.size[0]) for one in own)
    report.modes.update(f"{_NAMES.get(one.header.mode, one.header.mode)}, {one.header.bits} bit" for one in own)
    for one in own:
        report.mask_values.update(one.values)
    if shares := [one.shares for one in own if one.shares is not None]:
        report.class_shares = dict(enumerate(np.mean(shares, axis=0).tolist()))
    report.empty = sum(share[0] == 1 for share in shares)
    return report


def _duplicates(seen: Iterable[_Seen]) -> list[list[_Seen]]:
    groups: dict[str, list[_Seen]] = defaultdict(list)
    for one in seen:
        groups[one.pixels].append(one)
    return [group for group in groups.values() if len(group) > 1]


def _leaks(seen: Sequence[_Seen], duplicates: Sequence[Sequence[_Seen]]) -> list[str]:
    """Tell of pictures on both sides of a border, and of sets that may have such without a hash showing it."""
    found = []
    remedies = {
        "split": "Remove the copies, or, within a client, give them one `patient` in clients.csv.",
        "client": "Remove the copies from all clients but one: a patient's images belong to one client.",
    }
    for what, remedy in remedies.items():
        groups = [group for group in duplicates if len({getattr(one.row, what) for one in group}) > 1]
        names = [" = ".join(f"{one.row.id} ({one.row.client}, {one.row.split})" for one in group) for group in groups]
        if names:
            found.append(f"{len(names)} pictures are in more than one {what}: {listing(names)}. {remedy}")
    if len(seen) > 1 and len({one.row.patient for one in seen}) == len(seen):
        found.append(
            "Every image counts as a patient of its own. If several come from one person, scan or video, say so in "
            "the `patient` column of clients.csv, or the test will see what training saw."
        )
    return found


def _oddities(clients: Sequence[ClientReport], manifest: Manifest) -> list[str]:
    found = []
    somewhere = {index for client in clients for index, share in client.class_shares.items() if share > 0}
    for client in clients:
        bare = [split for split in SPLITS if not manifest.of(client.client, split)]
        if bare:
            found.append(f"{client.client} has no image in {', '.join(bare)}.")
        absent = [str(index) for index, share in client.class_shares.items() if share == 0 and index in somewhere]
        if absent:
            found.append(f"{client.client} has no pixel of class {', '.join(absent)}.")
        if len(client.modes) > 1:
            kinds = ", ".join(f"{number} {mode}" for mode, number in client.modes.most_common())
            found.append(f"{client.client} mixes kinds of images: {kinds}.")
    return found


def _contents(client: ClientReport) -> list[str]:
    sizes = ", ".join(f"{width}x{height} ({number})" for (width, height), number in client.sizes.most_common())
    if len(client.sizes) > 3:
        widths, heights = zip(*client.sizes, strict=True)
        sizes = f"{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)} ({len(client.sizes)} sizes)"
    modes = [f"{mode} ({number})" for mode, number in client.modes.most_common()]
    values = [str(value) for value in sorted(client.mask_values)]
    shown = ", ".join(values) if len(values) <= 8 else f"{values[0]} to {values[-1]} ({len(values)} values)"
    drawn = [f"{client.foreground:.1%}", str(client.empty)] if client.class_shares else ["-", "-"]
    return [client.client, sizes or "-", listing(modes, 3) or "-", shown or "-", *drawn]
