"""One image with its mask, hospital and patient: what layouts find and everything after them uses."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fkd_med.errors import DataError

_SHOWN = 300  # letters of one name in a message


@dataclass(frozen=True)
class Record:
    """One image and what is known about it.

    Attributes:
        id: Name of the image, unique in its set: its path inside the image folder, without suffix, ``/`` between
            folders.
        image: File of the image.
        mask: File of the mask; None where only predictions are wanted.
        client: Natural client (hospital, site) of the image, when the set has one.
        patient: Patient, sequence or study; images of one patient never part. The id when empty.
        split: ``train``, ``val`` or ``test`` when the set prescribes it.
    """

    id: str
    image: Path
    mask: Path | None = None
    client: str | None = None
    patient: str = ""
    split: str | None = None

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)


def check_client_name(name: str, source: str) -> str:
    """Return `name`, fit to name a client.

    A client's name becomes a folder of the run directory, so it must be one plain path component.

    Args:
        name: The name to check.
        source: Where it was found, for the message.

    Raises:
        DataError: The name is empty, a path, starts with a dot or has control characters.
    """
    if not name or name.startswith(".") or name != name.strip() or not name.isprintable() or set(name) & set("/\\:"):
        raise DataError(
            f"{source}: {name!r} cannot name a client, because results are kept in a folder of that name. "
            "Use letters, digits, spaces, '-' and '_', not starting with a dot."
        )
    if len(name.encode()) > 150:
        raise DataError(f"{source}: the client name {name[:40]!r}... is too long; use at most 150 bytes.")
    return name


def check_distinct_clients(names: Iterable[str], source: str) -> None:
    """Refuse client names that are one to a reader or to a disk: they differ in case, spaces or Unicode's forms only.

    Args:
        names: The names.
        source: Where they were found, for the message.

    Raises:
        DataError: Names both of the first such pair.
    """
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        plain = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
        if (other := seen.setdefault(plain, name)) != name:
            alike = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
            both = " and ".join(ascii(one) if alike else repr(one) for one in (other, name))
            raise DataError(
                f"{source}: the clients {both} differ only in how they are written. Write one name for one hospital; "
                "two need names that differ in more, since some disks would keep their results in one folder."
            )


def is_writable_name(name: str) -> bool:
    """Return whether a table of ours can hold a name in one line: no control characters or line ends, and UTF-8."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)


def listing(names: list[str], show: int = 5) -> str:
    """Return the first few of `names`, each in one line of bounded length, and how many more, for messages."""
    rest = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(shown(name) for name in names[:show]) + rest


def shown(name: str) -> str:
    """Return whatever stood in a file, harmless on a terminal and not longer than a path."""
    name = name if is_writable_name(name) else ascii(name)
    return name if len(name) <= _SHOWN else f"{name[: _SHOWN // 2]}...{name[-_SHOWN // 4 :]}"
