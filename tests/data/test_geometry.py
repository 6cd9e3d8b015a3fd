"""Fitting to the working square and back: known ramps, kept labels, pixel centres."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fkd_med.data.geometry import ResizeMode, fit_image, fit_mask, fitted_box, undo
from fkd_med.errors import ConfigError

MODES: list[ResizeMode] = ["stretch", "letterbox"]
SIZES = [(288, 384), (384, 288), (40, 70), (64, 64), (301, 64)]


def ramp(height: int, width: int) -> np.ndarray:
    """Rises from 0 to 1 over rows and columns alike, linear in the pixel centres."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    return (0.5 * y[:, None] + 0.5 * x[None, :]).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_undo_gives_back_a_ramp_where_it_was(mode: ResizeMode, size: tuple[int, int]) -> None:
    original = ramp(*size)
    fitted = fit_image(original[..., None], 96, mode)
    assert fitted.shape == (96, 96, 1)
    back = undo(torch.from_numpy(fitted.transpose(2, 0, 1)), size, mode)[0].numpy()
    assert back.shape == size
    # One working pixel of slope is the most that the borders can lose; half of it would show a shift inside.
    inside = (slice(8, -8), slice(8, -8))
    assert np.abs(back - original)[inside].max() < 2e-3
    assert np.abs(back - original).max() < 2 / min(fitted_box(*size, 96, mode)[2:])


def test_letterbox_keeps_the_aspect_ratio_and_centres() -> None:
    fitted = fit_image(np.ones((288, 384, 3), np.float32), 96, "letterbox")
    assert fitted[12:84].min() == 1 and fitted[:12].max() == 0 and fitted[84:].max() == 0
    assert fitted_box(384, 288, 96, "letterbox") == (0, 12, 96, 72)


def test_shrinking_averages_and_growing_interpolates() -> None:
    chequers = np.indices((64, 64)).sum(0).astype(np.float32)[..., None] % 2
    assert np.allclose(fit_image(chequers, 32), 0.5)  # bilinear sampling at the centres would too; a third would not:
    stripes = np.tile(np.array([0, 0, 1], np.float32), (48, 16))[..., None]
    assert np.allclose(fit_image(stripes, 16), 1 / 3, atol=1e-5)
    assert np.allclose(fit_image(np.array([[[0.0], [1.0]]], np.float32), 4)[0, :, 0], [0, 0.25, 0.75, 1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_masks_keep_their_labels(mode: ResizeMode, dtype: type) -> None:
    mask = np.random.default_rng(0).choice([0, 3, 7, 200], (33, 61)).astype(dtype)
    fitted = fit_mask(mask, 48, mode)
    assert fitted.dtype == dtype and fitted.shape == (48, 48)
    assert set(np.unique(fitted)) == {0, 3, 7, 200}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(100, 60), (20, 30)])
def test_a_mask_stays_on_its_image(mode: ResizeMode, size: tuple[int, int]) -> None:
    y, x = np.indices(size)
    disk = ((y - size[0] * 0.4) ** 2 + (x - size[1] * 0.6) ** 2 < (min(size) * 0.3) ** 2).astype(np.uint8)
    image = fit_image(disk[..., None].astype(np.float32), 64, mode)[..., 0]
    mask = fit_mask(disk, 64, mode)
    centre_image = (np.indices((64, 64)) * image).sum((1, 2)) / image.sum()
    centre_mask = np.argwhere(mask == 1).mean(0)
    # cv2.INTER_NEAREST would be off by 0.18 when shrinking and 1.1 when growing.
    assert np.abs(centre_image - centre_mask).max() < (0.15 if size[0] > 64 else 0.3)


def test_equal_size_changes_nothing() -> None:
    image = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    for mode in MODES:
        assert np.array_equal(fit_image(image, 64, mode), image)
        maps = torch.from_numpy(image.transpose(2, 0, 1))
        assert torch.equal(undo(maps, (64, 64), mode), maps)


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="stretch, letterbox"):
        fit_image(np.zeros((4, 4, 3), np.float32), 8, "crop")  # type: ignore[arg-type]
