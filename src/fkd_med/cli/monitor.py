"""What `checkpoint.monitor` chooses the kept round by: refused before training if it cannot be known, or is turned."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L

from fkd_med.errors import ConfigError, check_known
from fkd_med.modules import SegmentationModule

_SCORES = ("val/dice", "val/iou", "val/worst_dice", "val/loss")
_COUNTERS = ("step", "epoch")  # the last round (or epoch) is kept


def check_monitor(monitor: str | None, mode: str, module: L.LightningModule, clients: Iterable[str] | None) -> None:
    """Refuse a metric that no validation logs, and a direction that would keep the worst round.

    Args:
        monitor: the name of the metric; ``None`` chooses nothing.
        mode: ``max`` or ``min``.
        module: what is trained; a class of the user's own may log whatever it likes.
        clients: the hospitals of a federation; ``None`` without one, where training metrics are known too.

    Raises:
        ConfigError: names the nearest metric, or the other direction.
    """
    if monitor is None:
        return
    known = [*_SCORES, *_COUNTERS, *(f"{client}/val_dice" for client in clients or ())]
    ours = isinstance(module, SegmentationModule) and type(module).__module__.startswith("fkd_med.")
    if ours and monitor not in known and not (clients is None and "/" in monitor and not monitor.startswith("val/")):
        check_known("checkpoint.monitor", [monitor], known)
    right = "min" if monitor.endswith("loss") else "max" if monitor in known else mode
    if mode != right:
        raise ConfigError(
            f"checkpoint.mode is {mode}, which keeps the round with the {'largest' if mode == 'max' else 'smallest'} "
            f"{monitor}: give --checkpoint.mode {right}."
        )
