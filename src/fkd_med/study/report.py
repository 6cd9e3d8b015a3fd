"""The files a study leaves: RESULTS.md with every table, results.csv with a row per run, and the plots."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from fkd_med.evaluation.intervals import Interval
from fkd_med.evaluation.plots import COLOURS, line_style, new_figure, new_panels, save_figure
from fkd_med.evaluation.summary import summarize
from fkd_med.files import atomic_write_text
from fkd_med.study.curves import LearningCurve, mean_curve
from fkd_med.study.intervals import interval_of, mean_of, samples
from fkd_med.study.tables import Tables

_COLUMNS = ("data", "teacher", "arm", "model", "seed", "hospital", "images", "dice", "iou", "hd95", "bytes", "seconds")
_TEACHERS = "hospitals' teachers"
_Curves = tuple[list[int], dict[str, LearningCurve]]  # the seeds, and by arm the mean over them


def write_report(tables: Tables, output: Path, head: Sequence[str] = ()) -> list[Path]:
    """Write RESULTS.md, results.csv and the plots into `output`; return the files.

    Args:
        tables: the tables.
        output: the study's folder.
        head: lines for the top: how the results were made.
    """
    suffix = "" if tables.split == "test" else f"-{tables.split}"
    plots = _plots(tables, output, suffix)
    missing = tables.missing
    parts = ["# Results\n", *head]
    if missing:
        parts.append(f"**{len(missing)} of {len(tables.jobs)} runs are missing**: {tables.missing_by_arm()}.\n")
    parts += [sheet.to_markdown() for sheet in tables.sheets()]
    parts += [f"![{plot.stem.replace('_', ' ')}]({plot.name})\n" for plot in plots]
    text, rows = output / f"RESULTS{suffix}.md", output / f"results{suffix}.csv"
    atomic_write_text(text, "\n".join(parts))
    atomic_write_text(rows, _csv(tables))
    return [text, rows, *plots]


def _csv(tables: Tables) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for (data, teacher, arm), outcome in sorted(tables.outcomes.items()):
        for model, by_seed in (("student", outcome.rows), ("teacher", outcome.teacher)):
            for seed, rows in sorted(by_seed.items()):
                cost = [outcome.bytes[seed], outcome.seconds[seed]] if model == "student" else ["", ""]
                summary = summarize(rows)
                for group in [*summary.clients.values(), summary.mean]:
                    scores = [group.dice, group.iou, group.hd95]
                    writer.writerow([data, teacher, arm, model, seed, group.name, group.n, *scores, *cost])
    return buffer.getvalue()


def _plots(tables: Tables, output: Path, suffix: str) -> list[Path]:
    plots = []
    if any(tables.pairs(cell, d) for cell in tables.cells() for d in tables.study.differences):
        plots.append(output / f"differences{suffix}.png")
        _draw_differences(tables, plots[-1])
    if any(any(outcome.bytes.values()) for outcome in tables.outcomes.values()):
        plots.append(output / f"dice_over_bytes{suffix}.png")
        _draw_bytes(tables, plots[-1])
    curves = {cell: found for cell in tables.cells() if (found := _mean_curves(tables, cell))[1]}
    if curves:
        plots.append(output / f"learning_curves{suffix}.png")
        _draw_curves(tables, curves, plots[-1])
    return plots


def _draw_differences(tables: Tables, path: Path) -> None:
    """Draw each difference with its interval, a group per cell, and a line at 0."""
    lines: list[tuple[float, str, str, Interval]] = []
    place = 0.0
    for cell in tables.cells():
        for number, difference in enumerate(tables.study.differences):
            found = tables.pairs(cell, difference)
            if found:
                name = f"{tables.name(cell)}: {difference.label}"
                lines.append((place, name, COLOURS[number % len(COLOURS)], interval_of(found)))
                place -= 1.0
        place -= 0.5
    figure, axes = new_figure(9, 1.2 + 0.3 * len(lines))
    for place, _, colour, interval in lines:
        axes.plot([100 * interval.low, 100 * interval.high], [place, place], color=colour, linewidth=2)
        axes.plot([100 * interval.estimate], [place], "o", color=colour, markersize=5)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks([line[0] for line in lines], [line[1] for line in lines])
    axes.set_ylim(lines[-1][0] - 0.6, 0.6)
    axes.set_xlabel("Dice points, 95 %")
    save_figure(figure, path)


def _draw_bytes(tables: Tables, path: Path) -> None:
    """Draw each arm's Dice over what it sent; arms that send nothing stand at the left."""
    figure, axes = new_figure(9)
    for number, arm in enumerate(tables.study.arms):
        points = [outcome for cell in tables.cells() if (outcome := tables.outcome(cell, arm)).rows]
        dice = [mean_of(samples(o.rows)) for o in points]
        sent = [sum(o.bytes.values()) / len(o.bytes) / 1e6 for o in points]
        if points:
            label, dark = tables.study.arms[arm].label, COLOURS[number % len(COLOURS)]
            axes.plot(sent, dice, "os^Dv"[number // len(COLOURS) % 5], color=dark, label=label, markersize=6)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(left=-0.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("megabytes sent in the whole run, all hospitals, up and down")
    axes.set_ylabel(f"{tables.split} Dice, mean of hospitals")
    figure.legend(frameon=False, loc="outside upper left", ncols=3)
    save_figure(figure, path)


def _draw_curves(tables: Tables, found: Mapping[tuple[str, str], _Curves], path: Path) -> None:
    """Draw validation Dice over the training of each arm, a panel per cell; in black, their hospitals' teachers."""
    figure, panels = new_panels(len(found), 9, 1.3 + 3.2 * -(-len(found) // 2))
    shown: dict[str, Line2D] = {}
    for (cell, (seeds, curves)), axes in zip(found.items(), panels, strict=True):
        for number, (arm, design) in enumerate(tables.study.arms.items()):
            if arm in curves:
                shown[design.label] = _draw_curve(axes, curves[arm], **line_style(number))
        if _TEACHERS in curves:
            shown[_TEACHERS] = _draw_curve(axes, curves[_TEACHERS], color="black", linestyle=(0, (1, 1)))
        # What the first rounds rise from says nothing, and would leave the rest a few pixels.
        later = [dice for curve in curves.values() for step, dice in curve.items() if step >= max(curve) / 5]
        axes.set_ylim(bottom=max(0.0, min(later) - 0.02))
        of = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        axes.set_title(f"{tables.name(cell)}, {of}", fontsize=10, loc="left", parse_math=False)
        axes.set_xlabel("% of its training, or of a teacher's")
        axes.set_ylabel("validation Dice")
    legend = figure.legend(list(shown.values()), list(shown), frameon=False, loc="outside upper left", ncols=3)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)


def _mean_curves(tables: Tables, cell: tuple[str, str]) -> _Curves:
    """Return seeds that many arms have, and over these the mean curve of each arm of a cell that has them all.

    Arms with a teacher of the cell decide on the seeds, if there are any. Arms share teachers: what one arm trained
    counts for all.
    """
    outcomes = tables.of_cell(cell)
    each = {
        arm: {seed: curves["student"] for seed, curves in outcome.curves.items() if "student" in curves}
        for arm, outcome in outcomes.items()
    }
    seeds = _common([set(each[arm]) for arm, design in tables.study.arms.items() if design.has_teacher])
    seeds = seeds or _common([set(curves) for curves in each.values()])
    by_seed = [pair for outcome in outcomes.values() for pair in outcome.curves.items()]
    each[_TEACHERS] = {seed: curves["teacher"] for seed, curves in by_seed if "teacher" in curves}
    whole = {name: curves for name, curves in each.items() if seeds and curves.keys() >= set(seeds)}
    means = {name: mean_curve([curves[seed] for seed in seeds]) for name, curves in whole.items()}
    return seeds, {name: curve for name, curve in means.items() if curve}


def _common(arms: Sequence[Set[int]]) -> list[int]:
    """Return seeds of those that each arm has: with which the most curves can be drawn, more seeds before more arms."""
    number = Counter(seed for seeds in arms for seed in seeds)
    ordered = sorted(number, key=lambda seed: (-number[seed], seed))
    best: list[int] = []
    drawn = 0
    for count in range(len(ordered), 0, -1):
        chosen = ordered[:count]
        curves = count * sum(seeds >= set(chosen) for seeds in arms)
        if curves > drawn:
            best, drawn = sorted(chosen), curves
    return best


def _draw_curve(axes: Axes, curve: LearningCurve, **style: Any) -> Line2D:
    steps = [100 * step / max(curve) for step in curve]
    (line,) = axes.plot(steps, list(curve.values()), linewidth=1.5, marker="o" if len(steps) == 1 else None, **style)
    return line
