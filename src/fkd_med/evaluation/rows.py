"""images.csv: one row per scored image, the truth from which every table, interval and picture is made.

Rows are appended after each evaluation and flushed to the disk. A process that dies while writing leaves a last line
without its end; reading leaves that line out and the next append removes it, both with a warning. A row written twice
(DDP pads its last batch; a test is run again) counts once, and the last writing wins.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fkd_med.errors import RunError
from fkd_med.files import append_text, atomic_write_text

COLUMNS = ("model", "arm", "split", "round", "client", "id", "patient", "dice", "iou", "hd95", "empty")
EMPTY = ("", "prediction", "truth", "both")
_HEADER = ",".join(COLUMNS) + "\n"
_BOM = b"\xef\xbb\xbf"  # some editors put it in front of UTF-8

Key = tuple[str, str, str, int, str, str]


@dataclass(frozen=True)
class ImageRow:
    """The scores of one image by one model.

    Attributes:
        model: Which network: ``"teacher"`` or ``"student"``.
        arm: How it was trained, such as ``"federated"`` or ``"local-only"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        round: Round whose weights were scored, from 1; the epoch outside a federation, 0 for a teacher.
        client: Hospital the image belongs to.
        id: The image's id in the manifest.
        dice: Dice in [0, 1].
        iou: IoU in [0, 1].
        hd95: HD95 in pixels (mm with spacing); None where it was not computed, as in validation.
        empty: See `Scores.empty`.
        patient: Patient, sequence or study the image is of; the id when empty.
    """

    model: str
    arm: str
    split: str
    round: int
    client: str
    id: str
    dice: float
    iou: float
    hd95: float | None
    empty: str
    patient: str = ""

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)

    @property
    def key(self) -> Key:
        """What makes two rows the same row."""
        return self.model, self.arm, self.split, self.round, self.client, self.id


@dataclass(frozen=True)
class ImageTable:
    """The rows of an images.csv, each key once, in the order of their last writing."""

    rows: tuple[ImageRow, ...]

    def __iter__(self) -> Iterator[ImageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, split: str, model: str | None = None, arm: str | None = None) -> list[ImageRow]:
        """Return the rows of a split, optionally of one model and arm."""
        return [r for r in self.rows if r.split == split and model in (None, r.model) and arm in (None, r.arm)]

    def latest(self, split: str) -> list[ImageRow]:
        """Return, for each model, arm and client, the rows of the round that was written last in a split."""
        rows = self.of(split)
        last = {(r.model, r.arm, r.client): r.round for r in rows}
        return [r for r in rows if r.round == last[r.model, r.arm, r.client]]

    @classmethod
    def read(cls, path: Path) -> ImageTable:
        """Read an images.csv.

        Raises:
            RunError: If the file is missing, has other columns or a line that cannot be read.
        """
        try:
            data = Path(path).read_bytes().removeprefix(_BOM)
        except FileNotFoundError:
            raise RunError(
                f"{path} does not exist: no image of this run was scored yet; run `fkd test` for it."
            ) from None
        _check_header(path, data)
        # Cut before decoding: the cut may go through a character.
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            _warn_torn(path, "left out")
        lines = whole.split(b"\n")[1:]
        return cls(_unique(_parse(path, n, line) for n, line in enumerate(lines, start=2) if line.strip()))

    @staticmethod
    def append(path: Path, rows: Iterable[ImageRow]) -> None:
        """Append rows durably; the file and its header are made when needed, a torn last line is removed.

        Raises:
            RunError: If the file is not an images.csv, or a name cannot be written.
        """
        path, text = Path(path), _format(_unique(rows))
        if text:
            append_text(path, text if _has_header(path) else _HEADER + text)

    @staticmethod
    def write(path: Path, rows: Iterable[ImageRow]) -> None:
        """Write these rows and no others, atomically.

        Raises:
            RunError: If the file or a name cannot be written.
        """
        atomic_write_text(Path(path), _HEADER + _format(_unique(rows)))

    @staticmethod
    def drop_after(path: Path, round: int) -> None:
        """Drop the rows of rounds after `round`, which a resumed run will write again; atomic, no file is no error."""
        _keep(Path(path), lambda row: row.round <= round)

    @staticmethod
    def drop_split(path: Path, split: str) -> None:
        """Drop the rows of a split, before it is scored again; atomic, no file is no error."""
        _keep(Path(path), lambda row: row.split != split)


def _keep(path: Path, wanted: Callable[[ImageRow], bool]) -> None:
    if path.exists():
        ImageTable.write(path, [row for row in ImageTable.read(path).rows if wanted(row)])


def group_arms(rows: Iterable[ImageRow]) -> dict[str, list[ImageRow]]:
    """Group rows by model and arm, in order of appearance, under readable names such as "federated student"."""
    groups: dict[str, list[ImageRow]] = {}
    for row in rows:
        groups.setdefault(f"{row.arm} {row.model}".strip(), []).append(row)
    return groups


def _unique(rows: Iterable[ImageRow]) -> tuple[ImageRow, ...]:
    unique: dict[Key, ImageRow] = {}
    for row in rows:
        unique.pop(row.key, None)  # so that the row takes the place of its last writing
        unique[row.key] = row
    return tuple(unique.values())


def _format(rows: Iterable[ImageRow]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        names = "".join((row.model, row.arm, row.split, row.client, row.id, row.patient))
        if any(c in "\r\n\0" or "\ud800" <= c <= "\udfff" for c in names):
            raise RunError(
                f"client {row.client!r}, image {row.id!r}, patient {row.patient!r}: a name with a line break, or not "
                "in UTF-8, cannot be written to images.csv; rename it."
            )
        # repr reads back exactly; float() because the repr of a NumPy scalar is not a number to a reader.
        scores = ["" if v is None else repr(float(v)) for v in (row.dice, row.iou, row.hd95)]
        writer.writerow([*row.key, row.patient, *scores, row.empty])
    return buffer.getvalue()


def _parse(path: Path, number: int, line: bytes) -> ImageRow:
    try:
        # Line by line, so that a damaged quote cannot swallow the lines after it.
        (fields,) = csv.reader([line.rstrip(b"\r").decode()], strict=True)
        model, arm, split, round_, client, id_, patient, dice, iou, hd95, empty = fields
        if empty not in EMPTY:
            raise ValueError(f"empty is {empty!r}, expected one of {EMPTY}")
        hd95_value = float(hd95) if hd95 else None
        scores = float(dice), float(iou), hd95_value
        return ImageRow(model, arm, split, int(round_), client, id_, *scores, empty, patient)
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path}, line {number} cannot be read ({error}); correct or remove that line.") from error


def _has_header(path: Path) -> bool:
    """Whether rows can follow what is in a file; refuses one that is not ours, warns of a torn last line."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_BOM) + len(_HEADER) + 1).removeprefix(_BOM)
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read() not in (b"", b"\n")
    except FileNotFoundError:
        return False
    _check_header(path, head)
    if torn:
        _warn_torn(path, "removed")  # by append_text
    return b"\n" in head


def _check_header(path: Path, data: bytes) -> None:
    """Accept our header, or as much of it as a crash left."""
    header, newline, _ = data.partition(b"\n")
    if not (header.rstrip(b"\r") + b"\n" == _HEADER.encode() if newline else _HEADER.encode().startswith(header)):
        if header.rstrip(b"\r") == _HEADER.replace("patient,", "").rstrip().encode():
            raise RunError(
                f"{path} lacks the column `patient`: an older version wrote it. Run it again, or add the column after "
                "`id`, filled from the run's manifest.csv."
            )
        shown = header[:80].decode(errors="replace")
        raise RunError(
            f"{path} is not the images.csv of a run: it begins with {shown!r}, expected {_HEADER.strip()!r}; "
            "move it away or name another run directory."
        )


def _warn_torn(path: Path, action: str) -> None:
    warnings.warn(f"{path}: the last line was cut off by a crash; it is {action}.", stacklevel=3)
