"""Checks a federated run on two GPUs: NCCL, torchrun, bf16, SyncBatchNorm and a compiled teacher.

    python benchmarks/multi_gpu.py                # on a machine with two or more CUDA GPUs; minutes
    python benchmarks/multi_gpu.py --rehearse     # the script itself, with gloo on CPU, where a check can run there

Each check is a whole ``fkd fit`` on phantoms (teachers, cache, rounds, test, report) in a folder of its own. A line of
JSON per check says whether it ended well, and what is wrong: an exit code, an image scored twice or not at all, bytes
counted twice, weights that are not finite or not those of another start. Exit code 0: all is well; 1: something is
wrong; 2: there are not two GPUs, and nothing was checked.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from _kills import configuration, differences
from fkd_med.checkpoints import read_checkpoint

COMPILED = '''
"""A teacher whose forward pass is compiled; torch.compile of the module itself would not survive copies of it."""
import torch

from fkd_med.networks import ResUNet

_compiled = torch.compile(ResUNet.forward)


class CompiledResUNet(ResUNet):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return _compiled(self, image)
'''


@dataclass(frozen=True)
class Check:
    """One run.

    Args:
        name: what it is about; its folder, too.
        options: beside those of two devices.
        torchrun: started by torchrun instead of Lightning.
        same_as: another check, whose run must be the same bit for bit.
        on_cpu: whether it can be rehearsed.
    """

    name: str
    options: tuple[str, ...] = ()
    torchrun: bool = False
    same_as: str | None = None
    on_cpu: bool = True


CHECKS = (
    Check("ddp"),
    Check("torchrun", torchrun=True, same_as="ddp"),
    Check("again", ("--ckpt_path", "last"), same_as="ddp"),
    Check("bf16-mixed", ("--trainer.precision", "bf16-mixed")),
    Check("sync-batchnorm", ("--trainer.sync_batchnorm", "true"), on_cpu=False),
    Check("compiled-teacher", ("--model.teacher.module.network", "compiled_teacher.CompiledResUNet",
                               "--model.teacher.module.network.width", "4", "--model.teacher_cache", "off")),
)  # fmt: skip


def main() -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="Two processes with gloo on CPU.")
    parser.add_argument("--only", nargs="*", help="Names of checks, with those that they are compared with.")
    parser.add_argument("--out", type=Path, default=Path("runs/multi-gpu"), help="Replaced.")
    given = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not given.rehearse and gpus < 2:
        print(f"multi_gpu: this machine has {gpus} CUDA GPU(s) and two are needed: nothing was checked.")
        return 2
    shutil.rmtree(given.out, ignore_errors=True)
    good = True
    for check in CHECKS:
        if (given.only and check.name not in given.only) or (given.rehearse and not check.on_cpu):
            continue
        started = time.monotonic()
        wrong = perform(check, given.out.resolve(), given.rehearse)
        line = {"check": check.name, "ok": not wrong, "seconds": round(time.monotonic() - started, 1)}
        print(json.dumps(line | ({"wrong": wrong} if wrong else {})), flush=True)
        good = good and not wrong
    devices = "2 processes on CPU" if given.rehearse else f"{gpus} x {torch.cuda.get_device_name()}"
    print(json.dumps({"program": "multi_gpu", "devices": devices, "torch": torch.__version__, "ok": good}))
    return int(not good)


def perform(check: Check, out: Path, on_cpu: bool) -> list[str]:
    """Run one check in its folder; return what is wrong."""
    folder = out / check.name
    if "--ckpt_path" in check.options:  # a run that is done: nothing is left but its test, to the same scores
        shutil.copytree(out / str(check.same_as), folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = configuration(False)
    settings["trainer"] = {"logger": False, "deterministic": True, "devices": 2, "strategy": "ddp"}
    settings["trainer"]["accelerator"] = "cpu" if on_cpu else "gpu"
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "compiled_teacher.py").write_text(COMPILED)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if check.torchrun else []
    command = [sys.executable, *launcher, "-m", "fkd_med", "fit", "--config", "run.yaml", *check.options]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    with open(folder / "log", "a") as log:
        environment = os.environ | {"PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        code = subprocess.call(command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=1800)
    if code:
        return [f"exit code {code}: see {folder / 'log'}"]
    wrong = examine(folder / "runs" / "run")
    if check.same_as is not None:
        wrong += [f"other than {check.same_as}: {text}" for text in differences(out / check.same_as, folder)]
    return wrong


def examine(run: Path) -> list[str]:
    """Return what is wrong with a run's files, whoever wrote them."""
    manifest = {split: [row["id"] for row in rows(run / "manifest.csv") if row["split"] == split] for split in SPLITS}
    scored = Counter((row["model"], row["split"], row["round"], row["id"]) for row in rows(run / "images.csv"))
    wrong = [f"scored {count} times: {key}" for key, count in scored.items() if count > 1]
    expected = 3 * len(manifest["val"]) + 2 * len(manifest["test"])  # rounds; student and teacher
    wrong += [] if len(scored) == expected else [f"{len(scored)} scores instead of {expected}"]
    messages = Counter((r["round"], r["client"], r["direction"], r["section"]) for r in rows(run / "ledger.csv"))
    wrong += [f"counted {count} times: {key}" for key, count in messages.items() if count > 1]
    state = read_checkpoint(run / "student.ckpt")["state_dict"]
    wrong += [f"not finite: {name}" for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    processes = read_checkpoint(run / "checkpoints" / "last.ckpt")["fkd_med"]["processes"]
    return wrong + ([] if processes == 2 else [f"{processes} process(es) trained it"])


SPLITS = "val", "test"


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())
