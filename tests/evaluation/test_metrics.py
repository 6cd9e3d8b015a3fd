"""Dice, IoU and HD95 against definitions spelled out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from fkd_med.evaluation import hausdorff95, score_image


def surface(mask: np.ndarray) -> list[tuple[int, int]]:
    """Mask pixels with a four-neighbour outside the mask or the image."""
    height, width = mask.shape
    points = []
    for y, x in zip(*np.nonzero(mask), strict=True):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        if any(not (0 <= i < height and 0 <= j < width) or not mask[i, j] for i, j in around):
            points.append((int(y), int(x)))
    return points


def brute_hd95(first: np.ndarray, second: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    a, b = surface(first), surface(second)
    if not a and not b:
        return 0.0
    if not a or not b:
        return math.hypot(first.shape[0] * spacing[0], first.shape[1] * spacing[1])

    def directed(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[float]:
        return [min(math.hypot((p[0] - q[0]) * spacing[0], (p[1] - q[1]) * spacing[1]) for q in other) for p in one]

    distances = sorted(directed(a, b) + directed(b, a))
    place = 0.95 * (len(distances) - 1)
    low = int(place)
    high = min(low + 1, len(distances) - 1)
    return distances[low] + (place - low) * (distances[high] - distances[low])


def blobs(seed: int, shape: tuple[int, int], threshold: float) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    return noise / noise.std() > threshold


@pytest.mark.parametrize("shape", [(24, 24), (17, 31), (31, 17), (1, 20), (20, 1)])
@pytest.mark.parametrize("spacing", [None, (0.5, 2.0), (3.0, 0.25)])
def test_scores_agree_with_brute_force(shape: tuple[int, int], spacing: tuple[float, float] | None) -> None:
    for seed in range(6):
        prediction, truth = blobs(seed, shape, 0.4), blobs(seed + 100, shape, 0.4)
        scores = score_image(prediction.astype(np.int64), truth.astype(np.uint8), classes=1, spacing=spacing)
        p, t = set(map(tuple, np.argwhere(prediction))), set(map(tuple, np.argwhere(truth)))
        if p or t:
            assert scores.dice == pytest.approx(2 * len(p & t) / (len(p) + len(t)), abs=1e-12)
            assert scores.iou == pytest.approx(len(p & t) / len(p | t), abs=1e-12)
        assert scores.hd95 == pytest.approx(brute_hd95(prediction, truth, spacing or (1.0, 1.0)), abs=1e-9)


def test_hd95_by_hand() -> None:
    # Single pixels 3 rows and 4 columns apart: both directed distances are 5.
    one, other = np.zeros((9, 12), bool), np.zeros((9, 12), bool)
    one[1, 2] = other[4, 6] = True
    assert hausdorff95(one, other) == pytest.approx(5.0)
    assert hausdorff95(one, other, spacing=(2.0, 0.5)) == pytest.approx(math.hypot(6.0, 2.0))


def test_hd95_pools_both_directions() -> None:
    # Nine common pixels on a line, and one more in the prediction, 30 away.
    truth = np.zeros((1, 60), bool)
    truth[0, :9] = True
    prediction = truth.copy()
    prediction[0, 38] = True
    # Directed: ten distances, 0 x 9 and 30 -> percentile at 8.55 -> 0.55 * 30 = 16.5. Pooled: 19, at 17.1 -> 0.1 * 30.
    assert hausdorff95(prediction, truth) == pytest.approx(3.0)
    assert hausdorff95(truth, prediction) == pytest.approx(3.0)


def test_surface_includes_the_edge_of_the_image() -> None:
    # The full image against its inner part: the surface of the full mask is the image's edge, 2 pixels away at most
    # corners excepted (2 * sqrt 2).
    full, inner = np.ones((12, 9), bool), np.zeros((12, 9), bool)
    inner[2:-2, 2:-2] = True
    assert hausdorff95(full, inner) == pytest.approx(brute_hd95(full, inner))
    assert hausdorff95(full, inner) >= 2.0


@pytest.mark.parametrize("where", [(0, 0), (0, 30), (40, 0), (40, 30), (17, 11)])
def test_cropping_is_exact(where: tuple[int, int]) -> None:
    """The same masks in a larger image, at its edges too where they keep their surroundings, score the same."""
    prediction, truth = np.pad(blobs(1, (14, 20), 0.3), 1), np.pad(blobs(2, (14, 20), 0.3), 1)
    large = [np.zeros((56, 52), bool) for _ in range(2)]
    for canvas, mask in zip(large, (prediction, truth), strict=True):
        canvas[where[0] : where[0] + 16, where[1] : where[1] + 22] = mask
    assert hausdorff95(large[0], large[1]) == hausdorff95(prediction, truth)
    assert hausdorff95(large[0], large[1]) == pytest.approx(brute_hd95(large[0], large[1]), abs=1e-9)


def test_empty_masks() -> None:
    nothing, something = np.zeros((30, 40), np.int64), np.zeros((30, 40), np.int64)
    something[3:6, 4:9] = 1
    both = score_image(nothing, nothing, classes=1)
    assert (both.dice, both.iou, both.hd95, both.empty) == (1.0, 1.0, 0.0, "both")
    missed = score_image(nothing, something, classes=1)
    assert (missed.dice, missed.iou, missed.hd95, missed.empty) == (0.0, 0.0, 50.0, "prediction")
    invented = score_image(something, nothing, classes=2, spacing=(2.0, 2.0))
    assert (invented.dice, invented.iou, invented.hd95, invented.empty) == (0.0, 0.0, 100.0, "truth")
    apart = score_image(np.roll(something, 20, 1), something, classes=1)
    assert apart.dice == 0.0 and apart.empty == "" and apart.hd95 is not None and apart.hd95 < 50.0


def test_hd95_is_left_out_on_request() -> None:
    mask = np.eye(5, dtype=np.int64)
    assert score_image(mask, mask, classes=1, hd95=False).hd95 is None
    assert score_image(mask * 0, mask * 0, classes=1, hd95=False).hd95 is None


def test_multi_class_is_the_mean_over_classes_present() -> None:
    truth = np.array([[1, 1, 0, 2], [1, 1, 0, 2], [0, 0, 0, 0]])
    prediction = np.array([[1, 1, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = score_image(prediction, truth, classes=4)  # class 3 is in neither
    assert scores.dice == pytest.approx((2 * 2 / 6 + 2 * 1 / 3) / 2)
    assert scores.iou == pytest.approx((2 / 4 + 1 / 2) / 2)
    expected = [brute_hd95(prediction == c, truth == c) for c in (1, 2)]
    assert scores.hd95 == pytest.approx(sum(expected) / 2) and scores.empty == ""


def test_multi_class_counts_a_missing_class() -> None:
    truth = np.array([[1, 0, 0, 2]])
    lost = score_image(np.array([[1, 0, 0, 0]]), truth, classes=3)
    assert lost.empty == "prediction" and lost.dice == 0.5 and lost.hd95 == pytest.approx(math.hypot(1, 4) / 2)
    added = score_image(truth, np.array([[1, 0, 0, 0]]), classes=3)
    assert added.empty == "truth" and added.dice == 0.5


def test_two_logits_score_like_one() -> None:
    prediction, truth = blobs(3, (20, 25), 0.5).astype(np.int64), blobs(4, (20, 25), 0.5).astype(np.int64)
    assert score_image(prediction, truth, classes=2) == score_image(prediction, truth, classes=1)


def test_wrong_masks_are_refused() -> None:
    mask = np.zeros((4, 5), np.int64)
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(5, 4\)"):
        score_image(mask, mask.T, classes=1)
    with pytest.raises(ValueError, match="truth holds class 0 to 255"):
        score_image(mask, np.eye(4, 5, dtype=np.uint8) * 255, classes=1)
    with pytest.raises(ValueError, match="prediction holds class -1"):
        score_image(mask - 1, mask, classes=3)
