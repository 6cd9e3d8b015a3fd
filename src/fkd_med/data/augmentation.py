"""Seeded augmentation in two steps: geometric on image and mask, then photometric on the image only.

Resizing and normalising are not augmentation: they belong to the datamodule, so that test and predict undo
and repeat them exactly.

What a frozen teacher says about an image is computed once, before augmentation. So that it can be looked up for
the augmented image, the geometric step also moves a grid of coordinates: where each pixel came from, if from
anywhere.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would look for updates over the network
import albumentations as A

from fkd_med.errors import ConfigError
from fkd_med.seeding import derive_seed

_COORDINATES = "coordinates"


class Augmentation:
    """Albumentations transforms for training images: geometric ones, then photometric ones.

    Args:
        geometric: Transforms that move pixels, applied to image and mask together; they keep the size.
        photometric: Transforms that change values, applied to the image only (float32 in [0, 1]).

    Raises:
        ConfigError: A transform that would blend the labels of a mask, or a photometric one among the geometric.
    """

    def __init__(
        self,
        geometric: list[A.BasicTransform] | None = None,
        photometric: list[A.BasicTransform] | None = None,
    ) -> None:
        for transform in _leaves(geometric or []):
            _check_geometric(transform)
        self.geometric = A.Compose(geometric or [])
        self.photometric = A.Compose(photometric or [])
        # Told to the transforms, not to Compose: teachers are stored under a description of Compose, which would
        # list the target. Morphological grows and shrinks shapes, but what is at a place stays there.
        for transform in _leaves(self.geometric.transforms):
            if not isinstance(transform, A.Morphological):
                transform.add_targets({_COORDINATES: "image"})

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
        moved = self._apply(seed, image=image, mask=mask)
        return moved["image"], moved["mask"]

    def with_coordinates(
        self, image: NDArray[np.float32], mask: NDArray[np.uint8], seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
        """Augment one sample and tell where each of its pixels came from; image and mask are as without.

        Args:
            image: (H, W, C) float32 in [0, 1].
            mask: (H, W) class indices.
            seed: Seeds both steps.

        Returns:
            Image, mask and coordinates (3, H, W) float32: x and y of the source point in [-1, 1], as
            ``grid_sample(align_corners=False)`` counts them, and 1 where they hold. All three are 0 where the
            pixel shows something from outside the image, a dropout, or a blend of places far apart.

        Raises:
            ConfigError: A transform changed the size, or cannot take such an image or such coordinates.
        """
        moved = self._apply(seed, image=image, mask=mask, coordinates=_grid(*mask.shape))
        return moved["image"], moved["mask"], _decode(moved[_COORDINATES])

    def _apply(self, seed: int, **arrays: NDArray[Any]) -> dict[str, NDArray[Any]]:
        moved = _run(self.geometric, derive_seed(seed, "geometric"), **arrays)
        lit = _run(self.photometric, derive_seed(seed, "photometric"), image=moved["image"])
        moved["image"] = lit["image"]
        if any(moved[name].shape != array.shape for name, array in arrays.items()):
            raise ConfigError(
                f"augmentation: an image of {arrays['image'].shape} left as {lit['image'].shape}; transforms must keep "
                "the size (data.image_size and data.resize set it). For random crops use RandomResizedCrop with that "
                "size."
            )
        return moved


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
        grid = " with a grid of coordinates (H, W, 3), float32 too, for teacher maps" if _COORDINATES in arrays else ""
        raise ConfigError(
            f"augmentation: {', '.join(type(t).__name__ for t in compose.transforms)} failed on a float32 image of "
            f"{arrays['image'].shape} in [0, 1]{grid}: {error}. Remove the transform that needs another type or shape."
        ) from error
    return result


def _leaves(transforms: list[Any]) -> Iterator[Any]:
    for transform in transforms:
        # SelectiveChannelTransform shows its transforms some channels of the image, and nothing else.
        if isinstance(transform, A.BaseCompose) and not isinstance(transform, A.SelectiveChannelTransform):
            yield from _leaves(transform.transforms)
        else:
            yield transform


def _check_geometric(transform: Any) -> None:
    name = type(transform).__name__
    if not isinstance(transform, A.DualTransform):
        raise ConfigError(
            f"augmentation.geometric: {name} changes the image alone, not where its pixels are, and so would change "
            "the coordinates that go along with it. Move it to augmentation.photometric."
        )
    if getattr(transform, "mask_interpolation", cv2.INTER_NEAREST) != cv2.INTER_NEAREST:
        raise ConfigError(
            f"augmentation.geometric: {name} has mask_interpolation={transform.mask_interpolation}, which blends "
            f"labels; leave it at {cv2.INTER_NEAREST} (nearest)."
        )


@lru_cache(maxsize=4)
def _grid(height: int, width: int) -> NDArray[np.float32]:
    """Return an image (H, W, 3) of what `_decode` reads: x and y in [0, 0.5], and the `_dome` over them."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    grid = np.stack([x / 2, y / 2, _dome(x / 2, y / 2)], axis=-1).astype(np.float32)
    grid.flags.writeable = False  # kept for all images
    return grid


def _dome(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Return a height in [0.5, 1) that travels with x and y, so that anything else put in their place is found out.

    Interpolating between neighbours keeps to the dome. A blend of places far apart lies below it. So does
    (f, f, f) for any f in [0, 1], and with it whatever blends with a border filled with f: the dome is concave.
    """
    return 1.22 - 0.25 * (np.square(x - 1.2) + np.square(y - 1.2))


def _decode(moved: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return x and y in [-1, 1] and whether they hold, (3, H, W)."""
    # Not cv2.split, which takes three times as long.
    coordinates = np.array(moved.transpose(2, 0, 1), np.float32, order="C")
    x, y, height = coordinates
    # Pixels that are d apart from their blend (root mean square) lie (d / 4)^2 / (H W) below the dome. Letting
    # d = 4 through covers every interpolation of neighbours; 2e-6 is what float32 needs for very large images.
    holds = np.abs(_dome(x, y) - height) < max(1 / x.size, 2e-6)
    coordinates[:2] *= 4
    coordinates[:2] -= 1
    np.copyto(coordinates[:2], 0, where=~holds)  # it may be NaN, which GridElasticDeform leaves in its gaps
    coordinates[2] = holds
    return coordinates
