"""What a long run leaves on the disk: the best and the last checkpoint, what these two need, and nothing older."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fkd_med.checkpoints import read_checkpoint, write_checkpoint
from fkd_med.cli.best_weights import latest_checkpoint, recorded_best
from fkd_med.errors import RunError
from fkd_med.federated import Federation
from fkd_med.federated.client_state import ClientStates


def fit(fed: Any, folder: Path, rounds: int, resume: bool = False, fraction: float = 0.67) -> Any:
    trainer = fed.trainer(folder, Federation(rounds=rounds, optimizer_state="keep", fraction=fraction))
    trainer.fit(
        fed.student(), datamodule=fed.Hospitals(),
        ckpt_path=folder / "checkpoints" / "last.ckpt" if resume else None,
    )  # fmt: skip
    return trainer


def named(path: Path) -> dict[str, int]:
    loop = read_checkpoint(path)["loops"]["fit_loop"]["state_dict"]["federation"]
    return dict(loop["client_states"])


def test_after_six_rounds_only_the_best_and_the_last_are_there(fed, tmp_path) -> None:
    fit(fed, tmp_path, 3)
    trainer = fit(fed, tmp_path, 6, resume=True)
    checkpoints = tmp_path / "checkpoints"
    best = Path(trainer.checkpoint_callback.best_model_path)
    assert {path.name for path in checkpoints.iterdir()} == {"last.ckpt", best.name}
    needed = set(named(best).items()) | set(named(checkpoints / "last.ckpt").items())
    found = {(path.parent.name, int(path.stem.partition("-")[2])) for path in tmp_path.glob("clients/*/state-*.pt")}
    assert found == needed and len({round for _, round in found}) > 1
    assert not list((tmp_path / "journal").iterdir())
    assert not list(tmp_path.rglob("*.fkd-tmp"))


def test_a_kill_between_the_last_checkpoint_and_clearing_away_leaves_nothing(fed, tmp_path, monkeypatch) -> None:
    """Found by a random kill: no round was left to train, so nobody cleared away what the last one had."""
    fit(fed, tmp_path / "whole", 4, fraction=1.0)

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    fit(fed, tmp_path / "killed", 3, fraction=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(ClientStates, "prune", die)
        with pytest.raises(Killed):
            fit(fed, tmp_path / "killed", 4, resume=True, fraction=1.0)
    before, expected = (states(tmp_path / name) for name in ("killed", "whole"))
    assert expected < before
    fit(fed, tmp_path / "killed", 4, resume=True, fraction=1.0)
    assert states(tmp_path / "killed") == expected


def states(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.glob("clients/*/state-*.pt")}


# --- no clock decides -----------------------------------------------------------------------------------------------


def checkpoint(path: Path, step: int, written: int, best: str = "") -> Path:
    callbacks = {"ModelCheckpoint{'monitor': 'val/dice'}": {"best_model_path": f"/elsewhere/{best}"}} if best else {}
    write_checkpoint({"global_step": step, "callbacks": callbacks}, path)
    os.utime(path, (written, written))
    return path


@pytest.mark.parametrize("order", [(100, 200), (200, 100), (100, 100)])
def test_the_latest_checkpoint_is_the_one_of_most_rounds(tmp_path, order) -> None:
    older = checkpoint(tmp_path / "last.ckpt", 9, order[0])
    newer = checkpoint(tmp_path / "last-v1.ckpt", 10, order[1])
    assert latest_checkpoint(tmp_path.glob("last*.ckpt")) == newer
    checkpoint(older, 10, order[0])
    assert latest_checkpoint(tmp_path.glob("last*.ckpt")) == older, "of equals, last.ckpt"


@pytest.mark.parametrize("order", [(100, 200), (200, 100)])
def test_the_best_is_what_the_latest_checkpoint_names(tmp_path, order) -> None:
    two = checkpoint(tmp_path / "best-step=2.ckpt", 2, order[0], "best-step=2.ckpt")
    five = checkpoint(tmp_path / "best-step=5.ckpt", 5, order[1], "best-step=2.ckpt")  # kept as the second best
    assert recorded_best(tmp_path) == two
    checkpoint(tmp_path / "last.ckpt", 7, 50, "best-step=5.ckpt")
    assert recorded_best(tmp_path) == five


def test_of_several_a_damaged_one_is_named_and_a_single_one_left_to_who_reads_it(tmp_path) -> None:
    checkpoint(tmp_path / "last.ckpt", 1, 100)
    (tmp_path / "last-v1.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-20])
    with pytest.raises(RunError, match=r"last-v1\.ckpt"):
        latest_checkpoint(tmp_path.glob("last*.ckpt"))
    assert latest_checkpoint(tmp_path.glob("last-v1.ckpt")) == tmp_path / "last-v1.ckpt"
    assert latest_checkpoint([]) is None


def test_states_of_a_checkpoint_written_again_within_one_tick_of_the_clock(fed, tmp_path) -> None:
    trainer = fed.trainer(tmp_path)
    path = tmp_path / "best.ckpt"
    for round in (1, 2):
        loop = {"state_dict": {"federation": {"client_states": {"a": round}}}}
        write_checkpoint({"loops": {"fit_loop": loop}}, path)
        os.utime(path, (100, 100))
        assert trainer._states_in(str(path)) == {("a", round)}
