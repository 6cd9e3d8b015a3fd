"""The same students, each hospital alone: what a federation has to beat, trained as a run inside the run."""

from __future__ import annotations

from typing import Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from fkd_med.checkpoints import LastCheckpoint
from fkd_med.cli.best_weights import best_checkpoint, checkpoint_to_resume
from fkd_med.cli.repeated import forget_rounds, forget_tests
from fkd_med.federated import FederatedTrainer
from fkd_med.federated.quiet import quiet
from fkd_med.files import atomic_write_text
from fkd_med.modules import SegmentationModule
from fkd_med.rundir import RunDir
from fkd_med.tracking import ImageRecorder, MetricsCSV


def train_alone(trainer: FederatedTrainer, module: SegmentationModule, data: Any, run_dir: RunDir) -> None:
    """Train each client alone for as many rounds as a federated run closed, and test it.

    It is a run of its own in ``<run>/local``, resumed if it was interrupted; `module` then holds its scores.

    Args:
        trainer: the trainer of the federated run, which has finished.
        module: the module as it was before that run trained; it is trained here.
        data: the data module.
        run_dir: the federated run's folder.
    """
    run = RunDir(run_dir.path / "local")
    last = checkpoint_to_resume(run.checkpoints)
    resume = last is not None
    goes_on = False
    if trainer.is_global_zero:
        text = _configuration(run, run_dir)
        goes_on = run.begin(text, resume=resume)
        if run_dir.manifest.is_file():
            atomic_write_text(run.manifest, run_dir.manifest.read_text(encoding="utf-8"))
        atomic_write_text(run.config, text)
    trainer.reporter.line("the same students, each hospital alone:")
    alone = _trainer(trainer, run)
    alone.goes_on = goes_on
    if goes_on:
        forget_rounds(alone)
    alone.fit_loop.max_epochs = trainer.global_step  # the budget of the run, also if it stopped early
    module.arm = alone.arm()
    with quiet():
        alone.fit(module, datamodule=data, ckpt_path=None if last is None else str(last))
        forget_tests(alone, run)
        alone.test(module, datamodule=data, ckpt_path=best_checkpoint(alone), verbose=False)


def _configuration(run: RunDir, federated: RunDir) -> str:
    config = yaml.safe_load(federated.config.read_text())
    alone = {
        "aggregator": None,
        "local_baseline": False,
        "server_distillation": None,
        "share_logits": False,
        "share_teachers": False,
    }
    config["federation"]["init_args"] |= alone
    config["run_dir"] = str(run.path)
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _trainer(trainer: FederatedTrainer, run: RunDir) -> FederatedTrainer:
    """Return a trainer with the same hardware, recipe and limits, but nobody to send to."""
    assert trainer.federation is not None
    federation = trainer.federation.alone()
    kept = ("limit_val_batches", "limit_test_batches", "check_val_every_n_epoch")
    flags = {name: trainer.flags[name] for name in kept if trainer.flags.get(name) is not None}
    best = ModelCheckpoint(
        dirpath=run.checkpoints, filename="best-{step}", monitor="val/dice", mode="max", enable_version_counter=False
    )
    with quiet():
        return FederatedTrainer(
            **{**trainer.inner_flags, **flags},
            default_root_dir=str(run.path),
            federation=federation,
            logger=[MetricsCSV(run.metrics)],
            callbacks=[best, LastCheckpoint(run.checkpoints), ImageRecorder(run.images, panel_every=0)],
        )
