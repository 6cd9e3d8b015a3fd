"""A round that was interrupted goes on with the clients that have not finished; nothing doubtful is believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from fkd_med.aggregation import Scaffold
from fkd_med.communication import Broadcast, Int4, Packing
from fkd_med.federated import Chaos, Federation, ScaffoldRule
from fkd_med.federated import journal as journal_module
from fkd_med.federated.opening import Openings
from slowly import slow_but

FILES = ("ledger.csv", "images.csv", "metrics.csv", "absences.csv")
ROUNDS, OPEN = 3, 2


class KilledError(Exception):
    """Stands for a crash."""


class Kill(L.Callback):
    """Raises when a client of the open round has finished."""

    def __init__(self, client: str) -> None:
        self.client = client

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.round == OPEN and batch == self.client:
            raise KilledError


def fit(fed: Any, folder: Path, *callbacks: Any, resume: bool = False, lr: float = 0.05, **recipe: Any) -> Any:
    """Train; return the module, its weights, and which client trained in which round."""
    data = fed.Hospitals()
    trainer = fed.trainer(folder, Federation(**{"rounds": ROUNDS, **recipe}), callbacks=list(callbacks))
    told: list[str] = []
    trainer.reporter.line = told.append
    module = fed.student(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))
    trainer.fit(module, datamodule=data, ckpt_path=str(folder / "checkpoints/last.ckpt") if resume else None)
    state = fed.weights(module) | {
        f"{client}/{name}": tensor for client, own in module.personal.by_client.items() for name, tensor in own.items()
    }
    return state, data.drawn, [line for line in told if "journal" in line]


def killed(fed: Any, folder: Path, client: str = "b", **recipe: Any) -> None:
    with pytest.raises(KilledError):
        fit(fed, folder, Kill(client), **recipe)


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FILES if (folder / name).exists()}


def of_open_round(drawn: list[tuple[int, str]]) -> list[str]:
    return [client for round, client in drawn if round == OPEN]


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "moments kept": lambda: {"optimizer_state": "keep"},
    "alone": lambda: {"aggregator": None},
    "own BatchNorm": lambda: {"batch_norm": "local"},
    "error feedback": lambda: {"uplink": Packing(Int4(), of="delta", error_feedback=True)},
    "scaffold": lambda: {"aggregator": Scaffold(), "client_rules": [ScaffoldRule()]},
    "a liar": lambda: {"chaos": Chaos(liars={"a": "flip"}), "quorum": 0.5},
}


@pytest.mark.parametrize("name", RECIPES)
def test_who_has_finished_is_not_asked_again(fed, tmp_path, name) -> None:
    expected, _, _ = fit(fed, tmp_path / "whole", **RECIPES[name]())
    killed(fed, tmp_path / "cut", **RECIPES[name]())
    state, drawn, told = fit(fed, tmp_path / "cut", resume=True, **RECIPES[name]())
    assert of_open_round(drawn) == ["c"]
    what = "training" if name == "alone" else "update"
    assert told == [f"round {OPEN}: {what} of {client} found in the journal" for client in "ab"]
    assert fed.same(state, expected)
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")
    assert not list((tmp_path / "cut" / "journal").glob("*"))


def test_a_round_that_was_only_to_be_combined_trains_nobody(fed, tmp_path) -> None:
    expected, _, _ = fit(fed, tmp_path / "whole")
    killed(fed, tmp_path / "cut", "c")
    state, drawn, _ = fit(fed, tmp_path / "cut", resume=True)
    assert of_open_round(drawn) == []
    assert fed.same(state, expected)


def _rewritten(key: str, value: Any) -> Callable[[Path], None]:
    def change(note: Path) -> None:
        note.write_text(json.dumps({**json.loads(note.read_text()), key: value}))

    return change


def _of_another_client(note: Path) -> None:
    for suffix in (".json", ".update"):
        shutil.copy(note.with_name("b" + suffix), note.with_suffix(suffix))


def _flipped(suffix: str) -> Callable[[Path], None]:
    def change(note: Path) -> None:
        path = note.with_suffix(suffix) if suffix == ".update" else state_beside(note)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return change


def state_beside(note: Path) -> Path:
    return note.parents[2] / "clients" / "a" / f"state-{OPEN:05d}.pt"


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no note": lambda note: note.unlink(),
    "a torn note": lambda note: note.write_bytes(note.read_bytes()[:-9]),
    "an empty note": lambda note: note.write_bytes(b""),
    "no JSON object": lambda note: note.write_text("[" * 100_000),
    "another opening": _rewritten("opening", "0" * 64),
    "metrics that are none": _rewritten("metrics", {"train/loss": "low"}),
    "metrics of another kind": _rewritten("metrics", [1, 2]),
    "no hashes": lambda note: [_rewritten(key, None)(note) for key in ("update", "state")],
    "no update": lambda note: note.with_suffix(".update").unlink(),
    "a torn update": lambda note: note.with_suffix(".update").write_bytes(
        note.with_suffix(".update").read_bytes()[:99]
    ),
    "an altered update": _flipped(".update"),
    "another client's": _of_another_client,
    "no state": lambda note: state_beside(note).unlink(),
    "an altered state": _flipped(".pt"),
}


@pytest.mark.parametrize("damage", slow_but(list(DAMAGES)[::3], DAMAGES))
def test_what_does_not_agree_is_trained_again(fed, tmp_path, damage) -> None:
    recipe = {"optimizer_state": "keep", "batch_norm": "local"}
    expected, _, _ = fit(fed, tmp_path / "whole", **recipe)
    killed(fed, tmp_path / "cut", **recipe)
    DAMAGES[damage](tmp_path / "cut" / "journal" / f"round-{OPEN:05d}" / "a.json")
    state, drawn, _ = fit(fed, tmp_path / "cut", resume=True, **recipe)
    assert of_open_round(drawn) == ["a", "c"]
    assert fed.same(state, expected)
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")


def test_an_update_that_only_pretends_to_be_one_is_trained_again(fed, tmp_path) -> None:
    """Its note names it by its right hash, and it still is none."""
    expected, _, _ = fit(fed, tmp_path / "whole")
    killed(fed, tmp_path / "cut")
    note = tmp_path / "cut" / "journal" / f"round-{OPEN:05d}" / "a.json"
    note.with_suffix(".update").write_bytes(b"no update")
    _rewritten("update", journal_module.file_digest(note.with_suffix(".update")))(note)
    state, drawn, _ = fit(fed, tmp_path / "cut", resume=True)
    assert of_open_round(drawn) == ["a", "c"]
    assert fed.same(state, expected)


def test_killed_between_update_and_note(fed, tmp_path, monkeypatch) -> None:
    expected, _, _ = fit(fed, tmp_path / "whole", optimizer_state="keep")
    write = journal_module.atomic_write_text

    def die(path: Path, text: str) -> None:
        if path.name == "b.json" and path.parent.name == f"round-{OPEN:05d}":
            raise KilledError
        write(path, text)

    monkeypatch.setattr(journal_module, "atomic_write_text", die)
    killed(fed, tmp_path / "cut", optimizer_state="keep")
    assert (tmp_path / "cut" / "journal" / f"round-{OPEN:05d}" / "b.update").exists()
    monkeypatch.undo()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    state, drawn, _ = fit(fed, tmp_path / "cut", resume=True, optimizer_state="keep")
    assert of_open_round(drawn) == ["b", "c"]
    assert fed.same(state, expected)


CHANGES: dict[str, dict[str, Any]] = {
    "epochs": {"local_epochs": 2},
    "steps": {"local_steps": 1},
    "learning rate": {"lr": 0.1},
    "rounds, which schedules span": {"rounds": ROUNDS + 1},
    "packing": {"uplink": Packing(Int4())},
    "BatchNorm": {"batch_norm": "local"},
    "optimizer state": {"optimizer_state": "keep"},
    "frozen": {"frozen": ["network.0.bias"]},
    "a lie": {"chaos": Chaos(liars={"a": "flip"})},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_not_mixed_into_a_round(fed, tmp_path, change) -> None:
    killed(fed, tmp_path)
    _, drawn, told = fit(fed, tmp_path, resume=True, **CHANGES[change])
    assert of_open_round(drawn) == ["a", "b", "c"]
    assert told == []


def test_what_the_server_does_with_updates_may_change(fed, tmp_path) -> None:
    killed(fed, tmp_path)
    _, drawn, _ = fit(fed, tmp_path, resume=True, quorum=0.5, firewall=None)
    assert of_open_round(drawn) == ["c"]


def test_who_was_absent_is_asked_again(fed, tmp_path) -> None:
    chaos = {"quorum": 0.01, "chaos": Chaos(dropout=0.2, straggle=0.3, rounds=[OPEN, OPEN])}
    events = {client: chaos["chaos"].happens(client, 7, OPEN) for client in fed.SIZES}
    assert set(events.values()) == {"fine", "dropout", "late"}, events
    expected, _, _ = fit(fed, tmp_path / "whole", **chaos)
    killed(fed, tmp_path / "cut", "c", **chaos)
    state, drawn, _ = fit(fed, tmp_path / "cut", resume=True, **chaos)
    assert of_open_round(drawn) == [client for client, event in events.items() if event == "late"]
    assert fed.same(state, expected)
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")


def test_a_fresh_run_believes_no_journal(fed, tmp_path) -> None:
    killed(fed, tmp_path)
    _, drawn, told = fit(fed, tmp_path)
    assert len(drawn) == ROUNDS * len(fed.SIZES) and told == []


def test_a_round_killed_twice(fed, tmp_path) -> None:
    expected, _, _ = fit(fed, tmp_path / "whole")
    killed(fed, tmp_path / "cut", "a")
    killed(fed, tmp_path / "cut", "b", resume=True)
    state, drawn, _ = fit(fed, tmp_path / "cut", resume=True)
    assert of_open_round(drawn) == ["c"]
    assert fed.same(state, expected)
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")


def test_an_empty_state_leaves_no_older_one_behind(fed, tmp_path) -> None:
    """Killed with moments kept, resumed without: the state of the first attempt must not become current."""
    killed(fed, tmp_path, optimizer_state="keep", batch_norm="average")
    fit(fed, tmp_path, resume=True)
    assert not (tmp_path / "clients" / "a" / f"state-{OPEN:05d}.pt").exists()


def test_what_a_client_keeps_is_part_of_what_it_starts_from(fed, tmp_path) -> None:
    trainer = fed.trainer(tmp_path, Federation(rounds=1, optimizer_state="keep"))
    trainer.fit(fed.student(), datamodule=fed.Hospitals())
    loop = trainer.fit_loop
    broadcast = Broadcast(2, loop._state(), {})
    before = {client: Openings(loop._worker).digest(client, broadcast) for client in "ab"}
    kept = loop.states.load("a")
    kept.optimizers[0]["state"][0]["exp_avg"] += 1
    loop.states.save("a", 1, kept)
    after = {client: Openings(loop._worker).digest(client, broadcast) for client in "ab"}
    assert before["a"] != after["a"] and before["b"] == after["b"]


def test_images_without_masks_are_part_of_what_a_client_starts_from(fed, tmp_path) -> None:
    trainer = fed.trainer(tmp_path, Federation(rounds=1))
    trainer.fit(fed.student(), datamodule=fed.Hospitals())
    loop = trainer.fit_loop
    broadcast = Broadcast(2, loop._state(), {})
    before = {client: Openings(loop._worker).digest(client, broadcast) for client in "ab"}
    loop._worker.data.unlabelled_fingerprint = lambda client: "more" if client == "a" else ""
    after = {client: Openings(loop._worker).digest(client, broadcast) for client in "ab"}
    assert before["a"] != after["a"] and before["b"] == after["b"]
