"""Supervised training of one network: big teachers and undistilled students alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fkd_med.errors import ConfigError, TrainingError
from fkd_med.losses import DiceCE
from fkd_med.modules.evaluated import EvaluatedModule
from fkd_med.modules.labels import only_labelled, supervised_part
from fkd_med.modules.loading import VERSION, described
from fkd_med.modules.schedule import RunClock, WarmupCosine, advance
from fkd_med.modules.settings import SharedCallable, as_written, is_plain
from fkd_med.networks import PARAMETER_BOUND, channels_last, count_parameters, forward_padded, lay_out_moments
from fkd_med.ranks import count_processes


class SegmentationModule(EvaluatedModule):
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
        self.network = channels_last(network)
        self.loss = loss if loss is not None else DiceCE()
        self.optimizer = SharedCallable(optimizer)
        self.scheduler = None if scheduler is None else SharedCallable(scheduler)
        self.scheduler_interval = scheduler_interval
        self.learns_from_unlabelled = False
        self.model_name = "student" if count_parameters(network) <= PARAMETER_BOUND else type(network).__name__

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

    def on_train_start(self) -> None:
        """Lay out moments that come from a file as the weights lie."""
        for optimizer in self.trainer.optimizers:
            lay_out_moments(optimizer)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch, refusing to go on with one that is not finite."""
        terms = self.loss_terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        self._refuse_non_finite(loss, terms, batch, batch_idx)
        logged = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict({"train/loss": loss.detach(), **logged}, batch_size=len(batch["image"]), on_epoch=True)
        return loss

    def loss_terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weighted terms that make up the loss, by name.

        Images without a mask are passed over, unless another part of the loss learns from them
        (`learns_from_unlabelled`).
        """
        batch = self.learned_part(batch)
        return {"supervised": supervised_part(self.loss, self(batch["image"]), batch)}

    def learned_part(self, batch: dict[str, Any], by_terms: bool = False) -> dict[str, Any]:
        """Return the images that a loss is learned from: without a term that needs no mask, those that have one.

        Others would only change BatchNorm's statistics.

        Args:
            batch: with or without `labelled`.
            by_terms: whether terms of the module's own learn from images without a mask at this moment.
        """
        return batch if by_terms or self.learns_from_unlabelled else only_labelled(batch)

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
        """Add the network's description, the preprocessing, the number of processes and clients' personal tensors.

        Tensors are written in the plain layout, which other programs expect (safetensors takes no other).
        """
        checkpoint["state_dict"] = {name: tensor.contiguous() for name, tensor in checkpoint["state_dict"].items()}
        checkpoint["fkd_med"] = self.export() | {"processes": count_processes()}
        if self.personal.by_client:
            checkpoint["fkd_med"]["personal"] = self.personal.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the clients' personal tensors back; RunError for a checkpoint of another network."""
        ours = described(checkpoint, self)
        self.personal.load_state_dict(ours.get("personal", {}))
        self.clock = RunClock(round=int(ours.get("round", 0)))
