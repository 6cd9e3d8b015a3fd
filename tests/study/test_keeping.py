"""What is kept of a study: small, without paths, enough for the tables, and never another configuration's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fkd_med.errors import ConfigError, RunError
from fkd_med.evaluation.rows import ImageRow, ImageTable
from fkd_med.study import Job, Selection, Study, check_keep, jobs_of, keep, read_outcomes

OUTPUT, KEPT = Path("results"), Path("kept")


@pytest.fixture
def finished(jobs: list[Job]) -> Job:
    """A run, finished: three rounds of validation at two hospitals, of which the second is best, and a test."""
    job = jobs[3]
    assert str(Path.cwd()) in str(job.settings["model"]["store"]), "a path that must not come along"
    finish(job)
    return job


def finish(job: Job) -> None:
    job.prepare()
    (job.run / "checkpoints").mkdir(parents=True)
    (job.run / "checkpoints" / "last.ckpt").write_bytes(b"0" * 10_000)
    row = ImageRow("student", "federated", "val", 1, "a", "image-1", 0.5, 0.4, None, "")
    rows = [replace(row, round=round, dice=dice) for round, dice in ((1, 0.5), (2, 0.7), (3, 0.6))]
    rows += [replace(row, client="b") for row in rows]
    ImageTable.append(job.run / "images.csv", [*rows, replace(row, split="test", round=2, hd95=3.0)])
    metrics = ["1,teacher/a/val/dice,0.25", "2,teacher/a/val/dice,0.375", "1,teacher/b/val/dice,0.5", "1,val/dice,0.9"]
    (job.run / "metrics.csv").write_text("\n".join(["step,name,value", *metrics, "2,teacher/b/val/di"]))
    (job.run / "ledger.csv").write_text("round,client,bytes\n1,a,10\n2,a,20\n2,b,5\n")
    job.add(60.0, 0, "code")


def test_tables_come_out_the_same(finished: Job, jobs: list[Job], study: Study, base: Path) -> None:
    assert keep(jobs, OUTPUT, KEPT) == 1
    again = jobs_of(study, study.presets["few"], base, KEPT, Selection(without_images=True))
    for split in ("test", "val"):
        assert read_outcomes(again, split) == read_outcomes(jobs, split)
    assert [job.name for job in again if job.finished] == [finished.name]


def test_it_is_small_and_has_no_paths(finished: Job, jobs: list[Job]) -> None:
    keep(jobs, OUTPUT, KEPT)
    files = sorted(path for path in KEPT.rglob("*") if path.is_file())
    assert [path.name for path in files] == [
        "definition.yaml",
        "outcome.yaml",
        "curves.csv",
        "images.csv",
        "ledger.csv",
    ]
    assert len(ImageTable.read(files[3])) == 3
    assert files[4].read_text() == "round,bytes\n1,10\n2,25\n"
    assert all(str(Path.cwd()) not in path.read_text() for path in files)


def test_curves_are_of_all_rounds_and_of_epochs_of_all_teachers(finished: Job, jobs: list[Job]) -> None:
    (outcome,) = read_outcomes(jobs).values()
    assert outcome.curves[0] == {"student": {1: 0.5, 2: 0.7, 3: 0.6}, "teacher": {1: 0.375}}


def test_rows_that_were_kept_without_curves_have_none(finished: Job, jobs: list[Job]) -> None:
    """Those of the best round alone are no curve."""
    keep(jobs, OUTPUT, KEPT)
    (finished.run / "metrics.csv").unlink()
    (outcome,) = read_outcomes(jobs).values()
    assert outcome.curves[0] == {}
    before = (KEPT / "x" / "large" / "taught" / "seed-0" / "run" / "curves.csv").read_text()
    keep(jobs, OUTPUT, KEPT)
    assert (KEPT / "x" / "large" / "taught" / "seed-0" / "run" / "curves.csv").read_text() == before


def test_kept_curves_of_teachers_outlive_a_run_that_found_them_in_the_store(finished: Job, jobs: list[Job]) -> None:
    keep(jobs, OUTPUT, KEPT)
    (finished.run / "metrics.csv").write_text("step,name,value\n1,val/dice,0.9\n")
    (outcome,) = read_outcomes(jobs).values()
    assert outcome.curves[0].keys() == {"student"}
    keep(jobs, OUTPUT, KEPT)
    kept = (KEPT / "x" / "large" / "taught" / "seed-0" / "run" / "curves.csv").read_text()
    assert "teacher,1,0.375" in kept and "student,2,0.7" in kept


@pytest.mark.parametrize("trained", [["a"], ["a", "b", "c"], ["all-clients"]])
def test_teachers_of_some_hospitals_are_no_curve_of_all(finished: Job, jobs: list[Job], trained: list[str]) -> None:
    lines = [f"1,teacher/{name}/val/dice,0.5\n" for name in trained]
    (finished.run / "metrics.csv").write_text("".join(["step,name,value\n", *lines]))
    (outcome,) = read_outcomes(jobs).values()
    assert outcome.curves[0].keys() == {"student"}


@pytest.mark.parametrize("line", ["student,one,0.5", "student,0,0.5", "student,1,nan", "student,1"])
def test_damaged_curves_are_named(finished: Job, jobs: list[Job], study: Study, base: Path, line: str) -> None:
    keep(jobs, OUTPUT, KEPT)
    again = jobs_of(study, study.presets["few"], base, KEPT, Selection(without_images=True))
    path = KEPT / "x" / "large" / "taught" / "seed-0" / "run" / "curves.csv"
    path.write_text(f"model,step,dice\n{line}\n")
    with pytest.raises(RunError, match=r"seed-0/run/curves\.csv cannot be read .*do without"):
        read_outcomes(again)


def test_kept_twice_is_kept_once(finished: Job, jobs: list[Job]) -> None:
    keep(jobs, OUTPUT, KEPT)
    before = {path: path.read_bytes() for path in KEPT.rglob("*") if path.is_file()}
    assert keep(jobs, OUTPUT, KEPT) == 1
    assert {path: path.read_bytes() for path in KEPT.rglob("*") if path.is_file()} == before


def test_another_configuration_is_not_replaced(finished: Job, jobs: list[Job], base: Path) -> None:
    keep(jobs, OUTPUT, KEPT)
    place = KEPT / "x" / "large" / "taught" / "seed-0"
    shutil.rmtree(finished.folder)
    (base / "setx" / "large.yaml").write_text("data: data.yaml\nfederation: {rounds: 9}\n")
    finish(finished)
    before = (place / "definition.yaml").read_bytes()
    with pytest.raises(RunError, match=r"kept/x/large/taught/seed-0 was begun with another.*configs\.setx/large\.yaml"):
        keep(jobs, OUTPUT, KEPT)
    assert (place / "definition.yaml").read_bytes() == before


def test_what_was_edited_after_the_run_is_not_said_of_it(finished: Job, jobs: list[Job], base: Path) -> None:
    before = (finished.folder / "definition.yaml").read_bytes()
    (base / "setx" / "large.yaml").write_text("data: data.yaml\nfederation: {rounds: 9}\n")
    for _ in range(2):
        keep(jobs, OUTPUT, KEPT)
        assert (KEPT / "x" / "large" / "taught" / "seed-0" / "definition.yaml").read_bytes() == before


def test_whole_runs_are_not_replaced_by_their_rows(finished: Job, jobs: list[Job]) -> None:
    shutil.copytree(OUTPUT, KEPT)
    before = {path: path.read_bytes() for path in KEPT.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="--keep kept is a study that runs there itself"):
        keep(jobs, OUTPUT, KEPT)
    assert {path: path.read_bytes() for path in KEPT.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("folder", [OUTPUT, OUTPUT / "x", Path("elsewhere") / ".." / OUTPUT])
def test_the_study_itself_is_refused(folder: Path, jobs: list[Job]) -> None:
    with pytest.raises(ConfigError, match=r"--keep .* is in the study's own folder"):
        check_keep(jobs, OUTPUT, folder)
