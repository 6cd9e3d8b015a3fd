"""In which folders a run was recorded for Weights & Biases: one by each process that worked on it, in their order.

wandb-id.txt has the run's id as its first line, and a folder per line after it. The order is written down, since names
of folders have the time in them and clocks may go backwards.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fkd_med.errors import RunError
from fkd_med.files import atomic_write_text
from fkd_med.rundir import RunDir
from fkd_med.tracking import WandbLogger


def recorded_parts(run_dir: RunDir) -> tuple[str | None, list[str]]:
    """Return the id of the run's Weights & Biases run, and the folders it was recorded in; no id if there is none.

    Raises:
        RunError: the file does not hold an id, which W&B would take for a path.
    """
    path = run_dir.wandb_id
    if not path.is_file():
        return None, []
    first, *folders = path.read_text(encoding="utf-8", errors="replace")[:100_000].splitlines() or [""]
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}\s*", first):
        raise RunError(f"{path} holds no id of a Weights & Biases run. Remove it: the curves then go on in a new run.")
    return first.strip(), [str(run_dir.path / folder) for folder in folders if folder]


def record_part(run_dir: RunDir, logger: WandbLogger) -> None:
    """Add the folder of this process, before anything is trained: a killed process cannot."""
    identity, folders = recorded_parts(run_dir)
    if identity != logger.run_id:
        folders = []
    paths = folders + [logger.folder] * logger.is_offline
    relative = [os.path.relpath(Path(path).resolve(), run_dir.path.resolve()) for path in paths]
    atomic_write_text(run_dir.wandb_id, "\n".join([logger.run_id, *dict.fromkeys(relative)]) + "\n")
