"""One client's fit: schedules and moments over rounds, failures by name, nothing left in memory."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from fkd_med.communication import Broadcast, Update
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.federated import ClientWorker, Federation
from fkd_med.federated.client_state import ClientState, ClientStates
from fkd_med.modules import WarmupCosine


def rates(fed: Any, folder: Path, scheduler: Any, **recipe: Any) -> list[float]:
    """Return the learning rate of every optimizer step of client a over the rounds."""
    noted: list[float] = []

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            noted.append(optimizer.param_groups[0]["lr"])

        def __deepcopy__(self, memo: Any) -> Note:
            return self

    interval = recipe.pop("interval", "step")
    federation = Federation(**{"rounds": 4, "local_epochs": 2, "client_callbacks": [Note()], **recipe})
    module = fed.student(scheduler=scheduler, scheduler_interval=interval)
    fed.trainer(folder, federation, limit_val_batches=0).fit(module, datamodule=fed.Hospitals({"a": 8}))
    return noted


STEPS = 4 * 2 * 2  # rounds x local epochs x batches


def one_run(scheduler: Any, steps: int = STEPS, every: int = 1) -> list[float]:
    """Return the rates of one uninterrupted loop in plain torch."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    schedule, noted = scheduler(optimizer), []
    for step in range(steps):
        noted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            schedule.step()
    return noted


def torch_cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_torchs_cosine_spans_the_run(fed, tmp_path, policy) -> None:
    found = rates(fed, tmp_path, torch_cosine, optimizer_state=policy)
    assert found == pytest.approx(one_run(torch_cosine), rel=1e-9)
    assert found[-1] < 0.001 * found[0] + 0.0005


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_warmup_cosine_spans_the_run(fed, tmp_path, policy) -> None:
    found = rates(fed, tmp_path, lambda o: WarmupCosine(o, warmup=0.25, floor=0.1), optimizer_state=policy)
    rise, expected = STEPS * 0.25, []
    for step in range(STEPS):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - rise) / (STEPS - rise)))
        expected.append(0.02 * ((step + 1) / (rise + 1) if step < rise else cosine))
    assert found == pytest.approx(expected, rel=1e-9)


def test_epoch_schedules_and_local_steps_span_the_run(fed, tmp_path) -> None:
    def halves(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    assert rates(fed, tmp_path / "e", halves, interval="epoch") == pytest.approx(one_run(halves, every=2))
    found = rates(fed, tmp_path / "s", WarmupCosine, local_steps=3)
    assert found == pytest.approx([0.02 * 0.5 * (1 + math.cos(math.pi * s / 12)) for s in range(12)])


def test_who_sat_out_a_round_still_follows_the_clock(fed, tmp_path) -> None:
    """With moments kept, the rate is that of the round, not of how often the client took part."""
    module = fed.student(scheduler=torch_cosine)
    federation = Federation(rounds=4, local_epochs=2, optimizer_state="keep")
    worker = make_worker(fed, tmp_path, module, federation)
    worker.fit("a", Broadcast(1, fed.weights(module)))
    worker.states.accept("a", 1)
    late = worker.fit("a", Broadcast(4, fed.weights(module)))
    assert late.metrics["lr"] == pytest.approx(one_run(torch_cosine)[-1], rel=1e-6)


def test_learning_rate_is_logged_per_client(fed, tmp_path) -> None:
    fed.trainer(tmp_path, Federation(rounds=4, local_epochs=2), limit_val_batches=0).fit(
        fed.student(scheduler=torch_cosine), datamodule=fed.Hospitals({"a": 8, "b": 8})
    )
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    expected = one_run(torch_cosine)[3::4]
    for client in "ab":
        found = [float(value) for _, name, value in lines if name == f"{client}/lr"]
        assert found == pytest.approx(expected, rel=1e-6)


def make_worker(fed: Any, folder: Path, module: Any, federation: Federation, **options: Any) -> ClientWorker:
    defaults: dict[str, Any] = {
        "module": module,
        "data": fed.Hospitals(),
        "federation": federation,
        "flags": {"accelerator": "cpu", "devices": 1},
        "seed": 7,
        "states": ClientStates(folder / "clients"),
        "reporter": fed.silent(),
    }
    return ClientWorker(**{**defaults, **options})


class SameOrder:
    """Serves the batches of one endless epoch in order, whatever the round, without shuffling."""

    def __init__(self, fed: Any) -> None:
        self.fed = fed

    def num_examples(self, client: str) -> int:
        return 8

    def client_train_dataloader(self, client: str, round: int = 0) -> Any:
        return self.fed.Hospitals()._loader(self.fed.Blobs(client, "train", 8), None)


def rounds_of(fed: Any, folder: Path, policy: str, optimizer: Any, rounds: int = 3) -> dict[str, torch.Tensor]:
    """Let one client go from round to round with its own weights."""
    module = fed.student(optimizer=optimizer)
    federation = Federation(rounds=rounds, optimizer_state=policy)  # type: ignore[arg-type]
    worker = make_worker(fed, folder, module, federation, data=SameOrder(fed))
    state = fed.weights(module)
    for round in range(1, rounds + 1):
        state = worker.fit("a", Broadcast(round, state)).state
        worker.states.accept("a", round)
    return state


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_kept_moments_equal_one_uninterrupted_fit(fed, tmp_path, name) -> None:
    optimizer = getattr(fed, name)
    kept = rounds_of(fed, tmp_path / "keep", "keep", optimizer)
    reset = rounds_of(fed, tmp_path / "reset", "reset", optimizer)
    module = fed.student(optimizer=optimizer)
    parameters = optimizer(module.parameters())
    loader = SameOrder(fed).client_train_dataloader("a")
    module.train()
    for _ in range(3):
        for batch in loader:
            parameters.zero_grad()
            module.loss(module(batch["image"]), batch["mask"]).backward()
            parameters.step()
    expected = fed.weights(module)
    for key in expected:
        torch.testing.assert_close(kept[key], expected[key], rtol=1e-6, atol=1e-7)
    assert (reset["network.0.weight"] - expected["network.0.weight"]).abs().max() > 1e-4


def test_reset_equals_a_fresh_optimizer_each_round(fed, tmp_path) -> None:
    reset = rounds_of(fed, tmp_path, "reset", fed.sgd, rounds=2)
    module = fed.student(optimizer=fed.sgd)
    module.train()
    for _ in range(2):
        parameters = fed.sgd(module.parameters())
        for batch in SameOrder(fed).client_train_dataloader("a"):
            parameters.zero_grad()
            module.loss(module(batch["image"]), batch["mask"]).backward()
            parameters.step()
    for key, tensor in fed.weights(module).items():
        torch.testing.assert_close(reset[key], tensor, rtol=1e-6, atol=1e-7)


def test_update_says_what_was_done(fed, tmp_path) -> None:
    module = fed.student()
    update = make_worker(fed, tmp_path, module, Federation(rounds=2)).fit("c", Broadcast(2, fed.weights(module)))
    assert isinstance(update, Update)
    assert (update.client, update.round, update.num_examples, update.num_steps) == ("c", 2, 12, 3)
    assert update.metrics["lr"] == 0.02
    assert 0 < update.metrics["train/loss"] < 10
    assert update.metrics["train/supervised"] == pytest.approx(update.metrics["train/loss"])
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in update.state.values())


def test_reported_loss_is_the_mean_over_images(fed, tmp_path) -> None:
    """With a learning rate of 0 the loss is that of the broadcast student on the client's images."""
    module = fed.student(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    worker = make_worker(fed, tmp_path, module, Federation(), data=SameOrder(fed))
    update = worker.fit("a", Broadcast(1, fed.weights(module)))
    module.train()
    losses = [
        float(module.loss(module(batch["image"]), batch["mask"]))
        for batch in SameOrder(fed).client_train_dataloader("a")
    ]
    assert update.metrics["train/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_nothing_of_a_fit_stays_in_memory(fed, tmp_path) -> None:
    """Weights, moments and teacher go at once, without waiting for the garbage collector; the Trainer goes with it."""
    kept: dict[str, Any] = {}

    class Note(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            kept["trainer"], kept["module"] = weakref.ref(trainer), weakref.ref(pl_module)
            kept["weight"] = weakref.ref(pl_module.network[0].weight)
            kept["optimizer"] = weakref.ref(trainer.optimizers[0])
            kept["teacher"] = weakref.ref(pl_module.teacher[0].weight)

        def __deepcopy__(self, memo: Any) -> Note:
            return self

    module = fed.distilled(tmp_path / "teachers")
    module.scheduler = WarmupCosine
    federation = Federation(client_callbacks=[Note()])

    def prepare(worker: Any, client: str) -> None:
        worker.attach_teacher(fed.network(6))

    worker = make_worker(fed, tmp_path, module, federation, prepare=prepare)
    gc.collect()
    gc.disable()
    try:
        worker.fit("a", Broadcast(1, fed.weights(module)))
        alive = [name for name in ("weight", "optimizer", "teacher") if kept[name]() is not None]
        assert alive == []
    finally:
        gc.enable()
    gc.collect()
    assert kept["trainer"]() is None
    assert kept["module"]() is None


def test_nan_loss_names_client_round_and_batch(fed, tmp_path) -> None:
    class Broken(fed.Hospitals):
        def client_train_dataloader(self, client: str | None, round: int = 0) -> Any:
            loader = super().client_train_dataloader(client, round)
            if (client, round) == ("c", 2):
                batches = list(loader)
                batches[1]["image"][2] = float("nan")
                return torch.utils.data.DataLoader(batches, batch_size=None)
            return loader

    with pytest.raises(
        TrainingError, match=r"not finite.*client c, round 2, batch 1, images c-train-\d.*learning rate"
    ):
        fed.trainer(tmp_path, Federation(rounds=3)).fit(fed.student(), datamodule=Broken())
    assert "trainer" not in (tmp_path / "metrics.csv").read_text()


def test_no_optimizer_step_is_an_error(fed, tmp_path) -> None:
    module = fed.student()
    worker = make_worker(fed, tmp_path, module, Federation(), flags={"accelerator": "cpu", "limit_train_batches": 0})
    with pytest.raises(ConfigError, match="Client a did not do one optimizer step in round 1"):
        worker.fit("a", Broadcast(1, fed.weights(module)))


def test_client_states_hold_what_a_checkpoint_names(tmp_path) -> None:
    states = ClientStates(tmp_path)
    assert states.load("a").is_empty
    for round in (1, 2, 3):
        states.save("a", round, ClientState(personal={"w": torch.full((2,), float(round))}))
    assert states.load("a").is_empty  # written, not yet accepted
    states.accept("a", 2)
    assert states.load("a").personal["w"].tolist() == [2.0, 2.0]
    states.prune({("a", 1)})
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["state-00001.pt", "state-00002.pt"]
    states.accept("b", 1)  # nothing was written for b
    assert states.versions == {"a": 2}
