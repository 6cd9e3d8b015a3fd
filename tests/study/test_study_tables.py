"""Tables of a study by hand: differences, ratios, hospitals, what is missing, and choices on validation images."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from study_rows import finish, row

from fkd_med.evaluation import ImageRow, ImageTable
from fkd_med.study import Arm, Difference, Job, Outcome, Selection, Study, Tables, jobs_of, read_outcomes
from fkd_med.study.curves import mean_curve
from fkd_med.study.report import _common, _mean_curves, write_report


def student(base: float, **other: object) -> list[ImageRow]:
    return [row(base + (0.1 if c == "b" else 0.0), client=c, id=str(i), **other) for c in "ab" for i in range(6)]


@pytest.fixture
def tables(study: Study, jobs: list[Job]) -> Tables:
    """Set X with Small: two seeds of `plain`, two of `taught`, with their teachers; the rest is missing."""
    by_name = {job.name: job for job in jobs}
    for seed, gain in ((0, 0.02), (1, 0.06)):
        finish(by_name[f"x plain seed {seed}"], student(0.5))
        taught = student(0.5 + gain) + student(0.6, model="teacher", arm="", round=0)
        finish(by_name[f"x small taught seed {seed}"], taught, seconds=120)
    return Tables(study, jobs, read_outcomes(jobs))


def found(tables: Tables, name: str) -> list[list[str]]:
    return [list(line) for sheet in tables.sheets() if sheet.title.startswith(name) for line in sheet.rows]


def test_arms(tables: Tables) -> None:
    plain, taught, teachers, *others = found(tables, "Arms on test images")
    assert plain[:4] == ["Set X, Small", "plain student", "2", "0.550"]
    assert taught[1:4] == ["taught student", "2", "0.590"] and taught[-1] == "2.0 min"
    assert teachers[1:4] == ["taught student: its teachers", "2", "0.650"]
    assert plain[7] == "0.500" and plain[5] == "0.275" and plain[6] == "5.0"  # the worst hospital, IoU, HD95
    assert not others, "Large has no run of its own: the one that both teachers share stands with Small"


def test_only_the_cells_that_were_asked_for(tables: Tables) -> None:
    """Though their shared run belongs to another cell too."""
    plain = [job for job in tables.jobs if job.name.startswith("x plain")]
    asked = Tables(tables.study, plain, read_outcomes(plain), asked=["x/small"])
    assert [line[0] for line in found(asked, "Arms")] == ["Set X, Small"]
    assert len(found(Tables(tables.study, plain, read_outcomes(plain)), "Arms")) == 2


def test_differences(tables: Tables) -> None:
    assert found(tables, "Differences") == [["Set X, Small", "gain", "2", "+4.00", "too few", "+2.0, +6.0"]]


def test_student_beside_teacher(tables: Tables) -> None:
    (line,) = found(tables, "Student beside teachers")
    assert line == ["Set X, Small", "taught student", "2", "0.650", "0.590", "90.8 %", "-6.00", "too few"]


def test_hospitals(tables: Tables) -> None:
    lines = found(tables, "Hospital by hospital")
    assert [line[1:6] for line in lines] == [["a", "2", "12", "6", "+4.00"], ["b", "2", "12", "6", "+4.00"]]


def test_differences_between_the_teachers_of_two_arms(study: Study) -> None:
    """Whatever their students say; an arm without teachers has no such difference."""
    study.arms["again"] = Arm("taught again", ["{teacher}.yaml"])
    study.differences = [
        Difference("teachers", of="again", over="taught", model="teacher"),
        Difference("none", of="again", over="plain", model="teacher"),
    ]

    def outcome(of_students: float, of_teachers: float | None) -> Outcome:
        teachers = {0: student(of_teachers, model="teacher", arm="", round=0)} if of_teachers else {}
        return Outcome(rows={0: student(of_students)}, teacher=teachers, bytes={0: 0}, seconds={0: 60.0})

    outcomes = {("x", "", "plain"): outcome(0.5, None)}
    outcomes |= {("x", "small", "taught"): outcome(0.5, 0.6), ("x", "small", "again"): outcome(0.4, 0.67)}
    tables = Tables(study, [], outcomes)
    assert [line[1:4] for line in found(tables, "Differences")] == [["teachers", "1", "+7.00"]]
    assert "teachers: taught again minus taught student, hospitals' teachers." in tables.differences().notes
    (sheet,) = [sheet for sheet in tables.sheets() if sheet.title.startswith("Hospital by hospital")]
    assert "taught again minus taught student, hospitals' teachers, Dice points" in sheet.title


def test_three_seeds_have_intervals(study: Study) -> None:
    """By hand: +2, +6 and +10 points have a mean of 6, a deviation of 4 and an interval of 4.3027 x 4 / sqrt(3)."""
    gains = {0: 0.02, 1: 0.06, 2: 0.10}
    outcomes = {
        ("x", "", "plain"): Outcome(rows={seed: student(0.5) for seed in gains}),
        ("x", "small", "taught"): Outcome(rows={seed: student(0.5 + gain) for seed, gain in gains.items()}),
    }
    for outcome in outcomes.values():
        outcome.bytes, outcome.seconds = dict.fromkeys(gains, 0), dict.fromkeys(gains, 60.0)
    tables = Tables(study, [], outcomes)
    (line,) = found(tables, "Differences")
    assert line[2:] == ["3", "+6.00", "-3.94 to +15.94", "+2.0, +6.0, +10.0"]
    assert [line[2:] for line in found(tables, "Hospital by hospital")] == [["3", "18", "6", "+6.00", line[4]]] * 2


def test_missing_runs_are_named_and_the_rest_is_made(tables: Tables, tmp_path: Path) -> None:
    assert len(tables.missing) == len(tables.jobs) - 4 and "y large taught seed 1" in tables.missing
    files = write_report(tables, tmp_path / "made")
    assert [file.name for file in files] == [
        "RESULTS.md",
        "results.csv",
        "differences.png",
    ]  # no bytes, no plot of them
    text = files[0].read_text()
    assert "10 of 14 runs are missing" in text and "y large taught seeds 0 1" in text and "+4.00" in text
    with files[1].open() as file:
        lines = list(csv.DictReader(file))
    assert {line["model"] for line in lines} == {"student", "teacher"} and len(lines) == 3 * 2 * 3
    one = [line for line in lines if line["hospital"] == "b" and line["arm"] == "taught" and line["seed"] == "1"]
    assert [float(line["dice"]) for line in one] == [pytest.approx(0.66), pytest.approx(0.7)]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_missing_seeds_in_a_row_are_named_by_the_first_and_the_last(study: Study, base: Path) -> None:
    wanted = Selection(seeds=[0, 1, 2, 3, 5, 7, 8], cells=["x/small"], arms=["taught"], without_images=True)
    jobs = jobs_of(study, study.presets["few"], base, base.parent / "results", wanted)
    assert Tables(study, jobs, {}).missing_by_arm() == "x small taught seeds 0-3 5 7 8"


def test_learning_curves_are_drawn_where_there_are_some(tables: Tables, tmp_path: Path) -> None:
    job = next(job for job in tables.jobs if job.name == "x small taught seed 1")
    ImageTable.append(job.run / "images.csv", student(0.4, split="val", round=1) + student(0.6, split="val", round=2))
    (job.run / "metrics.csv").write_text("step,name,value\n1,teacher/a/val/dice,0.4\n1,teacher/b/val/dice,0.6\n")
    again = Tables(tables.study, tables.jobs, read_outcomes(tables.jobs))
    assert again.outcome(("x", "small"), "taught").curves[1] == {"student": {1: 0.45, 2: 0.65}, "teacher": {1: 0.5}}
    *_, plot = write_report(again, tmp_path / "made")
    assert plot.name == "learning_curves.png" and plot.read_bytes().startswith(b"\x89PNG")
    assert "![learning curves](learning_curves.png)" in (tmp_path / "made" / "RESULTS.md").read_text()


def test_curves_beside_each_other_are_of_the_same_seeds(study: Study) -> None:
    """An arm without them is left out, and teachers that any arm trained count for all."""

    def outcome(curves: dict[int, float], teachers: dict[int, float] | None = None) -> Outcome:
        found = {seed: {"student": {1: dice, 2: dice}} for seed, dice in curves.items()}
        for seed, dice in (teachers or {}).items():
            found.setdefault(seed, {})["teacher"] = {1: dice}
        return Outcome(curves=found)

    def drawn(**arms: Outcome) -> tuple[list[int], dict[str, dict[int, float]]]:
        places = {name: ("x", "small" if name == "taught" else "", name) for name in arms}
        return _mean_curves(Tables(study, [], {places[name]: arm for name, arm in arms.items()}), ("x", "small"))

    plain, taught = outcome({1: 0.2, 2: 0.4, 3: 0.9}), outcome({1: 0.4, 2: 0.6}, {1: 0.1, 2: 0.3})
    both = {1: pytest.approx(0.3), 2: pytest.approx(0.3)}, {1: 0.5, 2: 0.5}
    seeds, curves = drawn(plain=plain, taught=taught, extra=outcome({3: 0.9}))
    assert seeds == [1, 2], "arms with a teacher decide"
    assert curves == {"plain": both[0], "taught": both[1], "hospitals' teachers": {1: pytest.approx(0.2)}}
    assert drawn(plain=plain, taught=outcome({0: 0.5}, {1: 0.1})) == ([0], {"taught": {1: 0.5, 2: 0.5}})
    assert drawn(plain=plain)[0] == [1, 2, 3]
    assert drawn() == ([], {})


def test_seeds_are_chosen_for_the_most_curves() -> None:
    assert _common([{0, 1, 2}, {1, 2}, {1}]) == [1, 2]
    assert _common([{0, 1}, {1, 2}, {1}]) == [1]
    assert _common([{0}, {1}]) == [0]
    assert _common([]) == []


def test_seeds_without_a_common_step_have_no_mean_curve(study: Study) -> None:
    taught = Outcome(curves={0: {"student": {1: 0.5}}, 1: {"student": {2: 0.5}}})
    assert _mean_curves(Tables(study, [], {("x", "small", "taught"): taught}), ("x", "small")) == ([0, 1], {})


def test_mean_of_curves_is_of_the_steps_that_all_have() -> None:
    assert mean_curve([{1: 0.2, 2: 0.4, 3: 0.9}, {1: 0.4, 2: 0.8}]) == {1: pytest.approx(0.3), 2: pytest.approx(0.6)}
    assert mean_curve([]) == {}


def test_nothing_finished_makes_empty_tables(study: Study, jobs: list[Job]) -> None:
    assert Tables(study, jobs, read_outcomes(jobs)).sheets() == []


def test_validation_takes_the_round_that_was_kept(study: Study, jobs: list[Job]) -> None:
    """Of a federation the best round; of hospitals alone, the best round of each."""

    def val(dice: float, client: str, round: int, arm: str) -> ImageRow:
        return row(dice, client=client, split="val", round=round, arm=arm, hd95=None)

    def both(arm: str) -> list[ImageRow]:
        scores = {1: (0.2, 0.9), 2: (0.8, 0.4), 3: (0.1, 0.1)}
        return [val(d, c, r, arm) for r, pair in scores.items() for c, d in zip("ab", pair, strict=True)]

    finish(jobs[0], both("federated"))
    finish(jobs[2], both("local-only"))
    outcomes = read_outcomes(jobs, "val")
    kept = {arm: sorted((r.client, r.round) for r in outcomes["x", "", arm].rows[0]) for arm in ("plain", "extra")}
    assert kept == {"plain": [("a", 2), ("b", 2)], "extra": [("a", 2), ("b", 1)]}


def test_a_baseline_trained_beside_an_arm_does_not_take_its_place(jobs: list[Job]) -> None:
    job = jobs[3]
    finish(job, [row(0.8), row(0.5, arm="local-only", round=2), row(0.9, model="teacher", arm="")])
    (outcome,) = read_outcomes(jobs).values()
    assert [r.dice for r in outcome.rows[job.seed]] == [0.8] and [r.dice for r in outcome.teacher[job.seed]] == [0.9]


def test_validation_rows_are_of_the_round_that_was_tested_not_of_the_best_one(jobs: list[Job]) -> None:
    """As with `checkpoint.monitor: step`, and where every hospital keeps a student of its own (FedMD)."""
    val = [row(dice, c, split="val", round=r) for r, dice in ((1, 0.9), (2, 0.5), (3, 0.7)) for c in "ab"]
    finish(jobs[3], [*val, row(0.6, "a", round=3), row(0.6, "b", round=2)])
    (outcome,) = read_outcomes(jobs, "val").values()
    assert [(r.client, r.round, r.dice) for r in outcome.rows[jobs[3].seed]] == [("a", 3, 0.7), ("b", 2, 0.5)]
