"""A run is started once, resumed or overwritten on request, and strangers' files are never touched."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fkd_med.errors import DataError, RunError
from fkd_med.rundir import RunDir


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run in which something was done."""
    run = RunDir(tmp_path / "runs" / "one")
    run.create()
    run.config.write_text("seed: 1\n")
    (run.checkpoints / "last.ckpt").write_text("x")
    run.client("Köln").mkdir()
    (run.client("Köln") / "state.safetensors").write_text("x")
    return run


def test_what_lies_where(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "x"))
    names = ("config", "manifest", "journal", "checkpoints", "clients", "ledger", "images", "metrics", "pictures")
    found = {name: getattr(run, name).name for name in (*names, "student")}
    assert found == {
        "config": "config.yaml", "manifest": "manifest.csv", "journal": "journal", "checkpoints": "checkpoints",
        "clients": "clients", "ledger": "ledger.csv", "images": "images.csv", "metrics": "metrics.csv",
        "pictures": "pictures", "student": "student.ckpt",
    }  # fmt: skip
    assert run.client("Köln") == tmp_path / "x" / "clients" / "Köln"
    assert not (tmp_path / "x").exists()


def test_no_client_leads_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would be a path"):
        RunDir(tmp_path).client("../..")


def test_a_new_run_is_made_and_a_run_that_never_began_is_used_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a" / "b")
    run.create()
    assert {"journal", "checkpoints", "clients", "pictures"} < set(os.listdir(run.path))
    assert not run.exists()
    (run.checkpoints / ".99999999-0123abcd.fkd-tmp").write_text("a killed write")
    run.create()


@pytest.fixture
def open_run(tmp_path: Path) -> RunDir:
    """A run that was killed in its first round."""
    run = RunDir(tmp_path / "open")
    assert not run.begin("rounds: 3\n")
    run.config.write_text("rounds: 3\n")
    for path in (run.journal / "round-00001" / "a.json", run.client("a") / "state-00001.pt", run.metrics, run.images):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return run


def test_a_first_round_is_taken_up_again(open_run: RunDir) -> None:
    (open_run.journal / "round-00001" / ".99999999-0123abcd.fkd-tmp").write_text("a killed write")
    assert open_run.begin("rounds: 3\n")
    kept = {"journal/round-00001/a.json", "clients/a/state-00001.pt", "metrics.csv"}
    assert {str(p.relative_to(open_run.path)) for p in open_run.path.rglob("*") if p.is_file()} == {*kept, ".fkd-run"}


@pytest.mark.parametrize("how", [{"overwrite": True}, {"text": "rounds: 4\n"}])
def test_another_configuration_or_overwrite_begins_afresh(open_run: RunDir, how: dict[str, Any]) -> None:
    assert not open_run.begin(how.pop("text", "rounds: 3\n"), **how)
    assert {p.name for p in open_run.path.rglob("*") if p.is_file()} == {".fkd-run"}


def test_a_run_with_a_closed_round_is_resumed_or_refused(open_run: RunDir) -> None:
    (open_run.checkpoints / "last.ckpt").write_text("x")
    with pytest.raises(RunError, match="--ckpt_path last"):
        open_run.begin("rounds: 3\n")
    assert not open_run.begin("rounds: 3\n", resume=True)
    assert open_run.images.exists()


def test_an_existing_run_is_refused_with_the_remedies(run: RunDir) -> None:
    before = tree(run.path)
    with pytest.raises(RunError, match=r"--ckpt_path last.*--overwrite"):
        run.create()
    assert tree(run.path) == before
    assert run.exists()


def test_resume_keeps_everything_and_clears_what_a_kill_left(run: RunDir) -> None:
    before = tree(run.path)
    (run.checkpoints / ".99999999-0123abcd.fkd-tmp").write_text("a killed write")
    run.create(resume=True)
    assert tree(run.path) == before


def test_resume_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        RunDir(tmp_path / "x").create(resume=True)
    assert not (tmp_path / "x").exists()


def test_overwrite_removes_the_run_but_not_what_the_user_or_wandb_put_there(run: RunDir, tmp_path: Path) -> None:
    (run.path / "notes.txt").write_text("mine")
    (run.path / "wandb").mkdir()
    (run.path / "wandb" / "run").write_text("not yet synced")
    big = tmp_path / "big disk"
    big.mkdir()
    (big / "picture.png").write_text("mine")
    run.pictures.rmdir()
    run.pictures.symlink_to(big)
    run.create(overwrite=True)
    assert not run.config.exists()
    assert os.listdir(run.checkpoints) == os.listdir(run.clients) == []
    assert (run.path / "notes.txt").exists()
    assert (run.path / "wandb" / "run").exists()
    assert (big / "picture.png").exists()
    assert not run.pictures.is_symlink()


def test_overwrite_forgets_the_local_baseline_too_but_no_other_run_inside(run: RunDir) -> None:
    for name in ("local", "other"):
        inner = RunDir(run.path / name)
        inner.create()
        (inner.checkpoints / "last.ckpt").write_text("x")
    (run.path / "local" / "notes.txt").write_text("mine")
    run.create(overwrite=True)
    assert not (run.path / "local" / "checkpoints").exists()
    assert (run.path / "local" / "notes.txt").exists()
    assert (run.path / "other" / "checkpoints" / "last.ckpt").exists()


def test_a_check_changes_nothing(run: RunDir, tmp_path: Path) -> None:
    before = tree(tmp_path)
    run.check(overwrite=True)
    run.check(resume=True)
    RunDir(tmp_path / "new").check()
    with pytest.raises(RunError, match="--overwrite"):
        run.check()
    assert tree(tmp_path) == before


def test_overwrite_of_nothing_starts_a_run(tmp_path: Path) -> None:
    RunDir(tmp_path / "x").create(overwrite=True)
    assert (tmp_path / "x" / ".fkd-run").exists()


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_strangers_folder_is_never_touched(tmp_path: Path, how: dict[str, bool]) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match="is no run of fkd-med"):
        RunDir(tmp_path).create(**how)
    with pytest.raises(RunError, match="is no run of fkd-med"), RunDir(tmp_path).lock():
        pass
    assert tree(tmp_path) == {"config.yaml", "checkpoints"}


def test_a_file_is_refused_and_so_are_both_flags(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        RunDir(tmp_path / "x").create(overwrite=True)
    with pytest.raises(RunError, match="Cannot write"):
        RunDir(tmp_path / "x" / "y").create()
    with pytest.raises(RunError, match="exclude each other"):
        RunDir(tmp_path / "y").create(overwrite=True, resume=True)


def test_an_empty_folder_of_the_users_is_accepted(tmp_path: Path) -> None:
    RunDir(tmp_path).create()
    assert (tmp_path / ".fkd-run").exists()


def test_a_lock_keeps_others_out_and_goes_after_an_exception(run: RunDir) -> None:
    with pytest.raises(ZeroDivisionError), run.lock():
        with pytest.raises(RunError, match="in use"), RunDir(run.path).lock():
            pass
        run.create(resume=True)
        _ = 1 / 0
    assert not (run.path / ".fkd-lock").exists()
    assert run.exists()


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_run_that_another_process_uses_is_left_alone(run: RunDir, how: dict[str, bool]) -> None:
    (run.path / ".fkd-lock").write_text(json.dumps({"pid": 5, "host": "elsewhere", "started": ""}))
    before = tree(run.path)
    with pytest.raises(RunError, match=r"in use by process 5 on host elsewhere.*delete .*\.fkd-lock"):
        run.create(**how)
    assert tree(run.path) == before


def test_a_run_that_fails_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a" / "b")
    with pytest.raises(ZeroDivisionError), run.lock():
        run.create()
        _ = 1 / 0
    assert tree(tmp_path) == set()


def test_a_run_that_fails_after_it_began_stays(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    with pytest.raises(ZeroDivisionError), run.lock():
        run.create()
        (run.checkpoints / "last.ckpt").write_text("round 1")
        _ = 1 / 0
    assert run.exists()


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only")])
def test_a_full_or_read_only_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    made = Path.mkdir

    def fail(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == "clients":
            raise OSError(number, os.strerror(number))
        made(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(RunError, match=remedy):
        RunDir(tmp_path / "a" / "b").create()
    assert tree(tmp_path) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match="You may not write there"), RunDir(tmp_path / "x").lock():
            pass
    finally:
        tmp_path.chmod(0o700)
