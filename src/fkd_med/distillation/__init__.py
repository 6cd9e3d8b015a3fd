"""What a student and its teacher show each other: taps, companions, matching, the dry pass, views, cached maps."""

from fkd_med.distillation.companions import Companions
from fkd_med.distillation.matching import match
from fkd_med.distillation.rehearsal import rehearse, sample_image
from fkd_med.distillation.taps import Taps
from fkd_med.distillation.teacher_maps import TeacherMaps, maps_bytes, write_maps
from fkd_med.distillation.views import MeanOfViews

__all__ = [
    "Companions",
    "MeanOfViews",
    "Taps",
    "TeacherMaps",
    "maps_bytes",
    "match",
    "rehearse",
    "sample_image",
    "write_maps",
]
