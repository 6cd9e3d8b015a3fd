"""Teachers travel only when all agree, once, as real messages that are checked and counted; alone, not at all."""

from __future__ import annotations

import copy
import csv
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from fkd_med.communication import Ledger, Update, encode
from fkd_med.errors import ConfigError, RunError, TrainingError
from fkd_med.federated import EnsembleTeachers, Federation, sharing
from fkd_med.federated.ensemble import MeanLogits
from fkd_med.federated.sharing import TeacherExchange


class KilledError(Exception):
    """Stands for a crash."""


class Kill(L.Callback):
    """Raises in a round."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.current_epoch + 1 == self.round:
            raise KilledError


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """Every teacher that is encoded, as it went out."""
    messages: list[Update] = []

    def spy(message: Update) -> bytes:
        messages.append(message)
        return encode(message)

    monkeypatch.setattr(sharing, "encode", spy)
    return messages


def taught(fed: Any, folder: Path, **options: Any) -> Any:
    source = EnsembleTeachers(fed.teacher_stage(folder / "teachers", epochs=1))
    return fed.distilled(folder, source=source, **options)


def fit(fed: Any, folder: Path, rounds: int = 2, resume: bool = False, **options: Any) -> tuple[Any, Any]:
    recipe = options.pop("recipe", {"share_teachers": True})
    trainer = fed.trainer(folder / "run", Federation(rounds=rounds, **recipe), **options)
    module = taught(fed, folder)
    ckpt = str(folder / "run" / "checkpoints" / "last.ckpt") if resume else None
    trainer.fit(module, datamodule=fed.Hospitals(), ckpt_path=ckpt)
    return trainer, module


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- what travels ---------------------------------------------------------------------------------------------------


def test_the_ledger_has_each_teacher_once_up_and_once_down_to_every_other(fed, tmp_path) -> None:
    trainer, module = fit(fed, tmp_path)
    rows = [row for row in table(tmp_path) if row["section"] == "teacher"]
    assert {row["round"] for row in rows} == {"0"} and table(tmp_path)[: len(rows)] == rows
    sizes = {}
    for client, path in module.teacher_source.teachers.files.items():
        state = load_file(path)
        sizes[client] = len(encode(Update(client, 0, 0, {k: state[k] for k in sorted(state)}, 1, 1)))
    wanted = Counter((client, "up", size) for client, size in sizes.items())
    wanted.update((client, "down", size) for client in sizes for other, size in sizes.items() if other != client)
    assert Counter((row["client"], row["direction"], int(row["bytes"])) for row in rows) == wanted
    assert Counter(row["direction"] for row in rows) == {"up": 3, "down": 6}
    shared, everything = sum(3 * size for size in sizes.values()), int(table(tmp_path)[-1]["cumulative"])
    assert sum(int(row["bytes"]) for row in table(tmp_path)) == everything > shared
    assert trainer.fit_loop.metrics["bytes/total"] == everything
    ledger = Ledger(tmp_path / "run" / "ledger.csv")
    students = [row for row in table(tmp_path) if row["round"] != "0" and row["direction"] == "up"]
    messages = len({(row["round"], row["client"]) for row in students})
    assert ledger.mean_per_message("up") == sum(int(row["bytes"]) for row in students) / messages  # without round 0


def test_what_clients_load_is_what_was_decoded_and_lossless(fed, tmp_path, sent) -> None:
    _, module = fit(fed, tmp_path, rounds=1)
    source = module.teacher_source
    assert [message.client for message in sent] == ["a", "b", "c"]
    names = set(fed.network(6).state_dict())
    assert all(set(message.state) == names and not message.extras and not message.metrics for message in sent)
    for client, member in zip("abc", source.load("b").members, strict=True):
        own = fed.weights(source.teachers.load(client))
        stored = load_file(source.teachers.files[client])
        assert fed.same(fed.weights(member), own) and fed.same(own, {name: stored[name] for name in own})
    files = sorted((tmp_path / "run" / "shared-teachers").iterdir())
    assert [path.name for path in files] == ["a.teacher", "b.teacher", "c.teacher"]  # one each, not one per receiver
    state = {name: torch.full_like(t, 3) for name, t in sent[0].state.items()}
    files[0].write_bytes(encode(Update("a", 0, 0, state, 1, 1)))
    assert fed.same(fed.weights(source.load("b").members[0]), state)  # the message, not the store


def test_clients_train_with_the_ensemble(fed, tmp_path) -> None:
    seen: list[int] = []

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert isinstance(pl_module.teacher, MeanLogits) and not pl_module.teacher.training
            seen.append(len(pl_module.teacher.members))

        def __deepcopy__(self, memo: Any) -> Watch:
            return self

    recipe = {"share_teachers": True, "client_callbacks": [Watch()], "fraction": 0.5}
    _, module = fit(fed, tmp_path, recipe=recipe)
    assert seen == [3] * 4  # all teachers, though half of the clients are drawn
    assert {f"network.{name}" for name in fed.network().state_dict()} == set(module.state_dict())


def test_only_the_teachers_own_tensors_pass(fed, tmp_path) -> None:
    exchange = TeacherExchange(fed.network(6), tmp_path, Ledger())
    wider = fed.network(7)
    with pytest.raises(TrainingError, match=r"Client 'a' sends tensor '0.weight' as .* where the teacher has"):
        exchange.send("a", ["b"], wider)
    more = fed.network(6)
    more.register_buffer("image", torch.zeros(3, 8, 8))
    with pytest.raises(TrainingError, match=r"'image', which is not the teacher's.*same teacher on all sides\.$"):
        exchange.send("a", ["b"], more)
    spoilt = fed.network(6)
    with torch.no_grad():
        spoilt[3].weight[0, 2] = float("nan")
    with pytest.raises(TrainingError, match=r"teacher of client a has NaN or infinity in 3\.weight"):
        exchange.send("a", ["b"], spoilt)
    assert exchange.ledger.total() == 0 and not list(tmp_path.iterdir())


def test_damaged_foreign_and_lost_messages_are_named(fed, tmp_path) -> None:
    exchange = TeacherExchange(fed.network(6), tmp_path, Ledger())
    for client in "ab":
        exchange.send(client, ["c"], fed.network(6))
    path = tmp_path / "a.teacher"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(TrainingError, match="message from client a cannot be read"):
        exchange.receive("a")
    path.write_bytes((tmp_path / "b.teacher").read_bytes())
    with pytest.raises(TrainingError, match="teacher of client a is another's"):
        exchange.receive("a")
    path.write_bytes(encode(Update("a", 0, 0, {"0.weight": torch.ones(2)}, 1, 1)))
    with pytest.raises(TrainingError, match=r"'0.weight' as .*where the teacher has"):
        exchange.receive("a")
    path.unlink()
    with pytest.raises(RunError, match=r"a.teacher, cannot be read .*--ckpt_path last"):
        exchange.receive("a")


# --- consent --------------------------------------------------------------------------------------------------------


def test_without_consent_nothing_is_trained_or_sent(fed, tmp_path, sent) -> None:
    with pytest.raises(ConfigError, match=r"EnsembleTeachers sends every client's teacher.*share_teachers: true once"):
        fit(fed, tmp_path, recipe={})
    assert not sent and not (tmp_path / "teachers").exists()


@pytest.mark.parametrize("kind", ["own teachers", "no teachers"])
def test_a_consent_that_nobody_uses(fed, tmp_path, kind) -> None:
    module = fed.distilled(tmp_path / "teachers") if kind == "own teachers" else fed.student()
    trainer = fed.trainer(tmp_path / "run", Federation(rounds=1, share_teachers=True))
    with pytest.raises(ConfigError, match=r"share_teachers: true lets teachers travel, and nothing here"):
        trainer.fit(module, datamodule=fed.Hospitals())
    assert not (tmp_path / "teachers").exists()


def test_alone_there_is_nothing_to_agree_to() -> None:
    with pytest.raises(ConfigError, match=r"share_teachers: true, and with `aggregator: null` nothing travels"):
        Federation(aggregator=None, share_teachers=True)


def test_own_teachers_never_travel(fed, tmp_path, sent, captured) -> None:
    fed.trainer(tmp_path / "run", Federation(rounds=1)).fit(
        fed.distilled(tmp_path / "teachers"), datamodule=fed.Hospitals()
    )
    names = {f"network.{name}" for name in fed.network().state_dict()}
    assert captured and not sent and all(set(message.state) == names for message in captured)
    assert not (tmp_path / "run" / "shared-teachers").exists()
    assert not [row for row in table(tmp_path) if row["round"] == "0"]


def test_teachers_of_unknown_architecture_are_not_shared(fed, tmp_path, monkeypatch) -> None:
    module = taught(fed, tmp_path)
    monkeypatch.setattr(type(module.teacher_source.teachers), "architecture", lambda self: None)
    trainer = fed.trainer(tmp_path / "run", Federation(rounds=1, share_teachers=True))
    with pytest.raises(ConfigError, match=r"does not tell their architecture"):
        trainer.fit(module, datamodule=fed.Hospitals())
    assert not (tmp_path / "teachers").exists()


# --- once -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_counts_teachers_once_and_is_bit_identical(fed, tmp_path) -> None:
    _, expected = fit(fed, tmp_path / "whole", rounds=3)
    with pytest.raises(KilledError):
        fit(fed, tmp_path / "cut", rounds=3, callbacks=[Kill(2)])
    trainer, module = fit(fed, tmp_path / "cut", rounds=3, resume=True)
    assert trainer.global_step == 3 and fed.same(fed.weights(module), fed.weights(expected))
    for name in ("ledger.csv", "metrics.csv", "images.csv"):
        assert (tmp_path / "cut/run" / name).read_text() == (tmp_path / "whole/run" / name).read_text(), name


def test_a_run_started_again_before_its_first_checkpoint_counts_once(fed, tmp_path) -> None:
    with pytest.raises(KilledError):
        fit(fed, tmp_path, callbacks=[Kill(1)])
    fit(fed, tmp_path)
    once = table(tmp_path)
    fit(fed, tmp_path)  # and a finished one, repeated in its place
    assert table(tmp_path) == once
    assert len([row for row in once if row["section"] == "teacher"]) == 9


def test_a_new_run_in_the_place_of_one_that_shared_has_a_ledger_of_its_own(fed, tmp_path) -> None:
    fit(fed, tmp_path, rounds=1)
    module = fed.distilled(tmp_path / "teachers")
    fed.trainer(tmp_path / "run", Federation(rounds=1)).fit(module, datamodule=fed.Hospitals())
    assert {row["section"] for row in table(tmp_path)} == {"header", "state"}


def test_a_trial_run_shares_and_leaves_nothing(fed, tmp_path) -> None:
    fit(fed, tmp_path, fast_dev_run=True)
    assert not list(tmp_path.glob("run*/shared-teachers")) and not list(tmp_path.glob("*fast-dev-run"))


# --- alone ----------------------------------------------------------------------------------------------------------


def test_alone_every_client_learns_from_its_own_teacher(fed, tmp_path, sent) -> None:
    """As the local baseline does: the recipe of a federation with nobody to send to."""
    seen: dict[str, Any] = {}

    class Watch(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            client = next(iter(trainer.train_dataloader))["client"][0]
            seen[client] = fed.weights(pl_module.teacher)

        def __deepcopy__(self, memo: Any) -> Watch:
            return self

    recipe = Federation(rounds=1, share_teachers=True, client_callbacks=[Watch()]).alone()
    assert not recipe.share_teachers
    module = taught(fed, tmp_path)
    source = module.teacher_source
    fed.trainer(tmp_path / "run", recipe).fit(module, datamodule=fed.Hospitals())
    stored = {client: load_file(source.teachers.files[client]) for client in "abc"}
    assert all(fed.same(seen[client], {k: stored[client][k] for k in seen[client]}) for client in "abc")
    assert not sent and not (tmp_path / "run" / "shared-teachers").exists()
    plain = fed.distilled(tmp_path, source=fed.teacher_stage(tmp_path / "teachers", epochs=1))
    fed.trainer(tmp_path / "plain", Federation(rounds=1, aggregator=None)).fit(plain, datamodule=fed.Hospitals())
    own, without = module.personal.by_client, plain.personal.by_client
    assert all(fed.same(own[client], without[client]) for client in "abc")


def test_after_the_baseline_the_federated_module_still_has_its_ensemble(fed, tmp_path) -> None:
    module = taught(fed, tmp_path)
    initial = copy.deepcopy(module)
    recipe = Federation(rounds=1, share_teachers=True)
    fed.trainer(tmp_path / "run", recipe).fit(module, datamodule=fed.Hospitals())
    fed.trainer(tmp_path / "run" / "local", recipe.alone()).fit(initial, datamodule=fed.Hospitals())
    assert len(module.teacher_source.load("a").members) == 3
    assert initial.teacher_source is module.teacher_source.teachers
