"""What a person sees while a run lasts: stage, round, client, loss, Dice, time left."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fkd_med.ranks import is_first_rank, mean_of_ranks

LONG = 60.0  # seconds without a line after which a log, which shows no bar, is told of unfinished pieces
REFRESH = 0.5  # seconds between two looks at the loss
VERY_LONG = 600.0  # and after which it is told what would stand beside the bar


def format_seconds(seconds: float) -> str:
    """Format a duration as 1:05 or 2:03:10."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Reporter:
    """Shows a live bar on a terminal, and a line for each finished piece of work everywhere.

    Args:
        console: where to write; standard output when left out.
        enabled: False is silence.
    """

    def __init__(self, console: Console | None = None, enabled: bool = True) -> None:
        self.console = console or Console(highlight=False)
        self.enabled = enabled and is_first_rank()
        self._progress: Progress | None = None
        self._task: Any = None
        self._units = self._done = self._skipped = 0
        self._started = 0.0
        self._spoke = time.monotonic()

    def begin(self, stage: str, units: int) -> None:
        """Start a stage of `units` equal pieces (teacher epochs, rounds x clients); 0 if nobody knows how many."""
        self.end()
        self._units, self._done, self._skipped, self._started = units, 0, 0, time.monotonic()
        if not self.enabled:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(stage, total=units or None)

    def show(self, text: str) -> None:
        """Change the text beside the bar; where there is none, print it if nothing was printed for ten minutes."""
        if self._progress is not None:
            self._progress.update(self._task, description=text)
        if self._silent_for(VERY_LONG):
            self.line(text)

    def advance(self, units: int = 1) -> None:
        """Count finished pieces."""
        self._done += units
        if self._progress is not None:
            self._progress.advance(self._task, units)

    def skip(self, units: int) -> None:
        """Count pieces that were there already: they took no time, so they say nothing of the pace."""
        self._skipped += units
        self.advance(units)

    def time_left(self) -> str:
        """Return the time left in this stage, from the pace so far; empty before the first piece is done."""
        worked = self._done - self._skipped
        if not (worked > 0 and self._units):
            return ""
        pace = (time.monotonic() - self._started) / worked
        return format_seconds(pace * max(0, self._units - self._done))

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._spoke = time.monotonic()
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def line_if_long(self, text: str) -> None:
        """Print a line where there is no bar and none was printed for a minute."""
        if self._silent_for(LONG):
            self.line(text)

    def _silent_for(self, seconds: float) -> bool:
        return not self.console.is_terminal and time.monotonic() - self._spoke > seconds

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def batches_left(trainer: L.Trainer) -> int:
    """Return how many batches a training still has before it, as far as that is known; otherwise 0."""
    epochs, steps, batches = trainer.max_epochs or 0, trainer.max_steps, trainer.num_training_batches
    known = []
    if epochs > 0 and batches != float("inf"):
        known.append((epochs - trainer.current_epoch) * batches)
    if steps > 0:
        known.append((steps - trainer.global_step) * trainer.accumulate_grad_batches)
    return int(min(known, default=0))


class LossOnBar(L.Callback):
    """Shows how far an inner Trainer is, and its running loss, beside the bar."""

    def __init__(self, reporter: Reporter, text: str) -> None:
        self.reporter, self.text = reporter, text
        self._last = 0.0
        self._batches = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note how many batches there are in all."""
        left = batches_left(trainer)
        self._batches = f"/{trainer.fit_loop.total_batch_idx + 1 + left}" if left else ""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Refresh twice a second: reading a loss waits for the device."""
        now = time.monotonic()
        if now - self._last > REFRESH:
            self._last = now
            loss = trainer.callback_metrics.get("train/loss_step", trainer.callback_metrics.get("train/loss"))
            batch = f"batch {trainer.fit_loop.total_batch_idx + 1}{self._batches}"
            parts = [self.text, batch, f"loss {float(loss):.3f}" if loss is not None else ""]
            self.reporter.show(" · ".join(part for part in parts if part))


class EpochProgress(LossOnBar):
    """Tells of a training without a federation what is told of rounds: a bar of its batches, a line for each epoch."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(reporter, "")
        self._validated = -1  # the epoch whose scores are in the trainer's metrics

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with what is left to train, as far as that is known."""
        super().on_train_start(trainer, pl_module)
        self.reporter.begin("batches", batches_left(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Count the batch."""
        self.reporter.advance()
        super().on_train_batch_end(trainer, pl_module, *args)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the scores are of this epoch."""
        self._validated = -1 if trainer.sanity_checking else trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of an epoch."""
        shown, last = trainer.callback_metrics, trainer.max_epochs or -1
        epoch = trainer.current_epoch + 1
        text = f"epoch {epoch}" + (f"/{last}" if last > 0 else "")
        if "train/loss" in shown:
            text += f" · loss {mean_of_ranks({'loss': float(shown['train/loss'])})['loss']:.3f}"
        if "val/dice" in shown and self._validated == trainer.current_epoch:
            end = "/val_dice"
            each = ", ".join(f"{k.removesuffix(end)} {float(v):.3f}" for k, v in shown.items() if k.endswith(end))
            text += f" · Dice {float(shown['val/dice']):.3f}" + (f" ({each})" if each else "")
        left = self.reporter.time_left() if epoch != last else ""
        self.reporter.line(text + (f" · {left} left" if left else ""))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say why training ends before its last epoch; Lightning's own notices are muted."""
        self.reporter.end()
        if trainer.current_epoch == trainer.max_epochs:
            return
        if trainer.should_stop:
            self.reporter.line(f"stopped after epoch {trainer.current_epoch}: a callback or max_time asked for it")
        elif trainer.global_step == trainer.max_steps:
            self.reporter.line(f"stopped after {trainer.global_step} steps: max_steps")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the bar away: Lightning calls no `teardown` then."""
        self.reporter.end()
