"""Brings a student's map and its teacher's to one frame and one resolution, pixel on pixel.

A live teacher sees the same augmented image as the student. A cached one saw the image as it is on disk: the batch
then says, in ``coordinates``, where in it each pixel of the augmented image comes from, and the maps are sampled there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.losses import DistillationTerm, Pixels


def match(
    term: DistillationTerm, student: Tensor, teacher: Tensor, pixels: Pixels, coordinates: Tensor | None = None,
    connector: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Pixels]:  # fmt: skip
    """Return what a term compares: student map, teacher map and pixels, of one height and width.

    Args:
        term: says which of the two is brought to the other's resolution.
        student: the student's map (N, C, h, w).
        teacher: the teacher's map (N, C', h', w'), of the image as it is on disk if there are `coordinates`.
        pixels: masks (N, H, W) at the size of the image.
        coordinates: where the pixels of the image come from (N, 3, H, W): x and y in [-1, 1] as in `grid_sample`
            with ``align_corners=False``, and 1 where that lies inside the image on disk.
        connector: applied to the student's map.

    Raises:
        ConfigError: the term allows no resizing, and the sizes differ.
    """
    if term.needs_masks():
        pixels = pixels.with_masks()
    if connector is not None:
        student = connector(student)
    wanted = _size(teacher)
    if term.resize == "teacher":
        student = resized(student, wanted)
    elif term.resize == "none" and _size(student) != wanted:
        raise ConfigError(
            f"the student's map is {_size(student)} and the teacher's {wanted}; resize: student or teacher brings one "
            "to the other's size"
        )
    size = _size(student)
    if coordinates is None:
        return student, resized(teacher, size), pixels.at(size)
    inside = coordinates[:, 2] > 0.5
    seen = replace(pixels, valid=inside if pixels.valid is None else pixels.valid & inside).at(size)
    if size != tuple(coordinates.shape[2:]) and seen.valid is not None:
        seen = replace(seen, valid=seen.valid & is_one_place(coordinates, size))
    return student, sampled(teacher, coordinates, size), seen


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (N, C, h, w) at another height and width: values at the new pixels' centres, bilinear."""
    if _size(maps) == size:
        return maps
    with torch.autocast(maps.device.type, enabled=False):
        return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)


def sampled(maps: Tensor, coordinates: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (N, C, h, w) seen through an augmentation, at height and width `size`, bilinear.

    Args:
        maps: maps of the images as they are on disk, of any resolution and floating type.
        coordinates: as in `match`.
        size: height and width of the result.
    """
    with torch.autocast(maps.device.type, enabled=False):
        points = resized(coordinates[:, :2].float(), size).movedim(1, -1)  # (N, h, w, 2)
        return F.grid_sample(maps.float(), points, mode="bilinear", padding_mode="border", align_corners=False)


def is_one_place(coordinates: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which cells of a coarser grid show one place of the image (N, h, w), not several that lie apart.

    A cell may be 2.5 times as wide in the image as in the grid: an image may be shrunk, but not torn.

    Args:
        coordinates: as in `match`.
        size: height and width of the coarser grid.
    """
    places = coordinates[:, :2].float()
    spread = F.adaptive_max_pool2d(places, size) + F.adaptive_max_pool2d(-places, size)  # (N, 2, h, w)
    return (spread <= 2.5 * 2 / min(size)).all(dim=1)


def _size(maps: Tensor) -> tuple[int, int]:
    return int(maps.shape[-2]), int(maps.shape[-1])
