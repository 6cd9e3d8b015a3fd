"""What a run writes while it lasts: curves as CSV and in Weights & Biases, per-image scores, validation pictures."""

from fkd_med.tracking.metrics_csv import MetricsCSV
from fkd_med.tracking.recorder import ImageRecorder
from fkd_med.tracking.wandb_logger import WandbLogger

__all__ = ["ImageRecorder", "MetricsCSV", "WandbLogger"]
