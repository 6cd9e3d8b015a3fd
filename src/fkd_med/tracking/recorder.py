"""Writes images.csv after every evaluation, and shows a panel of validation pictures to loggers that take them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from fkd_med.evaluation import ImageTable, panel
from fkd_med.modules import RunClock, SegmentationModule, predict_classes
from fkd_med.modules.schedule import set_clock


class ImageRecorder(L.Callback):
    """Keeps images.csv complete: one row per scored image, of every validation and test.

    Args:
        path: images.csv of the run.
        panel_every: validations between two panels of pictures, one image per hospital; 0 is never.
    """

    def __init__(self, path: str | Path, panel_every: int = 5) -> None:
        self.path = Path(path)
        self.panel_every = panel_every
        self._validations = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a resume, forget what later rounds had written: they come again."""
        if not trainer.is_global_zero or not trainer.ckpt_path:
            return
        done = trainer.current_epoch
        ImageTable.drop_after(self.path, done)
        for logger in trainer.loggers:
            drop = getattr(logger, "drop_after", None)
            if drop is not None:
                drop(trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Outside a federation, epochs take the place of rounds."""
        if getattr(trainer, "federation", None) is None and trainer.state.fn == "fit":
            set_clock(pl_module, RunClock(round=trainer.current_epoch + 1))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append the rows of this validation."""
        if trainer.sanity_checking:
            return
        self._write(trainer, pl_module)
        self._validations += 1
        if self.panel_every and (self._validations - 1) % self.panel_every == 0 and trainer.is_global_zero:
            self._show_panels(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append the rows of this test."""
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_trial = getattr(trainer, "fast_dev_run", False)
        if trainer.is_global_zero and isinstance(pl_module, SegmentationModule) and not is_trial:
            ImageTable.append(self.path, pl_module.evaluated)

    def _show_panels(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        takers = [logger for logger in trainer.loggers if hasattr(logger, "log_image")]
        if not takers or not isinstance(pl_module, SegmentationModule):
            return
        panels = [(f"{item['client']}: {item['id']}", picture) for item, picture in _panels(trainer, pl_module)]
        for logger in takers:
            logger.log_image(
                "val/pictures", [picture for _, picture in panels], caption=[caption for caption, _ in panels]
            )


def _panels(trainer: L.Trainer, module: SegmentationModule) -> Iterator[tuple[Any, NDArray[np.uint8]]]:
    """Yield the first validation image of each hospital with truth and student drawn on it."""
    data: Any = getattr(trainer, "datamodule", None)
    info = data.export_info()
    for client in data.client_names():
        dataset = data.client_val_dataloader(client).dataset
        if len(dataset) == 0:
            continue
        item = dataset[0]
        module.personal.enter(client)
        with torch.no_grad():
            logits = module(item["image"][None].to(module.device)).float()
        predicted = predict_classes(logits)[0].cpu().numpy()
        image = item["image"].numpy().transpose(1, 2, 0) * info["std"] + info["mean"]
        yield item, panel(image.clip(0, 1), item["mask"].numpy(), {"student": predicted}, classes=logits.shape[1])
    module.personal.leave()
