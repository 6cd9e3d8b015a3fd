"""The commands that train and score: LightningCLI with a federation, a run directory and one report at the end."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fkd_med.checkpoints import LastCheckpoint
from fkd_med.cli.changes import Change
from fkd_med.cli.configuration import refuse_inside_data, settle
from fkd_med.cli.console import wide_console
from fkd_med.cli.construction import construct, refusals
from fkd_med.cli.hardware import check_accelerator
from fkd_med.cli.monitor import check_callbacks, check_monitor
from fkd_med.cli.parser import FkdParser
from fkd_med.cli.processes import check_started
from fkd_med.cli.repeated import forget_rounds
from fkd_med.cli.report import Report
from fkd_med.cli.resume import accepted_changes, check_processes, record_changes, repeatable
from fkd_med.cli.stored import as_yaml, quiet_tuples, settled_text
from fkd_med.cli.wandb_parts import record_part, recorded_parts
from fkd_med.data import FederatedDataModule
from fkd_med.errors import RunError
from fkd_med.federated import FederatedTrainer, Federation
from fkd_med.federated.inner import as_list
from fkd_med.federated.quiet import quiet
from fkd_med.files import atomic_write_text
from fkd_med.modules import SegmentationModule
from fkd_med.ranks import is_first_rank
from fkd_med.tracking import ImageRecorder, MetricsCSV, WandbLogger

_GIVEN = {"model", "dataloaders", "datamodule", "weights_only"}
# The commands that go through Lightning, and their arguments that come from the configuration.
_HIDDEN = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": _GIVEN,
    "test": _GIVEN,
    "teachers": {"model", "datamodule"},
}


def run_lightning(command: str, arguments: list[str]) -> None:
    """Run fit, validate, test or teachers."""
    with ExitStack() as stack:
        FkdCLI([command, *arguments], stack)


class FkdCLI(LightningCLI):
    """Parses a configuration, builds everything in it, and runs the command.

    Args:
        arguments: the command and its options.
        stack: closed when the command ends; holds the lock of the run directory.
    """

    def __init__(self, arguments: list[str], stack: ExitStack) -> None:
        self.stack = stack
        self.command = arguments[0]
        self.changes: list[Change] = []
        self.unwritten: str | None = None  # the configuration, until it is in the run directory
        self.console = wide_console()
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            trainer_class=FederatedTrainer,
            parser_class=FkdParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            args=repeatable(arguments),
            parser_kwargs={name: {"exit_on_error": False} for name in self.subcommands()} | {"exit_on_error": False},
        )

    trainer: FederatedTrainer

    # --- the parser -------------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning asks the object
        """Return the command at hand, as the others' parsers cost time, and the arguments it does not show."""
        return {self.command: _HIDDEN[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of ours: federation, run_dir, overwrite, resume, test_after_fit, checkpoint."""
        parser.add_subclass_arguments(Federation, "federation", required=False)
        parser.link_arguments("federation", "trainer.federation", apply_on="instantiate")
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run; runs/<name of the config file, with its folder>.",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace an earlier run in run_dir.")
        parser.add_argument(
            "--resume.allow",
            type=list[str] | None,
            default=None,
            help="Keys, or beginnings of keys, that may differ from those the resumed run has; repeatable.",
        )
        parser.add_argument("--test_after_fit", type=bool, default=True, help="Test the best weights at the end.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "data": {"class_path": "fkd_med.data.FederatedDataModule", "init_args": {"root": "data"}},
                "checkpoint.filename": "best-{step}",
                "checkpoint.monitor": "val/dice",
                "checkpoint.mode": "max",
                "checkpoint.enable_version_counter": False,  # a round that is repeated writes the same file again
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's warning that `args` were given from Python."""
        with quiet_tuples():
            self.config = parser.parse_args(args)
        self._config_files = [str(path) for path in self.config[self.config.subcommand].get("config") or []]

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it is: ours always comes from files, never from a checkpoint."""

    # --- before anything is built -----------------------------------------------------------------------------

    @property
    def given(self) -> Namespace:
        """The configuration of the command."""
        config: Namespace = self.config[self.config.subcommand]
        return config

    def before_instantiate_classes(self) -> None:
        """Settle what the configuration leaves open; refuse a run that is there before anything is built."""
        config, command = self.given, str(self.subcommand)
        check_accelerator(config.trainer.accelerator)
        seed = config.seed_everything
        self.plan = settle(config, command, self._config_files)
        self.run_dir = self.plan.run_dir
        self.trainer_defaults = {"callbacks": [LastCheckpoint(config.checkpoint.dirpath)]}
        if command != "teachers":
            config.ckpt_path = self.plan.checkpoint
        if command == "fit" and not config.trainer.fast_dev_run and is_first_rank():
            self.run_dir.check(config.overwrite, self.plan.resumes)
            self.changes = accepted_changes(self.parser, self.config, self.plan)
        if config.seed_everything != seed:
            self._set_seed()

    # --- building ---------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build everything, without Lightning's notices about the machine."""
        with quiet(), refusals("The model, the data or the trainer"):
            super().instantiate_classes()

    def _add_instantiators(self) -> None:
        """Build modules as Lightning does, and all else so that its errors name it."""
        super()._add_instantiators()
        self.parser.add_instantiator(construct, object)

    def _dump_config(self) -> None:
        """Note what the networks' hyperparameters are, as Lightning does, without validating everything again."""
        if not hasattr(self, "config_dump"):
            self.config_dump = yaml.safe_load(as_yaml(self.parser, self.config))[self.subcommand]

    def _set_seed(self) -> None:
        with quiet():
            super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> FederatedTrainer:
        """Build the trainer with what every run has: metrics.csv and images.csv beside the configured loggers."""
        config = self._get(self.config_init, "trainer")
        config["logger"] = self._loggers(config.get("logger"))
        config["callbacks"] = as_list(config.get("callbacks"))
        # Only the run's own choice of weights goes into its images.csv; others are shown, not kept.
        self._records = self.subcommand == "fit" or (self.run_dir.exists() and self.plan.asked_for is None)
        if self._records:
            config["callbacks"].append(ImageRecorder(self.run_dir.images))
        with refusals("The trainer"):
            trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, FederatedTrainer)
        check_started(trainer.world_size)
        return trainer

    def _loggers(self, configured: Any) -> Any:
        if self.subcommand != "fit":
            return False
        loggers = [logger for logger in as_list(configured) if not isinstance(logger, bool)]
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                stored, parts = recorded_parts(self.run_dir) if self.plan.resumes else (None, [])
                logger.place(str(self.run_dir.path), self.run_dir.path.name, stored, parts)
                self.stack.callback(logger.close, self.console)
        return [MetricsCSV(self.run_dir.metrics), *loggers]

    # --- the commands -----------------------------------------------------------------------------------------

    def fit(self, model: L.LightningModule, datamodule: Any, ckpt_path: str | None = None) -> None:
        """Train, then test the best weights and leave a report."""
        trainer = self.trainer
        self._name(model, datamodule)
        fast = bool(trainer.fast_dev_run)
        if self.plan.resumes and not fast and is_first_rank():
            check_processes(self.plan, self.changes, trainer.world_size)
        self._set_up_data(datamodule, "fit")
        if isinstance(datamodule, FederatedDataModule):
            refuse_inside_data(self.run_dir.path, datamodule)
        clients = None if trainer.federation is None else datamodule.client_names()
        check_monitor(self.given.checkpoint.monitor, self.given.checkpoint.mode, model, clients)
        check_callbacks(trainer.callbacks, model, clients)
        trainer.check_model(model, datamodule)
        if not fast and is_first_rank():
            self.stack.enter_context(self.run_dir.lock())
            text = self.unwritten = settled_text(self.parser, self.config, self.plan.derived)
            trainer.goes_on = self.run_dir.begin(text, overwrite=self.given.overwrite, resume=self.plan.resumes)
            if self.plan.resumes:  # a resume that is refused must leave the run as it was
                trainer.callbacks.append(LambdaCallback(on_train_start=lambda *_: self._write_configuration()))
            else:
                self._write_configuration()
            if trainer.goes_on:
                forget_rounds(trainer)
        initial = copy.deepcopy(model)
        for logger in trainer.loggers:
            logger.log_hyperparams({k: v for k, v in self.config_dump.items() if k != "config"})
        trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        self._write_configuration()  # where nothing was left to train, no training has begun
        if fast:
            self.console.print("fast_dev_run: every part ran once; nothing was kept.")
            return
        report = Report(trainer, model, datamodule, self.run_dir, self.console)
        report.write(initial) if self.given.test_after_fit else report.write_student()

    def validate(self, model: L.LightningModule, datamodule: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Score a checkpoint on validation images and print the table."""
        self._score("validate", model, datamodule, ckpt_path)

    def test(self, model: L.LightningModule, datamodule: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Score a checkpoint on test images at their original size and print the table."""
        self._score("test", model, datamodule, ckpt_path)

    def _score(self, command: str, model: L.LightningModule, datamodule: Any, ckpt_path: str | None) -> None:
        self._name(model, datamodule)
        if self._records and is_first_rank():
            self._lock_to_record()
        run = getattr(self.trainer, command)
        with quiet(".*dirpath has changed.*"):  # the checkpoint is only scored
            run(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        if self.trainer.ckpt_path and self.trainer.is_global_zero:
            self.console.print(f"Weights of {self.trainer.ckpt_path}", markup=False, soft_wrap=True)
        Report(self.trainer, model, datamodule, self.run_dir, self.console).show_table(model)

    def _lock_to_record(self) -> None:
        """Keep other processes out of the run while its images.csv grows."""
        try:
            self.stack.enter_context(self.run_dir.lock())
        except RunError as error:
            raise RunError(
                f"{error} The scores of a checkpoint that is named (--ckpt_path FILE) are shown and not written there."
            ) from error

    def teachers(self, model: L.LightningModule, datamodule: Any) -> None:
        """Train the teachers that do not exist yet."""
        self._set_up_data(datamodule, "fit")
        self.trainer.teachers(model, datamodule)

    def _set_up_data(self, datamodule: Any, stage: str) -> None:
        """Read the data before anything is written, so that bad input costs no run."""
        datamodule.trainer = self.trainer
        if is_first_rank():
            datamodule.prepare_data()
        else:  # wait until the first process joins, which it does when all that it prepares is there
            with quiet():
                self.trainer.strategy.setup_environment()
        datamodule.setup(stage)

    def _name(self, model: L.LightningModule, datamodule: Any) -> None:
        """Say under which name this run's rows stand in images.csv."""
        if isinstance(model, SegmentationModule):
            model.arm = self.trainer.arm(getattr(datamodule, "client", None))

    def _write_configuration(self) -> None:
        """Write down, once, what is in force from now on."""
        if self.unwritten is None:
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                record_part(self.run_dir, logger)
                self.stack.callback(logger.close, self.console)  # before the run directory is unlocked
        record_changes(self.run_dir, self.changes, self.plan.checkpoint)
        if isinstance(self.datamodule, FederatedDataModule) and not self.plan.resumes:
            self.datamodule.manifest.write(self.run_dir.manifest)
        atomic_write_text(self.run_dir.config, self.unwritten)  # last: what a kill leaves out comes again
        self.unwritten = None
