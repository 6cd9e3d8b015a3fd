"""Silence for inner Trainers hides what is expected of them, and nothing else."""

from __future__ import annotations

import logging
import warnings

import pytest

from fkd_med.federated.quiet import quiet


def test_only_expected_warnings_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
            warnings.warn("invalid value encountered in divide", RuntimeWarning, stacklevel=1)
            warnings.warn("Detected call of `lr_scheduler.step()` before `optimizer.step()`.", stacklevel=1)
        warnings.warn("does not have many workers", stacklevel=1)
    assert [str(w.message)[:12] for w in seen] == ["invalid valu", "Detected cal", "does not hav"]


def test_levels_come_back_after_an_error() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with pytest.raises(ValueError, match="x"), quiet():
        assert not logger.isEnabledFor(logging.WARNING)
        raise ValueError("x")
    assert logger.level == before


def test_a_profilers_report_is_what_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        logging.getLogger("lightning.pytorch.profilers.profiler").info("FIT Profiler Report")
        logging.getLogger("lightning.pytorch.utilities.rank_zero").info("`Trainer.fit` stopped")
    assert [record.message for record in caplog.records] == ["FIT Profiler Report"]
