"""From image rows to hospitals: means per hospital, their plain mean, and the worst hospital.

The mean over hospitals is unweighted: a hospital with few images counts as much as one with many. The pooled mean over
all images is kept beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fkd_med.errors import RunError
from fkd_med.evaluation.rows import ImageRow

METRICS = ("dice", "iou", "hd95")


@dataclass(frozen=True)
class GroupSummary:
    """Means and sample standard deviations of a group of images, or of hospitals.

    NaN stands for what does not exist: an HD95 that was not computed, a deviation of fewer than two values.
    `n_empty` counts images in which one mask lacked a class of the other (`Scores.empty`), so that the image diagonal
    stands in their HD95; images where both are empty are not among them.
    """

    name: str
    n: int
    n_empty: int
    dice: float
    iou: float
    hd95: float
    dice_sd: float
    iou_sd: float
    hd95_sd: float

    def value(self, metric: str) -> float:
        """Return the mean of ``"dice"``, ``"iou"`` or ``"hd95"``."""
        return {"dice": self.dice, "iou": self.iou, "hd95": self.hd95}[metric]


@dataclass(frozen=True)
class Summary:
    """One model and arm on one split.

    Attributes:
        clients: Hospital -> its means, sorted by name.
        mean: Unweighted mean over hospitals; its deviations are between hospitals.
        pooled: Mean over all images.
    """

    clients: dict[str, GroupSummary]
    mean: GroupSummary
    pooled: GroupSummary

    @property
    def n(self) -> int:
        """Number of images."""
        return self.pooled.n

    @property
    def n_empty(self) -> int:
        """Number of images with the image diagonal in their HD95."""
        return self.pooled.n_empty

    @property
    def worst(self) -> GroupSummary:
        """The hospital with the lowest mean Dice; its other scores may not be the worst ones."""
        return self.clients[self.worst_by("dice")[0]]

    def worst_by(self, metric: str) -> tuple[str, float]:
        """Return name and mean of the hospital that is worst in a metric: lowest Dice or IoU, highest HD95."""
        sign = -1.0 if metric == "hd95" else 1.0
        known = [s for s in self.clients.values() if not math.isnan(s.value(metric))] or list(self.clients.values())
        worst = min(known, key=lambda s: (sign * s.value(metric), s.name))
        return worst.name, worst.value(metric)


def summarize(rows: Iterable[ImageRow]) -> Summary:
    """Summarise the rows of one model, arm and split.

    Args:
        rows: Image rows; the same row twice counts once.

    Raises:
        RunError: If there is no row.
        ValueError: If rows of several models, arms or splits are mixed, or an image appears in two rounds.
    """
    unique = list({row.key: row for row in rows}.values())
    if not unique:
        raise RunError(
            "No image was scored, so there is nothing to summarise: check the split and trainer.limit_*_batches."
        )
    kinds = sorted({(r.model, r.arm, r.split) for r in unique})
    if len(kinds) > 1:
        raise ValueError(f"rows of several models, arms or splits in one summary: {kinds}")
    if len({(r.client, r.id) for r in unique}) < len(unique):
        raise ValueError(f"{kinds[0]}: an image appears in two rounds; choose one round")
    names = sorted({r.client for r in unique})
    clients = {name: _summarize_images(name, [r for r in unique if r.client == name]) for name in names}
    return Summary(clients, _mean_of_hospitals(list(clients.values())), _summarize_images("all images", unique))


def _summarize_images(name: str, rows: Sequence[ImageRow]) -> GroupSummary:
    hd95 = [r.hd95 for r in rows if r.hd95 is not None]
    n_empty = sum(r.empty in ("prediction", "truth") for r in rows)
    return _group(name, len(rows), n_empty, [r.dice for r in rows], [r.iou for r in rows], hd95)


def _mean_of_hospitals(clients: Sequence[GroupSummary]) -> GroupSummary:
    hd95 = [c.hd95 for c in clients if not math.isnan(c.hd95)]
    n, n_empty = sum(c.n for c in clients), sum(c.n_empty for c in clients)
    return _group("mean", n, n_empty, [c.dice for c in clients], [c.iou for c in clients], hd95)


def _group(
    name: str, n: int, n_empty: int, dice: Sequence[float], iou: Sequence[float], hd95: Sequence[float]
) -> GroupSummary:
    means = [math.fsum(v) / len(v) if v else math.nan for v in (dice, iou, hd95)]
    deviations = [statistics.stdev(v) if len(v) > 1 else math.nan for v in (dice, iou, hd95)]
    return GroupSummary(name, n, n_empty, means[0], means[1], means[2], deviations[0], deviations[1], deviations[2])
