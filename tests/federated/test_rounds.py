"""A round: clients train copies, the mean is right, nothing but the student travels."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable

from fkd_med.communication import Broadcast, Update
from fkd_med.federated import Federation


def run(fed: SimpleNamespace, folder: Path, module: Any, data: Any = None, **recipe: Any) -> Any:
    options = recipe.pop("trainer", {})
    trainer = fed.trainer(folder, Federation(**{"rounds": 2, **recipe}), **options)
    trainer.fit(module, datamodule=data or fed.Hospitals())
    return trainer


def test_global_state_is_the_weighted_mean(fed, tmp_path, captured) -> None:
    module = fed.student()
    run(fed, tmp_path, module, rounds=1)
    updates = [m for m in captured if isinstance(m, Update)]
    assert {u.client: u.num_examples for u in updates} == fed.SIZES
    total = sum(u.num_examples for u in updates)
    for name, tensor in module.state_dict().items():
        mean = sum(u.state[name].numpy().astype(np.float64) * u.num_examples for u in updates) / total
        expected = np.rint(mean) if tensor.dtype == torch.int64 else mean
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=3e-7, atol=1e-9)
        if tensor.is_floating_point():  # the clients differ so much that another weighting would show
            plain = sum(u.state[name].numpy() for u in updates) / len(updates)
            assert np.abs(plain - mean).max() > 1e-5, name


def cli_optimizer() -> Any:
    parser = ArgumentParser()
    parser.add_argument("--optimizer", type=OptimizerCallable)
    given = parser.parse_object({"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}}})
    return parser.instantiate_classes(given).optimizer


@pytest.mark.parametrize("kind", ["command line", "python", "default"])
def test_a_worker_moves(fed, tmp_path, captured, kind) -> None:
    options = {"command line": {"optimizer": cli_optimizer()}, "python": {}, "default": {"optimizer": torch.optim.Adam}}
    run(fed, tmp_path, fed.student(**options[kind]), rounds=1)
    down = next(m for m in captured if isinstance(m, Broadcast))
    for update in (m for m in captured if isinstance(m, Update)):
        moved = (update.state["network.0.weight"] - down.state["network.0.weight"]).abs().max()
        assert moved > 1e-4


def test_every_client_starts_from_the_broadcast(fed, tmp_path, monkeypatch) -> None:
    starts: list[dict[str, torch.Tensor]] = []

    class Note(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            starts.append(fed.weights(pl_module))

        def __deepcopy__(self, memo: Any) -> Note:
            return self

    module = fed.student()
    before = fed.weights(module)
    run(fed, tmp_path, module, rounds=1, client_callbacks=[Note()])
    assert len(starts) == 3
    assert all(fed.same(start, before) for start in starts)


def test_the_servers_module_is_never_trained(fed, tmp_path) -> None:
    """It changes when updates are combined, at no other time, and has neither optimizer nor gradients."""
    seen: list[str] = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.start = fed.weights(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            assert fed.same(self.start, fed.weights(pl_module))
            seen.append(args[1])

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            assert not fed.same(self.start, fed.weights(pl_module))
            self.start = fed.weights(pl_module)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            assert fed.same(self.start, fed.weights(pl_module))

    module = fed.student()
    trainer = run(fed, tmp_path, module, trainer={"callbacks": [Watch()]})
    assert seen == ["a", "b", "c"] * 2
    assert not any(group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups)
    assert all(p.grad is None for p in module.parameters())
    assert "configure_optimizers" not in vars(module)
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any(stored["optimizer_states"]) and not stored["lr_schedulers"]


def test_rounds_are_steps_and_epochs(fed, tmp_path) -> None:
    trainer = run(fed, tmp_path, fed.student(), rounds=3)
    assert (trainer.global_step, trainer.current_epoch) == (3, 3)
    names = (tmp_path / "metrics.csv").read_text()
    assert {line.split(",")[0] for line in names.splitlines()[1:]} == {"1", "2", "3"}


def test_only_the_students_tensors_travel(fed, tmp_path, captured) -> None:
    module = fed.student()
    run(fed, tmp_path, module)
    assert len(captured) == 2 * (1 + 3)  # one broadcast and three updates each round
    for message in captured:
        assert message.state.keys() == module.state_dict().keys()
        assert not message.extras


def test_fraction_draws_the_right_number_the_same_every_time() -> None:
    clients = [f"site-{i}" for i in range(10)]
    for fraction, count in [(1.0, 10), (0.3, 3), (0.25, 3), (0.05, 1), (0.01, 1)]:
        federation = Federation(fraction=fraction)
        drawn = [federation.select(clients, 7, round) for round in range(1, 30)]
        assert all(len(d) == count and d == sorted(set(d)) and set(d) <= set(clients) for d in drawn)
        assert drawn == [federation.select(clients[::-1], 7, round) for round in range(1, 30)]
        if count in (1, 3):
            assert len({tuple(d) for d in drawn}) > 5  # rounds differ
            assert drawn != [federation.select(clients, 8, round) for round in range(1, 30)]
            assert {c for d in drawn for c in d} == set(clients)  # everybody's turn comes


def test_fraction_trains_and_weighs_only_the_drawn(fed, tmp_path, captured) -> None:
    module = fed.student()
    run(fed, tmp_path, module, rounds=3, fraction=0.5)
    for round in (1, 2, 3):
        chosen = Federation(fraction=0.5).select(sorted(fed.SIZES), 7, round)
        assert len(chosen) == 2
        assert [m.client for m in captured if isinstance(m, Update) and m.round == round] == chosen
    last = [m for m in captured if isinstance(m, Update) and m.round == 3]
    name, total = "network.0.weight", sum(u.num_examples for u in last)
    mean = sum(u.state[name].double() * u.num_examples for u in last) / total
    torch.testing.assert_close(module.state_dict()[name].double(), mean, rtol=3e-7, atol=1e-9)


def test_local_steps_count_optimizer_steps(fed, tmp_path, captured) -> None:
    run(fed, tmp_path, fed.student(), rounds=1, local_steps=5)
    assert [m.num_steps for m in captured if isinstance(m, Update)] == [5, 5, 5]


def test_local_epochs_and_accumulation_count_steps(fed, tmp_path, captured) -> None:
    run(fed, tmp_path, fed.student(), rounds=1, local_epochs=2, trainer={"accumulate_grad_batches": 2})
    assert {m.client: m.num_steps for m in captured if isinstance(m, Update)} == {"a": 2, "b": 2, "c": 4}


def test_callers_randomness_is_restored(fed, tmp_path, monkeypatch) -> None:
    for name in ("PL_SEED_WORKERS", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(1).item(), float(np.random.rand()), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    trainer, module = fed.trainer(tmp_path, Federation(rounds=1)), fed.student()
    trainer.fit(module, datamodule=fed.Hospitals())
    assert (torch.rand(1).item(), float(np.random.rand()), random.random()) == expected
    assert os.environ["PL_GLOBAL_SEED"] == "41"
    assert "PL_SEED_WORKERS" not in os.environ


def test_early_stopping_and_max_time_work_on_the_server(fed, tmp_path) -> None:
    stop = L.pytorch.callbacks.EarlyStopping("val/dice", patience=1, mode="max", min_delta=2.0)
    trainer = run(fed, tmp_path, fed.student(), rounds=9, trainer={"callbacks": [stop]})
    assert trainer.global_step == 2
    trainer = run(fed, tmp_path / "b", fed.student(), rounds=500, trainer={"max_time": "00:00:00:01"})
    assert 0 < trainer.global_step < 100
