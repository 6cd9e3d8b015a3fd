"""One process at a time in a run directory: the second is told who is there; reading is always safe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback

from fkd_med.cli import main
from fkd_med.locks import Holder

SHORT = ("--federation.local_baseline=false", "--federation.rounds=1", "--test_after_fit=false")
SEEN: list[tuple[bool, int]] = []


class Look(Callback):
    """Notes who holds the lock during training, at its end, and ends it as asked."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer)
        if self.how != "well":
            raise KeyboardInterrupt if self.how == "Ctrl-C" else ZeroDivisionError

    def note(self, trainer: Any) -> None:
        lock = Path(trainer.default_root_dir) / ".fkd-lock"
        SEEN.append((lock.exists(), json.loads(lock.read_text())["pid"] if lock.exists() else 0))


def command(tiny_run: Path, verb: str, run: Path, *options: str) -> int:
    return main([verb, "--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(run), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("how", "code"), [("well", 0), ("Ctrl-C", 130), ("error", 1)])
def test_the_lock_lasts_as_long_as_the_run_however_it_ends(tiny_run, tmp_path, how, code) -> None:
    SEEN.clear()
    look = (f"--trainer.callbacks+={__name__}.Look", f"--trainer.callbacks.how={how}")
    assert command(tiny_run, "fit", tmp_path / "run", *SHORT, *look) == code
    assert set(SEEN) == {(True, os.getpid())} and len(SEEN) == 2
    assert not (tmp_path / "run" / ".fkd-lock").exists()


@pytest.fixture
def busy(tiny_run: Path, tmp_path: Path) -> Path:
    """A run that another living process, the parent of this one, works on."""
    shutil.copytree(tiny_run, tmp_path / "run")
    parent = os.getppid()
    started = Holder.this_process().started and _started(parent)
    holder = {"pid": parent, "host": Holder.this_process().host, "started": started}
    (tmp_path / "run" / ".fkd-lock").write_text(json.dumps(holder))
    return tmp_path / "run"


def _started(pid: int) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"


@pytest.mark.parametrize(
    "words", [["fit"], ["fit", "--overwrite"], ["fit", "--ckpt_path=last"], ["validate"], ["test"]], ids=" ".join
)
def test_whoever_would_write_into_a_busy_run_is_refused(tiny_run, busy, capsys, words) -> None:
    before = contents(busy)
    assert command(tiny_run, words[0], busy, *words[1:]) == 2
    error = capsys.readouterr().err
    assert f"in use by process {os.getppid()}" in error and Holder.this_process().host in error
    assert ("--ckpt_path FILE" in error) == (words[0] != "fit")
    assert contents(busy) == before


def test_whoever_reads_a_busy_run_is_not(tiny_run, busy, tmp_path, capsys) -> None:
    before = contents(busy)
    assert command(tiny_run, "validate", busy, f"--ckpt_path={busy / 'checkpoints' / 'last.ckpt'}") == 0
    images = tiny_run.parents[1] / "phantoms" / "images"
    student, masks = str(busy / "student.ckpt"), str(tmp_path / "masks")
    assert main(["predict", "--ckpt_path", student, "--data.images", str(images), "--output", masks]) == 0
    assert main(["compare", str(busy), str(tiny_run), "--output", str(tmp_path / "compared")]) == 0
    assert contents(busy) == before


@pytest.mark.slow
def test_a_second_process_is_refused_and_one_that_was_killed_is_not_waited_for(tiny_run, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    words = ["fit", "--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(run)]
    long = ("--federation.rounds=1000", "--federation.local_baseline=false", "--test_after_fit=false")
    first = subprocess.Popen([sys.executable, "-m", "fkd_med", *words, *long], stdout=subprocess.DEVNULL)
    try:
        last = run / "checkpoints" / "last.ckpt"
        end = time.monotonic() + 300
        while not last.exists() and first.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert last.exists() and first.poll() is None
        for options in ((), ("--overwrite",), ("--ckpt_path=last",)):
            assert main([*words, *long, *options]) == 2
            assert f"in use by process {first.pid}" in capsys.readouterr().err
        assert first.poll() is None and last.exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (run / ".fkd-lock").exists(), "a killed process cleans up nothing"
    shorter = ("--federation.local_baseline=false", "--test_after_fit=false", "--overwrite", "--federation.rounds=1")
    assert main([*words, *shorter]) == 0
    assert not (run / ".fkd-lock").exists()
