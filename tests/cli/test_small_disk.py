"""A whole run on a disk that is really too small, given more room each time, ends as one that never lacked any."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fkd_med.checkpoints import read_checkpoint
from fkd_med.evaluation import ImageTable

# Root in a namespace of its own may mount, and its disk is gone with it.
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
PROGRAM = """
import shutil, subprocess, sys
from pathlib import Path
from fkd_med.cli import main

config, disk, kept, read_only = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])

def mount(*words):
    subprocess.run(["mount", *words], check=True)

def fit(run, *options):
    resume = ["--ckpt_path=last"] if any(run.glob("checkpoints/*.ckpt")) else []
    return main(["fit", "--config", config, "--run_dir", str(run), *options, *resume])

mount("-t", "tmpfs", "-o", "size=64k", "small", str(disk))
codes = []
for size in range(300, 30000, 600):
    mount("-o", f"remount,size={size}k", str(disk))
    codes.append(fit(disk / "run"))
    if codes[-1] == 0:
        break
shutil.copytree(disk / "run", kept)
mount("-o", "remount,size=100m", str(disk))
mount("--bind", str(read_only), str(read_only))
mount("-o", "remount,ro,bind", str(read_only))
codes.append(fit(read_only / "run"))
codes.append(fit(read_only / "new"))
codes.append(fit(disk / "other", f"--model.teacher.store={read_only / 'store'}", "--federation.rounds=1"))
print("codes", *codes)
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="this system lets nobody but root mount a disk")
def test_a_disk_that_grows_and_one_that_is_read_only(tiny_run: Path, tmp_path: Path) -> None:
    disk, kept, read_only = tmp_path / "disk", tmp_path / "kept", tmp_path / "read-only"
    disk.mkdir()
    shutil.copytree(tiny_run, read_only / "run")
    (read_only / "run" / "student.ckpt").unlink()
    config = str(tiny_run.parents[1] / "tiny.yaml")
    words = [*NAMESPACE, sys.executable, "-c", PROGRAM, config, str(disk), str(kept), str(read_only)]
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    result = subprocess.run(words, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("codes ")]
    *full, done, again, new, store = (int(word) for word in line.split()[1:])
    assert len(full) > 5 and set(full) == {2} and done == 0, result.stderr[-5000:]
    assert (again, new, store) == (2, 2, 2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("fkd: error: ")]
    assert len(errors) == len(full) + 3
    named = {Path(error.partition("Cannot write ")[2].partition(": ")[0]).name for error in errors[: len(full)]}
    assert all("The disk is full: free some space" in error for error in errors[: len(full)]) and len(named) > 2, named
    assert all("read-only" in error for error in errors[len(full) :]), errors[len(full) :]
    expected, actual = (read_checkpoint(run / "student.ckpt")["state_dict"] for run in (tiny_run, kept))
    assert all(actual[name].equal(tensor) for name, tensor in expected.items())
    tables = [sorted(ImageTable.read(run / "images.csv"), key=lambda row: row.key) for run in (tiny_run, kept)]
    assert tables[0] == tables[1]
    assert (kept / "ledger.csv").read_bytes() == (tiny_run / "ledger.csv").read_bytes()
