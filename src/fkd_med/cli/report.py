"""What a run leaves behind: test scores, one table, what travelled, pictures, student.ckpt."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import nn

from fkd_med.checkpoints import read_checkpoint
from fkd_med.cli.baseline import train_alone
from fkd_med.cli.best_weights import best_checkpoint
from fkd_med.cli.exports import export_students, export_teachers
from fkd_med.cli.repeated import forget_tests
from fkd_med.cli.showcase import Predictor, module_predictor, sample, teacher_predictor
from fkd_med.communication import TEACHER, Ledger, counterfactual_bytes
from fkd_med.evaluation import (
    ImageRow,
    ImageTable,
    Sheet,
    Traffic,
    choose,
    end_table,
    group_arms,
    traffic_table,
    write_pictures,
)
from fkd_med.federated import FederatedTrainer, Federation
from fkd_med.federated.inner import inner_trainer
from fkd_med.federated.quiet import quiet
from fkd_med.files import atomic_write_text
from fkd_med.modules import DistillationModule, MutualDistillationModule, SegmentationModule
from fkd_med.networks import ResUNet, TransUNet, count_parameters
from fkd_med.rundir import RunDir


class Report:
    """Tests, writes and prints what a finished run has to show.

    Args:
        trainer: the run's trainer.
        model: its module.
        data: its data module.
        run_dir: where everything goes.
        console: where the tables are printed.
    """

    def __init__(
        self, trainer: FederatedTrainer, model: L.LightningModule, data: Any, run_dir: RunDir, console: Console
    ) -> None:
        self.trainer, self.model, self.data = trainer, model, data
        self.run_dir, self.console = run_dir, console
        self.predictors: dict[str, Predictor] = {}

    def write(self, initial: L.LightningModule) -> None:
        """Test the best weights and write everything; `initial` is the module as it was before training."""
        trainer, model = self.trainer, self.model
        arms: dict[str, list[ImageRow]] = {}
        if not isinstance(model, SegmentationModule):
            with quiet():
                trainer.test(model, datamodule=self.data, ckpt_path=best_checkpoint(trainer))
            return
        forget_tests(trainer, self.run_dir)
        model.evaluated = []  # without a test image, the rows of the last validation would stay
        with quiet():
            trainer.test(model, datamodule=self.data, ckpt_path=best_checkpoint(trainer), verbose=False)
        own = group_arms(model.evaluated)
        if trainer.is_global_zero:
            self._export(model)
        if not own:
            self.console.print("There are no test images, so nothing was scored and no table made.")
            return
        if isinstance(model, DistillationModule) and model.active_losses:
            teachers = self._test_teachers(model)
            arms |= {"teacher": teachers} if teachers else {}
        federation = trainer.federation
        if federation is not None and federation.local_baseline and not federation.is_local:
            assert isinstance(initial, SegmentationModule)
            train_alone(trainer, initial, self.data, self.run_dir)
            arms |= self._keep(initial)
        if not trainer.is_global_zero:
            return
        arms |= own
        student = next(reversed(arms))
        self.predictors[student] = module_predictor(model)
        self._print(arms)
        self._write_pictures(arms[student], int(self.data.export_info()["classes"]))
        self.console.print(f"Run directory: {self.run_dir.path}", highlight=False, soft_wrap=True)

    def write_student(self) -> None:
        """Write student.ckpt of the best weights and nothing else."""
        path = best_checkpoint(self.trainer)
        if path is not None:
            checkpoint = read_checkpoint(path)
            self.model.load_state_dict(checkpoint["state_dict"])
            self.model.on_load_checkpoint(checkpoint)
        if isinstance(self.model, SegmentationModule) and self.trainer.is_global_zero:
            self._export(self.model)
            self.console.print(
                "test_after_fit is false: student.ckpt is written, nothing was tested, no baseline trained.\n"
                f"Run directory: {self.run_dir.path}",
                highlight=False,
                soft_wrap=True,
            )

    def show_table(self, model: L.LightningModule) -> None:
        """Print the table of the evaluation that has just run."""
        if isinstance(model, SegmentationModule) and self.trainer.is_global_zero and model.evaluated:
            title = {"val": "Validation, at working resolution", "test": "Test, at original size"}
            self.console.print(end_table(group_arms(model.evaluated), title[model.evaluated[0].split]))

    # --- scores -----------------------------------------------------------------------------------------------

    def _test_teachers(self, model: DistillationModule) -> list[ImageRow]:
        """Score each client's teacher on that client's test images."""
        rows: list[ImageRow] = []
        source = self.trainer.teachers_after(model)
        assert source is not None
        federated = self.trainer.federation is not None
        for client in self._taught():
            module = SegmentationModule(source.load(client))
            module.model_name, module.resize = "teacher", self.data.export_info()["resize"]
            loaders = self.data.client_test_dataloader(client) if client else self.data.test_dataloader()
            limit = self.trainer.flags.get("limit_test_batches")
            with quiet():
                inner_trainer(self.trainer.inner_flags, limit_test_batches=limit).test(module, loaders, verbose=False)
            rows += module.evaluated
        shown = {client: client if federated else self.data.client for client in self._hospitals(federated)}
        self.predictors["teacher"] = teacher_predictor(source, shown)
        if self.trainer.is_global_zero:
            ImageTable.append(self.run_dir.images, rows)
        return rows

    def _taught(self) -> list[str | None]:
        """Return those that have a teacher each; None is the pool of all images."""
        return list(self.data.client_names()) if self.trainer.federation is not None else [self.data.client]

    def _hospitals(self, training: bool) -> list[str]:
        """Return the hospitals that train, or all that are tested."""
        return list(self.data.client_names() if training else self.data.manifest.clients())

    def _keep(self, module: SegmentationModule) -> dict[str, list[ImageRow]]:
        """Take over the baseline's scores."""
        if self.trainer.is_global_zero:
            ImageTable.append(self.run_dir.images, module.evaluated)
        arms = group_arms(module.evaluated)
        self.predictors |= dict.fromkeys(arms, module_predictor(module))
        return arms

    # --- files ------------------------------------------------------------------------------------------------

    def _export(self, model: SegmentationModule) -> None:
        """Write what `fkd predict` takes."""
        export_students(model, self.run_dir, self._hospitals(training=True) if model.personal.by_client else [])
        if isinstance(model, MutualDistillationModule) and model.active_losses:
            source = self.trainer.teachers_after(model)
            assert source is not None
            export_teachers(model, source, self.run_dir, self._taught())

    def _print(self, arms: dict[str, list[ImageRow]]) -> None:
        sheets: list[Sheet] = [end_table(arms, "Test, at original size")]
        federation = self.trainer.federation
        if federation is not None and not federation.is_local:
            sheets.append(self._traffic(federation))
        for sheet in sheets:
            self.console.print()
            self.console.print(sheet)
        atomic_write_text(self.run_dir.path / "report.md", "\n".join(sheet.to_markdown() for sheet in sheets))
        for logger in self.trainer.loggers:
            summary = {f"test/{name}/dice": sum(r.dice for r in rows) / len(rows) for name, rows in arms.items()}
            logger.log_metrics({k.replace(" ", "_"): v for k, v in summary.items()}, step=self.trainer.global_step)

    def _traffic(self, federation: Federation) -> Sheet:
        """Return what was sent beside what federating larger networks would have sent."""
        model, info = self.model, self.data.export_info()
        assert isinstance(model, SegmentationModule)
        ledger, link = Ledger(self.run_dir.ledger), federation.link
        clients = sorted({row.client for row in ledger.rows})

        def traffic(name: str, parameters: int, up: float, down: float) -> Traffic:
            return Traffic(name, parameters, up, down, link.slowest(clients, up, down))

        what = "logits of the student" if federation.keeps_students else "student"
        sent = traffic(
            what, count_parameters(model.network), ledger.mean_per_message("up"), ledger.mean_per_message("down")
        )
        source = model.teacher_source if isinstance(model, DistillationModule) else None
        teacher = source.architecture() if source is not None else None
        instead = [] if teacher is None else [_sized(f"this teacher ({type(teacher).__name__})", teacher)]
        instead += _full_networks(info["in_channels"], info["classes"])
        lines = [traffic(name, parameters, size, size) for name, parameters, size in instead]
        rounds = max((row.round for row in ledger.rows), default=0)
        shared = ledger.total(section=TEACHER, direction="up"), ledger.total(section=TEACHER, direction="down")
        total = ledger.total() - sum(shared)
        return traffic_table(sent, lines, len(clients), rounds, total, link.describe(), shared)

    def _write_pictures(self, rows: list[ImageRow], classes: int) -> None:
        """Show the worst, median and best test image of each hospital."""
        samples = [sample(self.data, client, name, rank, self.predictors) for client, name, rank in choose(rows)]
        paths = write_pictures(self.run_dir.pictures, samples, classes)
        if not paths:
            return
        for logger in self.trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("test/pictures", [str(paths[0])])
        self.console.print(f"Pictures: {paths[0]}", highlight=False, soft_wrap=True)


def _sized(name: str, network: nn.Module) -> tuple[str, int, int]:
    """Return a name, a network's number of parameters, and the bytes of a message with all of it."""
    return name, count_parameters(network), counterfactual_bytes(network.state_dict())


@cache
def _full_networks(in_channels: int, classes: int) -> tuple[tuple[str, int, int], ...]:
    """Return the full teachers, `_sized`: what federations without distillation send."""
    with torch.device("meta"):
        full = {
            "ResUNet, full": ResUNet(in_channels=in_channels, classes=classes),
            "TransUNet, full": TransUNet(in_channels=in_channels, classes=classes, img_size=256),
        }
    return tuple(_sized(name, network) for name, network in full.items())
