"""How a run is killed, and compared with one that was not: what `chaos.py` is made of.

A run takes seconds, importing the stack as long again; so one process imports it and a fork of it makes each run. The
product has no hooks for this: a fork replaces a function by one that kills its own process at the n-th call.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fkd_med.checkpoints import read_checkpoint
from fkd_med.cli import main as fkd

RUN = Path("runs/run")
COMMAND = ["fit", "--config", "run.yaml"]
PICTURES = "CHAOS_PICTURES"
POINT = "CHAOS_POINT"
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def configuration(baseline: bool, ddp: bool = False) -> dict[str, Any]:
    """Return a federated distillation of two phantom hospitals in which clients keep all that they can keep."""
    devices = {"devices": 2, "strategy": "ddp"} if ddp else {}
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 5.0e-3}}
    network = {"class_path": "fkd_med.networks.ResUNet", "init_args": {"width": 4}}
    module = {"network": network, "optimizer": optimizer}
    teacher = {
        "store": "teachers",
        "epochs": 2,
        "module": {"class_path": "fkd_med.modules.SegmentationModule", "init_args": module},
    }
    phantoms = {"hospitals": 2, "images": 14, "size": 32}
    int4 = {"class_path": "fkd_med.communication.Int4", "init_args": {"rounding": "stochastic"}}
    packing = {"codec": int4, "of": "delta", "error_feedback": True}
    return {
        "seed_everything": 7,
        "run_dir": str(RUN),
        "data": {
            "root": "phantoms",
            "layout": {"class_path": "fkd_med.data.Phantoms", "init_args": phantoms},
            "image_size": 32,
            "batch_size": 4,
        },
        "model": {
            "class_path": "fkd_med.modules.DistillationModule",
            "init_args": {
                "network": {"class_path": "fkd_med.networks.SlimUNet"},
                "optimizer": optimizer,
                "teacher": {"class_path": "fkd_med.federated.TeacherStage", "init_args": teacher},
            },
        },
        "federation": {
            "rounds": 3,
            "optimizer_state": "keep",
            "batch_norm": "local",
            "uplink": {"class_path": "fkd_med.communication.Packing", "init_args": packing},
            "threads": 1,
            "local_baseline": baseline,
        },
        "trainer": {"accelerator": "cpu", "logger": False, **devices},
    }


# --- killing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A place in the program: the n-th call of a function, just before or after it, or half done.

    Args:
        name: what happens there.
        target: ``module:attribute`` that is replaced, as its caller finds it.
        call: which call, from 1.
        when: ``before``, ``after``, or ``torn``: half of the text of an append is written.
        where: part of the path of the file in hand, for functions that write files; other calls do not count.
        signal: what the process sends to itself.
        rank: which process of a run of two.
    """

    name: str
    target: str
    call: int = 1
    when: str = "before"
    where: str = ""
    signal: int = signal.SIGKILL
    rank: int = 0

    def install(self) -> None:
        """Replace the function, or let the other process do it."""
        if self.rank == 0:
            self.replace()
        else:
            os.environ[POINT] = self.name

    def replace(self) -> None:
        """Replace the function in this process."""
        module, _, path = self.target.partition(":")
        *owners, attribute = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original, calls = getattr(owner, attribute), 0

        def replaced(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += not self.where or any(self.where in str(argument) for argument in args[:2])
            now = calls == self.call
            calls += now and self.when != "after"  # once only: a signal may be survived
            if now and self.when == "torn":
                with open(args[0], "a", encoding="utf-8") as file:
                    file.write(args[1][: len(args[1]) // 2])
            if now and self.when != "after":
                os.kill(os.getpid(), self.signal)
            result = original(*args, **kwargs)
            if now and self.when == "after":
                calls += 1
                os.kill(os.getpid(), self.signal)
            return result

        setattr(owner, attribute, replaced)


_STEP = "fkd_med.federated.client:LearningRateNote.on_before_optimizer_step"
# Two hospitals, three rounds, so six clients' trainings of two steps each and four validation batches a round.
POINTS = (
    Point("partition: after the manifest", "fkd_med.data.manifest:Manifest.write", when="after"),
    Point("teacher: in an epoch", "fkd_med.modules.segmentation:SegmentationModule.training_step", 3),
    Point("teacher: epoch logged, not saved", "fkd_med.federated.teachers:TeacherCurve.on_train_epoch_end", 2, "after"),
    Point("teacher: weights without their note", "fkd_med.federated.teachers:atomic_write_text", 2),
    Point("teacher cache: half built", "fkd_med.modules.teacher_cache:refuse_non_finite", 2),
    Point("teacher cache: not in its place", "fkd_med.distillation.atomic_folder:_put_in_place", 2),
    Point("client fit: first client of round 1", _STEP, 2),
    Point("client fit: second client of round 1", _STEP, 3),
    Point("client fit: second client of round 2", _STEP, 8),
    Point("client state: not in its place", "os:replace", 4, where="state-0000"),
    Point("client state: before the residual is added", "fkd_med.federated.client_state:ClientStates.save", 4),
    Point("encoding", "fkd_med.communication.packing:Packing.pack", 6),
    Point("encoded, update not in its place", "os:replace", 4, where=".update"),
    Point("between update and note", "fkd_med.federated.journal:atomic_write_text", 4),
    Point("note not in its place", "os:replace", 3, where="hospital-a.json"),
    Point("all clients finished", "fkd_med.federated.gathering:Gathering.check_quorum", 2),
    Point("aggregation: of round 1", "fkd_med.aggregation.fedavg:FedAvg.aggregate", 1),
    Point("aggregation: of round 3", "fkd_med.aggregation.fedavg:FedAvg.aggregate", 3, "after"),
    Point("ledger.csv: half appended", "fkd_med.communication.ledger:append_text", 1, "torn"),
    Point("metrics.csv: half appended", "fkd_med.tracking.metrics_csv:append_text", 9, "torn"),
    Point("evaluation", "fkd_med.modules.distillation:DistillationModule.validation_step", 6),
    Point("images.csv: half appended", "fkd_med.evaluation.rows:append_text", 2, "torn"),
    Point("checkpoint: best written, last not", "os:replace", 2, where="last.ckpt"),
    Point("checkpoint: of round 3", "os:replace", 3, where="last.ckpt"),
    Point("checkpoint written, journal not cleared", "fkd_med.federated.exchange:Exchange.forget", 3),
    Point("old states not deleted", "fkd_med.federated.client_state:ClientStates.prune", 2),
    Point("test", "fkd_med.modules.segmentation:SegmentationModule.test_step", 2),
    Point("test: images.csv half appended", "fkd_med.evaluation.rows:append_text", 4, "torn"),
    Point("student.ckpt not in its place", "os:replace", where="student.ckpt"),
    Point("pictures", "fkd_med.cli.report:write_pictures"),
    Point("report not in its place", "os:replace", where="report.md"),
    Point("SIGTERM in a client's fit", _STEP, 8, signal=signal.SIGTERM),
    Point("SIGINT in a client's fit", _STEP, 8, signal=signal.SIGINT),
    Point("SIGTERM in teacher training", "fkd_med.modules.segmentation:SegmentationModule.training_step", 3,
          signal=signal.SIGTERM),
    Point("SIGTERM while a checkpoint is written", "os:replace", 2, where="last.ckpt", signal=signal.SIGTERM),
    Point("SIGINT in the evaluation", "fkd_med.modules.distillation:DistillationModule.validation_step", 6,
          signal=signal.SIGINT),
    Point("SIGTERM in the test", "fkd_med.modules.segmentation:SegmentationModule.test_step", 2,
          signal=signal.SIGTERM),
)  # fmt: skip
BASELINE_POINTS = (
    Point("alone: first client of round 1", _STEP, 14),
    Point("alone: second client of round 1", _STEP, 15),
    Point("alone: second client of round 2", _STEP, 20),
    Point("alone: checkpoint not in its place", "os:replace", 9, where="last.ckpt"),
    Point("alone: between two tests", "fkd_med.cli.report:Report._keep"),
)
# The same run in two processes: one step and one batch of validation or test each, for what took two.
_TRAINING = "fkd_med.modules.segmentation:SegmentationModule.training_step"
RANK_POINTS = (
    Point("rank 1: teacher", _TRAINING, 2, rank=1),
    Point("rank 1: second client of round 1", _STEP, 2, rank=1),
    Point("rank 1: second client of round 2", _STEP, 4, rank=1),
    Point("rank 1: aggregation of round 2", "fkd_med.aggregation.fedavg:FedAvg.aggregate", 2, rank=1),
    Point("rank 1: evaluation", "fkd_med.modules.segmentation:SegmentationModule.validation_step", 8, rank=1),
    Point("rank 1: test", "fkd_med.modules.segmentation:SegmentationModule.test_step", rank=1),
    Point("rank 0: second client of round 2", _STEP, 4),
    Point("rank 0: between update and note", "fkd_med.federated.journal:atomic_write_text", 4),
    Point("rank 0: checkpoint, best written, last not", "os:replace", 2, where="last.ckpt"),
    Point("rank 0: SIGTERM in a client's fit", _STEP, 4, signal=signal.SIGTERM),
)


def at_event(number: int) -> Callable[[], None]:
    """Kill at the n-th file that is opened for writing, renamed or removed below the current folder."""

    def install() -> None:
        here, seen = os.getcwd(), 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            if (writes or event in _EVENTS) and os.path.abspath(str(arguments[0])).startswith(here):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                Path("../events").write_text(str(seen)) if number == 0 and not writes else None

        sys.addaudithook(hook)

    return install


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, or minus the signal that killed it; and how long it took."""

    code: int
    seconds: float


def run(folder: Path, argv: list[str], install: Callable[[], None] | None = None, after: float | None = None) -> Ended:
    """Run ``fkd`` in a fork, in `folder`; its output goes to ``log`` there.

    Args:
        folder: the current folder of the run.
        argv: the command.
        install: called in the fork before the command.
        after: seconds until it is killed.
    """
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_run(folder, argv, install)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        elapsed = time.monotonic() - started
        if done:
            return Ended(os.waitstatus_to_exitcode(status), elapsed)
        if after is not None and elapsed >= after:
            os.kill(child, signal.SIGKILL)
            after = None
        time.sleep(0.02)


def _be_the_run(folder: Path, argv: list[str], install: Callable[[], None] | None) -> None:
    """Become the run; never return."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits a deaf ear
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print(f"--- fkd {' '.join(argv)}", flush=True)
        sys.argv = [str(Path(__file__).with_name("_rank.py")), *argv]  # what Lightning starts another process with
        if PICTURES not in os.environ:  # they take a third of the time of so short a run
            importlib.import_module("fkd_med.cli.report").write_pictures = lambda *_: []
        if install is not None:
            install()
        code = fkd(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def prepare(folder: Path, baseline: bool, ddp: bool = False) -> Path:
    """Make the folder of a run, with its configuration."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration(baseline, ddp), sort_keys=False))
    return folder


def has_orphan(folder: Path, seconds: float = 20) -> bool:
    """Return whether the second process of a run that has ended stays for longer than some seconds."""
    note, deadline = folder / "rank-1.pid", time.monotonic() + seconds
    while note.exists() and _is_running(int(note.read_text())):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def resume(folder: Path) -> tuple[str, Ended]:
    """Go on with a killed run as its user would: from the last closed round, or by the same command."""
    last = any((folder / RUN / "checkpoints").glob("*.ckpt"))  # the first round's best may be all there is
    return ("last", run(folder, [*COMMAND, "--ckpt_path", "last"])) if last else ("again", run(folder, COMMAND))


# --- comparing ------------------------------------------------------------------------------------------------------


def differences(reference: Path, folder: Path) -> list[str]:
    """Return what is not the same, bit by bit, in two folders of runs: files, tables, tensors, teachers."""
    one, other = _files(reference), _files(folder)
    found = [f"only in one: {name}" for name in sorted(one ^ other)]
    return found + [name for name in sorted(one & other) if not _same(reference, folder, name)]


def _files(folder: Path) -> set[str]:
    """Return the files of a run and its teachers; locks name processes."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in paths if path.parts[0] in ("runs", "teachers") and "lock" not in path.name}


def _same(one: Path, other: Path, name: str) -> bool:
    if name.endswith((".ckpt", ".pt")):
        return _equal(*(_placed(read_checkpoint(folder / name), folder) for folder in (one, other)))
    return (one / name).read_bytes() == (other / name).read_bytes()


def _placed(value: Any, folder: Path) -> Any:
    """Return a checkpoint's content with the run's own folder taken out of its paths."""
    if isinstance(value, dict):
        return {_placed(key, folder): _placed(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(item, folder) for item in value]
    return value.replace(str(folder.resolve()), "") if isinstance(value, str) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        alike = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return alike and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_equal, one, other))
    return bool(json.dumps(one, default=str) == json.dumps(other, default=str))
