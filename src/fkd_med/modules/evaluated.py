"""How any of our modules is scored: every image by itself, with the tensors of its hospital, on one rank or several."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from torch import Tensor, nn

from fkd_med.data.geometry import ResizeMode, undo
from fkd_med.evaluation import ImageRow, score_image, summarize
from fkd_med.losses import supervised_loss
from fkd_med.modules.personal import PersonalTensors
from fkd_med.modules.schedule import RunClock
from fkd_med.ranks import of_all_ranks


def predict_classes(logits: Tensor) -> Tensor:
    """Turn logits (N, K, H, W) into class indices (N, H, W): sigmoid at one half for K = 1, argmax otherwise."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


class EvaluatedModule(LightningModule):
    """Scores each image: at working resolution to validate, at its original size to test.

    After an evaluation `evaluated` has a row per image, and means over hospitals, the worst and each are logged. Called
    with images (N, C, H, W) it answers logits (N, K, H, W); `loss` makes a scalar of them and masks (N, H, W).
    """

    loss: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.clock = RunClock()
        self.arm = self.model_name = ""  # the names under which rows stand in images.csv
        self.resize: ResizeMode = "stretch"
        self.evaluated: list[ImageRow] = []
        self._rows: list[ImageRow] = []
        self._losses: list[float] = []
        self.personal = PersonalTensors(self)

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
                height, width = (int(n) for n in batch["size"][index])
                restored = undo(logits[index], (height, width), self.resize)
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
                round=self.personal.round_of(batch["client"][index], latest=self.clock.round),
                client=batch["client"][index],
                id=batch["id"][index],
                dice=scores.dice,
                iou=scores.iou,
                hd95=scores.hd95,
                empty=scores.empty,
                patient=_name(batch["patient"][index]) if "patient" in batch else "",
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
        if self.personal.are_students:  # a client without a student of its own has no scores
            self.evaluated = [row for row in self.evaluated if row.client in self.personal.by_client]
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
                self.personal.note(client, scores.dice, self.clock.round)
        self.log_dict(logged, rank_zero_only=False, sync_dist=False)

    @staticmethod
    def _gather(rows: list[ImageRow], losses: list[float]) -> tuple[list[ImageRow], list[float]]:
        """Collect rows and losses of every rank; each image once, since distributed samplers pad with repeats."""
        gathered = of_all_ranks((rows, losses))
        unique = {(row.client, row.id): row for part, _ in gathered for row in part}
        return [unique[key] for key in sorted(unique)], [loss for _, part in gathered for loss in part]


def _name(patient: object) -> str:
    """Return a patient's name, which batches may give as a number too; None is nobody's."""
    given = patient.item() if isinstance(patient, Tensor) else patient
    return "" if given is None else str(given)
