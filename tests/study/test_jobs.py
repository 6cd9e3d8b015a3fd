"""The runs of a study: which there are, where they lie, and when one must not be gone on with."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from fkd_med.errors import ConfigError, RunError
from fkd_med.study import Job, Selection, Study, finished_beside, jobs_of
from fkd_med.study.definition import code_of_today


def begin(job: Job) -> None:
    """Begin a run, which then was killed."""
    job.prepare()
    job.run.mkdir()


def test_each_seed_is_whole_before_the_next_and_shared_arms_run_once(jobs: list[Job]) -> None:
    names = ["x plain", "x small taught", "x extra", "x large taught", "y plain", "y small taught", "y large taught"]
    assert [job.name for job in jobs] == [f"{name} seed {seed}" for seed in (0, 1) for name in names]
    assert len({job.folder for job in jobs}) == len(jobs)


def test_settings_are_laid_over_in_order(jobs: list[Job], base: Path) -> None:
    settings = {job.name: job.settings for job in jobs}
    output = base.parent / "results"
    assert settings["x large taught seed 1"] == {
        "trainer": {"accelerator": "cpu"},
        "data": {"init_args": {"image_size": 32, "in_channels": 1, "root": str(base.parent / "images" / "x")}},
        "federation": {"rounds": 3},
        "model": {"store": f"{output}/teachers"},
        "seed_everything": 1,
        "run_dir": str(output / "x" / "large" / "taught" / "seed-1" / "run"),
    }
    assert "model" not in settings["x small taught seed 1"] and "federation" not in settings["x extra seed 0"]


def test_arguments_begin_a_run_and_resume_one(jobs: list[Job], base: Path) -> None:
    job = jobs[0]
    job.prepare()
    files = [str(base / "setx" / "plain.yaml"), str(job.folder / "settings.yaml")]
    assert job.arguments() == ["fit", "--config", files[0], "--config", files[1]]
    assert yaml.safe_load(Path(files[1]).read_text()) == job.settings
    (job.run / "checkpoints").mkdir(parents=True)
    (job.run / "checkpoints" / "last.ckpt").touch()
    assert job.arguments()[-2:] == ["--ckpt_path", "last"]


def test_another_configuration_is_refused_by_its_key(study: Study, base: Path, jobs: list[Job]) -> None:
    begin(jobs[0])
    study.presets["few"].settings["federated"]["federation"]["rounds"] = 4
    changed = jobs_of(study, study.presets["few"], base, Path("results"), Selection())[0]
    with pytest.raises(RunError, match=r"changed: settings\.federation\.rounds"):
        changed.prepare()


def test_an_edited_file_is_refused_by_its_name_also_one_it_names(base: Path, jobs: list[Job]) -> None:
    begin(jobs[0])
    (base / "setx" / "data.yaml").write_text("batch_size: 8\n")
    with pytest.raises(RunError, match=r"changed: configs\.setx/data\.yaml"):
        jobs[0].prepare()


def test_files_of_one_name_and_their_order_count(study: Study, base: Path, jobs: list[Job]) -> None:
    arm = study.arms["plain"]

    def with_configs(*configs: str) -> Job:
        arm.configs = [*configs]
        return jobs_of(study, study.presets["few"], base, Path("results"), Selection())[0]

    begin(with_configs("{data}/plain.yaml", "sety/plain.yaml"))
    with pytest.raises(RunError, match=r"changed: configs \(their order\)"):
        with_configs("sety/plain.yaml", "{data}/plain.yaml").prepare()
    (base / "setx" / "plain.yaml").write_text("data: data.yaml\ntrainer: {max_epochs: 1}\n")
    with pytest.raises(RunError, match=r"changed: configs\.setx/plain\.yaml"):
        with_configs("{data}/plain.yaml", "sety/plain.yaml").prepare()


def test_what_never_began_takes_the_corrected_configuration(base: Path, jobs: list[Job]) -> None:
    for job in jobs:
        job.prepare()
    (base / "setx" / "data.yaml").write_text("batch_size: 8\n")
    jobs[0].prepare()
    assert jobs[0].begun_with() == jobs[0].definition()
    jobs[0].add(1.0, 2, "")  # as with a misspelt key: it failed before it had a run directory
    (base / "setx" / "data.yaml").write_text("batch_size: 2\n")
    jobs[0].prepare()
    jobs[0].run.mkdir()
    (base / "setx" / "data.yaml").write_text("batch_size: 3\n")
    with pytest.raises(RunError, match=r"changed: configs\.setx/data\.yaml"):
        jobs[0].prepare()


def test_a_damaged_definition_says_what_to_do(jobs: list[Job]) -> None:
    begin(jobs[0])
    (jobs[0].folder / "definition.yaml").write_text("<<<<<<< HEAD\n{: :")
    with pytest.raises(RunError, match=r"definition\.yaml cannot be read\. Delete the folder"):
        jobs[0].prepare()


def test_a_comment_changes_nothing(base: Path, jobs: list[Job]) -> None:
    begin(jobs[0])
    (base / "setx" / "data.yaml").write_text("# how many images a step takes\nbatch_size:   4\n")
    jobs[0].prepare()


def test_what_is_finished_keeps_its_settings(jobs: list[Job]) -> None:
    jobs[0].prepare()
    jobs[0].add(1.0, 0, "")
    (jobs[0].folder / "settings.yaml").unlink()
    jobs[0].prepare()
    assert not (jobs[0].folder / "settings.yaml").exists()


def test_code_is_told_with_its_commit(repository: Path) -> None:
    code = code_of_today()
    assert code.startswith(f"fkd-med {version('fkd-med')}") and code.endswith(f"torch {version('torch')}")
    if (repository / ".git").exists():
        head = subprocess.check_output(["git", "-C", str(repository), "rev-parse", "HEAD"], text=True)
        assert head.startswith(code.partition("(")[2].partition(")")[0].removesuffix("-dirty") or "?")


def test_finished_runs_that_were_not_asked_for_are_named(jobs: list[Job]) -> None:
    for job in jobs[:3]:
        job.prepare()
    jobs[0].add(1.0, 0, "")
    jobs[1].add(1.0, 0, "")
    jobs[2].add(1.0, 1, "")
    assert finished_beside(Path("results"), jobs[1:]) == ["x/plain/seed-0"]
    assert finished_beside(Path("results"), jobs[:1]) == ["x/small/taught/seed-0"]


def test_a_study_that_was_moved_goes_on(study: Study, base: Path, jobs: list[Job]) -> None:
    for job in jobs:
        begin(job)
    shutil.move("results", "elsewhere")
    shutil.move("images", "pictures")
    roots = {"x": "pictures/x", "y": "pictures/y"}
    for job in jobs_of(study, study.presets["few"], base, Path("elsewhere"), Selection(roots=roots)):
        job.prepare()


def test_missing_images_name_the_option(study: Study, base: Path, jobs: list[Job]) -> None:
    shutil.rmtree("images/y")
    with pytest.raises(ConfigError, match=r"Set Y.*--data y=FOLDER"):
        jobs_of(study, study.presets["few"], base, Path("results"), Selection())
    assert jobs_of(study, study.presets["few"], base, Path("results"), Selection(cells=["x/small"]))
    assert jobs_of(study, study.presets["few"], base, Path("results"), Selection(without_images=True))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(cells=["x/tiny"]), "--cells.*'x/tiny'"),
        (Selection(arms=["taugt"]), "--arms.*Did you mean taught"),
        (Selection(seeds=[3, 3]), "--seeds has"),
        (Selection(roots={"z": "."}), "--data.*'z'"),
        (Selection(arms=["extra"], cells=["y/small"]), "No run is left"),
    ],
)
def test_what_is_asked_for_must_be_there(study: Study, base: Path, selection: Selection, message: str) -> None:
    for data in ("x", "y"):
        study.data[data].root = str(base)
    with pytest.raises(ConfigError, match=message):
        jobs_of(study, study.presets["few"], base, Path("results"), selection)


def test_a_missing_file_is_named(study: Study, base: Path, jobs: list[Job]) -> None:
    (base / "sety" / "large.yaml").unlink()
    with pytest.raises(ConfigError, match=r"arms\.taught\.configs: .*sety/large\.yaml does not exist"):
        jobs_of(study, study.presets["few"], base, Path("results"), Selection())


def test_a_damaged_note_says_what_to_do(jobs: list[Job]) -> None:
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "outcome.yaml").write_text("{: :")
    with pytest.raises(RunError, match=r"outcome\.yaml cannot be read\. Delete it"):
        _ = jobs[0].finished


def test_a_misspelt_place_in_a_setting_is_refused_and_another_s_template_is_not(study: Study, base: Path) -> None:
    few = study.presets["few"]
    few.settings["federated"] = {"checkpoint": {"filename": "best-{step}"}}
    jobs_of(study, few, base, Path("out"), Selection(without_images=True))
    few.settings["federated"] = {"model": {"store": "{ouput}/teachers"}}
    with pytest.raises(ConfigError, match=r"{ouput} in '{ouput}/teachers' stands for nothing. Did you mean {output}"):
        jobs_of(study, few, base, Path("out"), Selection(without_images=True))
