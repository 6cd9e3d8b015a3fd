"""Which checkpoint holds the best weights of a run: of one that has just trained, or of one on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from fkd_med.checkpoints import LastCheckpoint, read_checkpoint
from fkd_med.rundir import RunDir


def best_checkpoint(trainer: L.Trainer) -> str | None:
    """Return the best checkpoint of a fit, or the last; None tests the weights as they are."""
    federation = getattr(trainer, "federation", None)
    local = federation is not None and federation.keeps_students  # then the last one holds every client's own best
    folder = str(RunDir(trainer.default_root_dir).checkpoints.resolve())
    ours = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath == folder]
    chosen = [c for c in ours if isinstance(c, LastCheckpoint) == local] or trainer.checkpoint_callbacks
    path = getattr(chosen[0], "best_model_path", "") if chosen else ""
    if path and not Path(path).exists():  # the run directory was moved since
        path = str(Path(folder) / Path(path).name)
    return path if path and Path(path).exists() else None


def recorded_best(folder: Path) -> Path | None:
    """Return the checkpoint that the run itself holds for its best, as its latest checkpoint says."""
    latest = checkpoint_to_resume(folder)
    if latest is None:
        return None
    for key, state in read_checkpoint(latest).get("callbacks", {}).items():
        if str(key).startswith("ModelCheckpoint") and isinstance(state, dict):
            path = folder / Path(str(state.get("best_model_path", ""))).name
            if path.is_file():
                return path
    return None


def checkpoint_to_resume(folder: Path) -> Path | None:
    """Return the checkpoint that a run in this folder goes on from, None if no round was closed.

    It is the last one; the best where there is no last: the run was stopped in its first round, after one was written
    and before the other.
    """
    return latest_checkpoint(folder.glob("last*.ckpt")) or latest_checkpoint(folder.glob("*.ckpt"))


def latest_checkpoint(paths: Iterable[Path]) -> Path | None:
    """Return the checkpoint that closed most rounds (or steps); of equals, the shortest name: last.ckpt.

    What they hold decides, never when they were written: clocks go backwards, and copies have the time of copying.

    Raises:
        RunError: there are several, and one of them cannot be read.
    """
    found = sorted(paths, key=lambda path: (len(path.name), path.name))
    if len(found) < 2:
        return found[0] if found else None
    return max(found, key=lambda path: int(read_checkpoint(path).get("global_step", 0)))
