"""Clients in trouble: who is missing is written down, the quorum decides, and nothing harmful is combined."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_med.aggregation import CoordinateMedian, FedNova, MultiKrum
from fkd_med.aggregation.firewall import Firewall
from fkd_med.errors import ConfigError, DataError, RunError, TrainingError
from fkd_med.federated import Chaos, Federation, FedNovaRule, Number
from fkd_med.federated.absences import Absence, Absences
from fkd_med.federated.exchange import Exchange


def run(fed: Any, folder: Path, rounds: int = 2, ckpt: str | None = None, module: Any = None, **recipe: Any) -> Any:
    module = module or fed.student()
    trainer = fed.trainer(folder, Federation(rounds=rounds, **recipe))
    trainer.fit(module, datamodule=fed.Hospitals(), ckpt_path=ckpt)
    return module, trainer


def absences(folder: Path) -> list[tuple[str, str, str]]:
    with open(folder / "absences.csv") as file:
        return [(row["round"], row["client"], row["kind"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("lie", ["nan", "scale"])
def test_a_liar_is_set_aside_and_the_round_goes_on(fed, tmp_path, lie) -> None:
    chaos = Chaos(liars={"b": lie}, scale=1000.0)
    lied, trainer = run(fed, tmp_path / "lied", chaos=chaos, quorum=0.5)
    assert absences(tmp_path / "lied") == [("1", "b", "quarantined"), ("2", "b", "quarantined")]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fed.weights(lied).values())
    honest, _ = run(fed, tmp_path / "honest", chaos=Chaos(dropout=0.0), quorum=0.5)
    assert not fed.same(fed.weights(lied), fed.weights(honest))  # b had no part
    assert set(trainer.fit_loop.states.versions) <= {"a", "c"}


def test_a_lie_in_a_section_is_set_aside_too(fed, tmp_path) -> None:
    class Boast(FedNovaRule):
        def begin(self, broadcast: Any, kept: Any) -> None:
            super().begin(broadcast, kept)
            self.lies = broadcast.round == 2

        def end(self, trained: Any) -> Any:
            sections, kept = super().end(trained)
            return ({"fednova": {"a_norm": torch.tensor(1e30)}} if self.lies else sections), kept

    with pytest.raises(TrainingError, match=r"Round 2: 0 of 3 .* a .*tensor fednova/a_norm is 1e\+30, and 2 steps"):
        run(fed, tmp_path, aggregator=FedNova(), client_rules=[Boast()], module=fed.student(optimizer=fed.sgd))
    assert absences(tmp_path) == [("2", client, "quarantined") for client in "abc"]


def test_without_firewall_and_with_a_plain_mean_one_liar_ruins_the_model(fed, tmp_path) -> None:
    ruined, _ = run(fed, tmp_path, rounds=1, chaos=Chaos(liars={"b": "scale"}, scale=1000.0), firewall=None)
    honest, _ = run(fed, tmp_path / "honest", rounds=1)
    pairs = zip(fed.weights(ruined).values(), fed.weights(honest).values(), strict=True)
    gap = max(float((a - b).abs().max()) for a, b in pairs)
    assert gap > 1.0


def test_a_median_needs_no_firewall(fed, tmp_path) -> None:
    module, _ = run(
        fed, tmp_path, rounds=1, chaos=Chaos(liars={"b": "scale"}, scale=1000.0), firewall=None,
        aggregator=CoordinateMedian(),
    )  # fmt: skip
    assert max(float(parameter.abs().max()) for parameter in module.parameters()) < 2.0


def test_krum_goes_on_when_the_firewall_has_found_its_liar(fed, tmp_path) -> None:
    recipe = {"chaos": Chaos(liars={"c": "nan"}), "quorum": 0.8, "aggregator": MultiKrum(byzantine=1)}
    module, trainer = fed.student(), fed.trainer(tmp_path, Federation(rounds=2, **recipe))
    trainer.fit(module, datamodule=fed.Hospitals(sizes=dict.fromkeys("abcde", 8)))
    assert absences(tmp_path) == [("1", "c", "quarantined"), ("2", "c", "quarantined")]


def test_too_few_usable_updates_stop_the_run_and_name_everybody(fed, tmp_path) -> None:
    chaos = Chaos(liars={"b": "nan"}, rounds=[2, 9])
    with pytest.raises(TrainingError, match=r"Round 2: 2 of 3 clients sent .*, and 3 are needed .*b is set"):
        run(fed, tmp_path, rounds=3, chaos=chaos)
    module, _ = run(fed, tmp_path, rounds=3, ckpt=str(tmp_path / "checkpoints/last.ckpt"))  # the cause is mended
    whole, _ = run(fed, tmp_path / "whole", rounds=3)
    assert fed.same(fed.weights(module), fed.weights(whole))
    assert absences(tmp_path) == []  # the round was trained again, with everybody


@pytest.mark.parametrize(("chance", "kind"), [("dropout", "dropout"), ("straggle", "late"), ("fail", "failed")])
def test_simulated_trouble_is_written_down(fed, tmp_path, chance, kind) -> None:
    chaos = Chaos(**{chance: 0.5})
    events = {(r, c): chaos.happens(c, 7, r) for r in (1, 2, 3) for c in fed.SIZES}
    expected = [(str(r), c, kind) for (r, c), event in sorted(events.items()) if event != "fine"]
    assert 0 < len(expected) < 9 and all(sum(e == (str(r), c, kind) for e in expected) <= 1 for r, c in events)
    _, trainer = run(fed, tmp_path, rounds=3, chaos=chaos, quorum=0.01)
    assert absences(tmp_path) == expected
    up = {(row.round, row.client) for row in trainer.fit_loop.exchange.ledger.rows if row.direction == "up"}
    assert up == {key for key, event in events.items() if event == "fine"}


def test_a_real_failure_is_survived_if_the_quorum_holds(fed, tmp_path) -> None:
    class Hospitals(fed.Hospitals):
        def client_train_dataloader(self, client: str | None, round: int = 0) -> Any:
            loader = super().client_train_dataloader(client, round)
            if client == "b":
                loader.dataset.__class__ = type("Broken", (fed.Blobs,), {"__getitem__": broken(fed)})
            return loader

    trainer = fed.trainer(tmp_path, Federation(rounds=1, quorum=0.6))
    trainer.fit(fed.student(), datamodule=Hospitals())
    with open(tmp_path / "absences.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["client"] == "b" and row["kind"] == "failed" and "loss is not finite" in row["reason"]
    with pytest.raises(TrainingError, match="loss is not finite"):
        fed.trainer(tmp_path / "strict", Federation(rounds=1)).fit(fed.student(), datamodule=Hospitals())


@pytest.mark.parametrize(
    ("error", "raised", "reason"),
    [
        (RuntimeError("CUDA out of memory\nat length"), "^CUDA out of memory", "RuntimeError: CUDA out of memory"),
        (DataError("b/1.png: damaged."), "^Client b, round 1: b/1.png: damaged", "b/1.png: damaged."),
    ],
)
def test_whatever_a_hospitals_training_raises_is_its_failure(fed, tmp_path, error, raised, reason) -> None:
    class Hospitals(fed.Hospitals):
        def client_train_dataloader(self, client: str | None, round: int = 0) -> Any:
            if client == "b":
                raise error
            return super().client_train_dataloader(client, round)

    fed.trainer(tmp_path, Federation(rounds=2, quorum=0.6)).fit(fed.student(), datamodule=Hospitals())
    with open(tmp_path / "absences.csv") as file:
        missing = [(row["round"], row["client"], row["kind"], row["reason"]) for row in csv.DictReader(file)]
    assert missing == [("1", "b", "failed", reason), ("2", "b", "failed", reason)]
    with pytest.raises(type(error), match=raised):
        fed.trainer(tmp_path / "strict", Federation(rounds=1)).fit(fed.student(), datamodule=Hospitals())


def test_what_is_wrong_with_all_hospitals_ends_the_run(fed, tmp_path) -> None:
    class Hospitals(fed.Hospitals):
        def client_train_dataloader(self, client: str | None, round: int = 0) -> Any:
            raise RunError("The disk is full.")

    with pytest.raises(RunError, match="The disk is full"):
        fed.trainer(tmp_path, Federation(rounds=1, quorum=0.6)).fit(fed.student(), datamodule=Hospitals())


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1", b"", None])
def test_an_update_that_cannot_be_read_is_set_aside(fed, tmp_path, monkeypatch, sent) -> None:
    receive = Exchange.receive

    def garbled(exchange: Exchange, update: Any, broadcast: Any, residual: Any = None) -> Any:
        path, rest = receive(exchange, update, broadcast, residual)
        if update.client == "b":  # None: it claims to be another hospital
            path.write_bytes(exchange.path("a", update.round).read_bytes() if sent is None else sent)
        return path, rest

    monkeypatch.setattr(Exchange, "receive", garbled)
    garbled_run, _ = run(fed, tmp_path / "garbled", quorum=0.6)
    with open(tmp_path / "garbled" / "absences.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["client"], row["kind"]) for row in rows] == [("b", "quarantined")] * 2
    assert all(row["reason"].startswith("cannot be read: ") and "b" in row["reason"] for row in rows)
    without, _ = run(fed, tmp_path / "without", quorum=0.6, chaos=Chaos(liars={"b": "nan"}))
    assert fed.same(fed.weights(garbled_run), fed.weights(without))
    with pytest.raises(TrainingError):
        run(fed, tmp_path / "open", quorum=0.6, firewall=None)


def broken(fed: Any) -> Any:
    def getitem(self: Any, index: Any) -> dict[str, Any]:
        item = fed.Blobs.__getitem__(self, index)
        return {**item, "image": item["image"] * float("nan")}

    return getitem


def test_an_empty_round_never_makes_a_model(fed, tmp_path) -> None:
    with pytest.raises(TrainingError, match=r"Round 1: 0 of 3 clients .* 1 are needed"):
        run(fed, tmp_path, chaos=Chaos(dropout=1.0), quorum=0.01)


def test_settings_are_checked_before_training(fed, tmp_path) -> None:
    with pytest.raises(ConfigError, match="liars names client 'bb'"):
        run(fed, tmp_path, chaos=Chaos(liars={"bb": "nan"}))
    with pytest.raises(ConfigError, match="count is 9, more than there are clients"):
        run(fed, tmp_path, participation=Number(9))
    with pytest.raises(ConfigError, match="both choose the clients"):
        Federation(fraction=0.5, participation=Number(1))
    with pytest.raises(ConfigError, match=r"federation.quorum is 0"):
        Federation(quorum=0.0)


def test_a_firewall_that_finds_nothing_changes_no_bit(fed, tmp_path) -> None:
    with_it, _ = run(fed, tmp_path / "with", firewall=Firewall(max_norm=1e6))
    without, _ = run(fed, tmp_path / "without", firewall=None)
    assert fed.same(fed.weights(with_it), fed.weights(without))


def test_the_book_survives_a_torn_line(tmp_path) -> None:
    book = Absences(tmp_path / "absences.csv")
    book.note(Absence(1, "a", "failed", "line one\nline two, with a comma"))
    book.note(Absence(2, "b", "late"))
    (tmp_path / "absences.csv").open("a").write("3,c,fai")
    again = Absences(tmp_path / "absences.csv")
    assert [row.client for row in again.rows] == ["a", "b"] and again.rows[
        0
    ].reason == "line one line two, with a comma"
    again.drop_after(1)
    assert [row.client for row in Absences(tmp_path / "absences.csv").rows] == ["a"]
