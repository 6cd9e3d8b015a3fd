"""`fkd reproduce`: run a study, all its arms, cells and seeds, and write its tables and plots."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich.console import Console

from fkd_med.cli.configuration_files import check_configuration
from fkd_med.cli.console import wide_console
from fkd_med.cli.signals import TERMINATED
from fkd_med.errors import ConfigError
from fkd_med.files import make_folder
from fkd_med.locks import locked
from fkd_med.study import (
    Job,
    Selection,
    Study,
    Tables,
    Tally,
    check_keep,
    finished_beside,
    jobs_of,
    keep,
    read_outcomes,
    run_jobs,
)
from fkd_med.study.report import write_report

_DESCRIPTION = """Run a study: every arm on every cell (data set and teacher) with every seed, each a run of `fkd fit`.

What is finished is not run again, and a run that was killed goes on in the middle of its round, so give the same
command until it is done. Written into OUTPUT: a folder per run, RESULTS.md with all tables, results.csv and plots."""


def reproduce(arguments: list[str]) -> None:
    """Run a study, and write its tables and plots.

    Raises:
        ConfigError: a name in the study or on the command line is unknown; data or files are missing.
        RunError: the folder holds runs of another configuration, or another process works in it.
        SystemExit: 143 when time was up, 3 when a run failed; the tables of the others are written.
    """
    given = _parser().parse_args(arguments)
    study = read_study(Path(given.config))
    preset = study.preset(given.preset)
    output = Path(given.output or Path("results") / Path(given.config).stem / given.preset).expanduser()
    selection = Selection(given.cells, given.arms, given.seeds, _roots(given.data), without_images=given.tables)
    jobs = jobs_of(study, preset, Path(given.config).resolve().parent, output, selection)
    _check_files(file for job in jobs for file in job.configs)
    _check_files(file for job in jobs for file in job.files())  # what those name; they can be read now
    if given.tables and not output.is_dir():
        raise ConfigError(f"--output {output} is no folder, so there are no runs to make tables of.")
    console = wide_console(140)
    tally = Tally(left=[job for job in jobs if not job.finished])
    if given.keep is not None:
        check_keep(jobs, output, Path(given.keep))
    if not given.tables:
        read_outcomes(jobs, given.split)  # what is finished and cannot be read is told before others run
        _check_hardware(job for job in jobs if not job.finished)
    make_folder(output)
    if not given.tables:  # tables may be looked at while the study runs
        with locked(output / ".fkd-study-lock", f"The study {output}"):
            tally = run_jobs(jobs, console, given.minutes, given.jobs, devices=_devices(jobs, given.jobs))
    tables = Tables(study, jobs, read_outcomes(jobs, given.split), given.split, given.cells or preset.cells)
    _write(tables, jobs, output, console, arguments)
    if given.keep is not None:
        number = keep(jobs, output, Path(given.keep))
        console.print(f"Kept the rows of {number} runs in {given.keep}.", markup=False, soft_wrap=True)
    _end(tally, given.tables, console)


def _check_files(files: Iterable[Path]) -> None:
    for file in dict.fromkeys(files):
        check_configuration(file)


def _check_hardware(jobs: Iterable[Job]) -> None:
    """Refuse a study whose preset names an accelerator that is not here, before it runs anything."""
    from fkd_med.cli.hardware import check_accelerator  # imports torch, which tables can do without

    named = [(job.settings.get("trainer") or {}).get("accelerator") for job in jobs]
    for wanted in {name for name in named if isinstance(name, str)}:
        check_accelerator(wanted, "trainer.accelerator, in the preset's settings,")


def _devices(jobs: Iterable[Job], at_once: int) -> list[str]:
    """Return the GPUs that runs side by side share out, where each takes one and there are several."""
    trainers = [job.settings.get("trainer") or {} for job in jobs if not job.finished]
    if at_once == 1 or not all(t.get("accelerator") in ("gpu", "cuda") and t.get("devices") == 1 for t in trainers):
        return []
    import torch  # as above

    from fkd_med.federated.handover import visible_devices

    found = visible_devices({"devices": 1}, torch.device("cuda"))
    return found if len(found) > 1 else []


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        ConfigError: a key is unknown, missing or of another type; or names something that is not there.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--study", type=Study)
    content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict) or "arms" not in content:
        raise ConfigError(f"{path} is not a study: it has no `arms`. configs/paper.yaml is one.")
    settings = _taken_settings(content, path)
    study: Study = parser.instantiate_classes(parser.parse_object({"study": content}))["study"]
    for name, groups in settings.items():
        study.presets[name].settings = groups
    study.check()
    return study


def _taken_settings(content: dict[str, Any], path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Take the presets' settings out of a study's file: the parser would read their `init_args` as its own."""
    taken = {}
    presets = content.get("presets")
    for name, preset in presets.items() if isinstance(presets, dict) else ():
        groups = preset.pop("settings", {}) if isinstance(preset, dict) else {}
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise ConfigError(f"{path}: presets.{name}.settings must be groups of settings, each a mapping.")
        taken[name] = groups
    return taken


def _write(tables: Tables, jobs: list[Job], output: Path, console: Console, arguments: list[str]) -> None:
    other = finished_beside(output, jobs)
    if other:
        console.print(f"Finished and not asked for, so in no table: {', '.join(other)}.", markup=False, soft_wrap=True)
    if not tables.outcomes:
        console.print("No run is finished yet, so there are no tables.")
        return
    for sheet in tables.sheets():
        console.print(sheet)
        console.print()
    if tables.missing:
        console.print(f"Missing: {tables.missing_by_arm()}.", markup=False, soft_wrap=True)
    head = [f"Made by `fkd reproduce {shlex.join(arguments)}`.\n"]
    changed = [f"{job.name} ({', '.join(keys)})" for job in jobs if job.finished and (keys := job.changes())]
    if changed:
        head.append(f"**Made with another configuration than today's**: {'; '.join(changed)}.\n")
        console.print(head[-1].replace("**", ""), markup=False, soft_wrap=True, style="yellow")
    files = write_report(tables, output, head)
    console.print(f"Written to {output}: {', '.join(file.name for file in files)}", markup=False, soft_wrap=True)


def _end(tally: Tally, only_tables: bool, console: Console) -> None:
    """Say what failed and what is left, and end with an exit code that says the same."""
    for name, code in tally.failed.items():
        console.print(f"Failed with exit code {code}: {name}; its message is above.", style="red", markup=False)
    if tally.left and not only_tables:
        console.print(f"Time is up; {len(tally.left)} runs are left. The same command goes on.", markup=False)
        sys.exit(TERMINATED)
    if tally.failed:
        sys.exit(3)


def _roots(pairs: list[str] | None) -> dict[str, str]:
    roots = {}
    for pair in pairs or []:
        name, equals, folder = pair.partition("=")
        if not equals or not folder:
            raise ConfigError(f"--data {pair}: give NAME=FOLDER, such as --data cvc=/data/CVC-ClinicDB.")
        if name in roots:
            raise ConfigError(f"--data names {name!r} twice.")
        roots[name] = folder
    return roots


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fkd reproduce", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument("--config", type=str, required=True, help="The study: configs/paper.yaml.")
    parser.add_argument("--preset", type=str, required=True, help="Its size: tiny, cpu, long or paper.")
    parser.add_argument("--output", type=str | None, default=None, help="Folder; results/<study>/<preset>.")
    parser.add_argument("--data", type=str, nargs="+", default=None, help="Images: NAME=FOLDER ...")
    parser.add_argument("--cells", type=str, nargs="+", default=None, help="Only these: cvc/resunet ...")
    parser.add_argument("--arms", type=str, nargs="+", default=None, help="Only these arms.")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="In place of the preset's.")
    parser.add_argument("--minutes", type=float | None, default=None, help="Stop after so long; go on another time.")
    parser.add_argument(
        "--jobs", type=PositiveInt, default=1, help="So many runs at the same time; a GPU holds several."
    )
    parser.add_argument("--split", type=str, default="test", choices=["test", "val"], help="What the tables show.")
    parser.add_argument("--tables", action="store_true", help="Run nothing; make the tables of what is there.")
    parser.add_argument("--keep", type=str | None, default=None, help="Copy what tables need there: kB, no models.")
    return parser
