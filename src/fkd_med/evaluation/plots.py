"""Curves of arms: Dice over rounds and over megabytes sent, drawn without pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fkd_med.files import atomic_writer

# Okabe and Ito 2008, without yellow and black: told apart with any common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")  # lines beyond six arms repeat colours, never colour and dashes


@dataclass(frozen=True)
class Curve:
    """Validation Dice of one arm.

    Attributes:
        rounds: Rounds, ascending, (R,).
        mean: Mean Dice over hospitals per round, (R,).
        worst: Dice of the worst hospital per round, (R,).
        megabytes: Megabytes sent until the end of each round, (R,); None where nothing was counted.
    """

    rounds: Sequence[int]
    mean: Sequence[float]
    worst: Sequence[float]
    megabytes: Sequence[float] | None = None


def plot_rounds(curves: Mapping[str, Curve], path: Path) -> None:
    """Write the plot of validation Dice over rounds; dotted, the worst hospital."""
    figure, axes = new_figure()
    for i, curve in enumerate(curves.values()):
        _line(axes, curve.rounds, curve, i)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, axes, list(curves), path)


def plot_bytes(curves: Mapping[str, Curve], path: Path) -> None:
    """Write the plot of validation Dice over megabytes sent; an arm that sent nothing is a level line at its best."""
    figure, axes = new_figure()
    for i, curve in enumerate(curves.values()):
        if curve.megabytes and curve.megabytes[-1] > 0:
            _line(axes, curve.megabytes, curve, i)
        else:
            axes.axhline(max(curve.mean), color=_colour(i), linestyle=(0, (6, 2)), linewidth=1.5)
    sent = [m for c in curves.values() for m in c.megabytes or () if m > 0]
    if sent and max(sent) > 100 * min(sent):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("megabytes sent, all clients, up and down")
    silent = [name for name, c in curves.items() if not c.megabytes or c.megabytes[-1] <= 0]
    names = [f"{name} (best; sends nothing)" if name in silent else name for name in curves]
    _finish(figure, axes, names, path)


def new_figure(width: float = 8, height: float = 4.5) -> tuple[Figure, Axes]:
    """Return a figure of so many inches and its axes, in our looks; `save_figure` writes it."""
    figure, (axes,) = new_panels(1, width, height)
    return figure, axes


def new_panels(number: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches with axes in two columns, in our looks; one has the whole figure."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    columns = min(number, 2)
    panels = [figure.add_subplot(-(-number // columns), columns, place + 1) for place in range(number)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    return figure, panels


def _line(axes: Axes, x: Sequence[float], curve: Curve, index: int) -> None:
    marker = "o" if len(x) <= 30 else None
    axes.plot(x, curve.mean, **line_style(index), linewidth=2, marker=marker, markersize=4)
    if any(w < m for w, m in zip(curve.worst, curve.mean, strict=True)):
        axes.plot(x, curve.worst, color=_colour(index), linestyle=":", linewidth=1, alpha=0.8)


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of the arm at a place, told apart from every other for 24 arms."""
    return {"color": _colour(index), "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)]}


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _finish(figure: Figure, axes: Axes, names: Sequence[str], path: Path) -> None:
    axes.set_ylabel("validation Dice")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, math.floor(low * 20) / 20), min(1.0, math.ceil(high * 20) / 20))
    lines = [line for line in axes.get_lines() if line.get_linestyle() != ":" or line.get_linewidth() > 1]
    columns = 3 if max(map(len, names)) < 24 else 2
    legend = figure.legend(lines, names, frameon=False, loc="outside upper left", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a name is a dollar
    if len(lines) < len(axes.get_lines()):
        corner = axes.transAxes
        axes.text(1, 0.02, "dotted: worst hospital", transform=corner, ha="right", va="bottom", fontsize=9, color="0.4")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_writer(path) as file:
        figure.savefig(file, format="png")
