"""Faults of many files in a few lines: a set of a thousand coloured masks has one fault, not a thousand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from fkd_med.data.records import listing

_SHOWN = 3


def few_of_a_kind(faults: Iterable[tuple[Path, str]]) -> list[str]:
    """Return the messages, of one kind the first few, and how many more files have the same fault.

    Args:
        faults: File and message, in which the file is named.
    """
    kinds: dict[str, dict[str, Path]] = defaultdict(dict)
    for path, message in faults:
        kinds[message.replace(str(path), "").replace(path.name, "").replace(f"{path.stem}.", "")][message] = path
    lines: list[str] = []
    for alike in kinds.values():
        lines += list(alike)[:_SHOWN]
        if more := [str(path) for path in list(alike.values())[_SHOWN:]]:
            lines.append(f"{len(more)} more files have the fault of the last one: {listing(more)}.")
    return lines
