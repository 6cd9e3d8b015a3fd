"""A table as plain strings: printed in a terminal by rich, written to files and docs as Markdown, same content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """One column; neighbours of the same `group` share a heading. Numbers are set right, names left."""

    name: str
    group: str = ""
    left: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table of strings. ``console.print(sheet)`` shows it, `to_markdown` writes it.

    Attributes:
        title: Line above the table.
        columns: The columns.
        rows: One list of cells per row.
        notes: Lines below the table.
        sections: Indices of rows followed by a rule.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    sections: frozenset[int] = field(default_factory=frozenset)

    def __rich__(self) -> Group:
        return Group(self.to_rich(), "", *(Text(note, style="dim") for note in self.notes))

    def to_rich(self) -> Table:
        """Return the table, without its notes, for rich."""
        title = Text(self.title, style="bold")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        grouped = any(c.group for c in self.columns)
        for indices in self._groups():
            column = self.columns[indices[0]]
            # rich has no column groups: they become one column of aligned text under a heading of two lines.
            names = self._line(indices, [c.name for c in self.columns])
            header = Text(f"{column.group}\n{names}" if grouped else names, justify="center" if column.group else None)
            side: Literal["left", "right"] = "left" if column.left else "right"
            # In a narrow terminal names wrap, numbers never do.
            table.add_column(header, no_wrap=side == "right", justify=side, vertical="bottom")
        for number, row in enumerate(self.rows):
            cells = [Text(self._line(indices, row)) for indices in self._groups()]
            table.add_row(*cells, end_section=number in self.sections)
        return table

    def to_markdown(self) -> str:
        """Return title, table and notes as GitHub-flavoured Markdown."""
        names = [f"{c.group} {c.name}".strip() for c in self.columns]
        lines = [[_escape(cell) for cell in row] for row in (names, *self.rows)]
        widths = [max(3, *(cell_len(line[i]) for line in lines)) for i in range(len(self.columns))]
        rule = ["-" * w if c.left else "-" * (w - 1) + ":" for c, w in zip(self.columns, widths, strict=True)]
        padded = [
            [_pad(cell, w, c.left) for cell, w, c in zip(line, widths, self.columns, strict=True)] for line in lines
        ]
        table = "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))
        notes = "\n".join(f"- {_escape(note)}" for note in self.notes)
        return "\n\n".join(part for part in (f"**{_escape(self.title)}**", table, notes) if part) + "\n"

    def _groups(self) -> list[list[int]]:
        """Return the column indices of each group; a column without a group stands alone."""
        keys = [(c.group or i) for i, c in enumerate(self.columns)]
        return [list(indices) for _, indices in groupby(range(len(self.columns)), key=lambda i: keys[i])]

    def _line(self, indices: Sequence[int], cells: Sequence[str]) -> str:
        if len(indices) == 1:
            return cells[indices[0]]
        widths = [max(cell_len(line[i]) for line in (*self.rows, [c.name for c in self.columns])) for i in indices]
        return "  ".join(_pad(cells[i], w, self.columns[i].left) for i, w in zip(indices, widths, strict=True))


def _pad(cell: str, width: int, left: bool) -> str:
    space = " " * (width - cell_len(cell))
    return cell + space if left else space + cell


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
