"""metrics.csv: every logged number as one line ``step,name,value``, appended, never rewritten but for a resume.

Lightning's own CSV logger deletes the file of an earlier process when a run is resumed.
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from fkd_med.errors import RunError
from fkd_med.files import append_text, atomic_write_text

_HEADER = "step,name,value\n"


class MetricsCSV(Logger):
    """Writes curves to metrics.csv; a step is a round in a federation, an optimizer step otherwise.

    Names that begin with ``teacher/`` have epochs of that teacher as their step.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Nothing: a run directory holds one run."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self.path

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line per metric."""
        self._append({k: v for k, v in metrics.items() if k != "epoch"}, 0 if step is None else step)

    @rank_zero_only
    def log_teacher(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Append a teacher's metrics after one of its epochs."""
        self._append(metrics, epoch)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds them."""

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forget lines of later steps, which a resumed run writes again; teachers' lines stay."""
        if not self.path.exists():
            return
        try:
            lines = list(csv.reader(self.path.read_text().splitlines()[1:]))
            whole = [line for line in lines if len(line) == 3]
            kept = [line for line in whole if line[1].startswith("teacher/") or int(line[0]) <= step]
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{self.path} cannot be read ({error}). Restore it, or remove it to go on.") from error
        atomic_write_text(self.path, _HEADER + _format(kept))

    def _append(self, metrics: Mapping[str, float], step: int) -> None:
        rows = [[step, name, repr(_number(value))] for name, value in sorted(metrics.items())]
        if rows:
            new = not self.path.exists() or self.path.stat().st_size == 0
            append_text(self.path, (_HEADER if new else "") + _format(rows))


def _number(value: float | Tensor) -> float:
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def _format(rows: list[list[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
