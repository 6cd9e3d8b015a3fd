"""Which checkpoint holds the best weights of a run: of one that has just trained, or of one on disk."""

from __future__ import annotations

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
    """Return the checkpoint that the run itself holds for its best, as last.ckpt says."""
    last = folder / "last.ckpt"
    if not last.is_file():
        return None
    for key, state in read_checkpoint(last).get("callbacks", {}).items():
        if str(key).startswith("ModelCheckpoint") and isinstance(state, dict):
            path = folder / Path(str(state.get("best_model_path", ""))).name
            if path.is_file():
                return path
    return None
