"""LightningModules: SegmentationModule for teachers and plain students, DistillationModule for taught students."""

from fkd_med.modules.distillation import DistillationModule
from fkd_med.modules.dry_pass import check_fits
from fkd_med.modules.evaluated import predict_classes
from fkd_med.modules.mutual import MutualDistillationModule
from fkd_med.modules.schedule import RunClock, WarmupCosine
from fkd_med.modules.segmentation import SegmentationModule
from fkd_med.modules.teacher import TeacherSource, freeze

__all__ = [
    "DistillationModule",
    "MutualDistillationModule",
    "RunClock",
    "SegmentationModule",
    "TeacherSource",
    "WarmupCosine",
    "check_fits",
    "freeze",
    "predict_classes",
]
