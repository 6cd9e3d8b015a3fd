"""Coordinates that go along with augmentation: a known picture looked up at them must come back."""

from __future__ import annotations

import json
import pickle
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch

from fkd_med.data.augmentation import Augmentation, default_augmentation
from fkd_med.errors import ConfigError

SIZE = 64
CENTRES = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
X, Y = np.meshgrid(CENTRES, CENTRES)
RAMP = np.stack([X, Y, (X + Y) / 2], axis=-1)
# A ramp alone would not notice two far places blended into the one between them: this texture does.
WAVES = np.stack([0.5 + 0.4 * np.sin(2 * np.pi * u) * np.cos(4 * np.pi * v) for u, v in ((X, Y), (Y, X), (X, X))], -1)
WAVES_PER_PIXEL = float(np.abs(np.gradient(WAVES, axis=(0, 1))).max())
ONES = np.ones_like(RAMP)
MASK = ((X > 0.3) & (Y > 0.4)).astype(np.uint8)
BORDERS = {"constant": 0, "replicate": 1, "reflect": 2, "wrap": 3, "reflect101": 4}
AFFINE: dict[str, Any] = {"scale": (0.7, 1.4), "rotate": (-40, 40), "translate_percent": (-0.2, 0.2), "shear": (-9, 9)}


def mirrored(array: np.ndarray, **_: Any) -> np.ndarray:
    return np.ascontiguousarray(array[:, ::-1])


def same(array: np.ndarray, **_: Any) -> np.ndarray:
    return array


RIGID: dict[str, A.BasicTransform] = {  # every pixel of the result is one of the image
    "HorizontalFlip": A.HorizontalFlip(p=1),
    "VerticalFlip": A.VerticalFlip(p=1),
    "Transpose": A.Transpose(p=1),
    "RandomRotate90": A.RandomRotate90(p=1),
    "D4": A.D4(p=1),
    "SquareSymmetry": A.SquareSymmetry(p=1),
    "NoOp": A.NoOp(p=1),
    "RandomGridShuffle": A.RandomGridShuffle((3, 3), p=1),
    "Lambda": A.Lambda(image=mirrored, mask=mirrored, p=1),
}
INSIDE: dict[str, A.BasicTransform] = {  # never looks outside, or finds a copy of the image there
    "RandomResizedCrop": A.RandomResizedCrop((SIZE, SIZE), p=1),
    "RandomResizedCrop by area": A.RandomResizedCrop((SIZE, SIZE), interpolation=3, p=1),
    "RandomSizedCrop": A.RandomSizedCrop((20, SIZE), (SIZE, SIZE), p=1),
    "CropAndPad cropping": A.CropAndPad(percent=(-0.3, -0.1), p=1),
    "Perspective": A.Perspective(p=1),
    "Rotate reflecting": A.Rotate((-45, 45), border_mode=BORDERS["reflect101"], p=1),
    "CropAndPad reflecting": A.CropAndPad(percent=(-0.2, 0.2), border_mode=BORDERS["reflect101"], p=1),
    **{f"Affine {b}": A.Affine(**AFFINE, border_mode=BORDERS[b], p=1) for b in ("replicate", "reflect", "reflect101")},
    "Resize down and up": A.Sequential([A.Resize(SIZE // 4, SIZE // 4, p=1), A.Resize(SIZE, SIZE, p=1)], p=1),
}
FILLING: dict[str, A.BasicTransform] = {  # shows places outside of the image
    "Rotate": A.Rotate((15, 15), p=1),
    "SafeRotate": A.SafeRotate((20, 45), p=1),
    "Affine fitting": A.Sequential([A.Affine(rotate=30, fit_output=True, p=1), A.Resize(SIZE, SIZE, p=1)], p=1),
    "Affine shrinking": A.Affine(scale=(0.4, 0.6), p=1),
    **{f"Affine filling {f}": A.Affine(**AFFINE, fill=f, p=1) for f in (0, 1, 0.5, 0.7, 255, (0.2, 0.9, 0.4))},
    **{f"Affine interpolation {i}": A.Affine(**AFFINE, interpolation=i, p=1) for i in (0, 2, 3, 4)},
    "CropAndPad": A.CropAndPad(percent=(0.05, 0.2), p=1),
    "CropAndPad drawing its fill": A.CropAndPad(px=(3, 9), fill=(0.3, 0.9), p=1),
    "Perspective fitting": A.Perspective(fit_output=True, fill=(0.1, 0.2, 0.3), p=1),
    "ElasticTransform": A.ElasticTransform(alpha=60, sigma=6, p=1),
    "ElasticTransform rough": A.ElasticTransform(p=1),
    "OpticalDistortion": A.OpticalDistortion(distort_limit=(0.5, 0.6), p=1),
    "ThinPlateSpline": A.ThinPlateSpline(scale_range=(0.3, 0.4), p=1),
    "Pad": A.Sequential([A.Pad(padding=9, fill=0.5, p=1), A.Resize(SIZE, SIZE, p=1)], p=1),
}
OTHERS: dict[str, A.BasicTransform] = {
    "Affine wrapping": A.Affine(**AFFINE, border_mode=BORDERS["wrap"], p=1),
    "GridDistortion": A.GridDistortion(p=1),
    "GridDistortion far": A.GridDistortion(distort_limit=0.5, normalized=False, p=1),
    "OpticalDistortion fisheye": A.OpticalDistortion(mode="fisheye", distort_limit=0.5, p=1),
    "GridElasticDeform": A.GridElasticDeform(num_grid_xy=(4, 4), magnitude=3, p=1),
    "shuffled and turned": A.Sequential([A.RandomGridShuffle((3, 3), p=1), A.Rotate((20, 30), p=1)], p=1),
    "OneOf": A.OneOf([A.HorizontalFlip(), A.Rotate(), A.Transpose()], p=1),
    "SomeOf": A.SomeOf([A.HorizontalFlip(), A.Rotate(), A.Transpose()], n=2, p=1),
    "RandomOrder": A.RandomOrder([A.HorizontalFlip(p=1), A.Rotate(p=1)], p=1),
    "Compose": A.Compose([A.VerticalFlip(), A.Rotate(p=1)]),
}
DROPOUTS: dict[str, A.BasicTransform] = {
    **{f"CoarseDropout {f}": A.CoarseDropout(fill=f, p=1) for f in (0, 0.5, 1, "random_uniform")},
    "Erasing": A.Erasing(scale=(0.1, 0.2), p=1),
    "GridDropout": A.GridDropout(p=1),
    "PixelDropout": A.PixelDropout(dropout_prob=0.2, p=1),
    "XYMasking": A.XYMasking((2, 2), (2, 2), 9, 9, p=1),
}
MOVING = RIGID | INSIDE | FILLING | OTHERS


def chain() -> Augmentation:
    """Default augmentation without its affine map's mild limits, then a crop: several interpolations."""
    affine = A.Affine(scale=(0.8, 1.2), translate_percent=(-0.1, 0.1), rotate=(-30, 30), p=0.8)
    return Augmentation(
        [A.HorizontalFlip(), A.RandomRotate90(), affine, A.RandomResizedCrop((SIZE, SIZE), (0.5, 1.0), p=0.8)],
        [A.RandomBrightnessContrast(p=1), A.GaussNoise(p=1)],
    )


def look_up(picture: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """What a cached map shows at the coordinates, the way training samples it."""
    maps = torch.from_numpy(picture.astype(np.float32).transpose(2, 0, 1)[None])
    where = torch.from_numpy(coordinates[:2].transpose(1, 2, 0)[None])
    found = torch.nn.functional.grid_sample(maps, where, "bilinear", "border", align_corners=False)
    return found[0].numpy().transpose(1, 2, 0)


def quarter(picture: np.ndarray) -> np.ndarray:
    return picture.reshape(SIZE // 4, 4, SIZE // 4, 4, -1).mean(axis=(1, 3))


def worst(difference: np.ndarray, where: np.ndarray) -> float:
    return float(np.abs(difference).max(axis=-1)[where].max(initial=0))


@pytest.mark.parametrize("name", MOVING)
def test_a_known_ramp_and_texture_come_back(name: str) -> None:
    augment = Augmentation([MOVING[name]])
    full = small = waves = 0.0
    for seed in range(6):
        ramp, _, coordinates = augment.with_coordinates(RAMP, MASK, seed)
        valid = coordinates[2] == 1
        assert valid.mean() > 0.1
        full = max(full, SIZE * worst(look_up(RAMP, coordinates) - ramp, valid))
        # A quarter of the resolution cannot show the outermost two pixels of a ramp: cells end at their centres.
        shown = valid & (np.abs(coordinates[:2]).max(axis=0) <= 1 - 4 / SIZE)
        small = max(small, SIZE * worst(look_up(quarter(RAMP), coordinates) - ramp, shown))
        texture = augment.with_coordinates(WAVES, MASK, seed)[0]
        waves = max(waves, worst(look_up(WAVES, coordinates) - texture, valid) / WAVES_PER_PIXEL)
    assert full < 0.01 and small < 0.01 and waves < 1


def test_a_known_ramp_comes_back_through_flip_turn_crop_and_scale() -> None:
    moved, clean = chain(), Augmentation(list(chain().geometric.transforms))
    for seed in range(30):
        coordinates = moved.with_coordinates(RAMP, MASK, seed)[2]
        ramp = clean(RAMP, MASK, seed)[0]  # photometric transforms would change it
        assert SIZE * worst(look_up(RAMP, coordinates) - ramp, coordinates[2] == 1) < 0.01


@pytest.mark.parametrize("name", [*RIGID, *INSIDE])
def test_all_pixels_are_valid_where_nothing_comes_from_outside(name: str) -> None:
    augment = Augmentation([MOVING[name]])
    for seed in range(6):
        coordinates = augment.with_coordinates(RAMP, MASK, seed)[2]
        assert coordinates[2].min() == 1 and np.abs(coordinates[:2]).max() <= 1


@pytest.mark.parametrize("name", [*FILLING, *DROPOUTS])
def test_pixels_are_invalid_exactly_where_the_image_was_filled(name: str) -> None:
    """An image of ones next to one of zeros shows by how much each pixel comes from outside."""
    augment = Augmentation([(FILLING | DROPOUTS)[name]])
    cubic = name.endswith(("2", "4"))  # such kernels have parts that cancel out
    for seed in range(6):
        ones, _, coordinates = augment.with_coordinates(ONES, MASK, seed)
        zeros = augment(0 * ONES, MASK, seed)[0]
        outside = 1 - np.abs(ones - zeros).max(axis=-1)
        valid = coordinates[2] == 1
        assert 0.1 < valid.mean() < 1
        assert outside[valid].max() < (0.3 if cubic else 0.02)
        assert outside[~valid].min() > (-1 if cubic else 1e-5)


def test_flips_and_turns_point_at_the_exact_pixel() -> None:
    x, y = 2 * X - 1, 2 * Y - 1
    for transform, expected in (
        (A.HorizontalFlip(p=1), (x[:, ::-1], y)),
        (A.VerticalFlip(p=1), (x, y[::-1])),
        (A.Transpose(p=1), (x.T, y.T)),
        (A.Affine(translate_px={"x": 8, "y": -4}, p=1), (x - 16 / SIZE, y + 8 / SIZE)),
    ):
        coordinates = Augmentation([transform]).with_coordinates(RAMP, MASK, 0)[2]
        valid = coordinates[2] == 1
        assert coordinates.dtype == np.float32 and coordinates.shape == (3, SIZE, SIZE)
        assert valid[8:-8, 8:-8].all() and set(np.unique(coordinates[2])) <= {0, 1}
        for found, wanted in zip(coordinates, expected, strict=False):
            assert np.allclose(found[valid], wanted[valid], atol=1e-6)


def test_a_reflected_border_points_back_into_the_image() -> None:
    shift = A.Affine(translate_px={"x": 10, "y": 0}, border_mode=BORDERS["reflect"], p=1)
    coordinates = Augmentation([shift]).with_coordinates(RAMP, MASK, 0)[2]
    columns = np.concatenate([np.arange(9, -1, -1), np.arange(SIZE - 10)])
    assert coordinates[2].min() == 1
    assert np.allclose((coordinates[0] + 1) / 2 * SIZE - 0.5, np.tile(columns, (SIZE, 1)), atol=1e-3)


def test_a_blend_of_places_far_apart_is_invalid() -> None:
    """Where a wrapped border meets the image, interpolated coordinates point into its middle."""
    augment = Augmentation([A.Affine(translate_px={"x": 10, "y": 0}, rotate=1, border_mode=BORDERS["wrap"], p=1)])
    squares, _, coordinates = augment.with_coordinates(RAMP**2, MASK, 0)
    valid = coordinates[2] == 1
    blended = np.abs(augment(RAMP, MASK, 0)[0] ** 2 - squares).max(axis=-1) > 0.01  # so far off the curve
    assert 0.9 < valid.mean() < 1 and blended.sum() > SIZE / 4
    assert not valid[blended].any()
    assert worst(look_up(RAMP**2, coordinates) - squares, valid) < 0.01


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*MOVING, *DROPOUTS, "Morphological", "default", "chain"])
def test_image_and_mask_are_bit_identical_with_and_without(name: str, channels: int) -> None:
    known = {"default": default_augmentation(), "chain": chain()}
    transforms = MOVING | DROPOUTS | {"Morphological": A.Morphological(p=1)}
    augment = known[name] if name in known else Augmentation([transforms[name], A.Rotate(p=0.5)])
    image = np.ascontiguousarray(WAVES[..., :channels])
    image.flags.writeable = False
    for seed in range(4):
        with_image, with_mask, coordinates = augment.with_coordinates(image, MASK, seed)
        without_image, without_mask = augment(image, MASK, seed)
        assert np.array_equal(with_image, without_image) and np.array_equal(with_mask, without_mask)
        assert coordinates.shape == (3, SIZE, SIZE)


def test_photometric_transforms_leave_coordinates_alone() -> None:
    flip: list[A.BasicTransform] = [A.HorizontalFlip(p=0.5), A.Rotate()]
    noisy = Augmentation(flip, [A.RandomBrightnessContrast(p=1), A.CoarseDropout(p=1)])
    for seed in range(5):
        expected = Augmentation(flip).with_coordinates(RAMP, MASK, seed)[2]
        assert np.array_equal(noisy.with_coordinates(RAMP, MASK, seed)[2], expected)
    plain = Augmentation().with_coordinates(RAMP, MASK, 0)[2]
    assert np.allclose(plain, [2 * X - 1, 2 * Y - 1, np.ones_like(X)], atol=1e-6)


def test_what_is_not_square_and_what_only_grows_shapes() -> None:
    image, mask = RAMP[:40], MASK[:40]
    x, y, valid = Augmentation([A.VerticalFlip(p=1)]).with_coordinates(image, mask, 0)[2]
    assert valid.min() == 1 and np.allclose(y[:, 0], 1 - (2 * np.arange(40) + 1) / 40, atol=1e-6)
    assert np.allclose(x[0], 2 * CENTRES - 1, atol=1e-6)
    grown = Augmentation([A.Morphological(p=1)]).with_coordinates(image, mask, 0)[2]
    assert np.array_equal(grown, Augmentation().with_coordinates(image, mask, 0)[2])


def test_values_changed_by_a_function_invalidate_all() -> None:

    def brighter(image: np.ndarray, **_: Any) -> np.ndarray:
        return np.clip(1.05 * image, 0, 1)

    assert Augmentation([A.Lambda(image=brighter, mask=same, p=1)]).with_coordinates(RAMP, MASK, 0)[2][2].max() == 0


def test_invalid_coordinates_are_zero_even_where_a_transform_leaves_nan() -> None:
    def torn(image: np.ndarray, **_: Any) -> np.ndarray:
        return np.concatenate([np.full_like(image[:5], np.nan), image[5:]])

    coordinates = Augmentation([A.Lambda(image=torn, mask=same, p=1)]).with_coordinates(RAMP, MASK, 0)[2]
    assert not coordinates[:, :5].any() and coordinates[2, 5:].min() == 1
    filled = Augmentation([A.Rotate((45, 45), fill=255, p=1)]).with_coordinates(RAMP, MASK, 0)[2]
    assert np.abs(filled).max() <= 1 and not filled[:, 0, 0].any()


@pytest.mark.parametrize(
    "transform",
    [
        A.RandomBrightnessContrast(),
        A.OneOf([A.HorizontalFlip(), A.Sequential([A.GaussNoise()])]),
        A.SomeOf([A.Blur(), A.HorizontalFlip()], n=1),
        A.SelectiveChannelTransform([A.HorizontalFlip()], channels=(0,)),
    ],
)
def test_photometric_transforms_among_the_geometric_are_refused(transform: A.BasicTransform) -> None:
    with pytest.raises(ConfigError, match=r"(Brightness|Noise|Blur|Selective).*augmentation\.photometric"):
        Augmentation(geometric=[A.HorizontalFlip(), transform])


def test_a_transform_that_cannot_take_coordinates_is_named() -> None:
    def only_grey(image: np.ndarray, **_: Any) -> np.ndarray:
        assert image.shape[2] == 1, "grey images only"
        return image

    augment = Augmentation([A.Lambda(image=only_grey, mask=same, p=1)])
    grey = np.ascontiguousarray(RAMP[..., :1])
    augment(grey, MASK, 0)
    with pytest.raises(ConfigError, match=r"Lambda failed.*coordinates.*grey images only"):
        augment.with_coordinates(grey, MASK, 0)
    with pytest.raises(ConfigError, match="keep the size"):
        Augmentation([A.RandomCrop(8, 8)]).with_coordinates(RAMP, MASK, 0)


def test_coordinates_leave_no_trace_in_the_description_teachers_are_stored_under() -> None:
    augment = default_augmentation()
    before = json.dumps(augment.geometric.to_dict())
    augment.with_coordinates(RAMP, MASK, 0)
    plain = A.Compose([A.HorizontalFlip(p=0.5)]).to_dict()
    assert Augmentation([A.HorizontalFlip(p=0.5)]).geometric.to_dict() == plain
    assert json.dumps(augment.geometric.to_dict()) == before and set(vars(augment)) == {"geometric", "photometric"}


def test_a_pickled_augmentation_draws_the_same() -> None:
    augment = default_augmentation()
    again = pickle.loads(pickle.dumps(augment))
    for seed in range(5):
        pairs = zip(augment.with_coordinates(WAVES, MASK, seed), again.with_coordinates(WAVES, MASK, seed), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
