"""How a teacher's training goes, epoch by epoch: for the log, the loggers and the note beside the teacher."""

from __future__ import annotations

from typing import Any

import lightning as L

from fkd_med.federated.progress import Reporter
from fkd_med.ranks import mean_of_ranks


class TeacherCurve(L.Callback):
    """Reports each epoch of a teacher's training, on the teacher's own step axis: epochs."""

    def __init__(self, name: str, epochs: int, reporter: Reporter, log: Any = None) -> None:
        # Not `self.log`: Lightning puts its own there, on every callback.
        self.name, self.epochs, self.reporter, self.send = name, epochs, reporter, log
        self.rows: list[dict[str, float]] = []

    @property
    def best(self) -> float:
        """The best validation Dice so far; of an interrupted training too, even if nothing was left to train."""
        return max([row["val/dice"] for row in self.rows if "val/dice" in row], default=float("nan"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count epochs that an earlier, interrupted training has done."""
        self.reporter.skip(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch, and print the last one; where there is no bar, others too, one a minute."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k in ("val/dice", "val/loss")}
        if "train/loss_epoch" in trainer.callback_metrics:
            metrics["train/loss"] = float(trainer.callback_metrics["train/loss_epoch"])
        epoch, metrics = trainer.current_epoch + 1, mean_of_ranks(metrics)
        self.rows.append({"epoch": epoch, **metrics})
        if self.send is not None and trainer.is_global_zero:
            self.send({f"teacher/{self.name}/{k}": v for k, v in metrics.items()}, epoch)
        self.reporter.advance()
        left = self.reporter.time_left()
        scores = f"best validation Dice {self.best:.3f}"
        scores += f", {left} left for teachers" if left not in ("", "0:00") else ""
        if epoch == self.epochs:
            self.reporter.line(f"teacher of {self.name}: {epoch} epoch{'s' * (epoch > 1)}, {scores}")
        else:
            self.reporter.line_if_long(f"teacher of {self.name}: epoch {epoch}/{self.epochs}, {scores}")

    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curve of an interrupted training."""
        self.rows = list(state_dict["rows"])
