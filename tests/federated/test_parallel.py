"""Clients side by side: the same bits as one after the other, and one client's trouble is nobody else's."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parallel_parts import Trouble

from building import BASE, build
from fkd_med.aggregation import Scaffold
from fkd_med.checkpoints import read_checkpoint
from fkd_med.cli.resume_rules import verdict
from fkd_med.communication import Int4, Packing
from fkd_med.data import FederatedDataModule, Phantoms
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.federated import Chaos, EnsembleStage, Federation, ScaffoldRule, TeacherStage
from fkd_med.federated import crew as crew_module
from fkd_med.losses import HintMSE, LogitKL
from fkd_med.modules import DistillationModule, MutualDistillationModule, SegmentationModule
from fkd_med.networks import ResUNet, SlimUNet
from slowly import slow_but

CLIENTS = ("hospital-a", "hospital-b", "hospital-c")
ADAM, SGD = partial(torch.optim.Adam, lr=0.01), partial(torch.optim.SGD, lr=0.05)
TABLES = ("ledger.csv", "images.csv", "metrics.csv", "absences.csv")
HINT = {"kd": LogitKL(), "hint": HintMSE(student_tap="decoder.2", teacher_tap="decoder.0", weight=1.0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side")
    Phantoms(hospitals=3, images=10, size=32).prepare(folder / "phantoms")
    return folder


def data(root: Path, **options: Any) -> FederatedDataModule:
    return FederatedDataModule(
        str(root / "phantoms"), Phantoms(hospitals=3, images=10, size=32), image_size=32, **options
    )


def seeded_network(kind: type, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(**options)


def plain(root: Path, optimizer: Any = ADAM) -> SegmentationModule:
    return SegmentationModule(seeded_network(ResUNet, width=2), optimizer=optimizer)


def distilled(root: Path, stage: type = TeacherStage, cls: type = DistillationModule, **options: Any) -> Any:
    """Return a student whose teachers lie in a store that all runs of this file share."""
    epochs = 0 if cls is MutualDistillationModule else 1
    teacher = stage(plain(root), epochs=epochs, store=str(root / f"teachers-{epochs}"))
    return cls(seeded_network(SlimUNet), teacher=teacher, optimizer=ADAM, **options)


def fit(fed: Any, root: Path, folder: Path, module: Any, parallel: int, resume: bool = False, workers: int = 0,
        rounds: int = 2, **recipe: Any) -> Any:  # fmt: skip
    """Train; return the trainer, and the lines that were told."""
    trainer = fed.trainer(folder, Federation(**{"rounds": rounds, "parallel": parallel, **recipe}))
    told: list[str] = []
    trainer.reporter.line = told.append
    checkpoint = str(folder / "checkpoints/last.ckpt") if resume else None
    trainer.fit(module, datamodule=data(root, num_workers=workers), ckpt_path=checkpoint)
    return trainer, told


def left(folder: Path) -> dict[str, Any]:
    """Return what a run has left: tables, and the content of its checkpoints and its clients' states."""
    found: dict[str, Any] = {name: (folder / name).read_text() for name in TABLES if (folder / name).exists()}
    lines = found["metrics.csv"].splitlines()  # only the run that trained the teachers has their curves
    found["metrics.csv"] = [line for line in lines if ",teacher/" not in line]
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".ckpt", ".pt")):
        content = read_checkpoint(path)
        content.pop("callbacks", None)  # names the run's own folder
        found[path.relative_to(folder).as_posix()] = content
    return found


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or (one != one and other != other)


def assert_same(one: Path, other: Path) -> None:
    first, second = left(one), left(other)
    assert first.keys() == second.keys() and "checkpoints/last.ckpt" in first
    assert [name for name in first if not equal(first[name], second[name])] == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# --- the same bits ----------------------------------------------------------------------------------------------------

FEEDBACK = {"uplink": Packing(Int4(rounding="stochastic"), of="delta", error_feedback=True)}
RECIPES: dict[str, tuple[Callable[[Path], Any], Callable[[], dict[str, Any]]]] = {
    "all that clients keep, and connectors": (
        partial(distilled, losses=HINT, teacher_cache="taps"),
        lambda: {"optimizer_state": "keep", "batch_norm": "local", **FEEDBACK},
    ),
    "scaffold, data workers": (
        partial(plain, optimizer=SGD),
        lambda: {"aggregator": Scaffold(), "client_rules": [ScaffoldRule()], "workers": 1},
    ),
    "mutual": (partial(distilled, cls=MutualDistillationModule), lambda: {"optimizer_state": "keep"}),
    "shared teachers, live": (
        partial(distilled, stage=EnsembleStage, teacher_cache="off"),
        lambda: {"share_teachers": True},
    ),
    "alone": (plain, lambda: {"aggregator": None, "optimizer_state": "keep"}),
    "trouble": (
        plain,
        lambda: {
            "chaos": Chaos(straggle=0.2, dropout=0.2, fail=0.2, liars={CLIENTS[0]: "flip"}), "quorum": 0.1,
            "rounds": 4,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(["all that clients keep, and connectors", "trouble"], RECIPES))
def test_side_by_side_gives_the_same_bits(fed: Any, root: Path, tmp_path: Path, name: str) -> None:
    module, recipe = RECIPES[name]
    if name == "trouble":
        chaos = recipe()["chaos"]
        events = {chaos.happens(client, 7, round) for client in CLIENTS for round in (1, 2, 3, 4)}
        assert events == {"fine", "dropout", "late", "fail"}
    fit(fed, root, tmp_path / "one", module(root), 1, **recipe())
    trainer, _ = fit(fed, root, tmp_path / "two", module(root), 2, **recipe())
    assert_same(tmp_path / "one", tmp_path / "two")
    assert not any(trainer.run_dir.journal.iterdir())


# --- trouble ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trouble(tmp_path: Path) -> Callable[[str], Trouble]:
    """Makes trouble for the second hospital in the second round, until the file ``flag`` is gone."""
    (tmp_path / "flag").touch()
    return lambda kind: Trouble(str(tmp_path / "flag"), kind, CLIENTS[1], 2, str(tmp_path / "pids"))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        pytest.param("raises", "Client hospital-b is in trouble.", marks=pytest.mark.slow),
        ("killed", "Client hospital-b: the process that trained it was killed (SIGKILL; out of memory?)."),
        pytest.param(
            "hangs",
            "Client hospital-b: the process that trained it did nothing for 0.2 minutes and was ended.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_failure_is_one_clients_if_the_quorum_holds(
    fed: Any, root: Path, tmp_path: Path, trouble: Any, kind: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "SILENCE", 12.0)
    recipe = {"quorum": 0.6, "rounds": 3, "optimizer_state": "keep"}
    trainer, told = fit(
        fed, root, tmp_path / "run", plain(root), 2, client_callbacks=[trouble(kind)], **recipe
    )  # fmt: skip
    assert f"round 2 · hospital-b failed: {why}" in told
    if kind == "raises":  # as in the run's own process
        fit(fed, root, tmp_path / "own", plain(root), 1, client_callbacks=[trouble(kind)], **recipe)
        assert_same(tmp_path / "run", tmp_path / "own")
    assert (tmp_path / "run/absences.csv").read_text().splitlines()[1:] == [f"2,hospital-b,failed,{why}"]
    assert trainer.fit_loop.states.versions == dict.fromkeys(CLIENTS, 3)  # a new process took its place
    pids = {int(line) for line in (tmp_path / "pids").read_text().split()} - {os.getpid()}
    assert len(pids) >= 2 and not any(map(is_running, pids))


@pytest.mark.parametrize("kind", ["killed", pytest.param("breaks", marks=pytest.mark.slow)])
def test_a_run_that_a_failure_ends_is_resumed_bit_for_bit(
    fed: Any, root: Path, tmp_path: Path, trouble: Any, kind: str
) -> None:
    recipe = {"client_callbacks": [trouble(kind)], "optimizer_state": "keep", **FEEDBACK}
    expected = (TrainingError, "was killed") if kind == "killed" else (RuntimeError, "hospital-b: ValueError: of a bug")
    with pytest.raises(expected[0], match=expected[1]):
        fit(fed, root, tmp_path / "run", plain(root), 2, **recipe)
    pids = {int(line) for line in (tmp_path / "pids").read_text().split()}
    assert len(pids) >= 2 and os.getpid() not in pids and not any(map(is_running, pids))
    assert not list(tmp_path.rglob("*.fkd-tmp"))
    (tmp_path / "flag").unlink()
    _, told = fit(fed, root, tmp_path / "run", plain(root), 1 if kind == "killed" else 3, resume=True, **recipe)
    assert "round 2: update of hospital-a found in the journal" in told
    fit(fed, root, tmp_path / "whole", plain(root), 1, **recipe)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_an_interruption_leaves_no_process(fed: Any, root: Path, tmp_path: Path, trouble: Any) -> None:
    def end(text: str) -> None:
        if "round 2" in text:
            raise KeyboardInterrupt

    trainer = fed.trainer(tmp_path / "run", Federation(rounds=3, parallel=2, client_callbacks=[trouble("none")]))
    trainer.reporter.show = end
    with pytest.raises(SystemExit):
        trainer.fit(plain(root), datamodule=data(root))
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert pids and not any(map(is_running, pids))


PROGRAM = """
if __name__ == "__main__":
    import sys
    from fkd_med.cli import main
    sys.exit(main())
"""


def command(root: Path, tmp_path: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """Start `fkd fit` with two processes for clients, of which the second hospital's hangs in round 2."""
    trouble = {"flag": "flag", "kind": "hangs", "client": CLIENTS[1], "round": 2, "pids": "pids"}
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    network = {"class_path": "fkd_med.networks.ResUNet", "init_args": {"width": 2}}
    callbacks = [{"class_path": "parallel_parts.Trouble", "init_args": trouble}]
    layout = {"class_path": "fkd_med.data.Phantoms", "init_args": {"hospitals": 3, "images": 10, "size": 32}}
    configuration = {
        "run_dir": "run",
        "data": {"root": str(root / "phantoms"), "layout": layout, "image_size": 32, "num_workers": 1},
        "model": {
            "class_path": "fkd_med.modules.SegmentationModule",
            "init_args": {"network": network, "optimizer": optimizer},
        },
        "federation": {"rounds": 3, "parallel": 2, "threads": 1, "client_callbacks": callbacks},
        "trainer": {"accelerator": "cpu", "logger": False},
        "test_after_fit": False,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    (tmp_path / "program.py").write_text(PROGRAM)
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "program.py", "fit", "--config", "run.yaml", *options], cwd=tmp_path, text=True,
        env=os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job in the background is deaf
    )  # fmt: skip


def below(pid: int) -> set[int]:
    """Return a process and all that it, or one of these, has started."""
    parents: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), set()).add(int(stat.parent.name))
    found, new = set(), {pid}
    while new:
        found |= new
        new = set().union(*(parents.get(one, set()) for one in new)) - found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_stays_when_a_command_is_ended(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "flag").touch()
    note = tmp_path / "run/journal/round-00002/hospital-c.json"
    with command(root, tmp_path) as process:
        deadline = time.monotonic() + 200
        while not note.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.1)
        pids = below(process.pid)
        assert len(pids & {int(line) for line in (tmp_path / "pids").read_text().split()}) == 2
        assert len(pids) >= 6  # the command, the server, its tracker, two processes, a data worker
        os.kill(process.pid, number)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number], out
    assert "leaked" not in out and "Traceback" not in out
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"left behind: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.1)
    (tmp_path / "flag").unlink()
    with command(root, tmp_path, "--ckpt_path", "last") as process:
        out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out
    assert "round 2: update of hospital-a found" in out and "round 2: update of hospital-c found" in out


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_go_to_another_process_is_refused_before_training(fed: Any, root: Path, tmp_path: Path) -> None:
    module = SegmentationModule(ResUNet(width=2), optimizer=lambda parameters: torch.optim.Adam(parameters))
    with pytest.raises(ConfigError, match=r"federation.parallel: model \(SegmentationModule\) cannot .*lambda"):
        fit(fed, root, tmp_path, module, 2)

    class Local(ScaffoldRule):
        pass

    with pytest.raises(ConfigError, match=r"federation.client_rules cannot go .*Local"):
        fit(fed, root, tmp_path, plain(root, SGD), 2, aggregator=Scaffold(), client_rules=[Local()])


def test_one_device_per_client(fed: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation.parallel is 2, and a client's training takes 2 devices"):
        fed.trainer(tmp_path, Federation(parallel=2), devices=2, strategy="ddp")
    with pytest.raises(ConfigError, match=r"federation.parallel is 0: give 1 or more"):
        Federation(parallel=0)


def test_a_resume_may_change_it() -> None:
    assert verdict("federation.parallel") == "harmless"


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from fkd_med.federated.handover import visible_devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda = torch.device("cuda", 0)
    assert visible_devices({"devices": 1}, cuda) == ["0", "1"]
    assert (
        visible_devices({"devices": [1]}, cuda) == visible_devices({"devices": "1,"}, cuda) == []
    )  # the user's choice
    assert visible_devices({}, torch.device("cpu")) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert visible_devices({"devices": 1}, cuda) == ["3", "GPU-5"]


@pytest.mark.parametrize("file", ["algorithms/ensemble.yaml", "algorithms/fedkd.yaml", "algorithms/scaffold.yaml",
                                  "distillation/features.yaml", "algorithms/small_messages.yaml"])  # fmt: skip
def test_what_the_command_line_builds_can_go(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    built = build(BASE, file)
    module = pickle.loads(pickle.dumps(built.model))
    optimizer, original = module.optimizer.function, built.model.optimizer.function
    assert optimizer.func is original.args[1] and optimizer.keywords == original.keywords
    assert module.personal._module is module
    pickle.dumps(built.trainer.federation.client_rules)
    pickle.dumps(built.datamodule)
