"""Dice, IoU and HD95 of one image: the numbers every table, interval and picture is made from.

Conventions, so that nobody has to guess:

- *Classes.* With one or two logits the foreground is class 1. With three or more, a score is the plain mean over the
  foreground classes present in the prediction or in the truth of this image; a class absent from both says nothing.
- *HD95* is the 95th percentile of the surface distances of both directions, pooled (the convention of medpy; MONAI
  takes the larger of the two directed percentiles). A surface pixel is a mask pixel with one of its four neighbours
  outside the mask, the outside of the image included.
- *Empty masks.* Nothing in either mask: Dice 1, IoU 1, HD95 0. A class in only one of the masks: Dice 0, IoU 0, and for
  HD95 the image diagonal, longer than any distance inside it. `Scores.empty` tells these images apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

IndexMask = npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]
Spacing = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """Scores of one image.

    Attributes:
        dice: Dice coefficient in [0, 1].
        iou: Intersection over union in [0, 1].
        hd95: 95th percentile Hausdorff distance, pixels (mm with spacing), or None when it was not asked for.
        empty: ``"both"`` when neither mask has foreground; ``"prediction"`` when a class of the truth is missing from
            the prediction; else ``"truth"`` when a predicted class is missing from the truth; else ``""``. So the
            image diagonal entered `hd95` exactly when `empty` is ``"prediction"`` or ``"truth"``.
    """

    dice: float
    iou: float
    hd95: float | None
    empty: str


def score_image(
    prediction: IndexMask,
    truth: IndexMask,
    classes: int,
    hd95: bool = True,
    spacing: Spacing | None = None,
) -> Scores:
    """Score one predicted mask against the truth.

    Args:
        prediction: Class indices, (H, W).
        truth: Class indices, (H, W).
        classes: Number of logits K of the network: 1 or 2 for one foreground class, K for K - 1 of them.
        hd95: Compute HD95 (a few ms per image); validation leaves it out.
        spacing: Size of a pixel as (row, column) in mm; HD95 is then in mm.

    Raises:
        ValueError: If the shapes differ or a class index lies outside the range.
    """
    table = _confusion(prediction, truth, max(classes, 2))
    predicted, actual, both = table.sum(0), table.sum(1), table.diagonal()
    present = [c for c in range(1, len(table)) if predicted[c] or actual[c]]
    if not present:
        return Scores(1.0, 1.0, 0.0 if hd95 else None, "both")
    dice = [2.0 * both[c] / (predicted[c] + actual[c]) for c in present]
    iou = [both[c] / (predicted[c] + actual[c] - both[c]) for c in present]
    distances = [hausdorff95(prediction == c, truth == c, spacing) for c in present] if hd95 else []
    return Scores(
        dice=float(np.mean(dice)),
        iou=float(np.mean(iou)),
        hd95=float(np.mean(distances)) if hd95 else None,
        empty=_missing([bool(predicted[c]) for c in present], [bool(actual[c]) for c in present]),
    )


def hausdorff95(
    prediction: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], spacing: Spacing | None = None
) -> float:
    """Return the 95th percentile of the surface distances between two masks, both directions pooled.

    Args:
        prediction: Mask, (H, W).
        truth: Mask, (H, W).
        spacing: Size of a pixel as (row, column) in mm; default pixels.

    Returns:
        The distance; the diagonal of the image when exactly one mask is empty, 0 when both are.
    """
    if not prediction.any() and not truth.any():
        return 0.0
    if not prediction.any() or not truth.any():
        return diagonal(truth.shape, spacing)
    # Exact, not an approximation: every surface pixel lies in the bounding box, nearest surface pixels therefore too,
    # and what the box cuts off is background, which is what erosion assumes beyond the edge.
    box = _bounding_box(prediction | truth)
    ours, theirs = _surface(prediction[box]), _surface(truth[box])
    to_theirs = ndimage.distance_transform_edt(~theirs, sampling=spacing)[ours]
    to_ours = ndimage.distance_transform_edt(~ours, sampling=spacing)[theirs]
    return float(np.percentile(np.concatenate([to_theirs, to_ours]), 95))


def diagonal(shape: tuple[int, ...], spacing: Spacing | None = None) -> float:
    """Return the diagonal of an image of `shape` (H, W), in pixels, or mm with spacing."""
    rows, columns = spacing or (1.0, 1.0)
    return math.hypot(shape[0] * rows, shape[1] * columns)


def _confusion(prediction: IndexMask, truth: IndexMask, classes: int) -> npt.NDArray[np.int64]:
    """Count pixels by true class (row) and predicted class (column)."""
    if prediction.shape != truth.shape or prediction.ndim != 2:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} must be (H, W) masks of one shape")
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.size and (int(mask.min()) < 0 or int(mask.max()) >= classes):
            raise ValueError(f"{name} holds class {int(mask.min())} to {int(mask.max())}, expected 0 to {classes - 1}")
    pairs = truth.astype(np.int64) * classes + prediction.astype(np.int64)
    return np.bincount(pairs.ravel(), minlength=classes * classes).reshape(classes, classes)


def _missing(predicted: list[bool], actual: list[bool]) -> str:
    if not all(predicted):
        return "prediction"
    return "" if all(actual) else "truth"


def _bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _surface(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    # binary_erosion treats the outside of the array as background, so a mask that touches the edge has surface there.
    return mask & ~ndimage.binary_erosion(mask)
