"""Which of Lightning's strategies a run can have: one device, or DDP whose processes run the whole command.

Strategies that spawn or fork begin a process anew inside each fit, and a run has many: one per teacher, client and
round. Sharded models are no client's: an update is a whole student.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from fkd_med.errors import ConfigError

_NAMES = "auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"
_INSIDE = "_spawn", "_fork", "_notebook"


def check_strategy(strategy: Any, federated: bool) -> None:
    """Refuse a strategy by its name or class, before a trainer is built with it.

    Raises:
        ConfigError: names it and what to use.
    """
    if isinstance(strategy, str):
        bad = any(part in strategy for part in _INSIDE) or (federated and strategy not in _NAMES)
        name = strategy
    else:
        fits = strategy is None or isinstance(strategy, DDPStrategy | SingleDeviceStrategy)
        inside = getattr(strategy, "_start_method", "popen") != "popen"
        bad, name = inside or (federated and not fits), type(strategy).__name__
        name += f" (start_method {strategy._start_method})" if inside else ""
    if bad:
        where = "inside a federation" if federated else "here: it starts processes in the middle of a command"
        raise ConfigError(f"trainer.strategy {name} cannot run {where}: use ddp, or one device.")


def check_batch_norm(trainer: L.Trainer, sync_batchnorm: Any) -> None:
    """Refuse to synchronise BatchNorm between processes without GPUs, which torch cannot.

    Raises:
        ConfigError: says what happens without it.
    """
    if sync_batchnorm and trainer.world_size > 1 and isinstance(trainer.accelerator, CPUAccelerator):
        raise ConfigError(
            "trainer.sync_batchnorm needs GPUs: remove it. Each process then normalises its own part of a batch, and "
            "in a federation the statistics are averaged after each client's training."
        )


def check_parallel(trainer: L.Trainer, parallel: int) -> None:
    """Refuse clients side by side whose training takes several devices each.

    Raises:
        ConfigError: names both keys.
    """
    if parallel > 1 and trainer.world_size > 1:
        raise ConfigError(
            f"federation.parallel is {parallel}, and a client's training takes {trainer.world_size} devices "
            "(trainer.devices, trainer.num_nodes): set trainer.devices: 1, or federation.parallel: 1."
        )
