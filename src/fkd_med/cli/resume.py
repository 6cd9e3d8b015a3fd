"""A resume with a changed configuration: says what changed, and refuses what would make it another run.

Compared are two resolved configurations, the run's config.yaml as this version reads it and the one given now, so that
a default that a newer version added is no change. What may change is `fkd_med.cli.resume_rules`' table; the rest needs
``--resume.allow KEY``. config.yaml then is the configuration in force, config-started.yaml the one the run was started
with, and config-changes.csv says what changed after which round.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from fkd_med.checkpoints import read_checkpoint
from fkd_med.cli.changes import Change, differences, keys_of, plain_key
from fkd_med.cli.configuration import Plan
from fkd_med.cli.resume_rules import verdict
from fkd_med.cli.stored import closed, make_comparable, processes, settled_text, stored_configuration
from fkd_med.errors import ConfigError
from fkd_med.files import append_text, atomic_write_text
from fkd_med.rundir import RunDir

_OPTION = "--resume.allow"
_PROCESSES = {"trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"}
_CHANGES = "config-changes.csv"
_HEADER = "after,date,key,old,new\n"


def repeatable(arguments: Sequence[str]) -> list[str]:
    """Let ``--resume.allow`` be given several times, with one key, several between commas, or a list in brackets."""
    written, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == _OPTION and rest:
            argument = f"{_OPTION}={rest.pop(0)}"
        if argument.startswith(f"{_OPTION}="):
            keys = argument.removeprefix(f"{_OPTION}=").strip("[]").split(",")
            written += [f"{_OPTION}+={key.strip()}" for key in keys if key.strip()]
        else:
            written.append(argument)
    return written


def accepted_changes(parser: ArgumentParser, config: Namespace, plan: Plan) -> list[Change]:
    """Compare a resume's configuration with the run's, print what changed, and return it.

    Args:
        parser: of the command line.
        config: the whole configuration, settled.
        plan: which run is resumed from which checkpoint.

    Raises:
        ConfigError: something changed that decides what the run computes, and ``--resume.allow`` does not name it; or
            that names a key that did not change; or the run is longer already than it shall be.
        RunError: the run's own configuration is not there or cannot be read.
    """
    allowed = [plain_key(key) for key in config.fit.resume.allow or []]
    if not plan.resumes:
        _refuse_without_resume(allowed)
        return []
    old = stored_configuration(parser, plan.run_dir.config)
    new = yaml.safe_load(settled_text(parser, config, plan.derived))
    checkpoint = read_checkpoint(plan.checkpoint or "")
    _refuse_shorter(new, closed(checkpoint), plan.run_dir)
    make_comparable(old, new, plan.run_dir, checkpoint)
    changes = list(differences(old, new))
    _check_allowed(allowed, changes, {*keys_of(old), *keys_of(new)}, _earlier(plan.run_dir))
    _refuse([change for change in changes if not _may_change(change, allowed, plan)], changes, plan.run_dir)
    if changes:
        print("The run goes on with a changed configuration:")
        print("\n".join(f"  {change}" for change in changes))
    return changes


def check_processes(plan: Plan, changes: Sequence[Change], count: int) -> None:
    """See that a resume has as many processes as the run had, whatever `trainer.devices` leaves open.

    Args:
        plan: which run is resumed from which checkpoint.
        changes: what was accepted.
        count: how many processes it would have now.

    Raises:
        ConfigError: it would have another number, which changes bits, and no change of devices was accepted.
    """
    before = processes(read_checkpoint(plan.checkpoint or ""))
    accepted = {change.key for change in changes} | _earlier(plan.run_dir)
    if before in (None, count) or accepted & _PROCESSES:
        return
    raise ConfigError(
        f"The run {plan.run_dir.path} had {before} process{'es' * (before != 1)} and would go on with {count}, which "
        f"changes bits: give --trainer.devices {before} and the strategy it had, or, if you mean it, --trainer.devices "
        f"{count} {_OPTION} trainer.devices."
    )


def record_changes(run_dir: RunDir, changes: Sequence[Change], checkpoint: str | None) -> None:
    """Note accepted changes in the run directory, before its config.yaml is replaced; once, if a kill came between."""
    after = closed(read_checkpoint(checkpoint or "")) if changes else 0
    noted = {row[2]: row for row in _recorded(run_dir)}  # the last of each key
    news = [[str(after), change.key, change.old, change.new] for change in changes]
    news = [new for new in news if new != _undated(noted.get(new[1], []))]
    if not news:
        return
    started, path = run_dir.path / "config-started.yaml", run_dir.path / _CHANGES
    if not started.exists():
        atomic_write_text(started, run_dir.config.read_text(encoding="utf-8"))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([after, date, *rest] for _, *rest in news)
    append_text(path, ("" if path.exists() else _HEADER) + text.getvalue())


def _refuse_without_resume(allowed: Sequence[str]) -> None:
    if allowed:
        raise ConfigError(
            f"{_OPTION} {allowed[0]}: nothing is resumed, so no change has to be allowed. Leave it out, or give "
            "--ckpt_path last."
        )


def _refuse_shorter(new: Mapping[str, Any], done: int, run_dir: RunDir) -> None:
    federation = new.get("federation")
    key, part = "trainer.max_epochs", new["trainer"]
    if federation is not None:
        key, part = "federation.rounds", federation["init_args"]
    length = part.get(key.rpartition(".")[2])
    if length is not None and 0 <= length < done:
        raise ConfigError(
            f"{key} is {length}, and the run {run_dir.path} has closed {done}: give {done} or more, or start another "
            "run (another --run_dir)."
        )


def _may_change(change: Change, allowed: Sequence[str], plan: Plan) -> bool:
    if any(change.is_below(key) for key in allowed):
        return True
    if change.key == "data.root":  # the images are then compared with the run's manifest, file by file
        return ("data", "init_args", "manifest") in plan.derived
    return verdict(change.key) == "harmless"


def _check_allowed(allowed: Sequence[str], changes: Sequence[Change], known: set[str], earlier: set[str]) -> None:
    for key in allowed:
        if any(change.is_below(key) for change in changes) or _covers(key, earlier):
            continue
        if _covers(key, known):
            changed = ", ".join(change.key for change in changes) or "nothing"
            raise ConfigError(f"{_OPTION} {key}: it is as the run has it. Changed: {changed}. Leave the option out.")
        prefixes = {".".join(name.split(".")[:length]) for name in known for length in range(1, name.count(".") + 2)}
        close = difflib.get_close_matches(key, sorted(prefixes), n=3, cutoff=0.6)
        hint = f"Did you mean {' or '.join(close)}?" if close else "docs/configuration.md lists the keys."
        raise ConfigError(f"{_OPTION} {key}: there is no such key. {hint}")


def _covers(key: str, names: Iterable[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in names)


def _refuse(refused: Sequence[Change], changes: Sequence[Change], run_dir: RunDir) -> None:
    if not refused:
        return
    lines = [f"  {change}{'' if change in refused else '  (this may change)'}" for change in changes]
    options = " ".join(f"{_OPTION} {change.key}" for change in refused)
    raise ConfigError(
        f"This is not the configuration that the run {run_dir.path} has, and going on with it would make it another "
        f"run:\n" + "\n".join(lines) + f"\nGo on with the run's own (--config {run_dir.config}), start another run "
        f"(another --run_dir), or, if you mean it, accept: {options}"
    )


def _earlier(run_dir: RunDir) -> set[str]:
    """The keys that an earlier resume accepted: the same command may be given again."""
    return {row[2] for row in _recorded(run_dir)}


def _recorded(run_dir: RunDir) -> list[list[str]]:
    """The changes that earlier resumes noted: after, date, key, old, new; none if the file cannot be read."""
    try:
        rows = list(csv.reader(io.StringIO((run_dir.path / _CHANGES).read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError):
        return []
    return [row for row in rows[1:] if len(row) == 5]


def _undated(row: Sequence[str]) -> list[str]:
    return [*row[:1], *row[2:]]
