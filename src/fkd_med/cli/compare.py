"""`fkd compare`: finished runs side by side, with intervals and plots."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from fkd_med.cli.console import wide_console
from fkd_med.evaluation import compare as compare_runs

_DESCRIPTION = """Put finished runs side by side: Dice, IoU and HD95 of every arm, from each run's images.csv.

Every arm is compared with the first student of the first run, image by image, with paired bootstrap intervals.
Written are compare.csv, compare.md and the plots of Dice over rounds and over bytes sent."""
_LONGEST = 100  # letters in a folder's name


def compare(arguments: list[str]) -> None:
    """Put finished runs side by side, with intervals and plots.

    Raises:
        RunError: A run does not exist or was not tested, or shares no image with the first; it is named.
    """
    given = _parser().parse_args(arguments)
    runs = [Path(run).expanduser() for run in given.runs]
    output = Path(given.output).expanduser() if given.output else default_output(runs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        comparison = compare_runs(runs, output, given.seed)
    console = wide_console(120)
    for sheet in (comparison.overview, comparison.details):
        console.print(sheet)
        console.print()
    for message in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        console.print(f"Warning: {message}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"Written to {output}: {', '.join(file.name for file in comparison.files)}", soft_wrap=True)


def default_output(runs: Sequence[Path]) -> Path:
    """Return the folder of a comparison: beside the first run, named by all, so that each has one of its own."""
    names = [run.resolve().name for run in runs]
    name = "-vs-".join(names)
    if len(name) > _LONGEST or len(set(names)) < len(names):
        digest = hashlib.sha256("\n".join(str(run.resolve()) for run in runs).encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST - 9]}-{digest}"
    return runs[0].parent / "comparisons" / name


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fkd compare", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument("runs", metavar="RUN", type=str, nargs="+", help="Run directories; the first is the reference.")
    parser.add_argument(
        "--output", type=str | None, default=None, help="Folder to write; comparisons/<names> beside the first run."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the bootstrap.")
    return parser
