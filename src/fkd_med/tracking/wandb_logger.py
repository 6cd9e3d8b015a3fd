"""Weights & Biases: Lightning's logger that never hangs without an account, and says how to sync later."""

from __future__ import annotations

import netrc
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from glob import escape as glob_escape
from glob import glob
from typing import Any
from urllib.parse import urlparse

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from fkd_med.errors import RunError, first_line

_PUBLIC = "https://api.wandb.ai"  # which versions of wandb name otherwise, for the same accounts


def has_account() -> bool:
    """Tell whether this machine knows a Weights & Biases key; it asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:  # where `wandb login` writes; asked of no library of theirs, since that would open a session
        known = netrc.netrc(os.environ.get("NETRC"))
        return any(known.authenticators(urlparse(url).hostname or "") for url in _servers())
    except (OSError, netrc.NetrcParseError):
        return False


def _servers() -> list[str]:
    """Return the servers that a run would be sent to: one's own, or the public one under each of its names."""
    own = os.environ.get("WANDB_BASE_URL")
    return [own] if own else [wandb.Settings().base_url, _PUBLIC]


class WandbLogger(LightningWandbLogger):
    """Records a run in Weights & Biases, offline when no key is known.

    Args:
        project: the project in which runs are compared.
        name: the run's name; the run directory's when left out.
        save_dir: where files lie; the run directory when left out.
        offline: true records to disk only, false demands a key, null decides by whether a key is known.
        kwargs: those of Lightning's WandbLogger and of ``wandb.init``.
    """

    def __init__(
        self,
        project: str = "fkd-med",
        name: str | None = None,
        save_dir: str | None = None,
        offline: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self._environment = os.environ.get("WANDB_MODE")
        disabled = self._environment in ("disabled", "offline", "dryrun")
        if offline is None:
            offline = disabled or not has_account()
        if offline:  # said to wandb itself: it may have read WANDB_MODE already, which is all that Lightning sets
            kwargs["mode"] = "offline" if self._environment != "disabled" else "disabled"
        if kwargs.get("settings") is None:
            kwargs["settings"] = wandb.Settings(silent=bool(offline), console="off")
        super().__init__(project=project, name=name, save_dir=save_dir or ".", offline=offline, **kwargs)
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)  # wandb warns of the mere word
        self._own_save_dir = save_dir is not None
        self._on_teacher_axis: set[str] = set()
        self._earlier: list[str] = []

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb's own; asking for it opens it.

        Raises:
            RunError: the server cannot be reached, does not know the key, or refuses the run.
        """
        try:
            return super().experiment
        except wandb.Error as error:
            why = first_line(error).rstrip(".")
            raise RunError(
                f"Weights & Biases ({_servers()[0]}) cannot record this run: {why}. With WANDB_MODE=offline it is "
                "recorded on disk, to be uploaded later; with --trainer.logger false not at all."
            ) from error

    @property
    def run_id(self) -> str:
        """The run's id in Weights & Biases."""
        return str(self._wandb_init["id"])

    def place(self, run_dir: str, name: str, run_id: str | None = None, earlier: Sequence[str] = ()) -> None:
        """Put the files of a run that was not told where into its run directory; `run_id` goes on with that run.

        Args:
            run_dir: the run directory.
            name: the run's name, where none is configured.
            run_id: the id of a run to go on with.
            earlier: the folders in which earlier processes recorded that run, in their order.
        """
        self._earlier = list(earlier)
        if self._wandb_init.get("id") is None:
            self._id = self._wandb_init["id"] = run_id or secrets.token_hex(4)
        if not self._own_save_dir:
            # W&B's own process writes the files, and keeps the working directory in which it was started.
            self._save_dir = self._wandb_init["dir"] = os.path.abspath(run_dir)
        if self._wandb_init.get("name") is None:
            self._name = self._wandb_init["name"] = name

    @property
    def is_offline(self) -> bool:
        """Whether the run is recorded to disk only, to be uploaded later."""
        return bool(self._offline)

    @property
    def folder(self) -> str:
        """The folder that this process records the run in; asking for it opens the run."""
        return os.path.dirname(str(self.experiment.dir))

    @rank_zero_only
    def log_teacher(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log a teacher's metrics on their own axis: ``teacher/epoch``."""
        for name in metrics.keys() - self._on_teacher_axis:  # by name: the logger's own pattern `*` matches them too
            self.experiment.define_metric(name, step_metric="teacher/epoch")
        self._on_teacher_axis |= metrics.keys()
        self.experiment.log({**metrics, "teacher/epoch": epoch})

    @rank_zero_only
    def close(self, console: Console | None = None) -> None:
        """End the run, so that a later one in this process gets its own; say how to sync an offline one."""
        if self._experiment is not None:
            folder = os.path.dirname(str(self._experiment.dir))
            offline = self.is_offline
            self._experiment.finish()
            self._experiment = None
            if offline and console is not None:
                for line in self._sync_lines(folder):
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
        if self._environment is None:
            os.environ.pop("WANDB_MODE", None)
        else:
            os.environ["WANDB_MODE"] = self._environment

    def _sync_lines(self, folder: str) -> list[str]:
        """Say how to upload what was recorded offline: a command for each part of the run, in their order."""
        parts = [part for part in self._earlier if part != folder and _waits(part)] + [folder]
        commands = [f"wandb sync {shlex.quote(os.path.relpath(part))}" for part in parts]
        if len(commands) == 1:
            return [f"Weights & Biases: recorded offline; upload it with:  {commands[0]}"]
        return [
            f"Weights & Biases: recorded offline, one run in {len(commands)} parts; upload them in this order:",
            *(f"  {command}" for command in commands),
        ]


def _waits(folder: str) -> bool:
    """Tell whether a folder holds an offline recording that was not uploaded yet.

    The recording itself may appear late: another process writes it.
    """
    uploaded = glob(os.path.join(glob_escape(folder), "*.wandb.synced"))
    return os.path.basename(folder).startswith("offline-") and os.path.isdir(folder) and not uploaded
