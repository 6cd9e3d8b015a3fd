"""The run directory: what lies where, and who may write there.

``runs/<name>/{config.yaml, manifest.csv, journal/, checkpoints/, clients/<client>/, ledger.csv, absences.csv,
images.csv, metrics.csv, pictures/, shared-teachers/, student.ckpt}``, with a marker ``.fkd-run`` that says it is ours
and ``.fkd-lock`` while a process works in it. Only rank 0 creates, locks and writes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fkd_med.communication.messages import check_client_name
from fkd_med.errors import RunError
from fkd_med.files import LEFTOVER, append_text, atomic_write_bytes, atomic_write_text, make_folder, remove_leftovers
from fkd_med.locks import Holder, holder_of, locked

__all__ = ["RunDir", "append_text", "atomic_write_bytes", "atomic_write_text"]

_MARKER = ".fkd-run"
_LOCK = ".fkd-lock"
_FOLDERS = ("journal", "checkpoints", "clients", "pictures")
# Removed by --overwrite, in this order: once the first are gone, nobody can resume what is left of the old run.
_OURS = ("checkpoints", "journal", "student.ckpt", "clients", "ledger.csv", "absences.csv", "images.csv",
         "metrics.csv", "pictures", "shared-teachers", "report.md", "manifest.csv", "config.yaml",
         "config-started.yaml", "config-changes.csv", "wandb-id.txt")  # fmt: skip
# What a run that was interrupted in its first round takes up again: who has finished, and the teachers' curves.
_OF_FIRST_ROUND = ("journal", "clients", "metrics.csv")
_BASELINE = "local"  # the run inside a run in which every client trains alone


class RunDir:
    """One run's folder: its paths, its lock, and whether it may be started, resumed or overwritten.

    Example:
        ``with run.lock(): run.create(overwrite=False, resume=False); ...``

    Args:
        path: the folder; nothing is read or written until `lock` or `create`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Which image belongs to which client and split."""
        return self.path / "manifest.csv"

    @property
    def journal(self) -> Path:
        """Folder of the open round."""
        return self.path / "journal"

    @property
    def checkpoints(self) -> Path:
        """Folder of the closed rounds' checkpoints."""
        return self.path / "checkpoints"

    @property
    def clients(self) -> Path:
        """Folder with one folder per client."""
        return self.path / "clients"

    @property
    def shared_teachers(self) -> Path:
        """Folder of the teachers that partners share, one message each, as it travelled."""
        return self.path / "shared-teachers"

    @property
    def ledger(self) -> Path:
        """Bytes that travelled."""
        return self.path / "ledger.csv"

    @property
    def absences(self) -> Path:
        """Clients whose update is missing in a round, and why."""
        return self.path / "absences.csv"

    @property
    def images(self) -> Path:
        """Per-image scores, from which every table is made."""
        return self.path / "images.csv"

    @property
    def metrics(self) -> Path:
        """Logged curves."""
        return self.path / "metrics.csv"

    @property
    def pictures(self) -> Path:
        """Folder of pictures."""
        return self.path / "pictures"

    @property
    def wandb_id(self) -> Path:
        """The id of the Weights & Biases run that a resume goes on with."""
        return self.path / "wandb-id.txt"

    @property
    def student(self) -> Path:
        """The final student, all that `fkd predict` needs."""
        return self.path / "student.ckpt"

    def client(self, name: str) -> Path:
        """Return the folder of client `name`.

        Raises:
            DataError: `name` cannot name a client.
        """
        return self.clients / check_client_name(name)

    def exists(self) -> bool:
        """Return whether a run of ours lies here with anything in it."""
        return (self.path / _MARKER).is_file() and not self._is_empty()

    def check(self, overwrite: bool = False, resume: bool = False) -> None:
        """Say whether `create` would refuse, and change nothing: for before any long work.

        Raises:
            RunError: as `create`.
        """
        if overwrite and resume:
            raise RunError(f"{self.path}: resuming and overwriting exclude each other; give one of the two.")
        self._refuse_strangers()
        self._refuse_other_process()
        if resume and not self.exists():
            raise RunError(f"There is no run to resume in {self.path}. Start it without `--ckpt_path last`.")
        if not (overwrite or resume or self._is_empty()):
            raise RunError(
                f"The run {self.path} exists already. Continue it with `--ckpt_path last`, "
                "replace it with `--overwrite`, or choose another folder."
            )

    def begin(self, configuration: str, overwrite: bool = False, resume: bool = False) -> bool:
        """Make the folder ready for a run; tell whether it takes up one that was interrupted in its first round.

        Args:
            configuration: the resolved configuration, as `config` will hold it.
            overwrite: see `create`.
            resume: see `create`.

        Raises:
            RunError: as `create`.
        """
        try:
            same = not overwrite and self._is_empty() and self.config.read_text(encoding="utf-8") == configuration
        except (OSError, ValueError):
            same = False
        self.create(overwrite, resume, keep=_OF_FIRST_ROUND if same else ())
        return same

    def create(self, overwrite: bool = False, resume: bool = False, keep: Collection[str] = ()) -> None:
        """Make the folder ready for a run; all of it, or nothing.

        Args:
            overwrite: remove an earlier run's files first (only files a run writes; others stay).
            resume: continue the run that is here.
            keep: names of an earlier run's files that stay, if it is neither resumed nor overwritten.

        Raises:
            RunError: a run is here and neither was asked for; nothing to resume; the folder holds other things;
                another process uses it; it cannot be written. The message gives the remedy.
        """
        self.check(overwrite, resume)
        if resume:
            remove_leftovers(self.path)
        elif self.path.is_dir():
            remove_leftovers(self.path)
            self._remove_ours(keep)
        with self._nothing_half_made():
            atomic_write_text(self.path / _MARKER, json.dumps({"format": "fkd-med run", "version": 1}) + "\n")
            for folder in _FOLDERS:
                make_folder(self.path / folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out during the block. A folder made for it goes if the block fails and left it empty.

        Raises:
            RunError: another process works here, or the folder cannot be written.
        """
        self._refuse_strangers()
        with self._nothing_half_made():
            make_folder(self.path)
            with locked(self.path / _LOCK, f"The run {self.path}"):
                yield

    def _is_empty(self) -> bool:
        """Whether nothing is here that could be resumed or read: a run that ended before its first checkpoint."""
        if self.student.exists() or (self.path / "report.md").exists() or any(self.checkpoints.glob("*.ckpt")):
            return False
        ours = {*_OURS, _MARKER, _BASELINE, "wandb"}
        return not (self.path.is_dir() and _foreign(os.listdir(self.path)) - ours)

    def _is_bare(self) -> bool:
        """Whether nothing is here but our marker, lock and empty folders."""
        return not any(_foreign(files) - {_MARKER} for _, _, files in os.walk(self.path))

    def _refuse_strangers(self) -> None:
        """Refuse a file, and a folder with things in it that no run of ours made."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file, where a run's folder should be. Choose another folder.")
        if self.path.is_dir() and not (self.path / _MARKER).is_file() and _foreign(os.listdir(self.path)):
            raise RunError(
                f"{self.path} is not empty and is no run of fkd-med, so it is left alone. "
                "Choose another folder, or empty this one yourself."
            )

    def _refuse_other_process(self) -> None:
        holder = holder_of(self.path / _LOCK, f"The run {self.path}")
        if holder not in (None, Holder.this_process()):
            raise RunError(
                f"The run {self.path} is in use by process {holder.pid} on host {holder.host}. Wait for it or choose "
                f"another folder; if that process no longer runs, delete {self.path / _LOCK}."
            )

    def _remove_ours(self, keep: Collection[str] = ()) -> None:
        baseline = RunDir(self.path / _BASELINE)
        if (baseline.path / _MARKER).is_file():
            baseline._remove_ours()
        try:
            for name in (name for name in _OURS if name not in keep):
                path = self.path / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"Cannot remove the earlier run {self.path}: {error}. Remove it yourself.") from error

    @contextmanager
    def _nothing_half_made(self) -> Iterator[None]:
        """After an error in the block, remove what it made, unless a run has begun to write there."""
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        marked = (self.path / _MARKER).exists()
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if not marked and self._is_bare():
                    (self.path / _MARKER).unlink(missing_ok=True)
                    for name in _FOLDERS:
                        _remove_empty(self.path / name)
                for folder in made:
                    folder.rmdir()
            raise


def _foreign(names: Iterable[str]) -> set[str]:
    """The names that are neither a lock nor what a killed write left."""
    return {name for name in names if name != _LOCK and not LEFTOVER.fullmatch(name)}


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
