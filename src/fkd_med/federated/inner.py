"""The Trainers inside a run: one for each client and round, one for each teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any

import lightning as L
from lightning.fabric.utilities import registry

from fkd_med.federated.quiet import quiet

# What an inner Trainer takes over from the run's: hardware and numerics, never logging or checkpointing.
INNER_FLAGS = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "sync_batchnorm",
    "deterministic",
    "benchmark",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "use_distributed_sampler",
    "limit_train_batches",
)


def as_list(value: Any) -> list[Any]:
    """Return a Trainer's argument that may be one thing, several or none as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def inner_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the flags an inner Trainer takes over; before the run's Trainer has used them, since it changes some."""
    kept = {name: flags[name] for name in INNER_FLAGS if flags.get(name) is not None}
    fast = flags.get("fast_dev_run")
    if fast:  # one batch, as Lightning does for the run itself
        kept["limit_train_batches"] = int(fast)
        kept["limit_val_batches"] = int(fast)
    return copy.deepcopy(kept)


def is_trial(flags: Mapping[str, Any]) -> bool:
    """Tell whether inner flags are those of a trial run: only ``fast_dev_run`` limits the validation of a teacher."""
    return "limit_val_batches" in flags


def inner_trainer(flags: Mapping[str, Any], **options: Any) -> L.Trainer:
    """Build a silent Trainer with the run's hardware flags and `options`."""
    silent: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    with quiet(), _one_scan():
        trainer = L.Trainer(**{**silent, **copy.deepcopy(dict(flags)), **options})
    leave_sigterm(trainer)
    return trainer


@contextmanager
def _one_scan() -> Iterator[None]:
    """Let Trainers share one look for plug-ins among the installed packages: five sixths of the time of making one."""
    names = vars(registry)
    scan, names["entry_points"] = names["entry_points"], _entry_points
    try:
        yield
    finally:
        names["entry_points"] = scan


@cache
def _entry_points(group: str) -> EntryPoints:
    return entry_points(group=group)


def leave_sigterm(trainer: L.Trainer) -> None:
    """Keep Lightning from answering SIGTERM in one of several processes.

    It would wait in a broadcast until all the others were asked to end too, for ever if only one was.
    """
    if trainer.world_size > 1:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def release(trainer: L.Trainer) -> None:
    """Cut the reference cycles of a Trainer that is done, so that its model and optimizers are freed at once."""
    module = trainer.lightning_module
    trainer.strategy.optimizers = []
    trainer.strategy.lr_scheduler_configs = []
    trainer.strategy._lightning_module = None
    trainer.strategy.model = None
    if module is not None:
        module._trainer = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning hangs the module's own methods on each
        vars(callback).pop("log", None)
        vars(callback).pop("log_dict", None)
    trainer._data_connector._datahook_selector = None
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop._data_source.instance = None
    trainer.predict_loop._data_source.instance = None


@contextmanager
def serving(module: L.LightningModule) -> Iterator[None]:
    """Keep the server's module from building an optimizer that nobody would use."""
    vars(module)["configure_optimizers"] = lambda: None
    try:
        yield
    finally:
        vars(module).pop("configure_optimizers", None)
