"""Masks and valid pixels at the resolution of a feature map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fkd_med.losses import Pixels


def pixels(classes: int = 300) -> Pixels:
    g = torch.Generator().manual_seed(0)
    mask = torch.randint(0, classes, (3, 6, 9), generator=g)
    return Pixels(mask, classes, torch.rand(3, 6, 9, generator=g) < 0.8)


def covered(cell: int, cells: int, size: int) -> slice:
    """The pixels of which a cell holds any part, by fractions of the image."""
    return slice(cell * size // cells, -(-(cell + 1) * size // cells))


@pytest.mark.parametrize("size", [(3, 3), (2, 9), (4, 5), (1, 1), (12, 18), (7, 4)])
def test_against_numpy(size: tuple[int, int]) -> None:
    full, found = pixels(), pixels().at(size)
    assert full.valid is not None and found.valid is not None
    assert found.mask.shape == found.valid.shape == (3, *size)
    assert found.mask.dtype == torch.int64 and found.valid.dtype == torch.bool and found.classes == 300
    mask, valid = full.mask.numpy(), full.valid.numpy()
    for n, y, x in np.ndindex(3, *size):
        near = mask[n, int((y + 0.5) * 6 / size[0]), int((x + 0.5) * 9 / size[1])]
        assert found.mask[n, y, x] == near
        assert found.valid[n, y, x] == valid[n, covered(y, size[0], 6), covered(x, size[1], 9)].all()


def test_one_invalid_pixel_spoils_its_cell_only() -> None:
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 1, 2] = False
    found = Pixels(torch.zeros(1, 4, 4, dtype=torch.int64), 2, valid).at((2, 2)).valid
    assert found is not None and found.tolist() == [[[True, False], [True, True]]]


def test_the_same_size_is_the_same_object() -> None:
    here = pixels()
    assert here.at((6, 9)) is here
    assert here.at(torch.zeros(1, 1, 6, 9).shape[2:]) is here  # type: ignore[arg-type]


def test_all_pixels_stay_all_pixels() -> None:
    full = pixels()
    found = Pixels(full.mask, full.classes).at((3, 3))
    assert found.valid is None and torch.equal(found.mask, full.at((3, 3)).mask)
