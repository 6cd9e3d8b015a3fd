"""The tables in docs/results are made of the rows beside them, by today's code."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from fkd_med.cli import main

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
TABLES = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.glob("*/RESULTS*.md"))
assert TABLES, "docs/results is empty"


@pytest.mark.parametrize("tables", TABLES)
def test_published_tables_come_from_the_published_rows(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: str
) -> None:
    """The command in the first lines of RESULTS.md makes the same tables again."""
    published = RESULTS / tables
    again = tmp_path / "docs" / "results" / tables
    shutil.copytree(
        published.parent, again.parent, ignore=shutil.ignore_patterns("RESULTS*.md", "results*.csv", "*.png")
    )
    (tmp_path / "configs").symlink_to(repository / "configs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    command = published.read_text().partition("`fkd ")[2].partition("`")[0]
    assert main(shlex.split(command)) == 0
    rows = published.name.replace("RESULTS", "results").replace(".md", ".csv")
    assert (again.parent / rows).read_text() == (published.parent / rows).read_text()
    assert again.read_text() == published.read_text()
