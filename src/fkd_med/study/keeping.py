"""What is worth keeping of a study: a few kB of each run, from which every table can be made again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from fkd_med.errors import ConfigError, RunError
from fkd_med.evaluation.history import read_bytes
from fkd_med.evaluation.rows import ImageTable
from fkd_med.files import atomic_write_bytes, atomic_write_text
from fkd_med.study.curves import read_curves, write_curves
from fkd_med.study.jobs import Job
from fkd_med.study.outcome import kept_rows


def keep(jobs: Iterable[Job], output: Path, folder: Path) -> int:
    """Copy what the tables need of every finished run; return how many there are.

    `folder` becomes a study's folder without models, checkpoints and pictures: `fkd reproduce --tables --output FOLDER`
    makes its tables, and a copy of it can be gone on with, which runs only what is missing. No path of this machine and
    no image is in it; names of hospitals and images are.

    Args:
        jobs: the study's runs; those that are not finished are left out.
        output: the study's folder.
        folder: where to; runs that are there from other times stay.

    Raises:
        ConfigError, RunError: as `check_keep` does; or a run's rows cannot be read.
    """
    finished = [job for job in jobs if job.finished]
    check_keep(finished, output, folder)
    for job in finished:
        _keep_one(job, _place(job, output, folder))
    return len(finished)


def check_keep(jobs: Iterable[Job], output: Path, folder: Path) -> None:
    """Refuse a folder in which runs cannot be kept, before they run.

    Raises:
        ConfigError: it is the study's own folder, or inside it.
        RunError: it holds a run of another configuration, or a whole run, of which it would leave the rows only.
    """
    if folder.expanduser().resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"--keep {folder} is in the study's own folder, {output}. Name another.")
    for job in jobs:
        place = _place(job, output, folder)
        if (place / "settings.yaml").exists():  # of `Job.prepare`; what is kept has none
            raise RunError(
                f"--keep {folder} is a study that runs there itself: of {place} only rows would be left. Name another "
                "folder."
            )
        job.check_kept(place)


def _place(job: Job, output: Path, folder: Path) -> Path:
    return folder.expanduser().resolve() / job.folder.relative_to(output.resolve())


def _keep_one(job: Job, folder: Path) -> None:
    table = ImageTable.read(job.run / "images.csv")
    curves = read_curves(job.run, table)
    definition = yaml.safe_dump(job.begun_with(), sort_keys=False)
    atomic_write_text(folder / "definition.yaml", definition)
    ImageTable.write(folder / "run" / "images.csv", kept_rows(table))
    write_curves(curves, folder / "run")
    sent = read_bytes(job.run / "ledger.csv")
    if sent:
        lines = [f"{round},{size}\n" for round, size in sorted(sent.items())]
        atomic_write_text(folder / "run" / "ledger.csv", "".join(["round,bytes\n", *lines]))
    atomic_write_bytes(folder / "outcome.yaml", (job.folder / "outcome.yaml").read_bytes())  # last: now it is finished
