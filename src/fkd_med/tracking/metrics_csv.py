"""metrics.csv: every logged number as one line ``step,name,value``, appended, never rewritten but for a resume.

Lightning's own CSV logger deletes the file of an earlier process when a run is resumed.
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
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
        self._teachers: set[str] = set()

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
        """Append a teacher's metrics after one of its epochs.

        A process that was killed may have logged an epoch, and not yet have saved it: it comes again.
        """
        new = metrics.keys() - self._teachers
        if new:
            self._teachers |= new
            self._keep(lambda step, name: name not in new or step < epoch)
        self._append(metrics, epoch)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds them."""

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forget lines of later steps, which a resumed run writes again; teachers' lines stay."""
        self._keep(lambda at, name: name.startswith("teacher/") or at <= step)

    @rank_zero_only
    def drop_tests(self) -> None:
        """Forget the lines of a test, which is made again."""
        self._keep(lambda _, name: not (name.startswith("test/") or name.endswith("/test_dice")))

    def _keep(self, wanted: Callable[[int, str], bool]) -> None:
        """Rewrite the file without the lines that are not wanted, and without torn ones."""
        if not self.path.exists():
            return
        try:
            lines, torn = _lines(self.path)
            kept = [line for line in lines if len(line) == 3 and wanted(int(line[0]), line[1])]
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{self.path} cannot be read ({error}). Restore it, or remove it to go on.") from error
        if torn or kept != lines:
            atomic_write_text(self.path, _HEADER + _format(kept))

    def _append(self, metrics: Mapping[str, float], step: int) -> None:
        rows = [[step, name, repr(_number(value))] for name, value in sorted(metrics.items())]
        if rows:
            new = not self.path.exists() or self.path.stat().st_size == 0
            append_text(self.path, (_HEADER if new else "") + _format(rows))


def read_metrics(path: Path) -> Iterator[tuple[int, str, float]]:
    """Yield step, name and value of each whole line of a metrics.csv.

    Raises:
        RunError: it cannot be read.
    """
    try:
        for line in _lines(path)[0]:
            if len(line) == 3:
                yield int(line[0]), line[1], float(line[2])
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error}). Restore it, or remove it to do without.") from error


def _lines(path: Path) -> tuple[list[list[str]], str]:
    """Return the lines below the header, and what a crash left of the last one."""
    whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
    return list(csv.reader(whole.splitlines()[1:])), torn


def _number(value: float | Tensor) -> float:
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def _format(rows: list[list[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
