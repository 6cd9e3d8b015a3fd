"""The tables in docs/results are made of the rows beside them, by today's code."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from fkd_med.cli import main


def test_published_tables_come_from_the_published_rows(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in the first lines of RESULTS.md makes the same tables again."""
    published, again = repository / "docs" / "results" / "paper-cpu", tmp_path / "docs" / "results" / "paper-cpu"
    shutil.copytree(published, again, ignore=shutil.ignore_patterns("RESULTS.md", "results.csv", "*.png"))
    (tmp_path / "configs").symlink_to(repository / "configs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    command = (published / "RESULTS.md").read_text().partition("`fkd ")[2].partition("`")[0]
    assert main(shlex.split(command)) == 0
    assert (again / "results.csv").read_text() == (published / "results.csv").read_text()
    assert (again / "RESULTS.md").read_text() == (published / "RESULTS.md").read_text()
