"""A progress bar for passes over many files, silent for short ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def with_progress(items: Sequence[Item], what: str, at_least: int = 500) -> Iterable[Item]:
    """Iterate over `items`, with a bar on standard error when there are more than `at_least`."""
    if len(items) <= at_least:
        return items
    return track(items, description=what, console=Console(stderr=True), transient=True)
