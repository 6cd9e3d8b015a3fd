"""Seeded augmentation in two steps: geometric on image and mask, then photometric on the image only.

Resizing and normalising are not augmentation: they belong to the datamodule, so that test and predict undo
and repeat them exactly.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would look for updates over the network
import albumentations as A

from fkd_med.errors import ConfigError
from fkd_med.seeding import derive_seed


class Augmentation:
    """Albumentations transforms for training images: geometric ones, then photometric ones.

    Args:
        geometric: Transforms that move pixels, applied to image and mask together; they keep the size.
        photometric: Transforms that change values, applied to the image only (float32 in [0, 1]).

    Raises:
        ConfigError: A transform that would blend the labels of a mask.
    """

    def __init__(
        self,
        geometric: list[A.BasicTransform] | None = None,
        photometric: list[A.BasicTransform] | None = None,
    ) -> None:
        for transform in _leaves(geometric or []):
            if getattr(transform, "mask_interpolation", cv2.INTER_NEAREST) != cv2.INTER_NEAREST:
                raise ConfigError(
                    f"augmentation.geometric: {type(transform).__name__} has mask_interpolation="
                    f"{transform.mask_interpolation}, which blends labels; leave it at {cv2.INTER_NEAREST} (nearest)."
                )
        self.geometric = A.Compose(geometric or [])
        self.photometric = A.Compose(photometric or [])

    def __call__(
        self, image: NDArray[np.float32], mask: NDArray[np.uint8], seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Augment one sample; equal seeds give equal results in any process.

        Args:
            image: (H, W, C) float32 in [0, 1].
            mask: (H, W) class indices.
            seed: Seeds both steps.

        Returns:
            Image and mask of the same sizes.

        Raises:
            ConfigError: A transform changed the size, or cannot take such an image.
        """
        moved = _run(self.geometric, derive_seed(seed, "geometric"), image=image, mask=mask)
        lit = _run(self.photometric, derive_seed(seed, "photometric"), image=moved["image"])
        if lit["image"].shape != image.shape or moved["mask"].shape != mask.shape:
            raise ConfigError(
                f"augmentation: an image of {image.shape} left as {lit['image'].shape}; transforms must keep the size "
                "(data.image_size and data.resize set it). For random crops use RandomResizedCrop with that size."
            )
        return lit["image"], moved["mask"]


def default_augmentation() -> Augmentation:
    """Return flips, quarter turns, a mild affine map, brightness and contrast."""
    return Augmentation(
        geometric=[
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            A.RandomRotate90(p=0.5),
            A.Affine(scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), rotate=(-15, 15), p=0.5),
        ],
        photometric=[A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5)],
    )


def _run(compose: A.Compose, seed: int, **arrays: NDArray[Any]) -> dict[str, NDArray[Any]]:
    # Not set_random_seed: that gives each transform its own generator with the same seed, so a horizontal and a
    # vertical flip would always come together.
    compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
    try:
        result: dict[str, NDArray[Any]] = compose(**arrays)
    except Exception as error:  # transforms raise types of their own; the user can only mend the list
        raise ConfigError(
            f"augmentation: {', '.join(type(t).__name__ for t in compose.transforms)} failed on a float32 image of "
            f"{arrays['image'].shape} in [0, 1]: {error}. Remove the transform that needs another type or shape."
        ) from error
    return result


def _leaves(transforms: list[Any]) -> Iterator[Any]:
    for transform in transforms:
        if isinstance(transform, A.BaseCompose):
            yield from _leaves(transform.transforms)
        else:
            yield transform
