"""Settles what a configuration leaves open: the run's folder, checkpoint, seed and split."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from fkd_med.cli.best_weights import checkpoint_to_resume, latest_checkpoint, recorded_best
from fkd_med.cli.shapes import find_class
from fkd_med.data import FederatedDataModule
from fkd_med.errors import ConfigError, RunError
from fkd_med.ranks import is_first_rank
from fkd_med.rundir import RunDir


@dataclass
class Plan:
    """What a command is about to do in which run directory, settled before anything is built.

    Attributes:
        run_dir: the run's folder.
        asked_for: the checkpoint as the user named it, if at all.
        checkpoint: its file, or that of the run's best weights for a command that scores.
        resumes: whether `fkd fit` goes on with the run that is there.
        derived: keys filled in from others; a saved configuration leaves them open.
    """

    run_dir: RunDir
    asked_for: str | None
    checkpoint: str | None
    resumes: bool
    derived: set[tuple[str, ...]]


def settle(config: Namespace, command: str, files: list[str]) -> Plan:
    """Fill in what a configuration leaves open, and say what the command will do.

    A resumed or scored run keeps its own seed and deals the images as its own manifest says, whatever lies in the
    data folder by now.

    Args:
        config: the configuration of the command; changed.
        command: fit, validate, test or teachers.
        files: the configuration files, which name a run without a folder.

    Raises:
        RunError: the checkpoint asked for does not exist, or the run's manifest is gone.
    """
    run_dir = RunDir(Path(config.run_dir or Path("runs") / _run_name(files)).expanduser())
    config.run_dir = config.trainer.default_root_dir = str(run_dir.path)
    derived: set[tuple[str, ...]] = {("trainer", "default_root_dir")}
    if config.checkpoint.dirpath is None:
        config.checkpoint.dirpath = str(run_dir.checkpoints)
        derived.add(("checkpoint", "dirpath"))
    asked_for = config.get("ckpt_path")
    checkpoint = _checkpoint(config, command, asked_for)
    plan = Plan(run_dir, asked_for, checkpoint, command == "fit" and checkpoint is not None, derived)
    if plan.resumes or command in ("validate", "test"):
        config.seed_everything = _stored_seed(run_dir.config, config.seed_everything)
        if _take_stored_manifest(config, run_dir):
            derived.add(("data", "init_args", "manifest"))
    return plan


def refuse_inside_data(run_dir: Path, data: FederatedDataModule) -> None:
    """Refuse a run directory among the images or masks: its pictures would be images of the next run.

    Raises:
        ConfigError: names both folders.
    """
    run = os.path.realpath(run_dir)
    for folder in data.folders():
        if os.path.commonpath([run, folder]) == folder:
            raise ConfigError(
                f"run_dir {run_dir} lies in {folder}, among the data, where later runs would find its pictures. "
                "Choose a folder outside."
            )


def saved_configuration(text: str, command: str, derived: set[tuple[str, ...]]) -> str:
    """Return the configuration of one command, as a file that --config takes; `derived` keys are left open."""
    whole = yaml.safe_load(text)
    part = dict(whole.get(command, whole))
    for name in ("config", "ckpt_path", "overwrite", "resume"):
        part.pop(name, None)
    for *path, last in derived:
        inner = part
        for name in path:
            inner = inner[name]
        inner[last] = None
    return yaml.safe_dump(part, sort_keys=False, allow_unicode=True)


def _run_name(files: list[str]) -> str:
    """Name a run after its first configuration: cvc_clinicdb/fkd_resunet.yaml gives cvc_clinicdb_fkd_resunet."""
    if not files:
        return "fkd"
    path = Path(files[0]).resolve()
    folder = path.parent.name
    return path.stem if folder in ("", "configs") else f"{folder}_{path.stem}"


def _checkpoint(config: Namespace, command: str, asked: str | None) -> str | None:
    """Return the file of the checkpoint asked for; a command that scores takes the best of the run when none is."""
    folder = Path(config.checkpoint.dirpath)
    if asked in (None, "best") and command in ("validate", "test"):
        asked = "last" if _keeps_students(config) else "best"  # the last one holds every client's own best
    if asked is None:
        return None
    if asked not in ("last", "best"):
        if not Path(asked).is_file():
            raise RunError(f"The checkpoint {asked} does not exist. Give a file, `last` or `best`.")
        return asked
    if asked == "last":
        found = checkpoint_to_resume(folder)
    else:
        found = recorded_best(folder) or latest_checkpoint(folder.glob("best*.ckpt"))
    if found is None:
        raise RunError(
            f"There is no {asked} checkpoint in {folder}. Start the run without --ckpt_path, or give the "
            "run_dir of the run that is meant."
        )
    return str(found)


def _keeps_students(config: Namespace) -> bool:
    """Tell whether every client of a federation keeps a student of its own."""
    federation = config.get("federation")
    if federation is None:
        return False
    aggregator = federation.init_args.get("aggregator")
    return aggregator is None or not getattr(find_class(aggregator["class_path"]), "weights_travel", True)


def _take_stored_manifest(config: Namespace, run_dir: RunDir) -> bool:
    """Give the data module the run's manifest unless the user names one; tell whether it was given.

    Raises:
        RunError: the run has lost it, so that nobody knows which images it was trained on.
    """
    data = config.get("data")
    arguments = data.get("init_args") if data is not None else None
    if arguments is None or arguments.get("manifest", "") is not None:
        return False
    if run_dir.manifest.is_file():
        arguments.manifest = str(run_dir.manifest)
        return True
    if run_dir.config.is_file():
        raise RunError(
            f"{run_dir.manifest} is missing. It says which images the run was trained on: dealt anew, some of them "
            "would be tested. Restore it, or name a copy: --data.manifest FILE."
        )
    return False


def _stored_seed(config: Path, given: Any) -> Any:
    """Return the seed of the run whose config.yaml this is, or the one given if there is none."""
    try:
        seed = yaml.safe_load(config.read_text()).get("seed_everything")
    except (OSError, yaml.YAMLError, AttributeError):
        return given
    if not isinstance(seed, int) or isinstance(seed, bool) or seed == given:
        return given
    if is_first_rank():
        print(f"The run was started with seed {seed}; it goes on with that seed.")
    return seed
