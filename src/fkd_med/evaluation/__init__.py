"""Per-image metrics, tables, intervals and pictures."""

from fkd_med.evaluation.compare import Arm, Comparison, compare
from fkd_med.evaluation.intervals import Interval, Intervals, bootstrap_difference, bootstrap_mean
from fkd_med.evaluation.metrics import Scores, diagonal, hausdorff95, score_image
from fkd_med.evaluation.pictures import Sample, choose, overlay, panel, write_pictures
from fkd_med.evaluation.plots import Curve, plot_bytes, plot_rounds
from fkd_med.evaluation.rows import ImageRow, ImageTable, group_arms
from fkd_med.evaluation.sheet import Column, Sheet
from fkd_med.evaluation.summary import GroupSummary, Summary, summarize
from fkd_med.evaluation.tables import Traffic, end_table, human_bytes, traffic_table

__all__ = [
    "Arm",
    "Column",
    "Comparison",
    "Curve",
    "GroupSummary",
    "ImageRow",
    "ImageTable",
    "Interval",
    "Intervals",
    "Sample",
    "Scores",
    "Sheet",
    "Summary",
    "Traffic",
    "bootstrap_difference",
    "bootstrap_mean",
    "choose",
    "compare",
    "diagonal",
    "end_table",
    "group_arms",
    "hausdorff95",
    "human_bytes",
    "overlay",
    "panel",
    "plot_bytes",
    "plot_rounds",
    "score_image",
    "summarize",
    "traffic_table",
    "write_pictures",
]
