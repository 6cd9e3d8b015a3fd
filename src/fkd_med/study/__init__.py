"""Studies: many runs of one design (data sets, teachers, arms, seeds), one or several at a time, and their tables."""

from fkd_med.study.design import Arm, Difference, Images, Preset, Study
from fkd_med.study.jobs import Job, Selection, finished_beside, jobs_of
from fkd_med.study.keeping import check_keep, keep
from fkd_med.study.outcome import Outcome, read_outcomes
from fkd_med.study.runner import Tally, run_jobs
from fkd_med.study.tables import Tables

__all__ = [
    "Arm",
    "Difference",
    "Images",
    "Job",
    "Outcome",
    "Preset",
    "Selection",
    "Study",
    "Tables",
    "Tally",
    "check_keep",
    "finished_beside",
    "jobs_of",
    "keep",
    "read_outcomes",
    "run_jobs",
]
