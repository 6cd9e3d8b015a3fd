"""Augmentation: seeded, aligned, and never on the wrong plane."""

from __future__ import annotations

import albumentations as A
import numpy as np
import pytest

from fkd_med.data.augmentation import Augmentation, default_augmentation
from fkd_med.errors import ConfigError


def sample(size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """An asymmetric blob, the same in all channels of the image and in the mask."""
    mask = np.zeros((size, size), np.uint8)
    mask[5:12, 8:27] = 1
    mask[12:24, 8:14] = 2
    return np.repeat(mask[..., None], 3, axis=2).astype(np.float32) / 2, mask


def test_equal_seeds_give_equal_results_whatever_came_before() -> None:
    image, mask = sample()
    augment = default_augmentation()
    first = augment(image, mask, 7)
    for seed in range(5):
        augment(image, mask, seed)
    again = default_augmentation()(image, mask, 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, augment(image, mask, 7), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    results = {augment(image, mask, seed)[0].tobytes() for seed in range(20)}
    assert len(results) > 15


def test_transforms_draw_independently() -> None:
    """Albumentations' set_random_seed would flip both ways together: 2 outcomes instead of 4."""
    image, mask = sample()
    augment = Augmentation(geometric=[A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    counts: dict[bytes, int] = {}
    for seed in range(200):
        key = augment(image, mask, seed)[1].tobytes()
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 4 and min(counts.values()) > 25


def test_geometric_transforms_move_image_and_mask_together() -> None:
    image, mask = sample()
    augment = Augmentation(geometric=[A.HorizontalFlip(), A.RandomRotate90(p=1), A.Transpose(), A.VerticalFlip()])
    for seed in range(20):
        moved, labels = augment(image, mask, seed)
        assert np.array_equal(moved[..., 0] * 2, labels)
    bend = Augmentation(geometric=[A.Affine(rotate=(-40, 40), scale=(0.8, 1.2), p=1)])
    for seed in range(20):
        moved, labels = bend(image, mask, seed)
        assert set(np.unique(labels)) <= {0, 1, 2}
        assert np.mean(np.abs(moved[..., 0] * 2 - labels) > 0.6) < 0.05


def test_photometric_transforms_never_touch_the_mask() -> None:
    image, mask = sample()
    augment = Augmentation(photometric=[A.RandomBrightnessContrast(p=1), A.GaussNoise(p=1), A.GaussianBlur(p=1)])
    lit, labels = augment(image, mask, 3)
    assert np.array_equal(labels, mask)
    assert not np.array_equal(lit, image)
    assert lit.dtype == np.float32 and lit.min() >= 0 and lit.max() <= 1


def test_geometric_draws_do_not_depend_on_photometric_ones() -> None:
    image, mask = sample()
    flips: list[A.BasicTransform] = [A.HorizontalFlip(), A.RandomRotate90()]
    alone = Augmentation(flips)
    both = Augmentation(flips, [A.GaussNoise(p=1)])
    assert all(np.array_equal(alone(image, mask, s)[1], both(image, mask, s)[1]) for s in range(10))


def test_it_leaves_its_input_alone_and_takes_grey() -> None:
    image, mask = sample()
    grey = np.ascontiguousarray(image[..., :1])
    for array in (image, mask, grey):
        array.flags.writeable = False  # kept in memory between epochs
    for seed in range(10):
        default_augmentation()(image, mask, seed)
        assert default_augmentation()(grey, mask, seed)[0].shape == grey.shape


def test_label_blending_and_size_changing_transforms_are_refused() -> None:
    with pytest.raises(ConfigError, match="mask_interpolation"):
        Augmentation(geometric=[A.OneOf([A.Affine(mask_interpolation=1)])])
    image, mask = sample()
    with pytest.raises(ConfigError, match="keep the size"):
        Augmentation(geometric=[A.RandomCrop(8, 8)])(image, mask, 0)
    with pytest.raises(ConfigError, match="float32"):
        Augmentation(geometric=[A.RandomCrop(64, 64)])(image, mask, 0)
