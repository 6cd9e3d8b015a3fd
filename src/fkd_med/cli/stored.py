"""The configuration that a run has, as this version reads its config.yaml, made comparable with one given now."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.callbacks.timer import Interval

from fkd_med.cli.configuration import saved_configuration
from fkd_med.cli.messages import explain_arguments
from fkd_med.cli.resume_rules import acting
from fkd_med.errors import RunError
from fkd_med.rundir import RunDir

_OPEN = "auto", -1, "-1", None  # trainer.devices: as many as the machine has

# A default of Lightning's Timer is declared as a word and is an enumeration, which no YAML file can hold.
yaml.SafeDumper.add_representer(Interval, lambda dumper, interval: dumper.represent_str(interval.value))


@contextmanager
def quiet_tuples() -> Iterator[None]:
    """Silence the notice that tuples of albumentations become lists and tuples again: nothing is lost."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*does not round-trip.*")
        yield


def settled_text(parser: ArgumentParser, config: Namespace, derived: Iterable[tuple[str, ...]]) -> str:
    """Return a settled configuration of `fkd fit` as config.yaml has it; `derived` keys are left open."""
    return saved_configuration(as_yaml(parser, config), "fit", set(derived))


def as_yaml(parser: ArgumentParser, config: Namespace) -> str:
    """Return all of a parsed configuration, without validating it once more, which takes half as long as parsing."""
    with quiet_tuples():
        text: str = parser.dump(config, skip_none=False, skip_link_targets=False, skip_validation=True)
    return text


def stored_configuration(parser: ArgumentParser, path: Path) -> dict[str, Any]:
    """Return the configuration of the run whose config.yaml this is, as this version of the program resolves it.

    Raises:
        RunError: the file is not there, or this version cannot read it.
    """
    if not path.is_file():
        raise RunError(
            f"{path} is not there, so nobody can tell whether this is the configuration that the run was started with. "
            "Restore it, or start afresh with --overwrite."
        )
    try:
        with quiet_tuples():
            config = parser.parse_args(["fit", "--config", str(path)])
    except (ArgumentError, OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path}, the configuration the run was started with, cannot be read by this version: "
            f"{explain_arguments(str(error))} Go on with the version that started the run, or mend the key there."
        ) from error
    settled: dict[str, Any] = yaml.safe_load(settled_text(parser, config, ()))
    return settled


def make_comparable(old: dict[str, Any], new: dict[str, Any], run_dir: RunDir, checkpoint: dict[str, Any]) -> None:
    """Leave out of both what is no choice: what follows from the run directory, and callbacks that only watch.

    Where the run left the number of threads or devices open and it is given now, the number that `checkpoint` used
    counts.
    """
    for settled in (old, new):
        _normalise(settled, run_dir)
    before, after = (_part(tree, "federation", "init_args") for tree in (old, new))
    if after.get("threads") is not None and "threads" in before and before["threads"] is None:
        before["threads"] = _federation_state(checkpoint).get("threads")
    before, after = (_part(tree, "trainer") for tree in (old, new))
    if before.get("devices") in _OPEN and str(after.get("devices")) == str(processes(checkpoint)):
        before["devices"] = after["devices"]


def closed(checkpoint: dict[str, Any]) -> int:
    """Return how many rounds, or epochs outside a federation, a checkpoint has behind it."""
    done = _part(checkpoint, "loops", "fit_loop", "epoch_progress", "current").get("processed", 0)
    return int(_federation_state(checkpoint).get("round", done))


def processes(checkpoint: dict[str, Any]) -> int | None:
    """Return how many processes wrote a checkpoint together; None of one that does not say."""
    count = _part(checkpoint, "fkd_med").get("processes")
    return count if isinstance(count, int) else None


def _normalise(settled: dict[str, Any], run_dir: RunDir) -> None:
    data, checkpoint = _part(settled, "data", "init_args"), _part(settled, "checkpoint")
    for part, name, path in ((data, "manifest", run_dir.manifest), (checkpoint, "dirpath", run_dir.checkpoints)):
        if part.get(name) and Path(part[name]).expanduser().resolve() == path.resolve():
            part[name] = None
    trainer, federation = _part(settled, "trainer"), _part(settled, "federation", "init_args")
    for part, name in ((trainer, "callbacks"), (federation, "client_callbacks")):
        part[name] = acting(part.get(name)) or None
    settled.pop("run_dir", None)


def _federation_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return _part(checkpoint, "loops", "fit_loop", "state_dict", "federation")


def _part(tree: Any, *names: str) -> dict[str, Any]:
    """Return an inner mapping; an empty one, part of nothing, if it is not there."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
