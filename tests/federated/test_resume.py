"""A run that was killed goes on at the grain of rounds, and ends bit for bit as if nothing had happened."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fkd_med.aggregation import CoordinateMedian, FedAvg, FedAvgM, TrimmedMean
from fkd_med.checkpoints import LastCheckpoint
from fkd_med.errors import ConfigError, RunError
from fkd_med.federated import Federation
from slowly import slow_but

FILES = ("ledger.csv", "images.csv", "metrics.csv", "best.txt")
ROUNDS = 4


class KilledError(Exception):
    """Stands for a crash."""


class Kill(L.Callback):
    """Raises in a hook of a round."""

    def __init__(self, hook: str, round: int) -> None:
        self.round = round
        setattr(self, hook, self._die)

    def _die(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.current_epoch + 1 == self.round and not trainer.sanity_checking:
            raise KilledError


class Rounds(L.Callback):
    """Notes which rounds were opened."""

    def __init__(self, opened: list[int]) -> None:
        self.opened = opened

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.opened.append(trainer.fit_loop.round)


def fit(fed: Any, folder: Path, *callbacks: Any, resume: bool = False, recipe: Any = None, **options: Any) -> Any:
    federation = Federation(**{"rounds": ROUNDS, **(recipe or {})})
    trainer = fed.trainer(folder, federation, callbacks=list(callbacks), **options)
    module = fed.student(optimizer=fed.sgd, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.7))
    ckpt = str(folder / "checkpoints" / "last.ckpt") if resume else None
    trainer.fit(module, datamodule=fed.Hospitals(), ckpt_path=ckpt)
    best = trainer.checkpoint_callback
    (folder / "best.txt").write_text(f"{Path(best.best_model_path).name} {best.best_model_score}")
    return trainer, fed.weights(module) | {
        f"{client}/{name}": tensor
        for client, state in module.personal.by_client.items()
        for name, tensor in state.items()
    }


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FILES if (folder / name).exists()}


KILLS = {
    "before round 3": ("on_train_epoch_start", 3),
    "inside round 3": ("on_train_batch_end", 3),
    "in the evaluation of round 3": ("on_validation_end", 3),
    "after round 3, before its checkpoint": ("on_train_epoch_end", 3),
    "while the checkpoint of round 3 is made": ("on_save_checkpoint", 3),
}
RECIPES: dict[str, dict[str, Any]] = {
    "reset": {},
    "keep": {"optimizer_state": "keep"},
    "keep, half of the clients": {"optimizer_state": "keep", "fraction": 0.5},
    "local only": {"aggregator": None},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("whole"), "runs": {}}


def reference(fed: Any, uninterrupted: dict[str, Any], name: str) -> tuple[Path, Any]:
    folder = uninterrupted["folder"] / name.replace(" ", "-")
    if name not in uninterrupted["runs"]:
        uninterrupted["runs"][name] = fit(fed, folder, recipe=RECIPES[name])[1]
    return folder, uninterrupted["runs"][name]


# One recipe is killed everywhere, the others at two places.
CASES = [(name, kill) for name in RECIPES for kill in KILLS if name == "keep" or kill.endswith(("re round 3", "point"))]


@pytest.mark.parametrize(("name", "kill"), CASES)
def test_resumed_run_is_bit_identical(fed, tmp_path, uninterrupted, name, kill) -> None:
    whole, expected = reference(fed, uninterrupted, name)
    with pytest.raises(KilledError):
        fit(fed, tmp_path, Kill(*KILLS[kill]), recipe=RECIPES[name])
    opened: list[int] = []
    trainer, state = fit(fed, tmp_path, Rounds(opened), resume=True, recipe=RECIPES[name])
    assert opened == [3, 4]
    assert fed.same(state, expected)
    assert texts(tmp_path) == texts(whole)
    assert trainer.global_step == trainer.current_epoch == ROUNDS
    assert not list((tmp_path / "journal").glob("*"))


def test_killed_twice(fed, tmp_path, uninterrupted) -> None:
    whole, expected = reference(fed, uninterrupted, "keep")
    for round in (2, 4):
        with pytest.raises(KilledError):
            fit(fed, tmp_path, Kill("on_validation_end", round), resume=round > 2, recipe=RECIPES["keep"])
    _, state = fit(fed, tmp_path, resume=True, recipe=RECIPES["keep"])
    assert fed.same(state, expected)
    assert texts(tmp_path) == texts(whole)


@pytest.mark.parametrize("lightnings", slow_but([False], [False, True]))
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_validation_end"])
def test_evaluating_every_second_round(fed, tmp_path, hook, lightnings) -> None:
    """Lightning's own last.ckpt then is written inside the evaluation; the round it closes is not repeated."""
    options = {"check_val_every_n_epoch": 2, "lightnings_last": lightnings}
    _, expected = fit(fed, tmp_path / "whole", recipe=RECIPES["keep"], **options)
    round = 3 if hook == "on_train_epoch_start" else 4
    with pytest.raises(KilledError):
        fit(fed, tmp_path / "cut", Kill(hook, round), recipe=RECIPES["keep"], **options)
    opened: list[int] = []
    trainer, state = fit(fed, tmp_path / "cut", Rounds(opened), resume=True, recipe=RECIPES["keep"], **options)
    assert opened == ([3, 4] if lightnings or round == 3 else [4])
    assert fed.same(state, expected)
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")
    assert trainer.global_step == trainer.current_epoch == ROUNDS


def test_killed_while_the_round_after_the_checkpoint_of_an_evaluation_ends(fed, tmp_path) -> None:
    """Killed after the evaluation's checkpoint, before the round itself is over: still the round is done."""
    options = {"check_val_every_n_epoch": 2, "lightnings_last": True}
    _, expected = fit(fed, tmp_path / "whole", recipe=RECIPES["keep"], **options)
    with pytest.raises(KilledError):
        fit(fed, tmp_path / "cut", Kill("on_train_epoch_end", 2), recipe=RECIPES["keep"], **options)
    assert (tmp_path / "cut" / "checkpoints" / "last.ckpt").exists()
    opened: list[int] = []
    _, state = fit(fed, tmp_path / "cut", Rounds(opened), resume=True, recipe=RECIPES["keep"], **options)
    assert opened == [3, 4]
    assert fed.same(state, expected)
    assert texts(tmp_path / "cut")["images.csv"] == texts(tmp_path / "whole")["images.csv"]
    assert texts(tmp_path / "cut")["ledger.csv"] == texts(tmp_path / "whole")["ledger.csv"]


def test_checkpoint_every_second_round(fed, tmp_path, uninterrupted) -> None:
    """Client states that the older checkpoint names outlive the rounds after it."""
    whole, expected = reference(fed, uninterrupted, "keep")
    with pytest.raises(KilledError):
        fit(fed, tmp_path, Kill("on_train_epoch_end", 4), save_every=2, lightnings_last=True, recipe=RECIPES["keep"])
    opened: list[int] = []
    _, state = fit(
        fed, tmp_path, Rounds(opened), resume=True, save_every=2, lightnings_last=True, recipe=RECIPES["keep"]
    )
    assert opened == [3, 4]
    assert fed.same(state, expected)
    assert {**texts(tmp_path), "best.txt": ""} == {**texts(whole), "best.txt": ""}  # the best of fewer rounds


def test_more_rounds_go_on_where_a_finished_run_ended(fed, tmp_path, uninterrupted) -> None:
    _, expected = reference(fed, uninterrupted, "reset")
    module = fed.student(optimizer=fed.sgd, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.7))
    fed.trainer(tmp_path, Federation(rounds=2)).fit(module, datamodule=fed.Hospitals())
    opened: list[int] = []
    _, state = fit(fed, tmp_path, Rounds(opened), resume=True)
    assert opened == [3, 4]
    assert fed.same(state, expected)


def test_what_is_said_of_the_best_round_stays_though_no_later_one_is_better(fed, tmp_path, monkeypatch) -> None:
    """All that the callback has written down, not only what Lightning loads again."""

    def first_only(self: ModelCheckpoint, trainer: Any, current: Any = None) -> bool:
        return isinstance(self, LastCheckpoint) or not self.best_k_models

    monkeypatch.setattr(ModelCheckpoint, "check_monitor_top_k", first_only)
    recipe = {"optimizer_state": "keep"}
    whole, _ = fit(fed, tmp_path / "whole", recipe={"rounds": 3, **recipe})
    fit(fed, tmp_path / "run", recipe={"rounds": 2, **recipe})
    again, _ = fit(fed, tmp_path / "run", resume=True, recipe={"rounds": 3, **recipe})
    told, expected = again.checkpoint_callback.state_dict(), whole.checkpoint_callback.state_dict()
    assert Path(told["best_model_path"]).name == Path(expected["best_model_path"]).name
    for name in ("current_score", "best_model_score", "kth_value"):
        assert expected[name] is not None and told[name] == expected[name], name


@pytest.mark.parametrize("carry", [Path.rename, shutil.copytree])
def test_a_run_that_was_moved_or_copied_keeps_its_best(fed, tmp_path, carry) -> None:
    """Also where the original still is: nothing there is read, kept or removed."""
    trainer, _ = fit(fed, tmp_path / "old", recipe={"rounds": 2, "optimizer_state": "keep"})
    score, name = trainer.checkpoint_callback.best_model_score, Path(trainer.checkpoint_callback.best_model_path).name
    carry(tmp_path / "old", tmp_path / "new")
    seen: list[Any] = []
    note = L.pytorch.callbacks.LambdaCallback(
        on_train_start=lambda trainer, _: seen.append(copy.deepcopy(trainer.checkpoint_callback.state_dict()))
    )
    trainer, _ = fit(fed, tmp_path / "new", note, resume=True, recipe={"rounds": 3, "optimizer_state": "keep"})
    (state,), best = seen, str(tmp_path / "new" / "checkpoints" / name)
    assert (state["best_model_score"], state["best_model_path"]) == (score, best)
    assert state["kth_best_model_path"] == best and list(state["best_k_models"]) == [best]
    left = {path.name for path in (tmp_path / "new" / "checkpoints").iterdir()}
    assert left == {"last.ckpt", Path(trainer.checkpoint_callback.best_model_path).name}


def test_a_checkpoint_of_another_run_brings_no_paths_along(fed, tmp_path) -> None:
    """Its best weights are not in this folder, whatever lies there under the same name."""
    fit(fed, tmp_path / "other", recipe={"rounds": 1})
    paths: list[str] = []
    note = L.pytorch.callbacks.LambdaCallback(
        on_train_start=lambda trainer, _: paths.append(trainer.checkpoint_callback.best_model_path)
    )
    here = fed.trainer(tmp_path / "here", Federation(rounds=2), callbacks=[note])
    module = fed.student(optimizer=fed.sgd, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.7))
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        here.fit(module, datamodule=fed.Hospitals(), ckpt_path=str(tmp_path / "other" / "checkpoints" / "last.ckpt"))
    assert Path(paths[0]).parent == tmp_path / "other" / "checkpoints"


def test_a_finished_run_does_nothing_more(fed, tmp_path) -> None:
    _, expected = fit(fed, tmp_path, recipe={"rounds": 2})
    before, opened = texts(tmp_path), []  # type: ignore[var-annotated]
    _, state = fit(fed, tmp_path, Rounds(opened), resume=True, recipe={"rounds": 2})
    assert opened == []
    assert fed.same(state, expected)
    assert texts(tmp_path) == before


def test_other_seed_threads_or_kind_of_run_are_refused(fed, tmp_path, monkeypatch) -> None:
    fit(fed, tmp_path, recipe={"rounds": 1})
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    with pytest.raises(ConfigError, match=r"started with seed 7.*8.*--seed_everything 7"):
        fit(fed, tmp_path, resume=True)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    torch.set_num_threads(2)
    with pytest.raises(ConfigError, match=r"used 1 CPU threads.*set federation.threads to 1"):
        fit(fed, tmp_path, resume=True)
    fit(fed, tmp_path, resume=True, recipe={"threads": 1})
    plain = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = fed.student(optimizer=fed.sgd, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.7))
    plain.fit(module, datamodule=fed.Hospitals())
    plain.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(RunError, match="without federation"):
        fit(fed, tmp_path, resume=True)


@pytest.mark.parametrize(("before", "after", "names"), [
    (FedAvg, CoordinateMedian, ("FedAvg", "CoordinateMedian")),
    (TrimmedMean, FedAvgM, ("TrimmedMean", "FedAvgM")),
    (FedAvgM, FedAvg, ("FedAvgM", "FedAvg")),
    (FedAvg, lambda: None, ("FedAvg", "null")),
    (lambda: None, FedAvg, ("null", "FedAvg")),
])  # fmt: skip
def test_another_aggregator_is_refused_before_training(fed, tmp_path, before, after, names) -> None:
    fit(fed, tmp_path, recipe={"aggregator": before(), "rounds": 1})
    saved = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(RunError, match=rf"aggregator {names[0]} and would go on with {names[1]}: set it back to"):
        fit(fed, tmp_path, resume=True, recipe={"aggregator": after()})
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == saved
    fit(fed, tmp_path, resume=True, recipe={"aggregator": before(), "rounds": 2})


def test_the_default_aggregator_and_its_name_are_the_same(fed, tmp_path) -> None:
    fit(fed, tmp_path, recipe={"rounds": 1})  # the default is made late, as another class
    fit(fed, tmp_path, resume=True, recipe={"aggregator": FedAvg(), "rounds": 2})


def test_a_lost_client_state_is_named(fed, tmp_path) -> None:
    fit(fed, tmp_path, recipe={"rounds": 2, "optimizer_state": "keep"})
    for path in (tmp_path / "clients" / "b").iterdir():
        path.unlink()
    with pytest.raises(RunError, match=r"state of client b after round 2.*--overwrite"):
        fit(fed, tmp_path, resume=True, recipe={"optimizer_state": "keep"})


def test_client_states_are_pruned(fed, tmp_path) -> None:
    """Only the current versions and those that a checkpoint on disk names remain."""
    trainer, _ = fit(fed, tmp_path, recipe={"rounds": 4, "optimizer_state": "keep"})
    best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    rounds = {4, best["loops"]["fit_loop"]["state_dict"]["federation"]["round"]}
    for client in fed.SIZES:
        found = {p.name for p in (tmp_path / "clients" / client).iterdir()}
        assert found == {f"state-{round:05d}.pt" for round in rounds}


def test_reset_without_personal_tensors_writes_no_state(fed, tmp_path) -> None:
    fit(fed, tmp_path, recipe={"rounds": 1})
    assert not list((tmp_path / "clients").glob("*/*"))
