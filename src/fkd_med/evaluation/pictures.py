"""Pictures a colleague can judge: contours of truth and predictions over the image.

Colours are from Okabe and Ito 2008, told apart with any common colour blindness, on a dark halo so that they show on
pink mucosa as on black film. Small images are enlarged, contours are drawn after the enlargement.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from fkd_med.evaluation.metrics import IndexMask, score_image
from fkd_med.evaluation.rows import ImageRow
from fkd_med.files import atomic_write_bytes

Picture = npt.NDArray[np.uint8]  # (H, W, 3), RGB
LineStyle = Literal["solid", "dashed", "dotted", "dashdot"]
FloatImage = npt.NDArray[np.floating[Any]]  # (H, W, C) in [0, 1]

TRUTH_COLOUR = "#FFFFFF"
STYLES: tuple[LineStyle, ...] = ("solid", "dashed", "dotted", "dashdot")
COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00")
_LEGIBLE = 512  # pixels: overlays whose longest side is shorter are enlarged
_TILE = 3.6  # inches
_LINE = 0.24  # inches of a line of the legend


@dataclass(frozen=True)
class Sample:
    """One image to show.

    Attributes:
        client: Hospital.
        id: Image id.
        rank: Why it was chosen: ``"worst"``, ``"median"`` or ``"best"``.
        image: Image in [0, 1], (H, W, C); one channel is grey, the first three of more are RGB.
        truth: Class indices, (H, W), or None.
        predictions: Name such as ``"student"`` -> class indices, (H, W).
    """

    client: str
    id: str
    rank: str
    image: FloatImage
    truth: IndexMask | None
    predictions: Mapping[str, IndexMask]


def choose(rows: Iterable[ImageRow]) -> list[tuple[str, str, str]]:
    """Choose the images to show: worst, median and best of each hospital by Dice.

    Args:
        rows: Rows of one model, arm and split; ties are broken by id.

    Returns:
        (client, id, rank), sorted by client, each image once.
    """
    by_client: dict[str, list[ImageRow]] = {}
    for row in {r.key: r for r in rows}.values():
        by_client.setdefault(row.client, []).append(row)
    chosen = []
    for client in sorted(by_client):
        ordered = sorted(by_client[client], key=lambda r: (r.dice, r.id))
        places = {0: "worst", len(ordered) - 1: "best"} if len(ordered) > 1 else {}
        places = {(len(ordered) - 1) // 2: "median"} | places
        chosen += [(client, ordered[i].id, places[i]) for i in sorted(places)]
    return chosen


def panel(
    image: FloatImage,
    truth: IndexMask | None,
    predictions: Mapping[str, IndexMask],
    title: str = "",
    classes: int = 1,
    path: Path | None = None,
) -> Picture:
    """Draw one image beside itself with the contours of truth and predictions.

    Args:
        image: Image in [0, 1], (H, W, C).
        truth: Class indices, (H, W), or None.
        predictions: Name -> class indices, (H, W); Dice and HD95 against the truth stand in the legend.
        title: Line above the picture.
        classes: Number of logits K, as in `score_image`.
        path: PNG to write.
    """
    height, width = image.shape[:2]
    tile = _tile_size(height, width)
    figure = Figure(figsize=(2 * tile[0] + 0.3, tile[1] + 0.55), dpi=140, layout="constrained")
    plain, marked = figure.subplots(1, 2)
    _show(plain, image)
    _show(marked, image)
    _contours(marked, truth, predictions, classes)
    figure.suptitle(title, fontsize=11, parse_math=False)
    labels = {name: f"{name}   {_scores(mask, truth, classes)}".rstrip() for name, mask in predictions.items()}
    _legend(figure, truth is not None, labels, 1, classes)
    return _render(figure, path)


def write_pictures(folder: Path, samples: Iterable[Sample], classes: int = 1) -> list[Path]:
    """Write one PNG per sample, ``<client>_<rank>.png``, and ``overview.png`` with all of them.

    Args:
        folder: Folder to write into; made when absent.
        samples: What to show, see `choose`.
        classes: Number of logits K, as in `score_image`.

    Returns:
        The files, overview first; empty without samples.
    """
    samples = list(samples)
    if not samples:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "overview.png"]
    _overview(samples, classes, paths[0])
    names = _file_names([s.client for s in samples])
    for sample in samples:
        path = folder / f"{names[sample.client]}_{sample.rank}.png"
        title = f"{sample.client}: {sample.id} ({sample.rank})"
        panel(sample.image, sample.truth, sample.predictions, title, classes, path)
        paths.append(path)
    return paths


def overlay(image: FloatImage, mask: IndexMask, enlarge: bool = True) -> Picture:
    """Draw a mask over an image: a tint and an outline per class, without matplotlib's frame.

    Args:
        image: Image in [0, 1], (H, W, C).
        mask: Class indices, (H, W).
        enlarge: Enlarge small images by a whole factor, so that the outline is legible.
    """
    scale = -(-_LEGIBLE // max(mask.shape)) if enlarge else 1
    size = (mask.shape[1] * scale, mask.shape[0] * scale)
    canvas: Picture = cv2.resize(_rgb(image), size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    large = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    for index in range(1, int(large.max(initial=0)) + 1):
        inside = (large == index).astype(np.uint8)
        colour = _bytes(COLOURS[(index - 1) % len(COLOURS)])
        tinted = canvas[inside > 0] * 0.7 + np.array(colour) * 0.3
        canvas[inside > 0] = tinted.round().astype(np.uint8)
        contours, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        width = max(1, max(size) // 250)
        cv2.drawContours(canvas, contours, -1, (0, 0, 0), width + 2, cv2.LINE_AA)
        cv2.drawContours(canvas, contours, -1, colour, width, cv2.LINE_AA)
    return canvas


def _overview(samples: Sequence[Sample], classes: int, path: Path) -> None:
    clients = sorted({s.client for s in samples})
    ranks = [r for r in ("worst", "median", "best") if any(s.rank == r for s in samples)]
    width, height = _tile_size(samples[0].image.shape[0], samples[0].image.shape[1], longest=3.0)
    figure = Figure(
        figsize=(width * len(ranks) + 0.4, (height + 0.45) * len(clients) + 0.56), dpi=120, layout="constrained"
    )
    grid = figure.subplots(len(clients), len(ranks), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for sample in samples:
        axes = grid[clients.index(sample.client), ranks.index(sample.rank)]
        _show(axes, sample.image)
        _contours(axes, sample.truth, sample.predictions, classes)
        scores = " / ".join(_dice(mask, sample.truth, classes) for mask in sample.predictions.values())
        axes.set_title(f"{sample.client}, {sample.rank}: {sample.id}\nDice {scores}", fontsize=8, parse_math=False)
    names = {name: name for s in samples for name in s.predictions}
    _legend(figure, any(s.truth is not None for s in samples), names, 1 + len(names) + classes, classes)
    _render(figure, path)


def _show(axes: Axes, image: FloatImage) -> None:
    height, width = image.shape[:2]
    axes.imshow(_rgb(image), interpolation="bicubic")
    # Set, because contours at the edge would widen the view.
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), autoscale_on=False)
    axes.set_axis_off()


def _contours(axes: Axes, truth: IndexMask | None, predictions: Mapping[str, IndexMask], classes: int) -> None:
    # The truth is the widest line, so that it still shows under a prediction that follows it.
    masks = [] if truth is None else [(truth, TRUTH_COLOUR, 2.4)]
    masks += [(mask, colour, 1.3) for mask, colour in zip(predictions.values(), _cycle(), strict=False)]
    for mask, colour, width in masks:
        for index in range(1, max(classes, 2)):
            # A border of background closes the contours of masks that touch the edge.
            inside = np.pad(mask == index, 1).astype(float)
            if not inside.any():
                continue
            rows, columns = np.arange(inside.shape[0]) - 1, np.arange(inside.shape[1]) - 1
            look: dict[str, Any] = {"colors": [colour], "linewidths": width, "linestyles": [_style(index)]}
            drawn = axes.contour(columns, rows, inside, levels=[0.5], **look)
            drawn.set_path_effects([Stroke(linewidth=width + 1.0, foreground="black", alpha=0.6), Normal()])


def _style(index: int) -> LineStyle:
    """Return the line of a class, so that a model that swaps two is seen to."""
    return STYLES[(index - 1) % len(STYLES)]


def _cycle() -> list[str]:
    return list(COLOURS) * 4


def _legend(figure: Figure, truth: bool, labels: Mapping[str, str], columns: int, classes: int) -> None:
    """Add a line for the truth, each model and each class, in as many columns as the figure has room for."""
    entries = ([("truth", TRUTH_COLOUR)] if truth else []) + list(zip(labels.values(), _cycle(), strict=False))
    effects = [Stroke(linewidth=4.5, foreground="black"), Normal()]
    handles = [Line2D([], [], color=colour, linewidth=2.5, path_effects=effects) for _, colour in entries]
    if not handles:
        return
    names, shown = [name for name, _ in entries], range(1, classes) if classes > 2 else ()
    handles += [Line2D([], [], color="black", linewidth=1.3, linestyle=_style(index)) for index in shown]
    names += [f"class {index}" for index in shown]
    canvas: Any = FigureCanvasAgg(figure)
    for fewer in range(columns, 0, -1):
        legend = figure.legend(handles, names, loc="outside lower center", ncols=fewer, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a "$" in a name is a dollar
        wide = legend.get_window_extent(canvas.get_renderer()).width
        if wide < figure.bbox.width or fewer == 1:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, wide / figure.dpi), height + _LINE * -(-len(handles) // fewer))


def _scores(mask: IndexMask, truth: IndexMask | None, classes: int) -> str:
    if truth is None:
        return ""
    scores = score_image(mask, truth, classes)
    note = {"prediction": ", nothing found", "truth": ", nothing to find", "both": ", both empty"}.get(scores.empty, "")
    return f"Dice {scores.dice:.3f}, HD95 {scores.hd95:.1f} px{note}"


def _dice(mask: IndexMask, truth: IndexMask | None, classes: int) -> str:
    return "" if truth is None else f"{score_image(mask, truth, classes, hd95=False).dice:.2f}"


def _rgb(image: FloatImage) -> Picture:
    """Return the image as bytes, (H, W, 3)."""
    channels = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    return np.ascontiguousarray((np.clip(np.nan_to_num(channels), 0, 1) * 255).round().astype(np.uint8))


def _bytes(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _tile_size(height: int, width: int, longest: float = _TILE) -> tuple[float, float]:
    """Return (width, height) in inches with the image's proportions."""
    scale = longest / max(height, width)
    return max(width * scale, longest / 3), max(height * scale, longest / 3)


def _render(figure: Figure, path: Path | None) -> Picture:
    canvas: Any = FigureCanvasAgg(figure)  # savefig lays everything out twice
    canvas.draw()
    pixels: Picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    if path is not None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png", compress_level=1)  # the default is five times slower
        atomic_write_bytes(path, buffer.getvalue())
    return pixels


def _file_names(clients: Iterable[str]) -> dict[str, str]:
    """Return a distinct name that any file system takes for each client."""
    names: dict[str, str] = {}
    for client in sorted(set(clients)):
        name = re.sub(r"[^\w.-]+", "_", client)
        taken = set(names.values())
        names[client] = next(n for n in (name, *(f"{name}_{i}" for i in range(2, 1000))) if n not in taken)
    return names
