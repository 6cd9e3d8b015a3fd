"""Where a training stands in the whole run, and the schedule that follows it.

A federated client gets a fresh optimizer and scheduler every round. So that a schedule spans the whole run and
not one round, a module is told its `RunClock`, and its scheduler is advanced to that place before training.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial

from lightning import LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass(frozen=True)
class RunClock:
    """The place of one training inside the whole run.

    Args:
        round: the current round, counted from 1; 0 outside a federation.
        step: optimizer steps a client that took part in every round has done before this training.
        epoch: the same in epochs.
        total_steps: optimizer steps of the whole run for one client.
        rounds: rounds of the whole run.
    """

    round: int = 0
    step: int = 0
    epoch: int = 0
    total_steps: int | None = None
    rounds: int = 0

    @property
    def progress(self) -> float:
        """The share of the run that has passed: 0 in the first round, 1 in the last."""
        return min(1.0, (self.round - 1) / (self.rounds - 1)) if self.round > 0 and self.rounds > 1 else 0.0


def set_clock(module: LightningModule, clock: RunClock) -> None:
    """Tell a module, ours or a user's own, where its training stands: its attribute `clock`, in no state dict."""
    vars(module)["clock"] = clock  # what nn.Module does with anything but tensors and modules


class WarmupCosine(LambdaLR):
    """Linear warm-up, then one cosine from the optimizer's learning rate to a floor, over the whole run.

    The length is not configured: it is rounds x local steps in a federation, all optimizer steps otherwise.

    Args:
        optimizer: whose learning rates are scaled.
        warmup: share of the run, 0 to 1, in which the rate rises linearly from 0.
        floor: final rate as a share of the initial one.
        total_steps: length in optimizer steps; filled in by the module.
    """

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.0, floor: float = 0.0, total_steps: int | None = None
    ) -> None:
        self.warmup, self.floor, self.total_steps = warmup, floor, total_steps
        super().__init__(optimizer, partial(_factor, warmup=warmup, floor=floor, total=total_steps or 1))


def _factor(step: int, warmup: float, floor: float, total: int) -> float:
    """Return the multiple of the initial rate at an optimizer step of the run.

    No method of the scheduler: that cycle would keep the optimizer, thus the weights, until garbage is collected.
    """
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    progress = min(1.0, (step - rise) / max(1.0, total - rise))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def advance(scheduler: LRScheduler, steps: int) -> None:
    """Step a fresh scheduler `steps` times, as if that much of the run had passed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of steps before the optimizer's first: meant here
        for _ in range(steps):
            scheduler.step()


def progress_of(clock: RunClock, trainer: Trainer | None) -> float:
    """Return the share of the run that has passed: of its rounds; outside a federation, of its epochs or steps."""
    if clock.rounds:
        return clock.progress
    if trainer is None:
        return 0.0
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    if epochs > 1:
        return min(1.0, trainer.current_epoch / (epochs - 1))
    return min(1.0, trainer.global_step / steps) if steps > 0 else 0.0
