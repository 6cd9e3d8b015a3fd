"""What a run had written when it was interrupted, and writes again: it must not stand there twice."""

from __future__ import annotations

from fkd_med.evaluation import ImageTable
from fkd_med.federated import FederatedTrainer
from fkd_med.rundir import RunDir


def forget_tests(trainer: FederatedTrainer, run_dir: RunDir) -> None:
    """Drop the scores of an earlier test, of this run or of what was trained less far, before they are made again."""
    if not trainer.is_global_zero:
        return
    ImageTable.drop_split(run_dir.images, "test")
    for logger in trainer.loggers:
        drop = getattr(logger, "drop_tests", None)
        if drop is not None:
            drop()


def forget_rounds(trainer: FederatedTrainer) -> None:
    """Drop the curves of a first round that is taken up again; those of teachers, which are trained, stay."""
    for logger in trainer.loggers:
        drop = getattr(logger, "drop_after", None)
        if drop is not None:
            drop(-1)
