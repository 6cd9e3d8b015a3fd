"""Pictures: what is chosen, what is drawn, what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fkd_med.evaluation import ImageRow, Sample, choose, overlay, panel, write_pictures
from fkd_med.evaluation.pictures import COLOURS


def row(client: str, image: str, dice: float) -> ImageRow:
    return ImageRow("student", "federated", "test", 0, client, image, dice, dice, None, "")


def disc(shape: tuple[int, int], centre: tuple[int, int], radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (np.hypot(rows - centre[0], columns - centre[1]) < radius).astype(np.int64)


def colour(index: int) -> np.ndarray:
    return np.array([int(COLOURS[index][i : i + 2], 16) for i in (1, 3, 5)])


def near(picture: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.abs(picture.astype(int) - target).max(axis=-1) < 60).nonzero()


def test_choose_is_deterministic() -> None:
    rows = [row("b", f"i{i}", d) for i, d in enumerate([0.5, 0.1, 0.9, 0.9, 0.1, 0.6])]
    rows += [row("a", "only", 0.3), row("c", "x", 0.2), row("c", "y", 0.1)]
    expected = [("a", "only", "median"), ("b", "i1", "worst"), ("b", "i0", "median"), ("b", "i3", "best")]
    expected += [("c", "y", "worst"), ("c", "x", "best")]
    assert choose(rows) == expected
    assert choose(reversed(rows)) == expected and choose(rows + rows) == expected


def test_panel_draws_each_contour_where_its_mask_is() -> None:
    image = np.full((64, 96, 1), 0.5, np.float32)
    masks = {"teacher": disc((64, 96), (16, 24), 8), "student": disc((64, 96), (44, 70), 8)}
    picture = panel(image, disc((64, 96), (30, 48), 6), masks, "title")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.shape[1] > 900
    right = picture[:, picture.shape[1] // 2 :]
    grey = (np.abs(right.astype(int) - 128) <= 2).all(axis=-1)  # the tile, apart from the legend's letters
    inside = right[grey.sum(axis=1) > 100][:, grey.sum(axis=0) > 100]
    assert inside.shape[1] / inside.shape[0] == pytest.approx(96 / 64, rel=0.02)
    for index, (row_, column) in enumerate([(16, 24), (44, 70)]):
        rows, columns = near(inside, colour(index))
        middle = (
            (rows.min() + rows.max()) / 2 / len(inside) * 64,
            (columns.min() + columns.max()) / 2 / inside.shape[1] * 96,
        )
        assert middle == pytest.approx((row_ + 0.5, column + 0.5), abs=0.5)
        assert (rows.max() - rows.min()) / len(inside) * 64 == pytest.approx(15, abs=1)


@pytest.mark.parametrize("shape", [(64, 64, 3), (20, 90, 1), (90, 20, 4)])
def test_panel_takes_any_shape_and_empty_masks(shape: tuple[int, int, int]) -> None:
    image, empty = np.zeros(shape, np.float32), np.zeros(shape[:2], np.int64)
    assert panel(image, None, {}).size
    assert panel(image, empty, {"a $x": empty, "b_$": empty + 1}, "100 $ \\frac").size
    assert panel(image, empty + 2, {"student": empty + 1}, classes=3).size


def test_classes_that_are_swapped_look_otherwise() -> None:
    mask = np.zeros((64, 64), np.int64)
    mask[8:24, 8:24], mask[40:56, 40:56] = 1, 2
    image = np.full((64, 64, 1), 0.5, np.float32)
    right, swapped = (panel(image, None, {"student": m}, classes=3) for m in (mask, (3 - mask) % 3))
    assert right.shape == swapped.shape and (right != swapped).any()
    # One line is solid and the other dashed: the same way round, it has more of its colour.
    halves = [
        [len(near(half, colour(0))[0]) for half in np.array_split(p[: len(p) * 3 // 4], 2)] for p in (right, swapped)
    ]
    assert halves[0][0] > 1.2 * halves[0][1] and halves[1][1] > 1.2 * halves[1][0]


@pytest.mark.parametrize("ranks", [["median"], ["worst", "best"], ["worst", "median", "best"]])
def test_the_legend_of_the_overview_is_whole(tmp_path: Path, ranks: list[str]) -> None:
    truth = disc((90, 40), (45, 20), 8)
    models = dict.fromkeys(["teacher", "local-only student", "federated student"], truth)
    samples = [Sample("a", "id", rank, np.full((90, 40, 1), 0.5), truth, models) for rank in ranks]
    sheet = np.asarray(Image.open(write_pictures(tmp_path, samples)[0]))
    tiles = (np.abs(sheet.astype(int) - 128) <= 2).all(axis=-1).sum(axis=1) > 60
    legend = sheet[np.flatnonzero(tiles).max() + 3 :]
    assert (legend < 100).any() and (legend[:, [0, 1, -2, -1]] == 255).all()


def test_overlay_of_original_size() -> None:
    image, mask = np.full((30, 50, 3), 0.5, np.float32), disc((30, 50), (12, 30), 8)
    picture = overlay(image, mask, enlarge=False)
    assert picture.shape == (30, 50, 3)
    away = disc((30, 50), (12, 30), 12) == 0
    assert (picture[away] == 128).all()
    inner = picture[12, 30]
    assert inner.tolist() == pytest.approx((0.7 * 128 + 0.3 * colour(0)).round().tolist(), abs=1)


def test_overlay_enlarges_small_images_only() -> None:
    assert overlay(np.zeros((64, 48, 1), np.float32), np.ones((64, 48), np.int64)).shape == (512, 384, 3)
    assert overlay(np.zeros((600, 512, 3), np.float32), np.zeros((600, 512), np.int64)).shape == (600, 512, 3)


def test_overlay_shows_each_class() -> None:
    mask = np.zeros((64, 64), np.int64)
    mask[8:24, 8:24], mask[40:56, 40:56] = 1, 2
    picture = overlay(np.zeros((64, 64, 1), np.float32), mask)
    scale = picture.shape[0] // 64
    for index, place in ((0, 16 * scale), (1, 48 * scale)):
        assert picture[place, place].tolist() == (0.3 * colour(index)).round().astype(int).tolist()


def test_write_pictures(tmp_path: Path) -> None:
    truth, image = disc((32, 40), (15, 20), 8), np.random.default_rng(0).random((32, 40, 3)).astype(np.float32)
    predictions = {"teacher": truth, "student": disc((32, 40), (17, 22), 8)}
    samples = [
        Sample(c, "id", rank, image, truth, predictions) for c in ("Zürich/1", "Zürich:1") for rank in ("worst", "best")
    ]
    paths = write_pictures(tmp_path / "pictures", samples)
    assert [p.name for p in paths] == [
        "overview.png", "Zürich_1_worst.png", "Zürich_1_best.png", "Zürich_1_2_worst.png", "Zürich_1_2_best.png",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == sorted(p.name for p in paths)
    assert all(min(Image.open(p).size) > 300 for p in paths)
    again = write_pictures(tmp_path / "again", samples[:1])
    assert again[1].read_bytes() == paths[1].read_bytes()
    assert write_pictures(tmp_path / "none", []) == [] and not (tmp_path / "none").exists()
