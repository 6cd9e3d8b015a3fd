"""A disk that is full, at any kind of file: one clear error, earlier files as they were, and an exact resume."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from fkd_med import files
from fkd_med.checkpoints import read_checkpoint, write_checkpoint
from fkd_med.errors import RunError
from fkd_med.evaluation import ImageTable
from fkd_med.federated import Federation
from slowly import slow_but

ROUNDS = 3
TABLES = ("ledger.csv", "images.csv", "metrics.csv")


class Disk:
    """A disk that refuses, when full, to keep whatever has `kind` in its path."""

    def __init__(self, kind: str) -> None:
        self.kind, self.full = kind, False
        self.refused: list[str] = []
        self._targets: dict[str, str] = {}
        self._temporary, self._fsync = files.temporary_beside, os.fsync

    def temporary_beside(self, path: Path) -> Path:
        """As `files.temporary_beside`, remembering what a temporary file is to become."""
        made = self._temporary(path)
        self._targets[os.path.realpath(made)] = str(path)
        return made

    def fsync(self, descriptor: int) -> None:
        """As `os.fsync`, if there is room."""
        path = os.path.realpath(f"/proc/self/fd/{descriptor}")
        path = self._targets.get(path, path)
        if self.full and self.kind in path and not os.path.isdir(path):
            self.refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(descriptor)


class FullFromRound(L.Callback):
    """Fills the disk at the beginning of a round."""

    def __init__(self, disk: Disk, round: int) -> None:
        self.disk, self.round = disk, round

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.disk.full |= trainer.current_epoch + 1 == self.round


@pytest.fixture
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(request.param)
    monkeypatch.setattr(files, "temporary_beside", made.temporary_beside)
    monkeypatch.setattr(os, "fsync", made.fsync)
    yield made


def fit(fed: Any, folder: Path, *callbacks: Any, resume: bool = False, module: Any = None) -> Any:
    trainer = fed.trainer(folder, Federation(rounds=ROUNDS, optimizer_state="keep"), callbacks=list(callbacks))
    module = module or fed.student()
    trainer.fit(module, datamodule=fed.Hospitals(), ckpt_path=folder / "checkpoints" / "last.ckpt" if resume else None)
    return fed.weights(module)


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in TABLES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


KINDS = ["last.ckpt", "best-", "/journal/", "/clients/", *TABLES]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not tell which file a descriptor is")
@pytest.mark.parametrize("disk", KINDS, indirect=True)
def test_a_run_ends_clearly_and_goes_on_exactly(fed, tmp_path, whole, disk) -> None:
    if not (whole / "weights.pt").exists():
        write_checkpoint(fit(fed, whole), whole / "weights.pt")
    with pytest.raises(RunError, match=rf"Cannot write .*{disk.kind}.*No space left.*free some space, then run again"):
        fit(fed, tmp_path, FullFromRound(disk, 1 if disk.kind == "best-" else 2))  # the first round is sure to be best
    assert disk.refused
    last = tmp_path / "checkpoints" / "last.ckpt"
    if disk.kind != "best-":
        assert read_checkpoint(last)["global_step"] == 1
    assert {row.round for row in ImageTable.read(tmp_path / "images.csv")} <= {1, 2}
    assert not list(tmp_path.rglob("*.fkd-tmp"))
    disk.full = False
    if not last.exists():
        for name in TABLES:  # as `fkd fit` does in a folder whose run closed no round
            (tmp_path / name).unlink(missing_ok=True)
    assert fed.same(fit(fed, tmp_path, resume=last.exists()), read_checkpoint(whole / "weights.pt"))
    assert texts(tmp_path) == texts(whole)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not tell which file a descriptor is")
@pytest.mark.parametrize(
    "disk",
    slow_but(["teacher.json"], ["teacher.safetensors", "teacher.json", "training/last.ckpt"]),
    indirect=True,
)
def test_a_teacher_that_cannot_be_kept_is_trained_again(fed, tmp_path, disk) -> None:
    def taught(name: str) -> Any:
        return fed.distilled(tmp_path / name, source=fed.teacher_stage(tmp_path / name, epochs=1))

    expected = fit(fed, tmp_path / "whole", module=taught("stores/whole"))
    disk.full = True
    with pytest.raises(RunError, match=rf"Cannot write .*{disk.kind}.*free some space"):
        fit(fed, tmp_path / "run", module=taught("stores/one"))
    assert not list(tmp_path.glob("stores/one/*/teacher.json")), "half a teacher must not be taken for one"
    disk.full = False
    assert fed.same(fit(fed, tmp_path / "run", module=taught("stores/one")), expected)


def test_a_store_that_nobody_may_write_to_is_an_error_before_training(fed, tmp_path, monkeypatch) -> None:
    (tmp_path / "store").write_text("a file, where not even root can make a folder")
    trained: list[Any] = []
    monkeypatch.setattr(L.Trainer, "fit", lambda *args, **kwargs: trained.append(args))
    stage = fed.teacher_stage(tmp_path / "store", epochs=1)
    with pytest.raises(RunError, match=r"The teacher store .*store cannot be written"):
        stage.ensure("a", fed.Hospitals())
    assert not trained
