"""Supervised training of one network: big teachers and undistilled students alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fkd_med.data.geometry import undo
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.evaluation import ImageRow, score_image, summarize
from fkd_med.losses import DiceCE, supervised_loss
from fkd_med.modules.loading import VERSION, described
from fkd_med.modules.personal import PersonalTensors
from fkd_med.modules.schedule import RunClock, WarmupCosine, advance
from fkd_med.networks import PARAMETER_BOUND, count_parameters, forward_padded

PLAIN = (str, int, float, bool, type(None))


def is_plain(value: Any) -> bool:
    """Tell whether a value is made of containers and scalars only, so that a checkpoint of it loads safely."""
    if isinstance(value, Mapping):
        return all(is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return isinstance(value, PLAIN)


def as_written(value: Any) -> Any:
    """Return a value as a configuration file would have it: functions by their import path."""
    if isinstance(value, Mapping):
        return {key: as_written(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_written(v) for v in value]
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, FunctionType) else value


def predict_classes(logits: Tensor) -> Tensor:
    """Turn logits (N, K, H, W) into class indices (N, H, W): sigmoid at one half for K = 1, argmax otherwise."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


class SharedCallable:
    """A callable that copies of a module share: those the command line builds hold the whole parser.

    Args:
        function: the callable.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedCallable:
        """Return the same object."""
        return self


class SegmentationModule(LightningModule):
    """Trains a segmentation network on images and masks.

    Args:
        network: maps images (N, C, H, W) to logits (N, K, H, W); K = 1 is binary with one logit.
        loss: maps logits and masks (N, H, W) to a scalar; Dice plus cross-entropy when left out.
        optimizer: called with the parameters, afresh in every round of a federation.
        scheduler: called with the optimizer; it spans the whole run, whatever the number of rounds.
        scheduler_interval: the unit in which the scheduler counts.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "step",
    ) -> None:
        super().__init__()
        self._keep_plain_hyperparameters()
        self.network = network
        self.loss = loss if loss is not None else DiceCE()
        self.optimizer = SharedCallable(optimizer)
        self.scheduler = None if scheduler is None else SharedCallable(scheduler)
        self.scheduler_interval = scheduler_interval
        self.clock = RunClock()
        self.arm = ""
        self.model_name = "student" if count_parameters(network) <= PARAMETER_BOUND else type(network).__name__
        self.resize = "stretch"
        self.evaluated: list[ImageRow] = []
        self._rows: list[ImageRow] = []
        self._losses: list[float] = []
        self.personal = PersonalTensors(self)

    def _keep_plain_hyperparameters(self) -> None:
        """Keep what a safe checkpoint can hold: a module built in Python is not written, its class_path dict is."""
        with warnings.catch_warnings():  # Lightning advises to ignore modules, which is what happens below
            warnings.filterwarnings("ignore", ".*is already saved during checkpointing.*")
            self.save_hyperparameters(logger=False)
        for name, value in list(self.hparams.items()):
            self.hparams[name] = as_written(value)
            if not is_plain(self.hparams[name]):
                del self.hparams[name]
        self._hparams_initial = dict(self.hparams)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, K, H, W) at the size of the images."""
        return forward_padded(self.network, image)

    # --- training -------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch, refusing to go on with one that is not finite."""
        terms = self.loss_terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        self._refuse_non_finite(loss, terms, batch, batch_idx)
        logged = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict({"train/loss": loss.detach(), **logged}, batch_size=len(batch["image"]), on_epoch=True)
        return loss

    def loss_terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weighted terms that make up the loss, by name."""
        return {"supervised": supervised_loss(self.loss, self(batch["image"]), batch["mask"])}

    def _refuse_non_finite(
        self, loss: Tensor, terms: Mapping[str, Tensor], batch: dict[str, Any], batch_idx: int
    ) -> None:
        if torch.isfinite(loss):
            return
        values = ", ".join(f"{name} = {float(value.detach()):.4g}" for name, value in terms.items())
        clients = ", ".join(sorted(set(batch.get("client", []))))
        images = ", ".join(list(batch.get("id", []))[:4])
        where = f"round {self.clock.round}, " if self.clock.round else ""
        raise TrainingError(
            f"The loss is not finite ({values}): client {clients or 'unknown'}, {where}batch {batch_idx}, "
            f"images {images}. Lower the learning rate (model.optimizer.lr), set trainer.gradient_clip_val, "
            "or look at these images."
        )

    def trained_parameters(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """Return what the optimizer gets: parameters, or groups of them with settings of their own."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the scheduler at its place in the whole run."""
        optimizer = self.optimizer(self.trained_parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                f"{type(scheduler).__name__} follows a metric, which no client has during a round. "
                "Choose a scheduler that counts steps or epochs."
            )
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
            scheduler.total_steps = self.clock.total_steps or int(self.trainer.estimated_stepping_batches)
            scheduler = self._restart(scheduler)
        advance(scheduler, self.clock.step if self.scheduler_interval == "step" else self.clock.epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.scheduler_interval}}

    @staticmethod
    def _restart(scheduler: WarmupCosine) -> WarmupCosine:
        """Rebuild a scheduler whose length has become known, so that its first rate is right too."""
        optimizer = scheduler.optimizer
        for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = group["initial_lr"] = rate
        return WarmupCosine(optimizer, scheduler.warmup, scheduler.floor, scheduler.total_steps)

    # --- evaluation -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Learn from the data module how images were brought to the working size."""
        describe = getattr(getattr(self.trainer, "datamodule", None), "export_info", None)
        self.resize = describe()["resize"] if describe else self.resize

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate with the tensors of the client the batch belongs to."""
        self.personal.enter(batch["client"][0], best=self.trainer.state.fn == "validate")

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate with the tensors of the client the batch belongs to."""
        self.personal.enter(batch["client"][0], best=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score each image at working resolution: Dice and IoU."""
        logits = self(batch["image"])
        self._losses.append(float(supervised_loss(self.loss, logits, batch["mask"])))
        predictions = predict_classes(logits.detach().float())
        for index, truth in enumerate(batch["mask"]):
            self._score(batch, index, predictions[index], truth, logits.shape[1], "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score each image at its original size against its original mask: Dice, IoU and HD95."""
        logits = self(batch["image"]).detach().float()
        for index in range(len(logits)):
            if "original" in batch:
                size = tuple(int(n) for n in batch["size"][index])
                restored = undo(logits[index], size, self.resize)  # type: ignore[arg-type]
                truth = batch["original"][index]
            else:
                restored, truth = logits[index], batch["mask"][index]
            self._score(batch, index, predict_classes(restored[None])[0], truth, logits.shape[1], "test")

    def _score(
        self, batch: dict[str, Any], index: int, prediction: Tensor, truth: Tensor, classes: int, split: str
    ) -> None:
        scores = score_image(prediction.cpu().numpy(), truth.cpu().numpy(), classes, hd95=split == "test")
        self._rows.append(
            ImageRow(
                model=self.model_name,
                arm=self.arm,
                split=split,
                round=self.clock.round,
                client=batch["client"][index],
                id=batch["id"][index],
                dice=scores.dice,
                iou=scores.iou,
                hd95=scores.hd95,
                empty=scores.empty,
            )
        )

    def on_validation_epoch_start(self) -> None:
        """Forget the rows of the last evaluation."""
        self._rows = []

    def on_test_epoch_start(self) -> None:
        """Forget the rows of the last evaluation."""
        self._rows = []

    def on_validation_epoch_end(self) -> None:
        """Log Dice and IoU: mean over hospitals, worst hospital and each hospital."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log Dice, IoU and HD95: mean over hospitals, worst hospital and each hospital."""
        self._finish("test")

    def _finish(self, split: str) -> None:
        self.personal.leave()
        self.evaluated, losses = self._gather(self._rows, self._losses)
        if own := self.personal.by_client:  # alone, a client without a student of its own has no scores
            self.evaluated = [row for row in self.evaluated if row.client in own]
        self._rows, self._losses = [], []
        if not self.evaluated:
            return
        summary = summarize(self.evaluated)
        logged = {f"{split}/dice": summary.mean.dice, f"{split}/iou": summary.mean.iou}
        logged[f"{split}/worst_dice"] = summary.worst.dice
        if split == "test":
            logged["test/hd95"] = summary.mean.hd95
        else:
            logged["val/loss"] = sum(losses) / len(losses)
        for client, scores in summary.clients.items():
            logged[f"{client}/{split}_dice"] = scores.dice
            if split == "val":
                self.personal.note(client, scores.dice)
        self.log_dict(logged, rank_zero_only=False, sync_dist=False)

    @staticmethod
    def _gather(rows: list[ImageRow], losses: list[float]) -> tuple[list[ImageRow], list[float]]:
        """Collect rows and losses of every rank; each image once, since distributed samplers pad with repeats."""
        gathered = [(rows, losses)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered = [([], [])] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, (rows, losses))
        unique = {(row.client, row.id): row for part, _ in gathered for row in part}
        return [unique[key] for key in sorted(unique)], [loss for _, part in gathered for loss in part]

    # --- checkpoints ----------------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """Return all that `fkd predict` needs besides the weights, in plain containers."""
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer else None
        describe = getattr(datamodule, "export_info", None)
        return {
            "version": VERSION,
            "network": self.hparams.get("network"),
            "preprocessing": describe() if describe else None,
            "round": self.clock.round,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network's description, the preprocessing and the clients' personal tensors."""
        checkpoint["fkd_med"] = self.export()
        if self.personal.by_client:
            checkpoint["fkd_med"]["personal"] = self.personal.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the clients' personal tensors back; RunError for a checkpoint of another network."""
        ours = described(checkpoint, self)
        self.personal.load_state_dict(ours.get("personal", {}))
        self.clock = RunClock(round=int(ours.get("round", 0)))
