"""Silence for the many small Trainers inside a run: each would print several lines per client and round."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric",
    "lightning.fabric.utilities.rank_zero",
    "lightning_utilities.core.rank_zero",
)

_ASKED_FOR = "lightning.pytorch.profilers"  # what a profiler found is what it was configured for

# What Lightning says of any inner Trainer, true and expected here.
_EXPECTED = (
    ".*does not have many workers.*",
    "(?s).*does not round-trip.*",  # tuples of albumentations, on their way through a configuration
    ".*You defined a `validation_step` but have no `val_dataloader`.*",
    ".*smaller than the logging interval.*",
    ".*GPU available but not used.*",
    ".*in eval mode at the start of training.*",
    ".*configure_optimizers.*returned.*None.*",
    ".*exists and is not empty.*",
    ".*tensorboardX.*",
    ".*logger=False.*",
    ".*no logger configured.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",
    ".*Trainer already configured with model summary.*",
    ".*sync_dist=True.*",  # scores are of all ranks' images already, and losses are averaged where they are kept
    ".*callbacks used to create the checkpoint.*",
    ".*isinstance.treespec, LeafSpec.*",
)


@contextmanager
def quiet(*also: str) -> Iterator[None]:
    """Mute Lightning's notices, and the warnings that say nothing new, inside the block.

    Args:
        also: patterns of warnings that say nothing new just here.
    """
    wanted = dict.fromkeys(_LOGGERS, logging.ERROR) | {_ASKED_FOR: logging.INFO}
    loggers = [logging.getLogger(name) for name in wanted]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        _set_level(logger, wanted[logger.name])
    try:
        with warnings.catch_warnings():
            for message in (*_EXPECTED, *also):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            _set_level(logger, level)


def _set_level(logger: logging.Logger, level: int) -> None:
    if logger.level != level:  # `setLevel` empties the caches of all loggers there are: a millisecond
        logger.setLevel(level)
