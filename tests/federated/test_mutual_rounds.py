"""Mutual distillation in rounds: each client's teacher trains on, stays, resumes exactly, and is in no message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fkd_med.checkpoints import read_checkpoint
from fkd_med.communication import LowRank, Packing, TopK
from fkd_med.errors import ConfigError
from fkd_med.federated import Chaos, Federation, FedProx
from fkd_med.losses import HintMSE, LogitKL
from fkd_med.modules import MutualDistillationModule, SegmentationModule

TERMS = {"kd": LogitKL(temperature=1.0), "hint": HintMSE(student_tap="2", teacher_tap="2", weight=1.0)}
CLIENTS = ("a", "b", "c")


def mutual(fed: Any, store: Path, epochs: int = 0, **options: Any) -> MutualDistillationModule:
    source = fed.teacher_stage(store, epochs=epochs)
    return MutualDistillationModule(
        fed.network(), **{"teacher": source, "losses": TERMS, "optimizer": fed.adam, "teacher_lr": 0.01, **options}
    )


class Rounds(L.Callback):
    """Notes each client's teacher before and after its part of a round; may stop the run."""

    def __init__(self) -> None:
        self.starts: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.ends: dict[tuple[str, int], dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert pl_module.teacher.training
        self.client = trainer.train_dataloader.dataset.client
        self.starts[self.client, pl_module.clock.round] = pl_module.companions.tensors()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ends[self.client, pl_module.clock.round] = pl_module.companions.tensors()

    def __deepcopy__(self, memo: Any) -> Rounds:
        return self


class Stop(L.Callback):
    """Stops after the first round."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


def run(fed: Any, folder: Path, module: Any = None, rounds: int = 2, ckpt: Any = None, **options: Any) -> Any:
    module = module or mutual(fed, folder.parent / "store")
    callbacks, data = options.pop("callbacks", []), options.pop("data", None) or fed.Hospitals()
    flags = options.pop("flags", {})
    trainer = fed.trainer(folder, Federation(rounds=rounds, **options), callbacks=callbacks, **flags)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module, trainer


def kept(trainer: Any) -> dict[str, dict[str, Tensor]]:
    return {client: trainer.fit_loop.states.load(client).companions for client in CLIENTS}


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_clients_teacher_trains_on_from_round_to_round(fed, tmp_path) -> None:
    rounds = Rounds()
    _, trainer = run(fed, tmp_path / "run", client_callbacks=[rounds])
    for client in CLIENTS:
        assert alike(rounds.starts[client, 2], rounds.ends[client, 1]), client
        for name in ("teacher.0.weight", "teacher.1.running_mean", "hint.weight"):
            assert not torch.equal(rounds.starts[client, 1][name], rounds.ends[client, 1][name])
            assert not torch.equal(rounds.starts[client, 2][name], rounds.ends[client, 2][name])
        assert alike(kept(trainer)[client], rounds.ends[client, 2])
    ends = [rounds.ends[client, 2]["teacher.0.weight"] for client in CLIENTS]
    assert not any(torch.equal(ends[i], ends[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_first_round_starts_from_the_teacher_source(fed, tmp_path) -> None:
    rounds, module = Rounds(), mutual(fed, tmp_path / "store", epochs=1)
    run(fed, tmp_path / "run", module, rounds=1, client_callbacks=[rounds])
    for client in CLIENTS:
        stored = load_file(module.teacher_source.files[client])  # type: ignore[union-attr]
        begun = {n.removeprefix("teacher."): t for n, t in rounds.starts[client, 1].items() if n.startswith("teacher.")}
        assert alike(begun, stored), client


def test_no_teacher_travels_or_is_in_a_checkpoint(fed, tmp_path, monkeypatch) -> None:
    sent: list[tuple[Any, bytes]] = []
    pack = Packing.pack

    def spy(self: Packing, message: Any, *args: Any, **kwargs: Any) -> Any:
        packed = pack(self, message, *args, **kwargs)
        sent.append((message, packed.data))
        return packed

    monkeypatch.setattr(Packing, "pack", spy)
    rounds = Rounds()
    module, _ = run(fed, tmp_path / "run", client_callbacks=[rounds])
    names = {f"network.{name}" for name in fed.network().state_dict()}
    assert len(sent) == 2 * (1 + 3) and all(set(message.state) == names for message, _ in sent)
    assert module.teacher is None and module.state_dict().keys() == names  # nor on the server
    secrets = [t.numpy().tobytes() for noted in (rounds.starts, rounds.ends) for s in noted.values() for t in s.values()
               if t.numel() > 1]  # fmt: skip
    assert len(secrets) > 50 and all(b"companions" not in data for _, data in sent)
    assert not [1 for _, data in sent for secret in secrets if len(secret) > 64 and secret in data]
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert set(last["state_dict"]) == names and "companions" not in last["fkd_med"]


@pytest.mark.parametrize(
    "recipe",
    [{}, {"optimizer_state": "keep"}, {"aggregator": None}, {"batch_norm": "local", "fraction": 0.5}],
    ids=["reset", "keep", "alone", "half of the clients"],
)
def test_a_resume_ends_bit_for_bit_as_an_uninterrupted_run(fed, tmp_path, recipe) -> None:
    recipe = recipe | {"uplink": Packing(LowRank(0.8, energy_end=0.99), of="delta")} if recipe else recipe
    whole, one = run(fed, tmp_path / "whole", rounds=3, **recipe)
    run(fed, tmp_path / "halves", rounds=3, callbacks=[Stop()], **recipe)
    last = str(tmp_path / "halves" / "checkpoints" / "last.ckpt")
    assert read_checkpoint(last)["fkd_med"]["round"] == 1
    rest, other = run(fed, tmp_path / "halves", rounds=3, ckpt=last, **recipe)
    assert fed.same(fed.weights(whole), fed.weights(rest))
    before, after = kept(one), kept(other)
    assert all(alike(before[client], after[client]) for client in CLIENTS) and any(before.values())


def test_who_was_set_aside_or_failed_goes_on_from_the_accepted_teacher(fed, tmp_path) -> None:
    rounds = Rounds()
    chaos = Chaos(liars={"b": "nan"}, rounds=[2, 2])
    _, trainer = run(fed, tmp_path / "lied", rounds=3, client_callbacks=[rounds], chaos=chaos, quorum=0.5)
    assert alike(rounds.starts["b", 2], rounds.ends["b", 1]) and not alike(rounds.ends["b", 2], rounds.ends["b", 1])
    assert alike(rounds.starts["b", 3], rounds.ends["b", 1])  # the second round was not accepted
    assert alike(rounds.starts["a", 3], rounds.ends["a", 2])
    assert trainer.fit_loop.states.versions["b"] == 3


def test_kept_moments_cover_both_networks(fed, tmp_path) -> None:
    _, trainer = run(fed, tmp_path / "run", optimizer_state="keep", client_rules=[FedProx(0.1)])
    state = trainer.fit_loop.states.load("a")
    assert any(name.startswith("companions.teacher.") for name in state.parameters)
    (optimizer,) = state.optimizers
    assert len(optimizer["state"]) == len(state.parameters) and len(optimizer["param_groups"]) == 2
    assert all(float(moments["step"]) == 2 * 2 for moments in optimizer["state"].values())  # two batches, two rounds


def test_each_network_has_its_own_rate_and_one_schedule(fed, tmp_path) -> None:
    rates: list[list[float]] = []

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

        def __deepcopy__(self, memo: Any) -> Note:
            return self

    def halves(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    module = mutual(fed, tmp_path / "store", scheduler=halves)
    data = fed.Hospitals({"a": 8})
    run(fed, tmp_path / "run", module, client_callbacks=[Note()], data=data)
    assert rates == [[0.02, 0.01], [0.02, 0.01], [0.01, 0.005], [0.01, 0.005]]


def test_a_trial_run_and_switched_off_terms(fed, tmp_path) -> None:
    run(fed, tmp_path / "trial", flags={"fast_dev_run": True})
    off, _ = run(fed, tmp_path / "off", mutual(fed, tmp_path / "none", losses={"kd": LogitKL(weight=0.0)}))
    plain, _ = run(fed, tmp_path / "plain", fed.student())
    assert fed.same(fed.weights(off), fed.weights(plain)) and not (tmp_path / "none").exists()


def test_another_teacher_on_resume_is_refused(fed, tmp_path) -> None:
    run(fed, tmp_path / "run", rounds=1)
    other = fed.teacher_stage(tmp_path / "store", epochs=0, module=SegmentationModule(fed.network(5)))
    module = mutual(fed, tmp_path / "store", teacher=other)
    with pytest.raises(ConfigError, match=r"kept of 'hint', which trains beside the student, does not fit \(hint.bias"):
        run(fed, tmp_path / "run", module, ckpt=str(tmp_path / "run/checkpoints/last.ckpt"))


def test_teachers_after_a_run_are_those_of_the_last_round(fed, tmp_path) -> None:
    module, trainer = run(fed, tmp_path / "run")
    source = trainer.teachers_after(module)
    state = {f"teacher.{name}": tensor for name, tensor in source.load("b").state_dict().items()}
    assert alike(state, {n: t for n, t in kept(trainer)["b"].items() if n.startswith("teacher.")})


# --- an energy that rises over the rounds ---------------------------------------------------------------------------


def test_the_energy_rises_from_the_first_round_to_the_last(fed, tmp_path, monkeypatch) -> None:
    seen: list[tuple[str, int, float]] = []
    for name in ("pack", "unpack"):
        original = getattr(Packing, name)

        def spy(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            made = _original(self, *args, **kwargs)
            if isinstance(self.codec, TopK):
                message = made.message if _name == "pack" else made
                seen.append((_name, message.round, self.codec.inner.energy_now))  # type: ignore[attr-defined]
            return made

        monkeypatch.setattr(Packing, name, spy)
    packing = Packing(TopK(1.0, LowRank(0.8, energy_end=0.9)), of="delta")
    run(fed, tmp_path / "run", fed.student(), rounds=3, uplink=packing)
    energies = {1: 0.8, 2: pytest.approx(0.85), 3: 0.9}
    assert {kind for kind, _, _ in seen} == {"pack", "unpack"}
    assert all(energy == energies[round] for _, round, energy in seen) and {r for _, r, _ in seen} == {1, 2, 3}
