"""Where tables are printed: the terminal, or a file or pipe that is wide enough for them."""

from __future__ import annotations

from rich.console import Console

from fkd_med.ranks import is_first_rank


def wide_console(width: int = 100, soft_wrap: bool = False) -> Console:
    """Return standard output, at least `width` columns wide where it is no terminal; only the first process prints."""
    terminal = Console(highlight=False, soft_wrap=soft_wrap, quiet=not is_first_rank())
    if not terminal.is_terminal:
        terminal.width = max(width, terminal.width)
    return terminal
