"""What the kept round is chosen by, and a run ended by: refused before training if it cannot be known, or is turned."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from fkd_med.errors import ConfigError, check_known
from fkd_med.modules import SegmentationModule

_SCORES = ("val/dice", "val/iou", "val/worst_dice", "val/loss")
_COUNTERS = ("step", "epoch")  # the last round (or epoch) is kept


def check_callbacks(callbacks: Iterable[L.Callback], module: L.LightningModule, clients: Iterable[str] | None) -> None:
    """Check what the user's own callbacks follow, as `check_monitor` does; ConfigError names the callback."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping | ModelCheckpoint):
            key = f"trainer.callbacks: {type(callback).__name__}."
            check_monitor(callback.monitor, callback.mode, module, clients, key)


def check_monitor(
    monitor: str | None,
    mode: str,
    module: L.LightningModule,
    clients: Iterable[str] | None,
    key: str = "checkpoint.",
) -> None:
    """Refuse a metric that no validation logs, and a direction that would keep the worst round.

    Args:
        monitor: the name of the metric; ``None`` chooses nothing.
        mode: ``max`` or ``min``.
        module: what is trained; a class of the user's own may log whatever it likes.
        clients: the hospitals of a federation; ``None`` without one, where training metrics are known too.
        key: what is before `monitor` and `mode` in messages.

    Raises:
        ConfigError: names the nearest metric, or the other direction.
    """
    if monitor is None:
        return
    known = [*_SCORES, *_COUNTERS, *(f"{client}/val_dice" for client in clients or ())]
    ours = isinstance(module, SegmentationModule) and type(module).__module__.startswith("fkd_med.")
    if ours and monitor not in known and not (clients is None and "/" in monitor and not monitor.startswith("val/")):
        check_known(f"{key}monitor", [monitor], known)
    right = "min" if monitor.endswith("loss") else "max" if monitor in known else mode
    if mode != right:
        raise ConfigError(
            f"{key}mode is {mode}, which takes the {'largest' if mode == 'max' else 'smallest'} {monitor} for the "
            f"best: give {'--' if key == 'checkpoint.' else ''}{key}mode {right}."
        )
