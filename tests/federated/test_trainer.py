"""FederatedTrainer: what it refuses and with which advice, trial runs, local-only runs, scoring what it wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from fkd_med.errors import ConfigError, TrainingError
from fkd_med.evaluation import ImageTable
from fkd_med.federated import FederatedTrainer, Federation
from fkd_med.federated.progress import EpochProgress


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_epochs": 5}, r"max_epochs .*federation\.rounds is the number of rounds.*Remove it"),
        ({"max_steps": 5}, r"max_steps .*federation\.rounds"),
        ({"overfit_batches": 1}, "overfit_batches .*no meaning"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs"),
        ({"strategy": "ddp_spawn"}, "ddp_spawn.*use ddp, or one device"),
        ({"strategy": "fsdp"}, "fsdp.*use ddp"),
        ({"strategy": DDPStrategy(start_method="fork")}, r"DDPStrategy \(start_method fork\) .*use ddp"),
        ({"strategy": FSDPStrategy()}, "FSDPStrategy cannot run inside a federation.*use ddp"),
        ({"strategy": "ddp", "devices": 2, "sync_batchnorm": True}, "sync_batchnorm needs GPUs: remove it"),
        ({"callbacks": [StochasticWeightAveraging(swa_lrs=0.1)]}, r"StochasticWeight.*federation\.client_callbacks"),
        ({"callbacks": LearningRateMonitor()}, "LearningRateMonitor.*remove it.*<client>/lr"),
    ],
)
def test_refused_with_advice(flags, message) -> None:
    with pytest.raises(ConfigError, match=message):
        FederatedTrainer(federation=Federation(), accelerator="cpu", logger=False, **flags)
    FederatedTrainer(accelerator="cpu", logger=False, **{k: v for k, v in flags.items() if k == "max_epochs"})


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", DDPStrategy(start_method="spawn")])
def test_strategies_that_start_processes_midway_are_refused_without_a_federation_too(strategy) -> None:
    with pytest.raises(ConfigError, match=r"cannot run here: it starts processes in the middle.*use ddp"):
        FederatedTrainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    FederatedTrainer(accelerator="cpu", devices=2, strategy=DDPStrategy(), logger=False, sync_batchnorm=False)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rounds": 0}, "federation.rounds is 0"),
        ({"local_epochs": 0}, "federation.local_epochs is 0"),
        ({"local_steps": 0}, "federation.local_steps is 0"),
        ({"fraction": 0.0}, "federation.fraction is 0.0"),
        ({"fraction": 1.5}, "federation.fraction is 1.5"),
        ({"optimizer_state": "kept"}, "'kept': give reset or keep"),
        ({"threads": 0}, "federation.threads is 0"),
    ],
)
def test_impossible_recipes_are_refused(recipe, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Federation(**recipe)


def test_swa_works_among_client_callbacks(fed, tmp_path) -> None:
    federation = Federation(
        rounds=1, local_epochs=3, client_callbacks=[StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]
    )
    fed.trainer(tmp_path, federation).fit(fed.student(), datamodule=fed.Hospitals({"a": 8}))


def test_data_without_clients_is_refused(fed, tmp_path) -> None:
    class Plain(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return fed.Hospitals().train_dataloader()

        def client_names(self) -> list[str]:
            return ["a"]

    with pytest.raises(ConfigError, match=r"Plain lacks .*num_examples.*FederatedDataModule") as caught:
        fed.trainer(tmp_path, Federation(rounds=1), limit_val_batches=0).fit(fed.student(), datamodule=Plain())
    assert "client_names" not in str(caught.value).split("Use ")[0]


def test_metric_schedulers_are_refused(fed, tmp_path) -> None:
    for scheduler in (
        torch.optim.lr_scheduler.ReduceLROnPlateau,
        lambda o: L.pytorch.cli.ReduceLROnPlateau(o, monitor="val/dice"),
    ):
        module = fed.student(scheduler=scheduler)
        with pytest.raises(ConfigError, match="ReduceLROnPlateau follows a metric"):
            fed.trainer(tmp_path, Federation(rounds=1)).fit(module, datamodule=fed.Hospitals())


def test_failing_fit_restores_the_caller(fed, tmp_path, monkeypatch) -> None:
    """After an error: seed, generators and the module's own optimizer are as before."""
    import os

    class Broken(fed.Hospitals):
        def client_train_dataloader(self, client: str | None, round: int = 0) -> Any:
            raise TrainingError("no images today")

    module = fed.student()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trainer = fed.trainer(tmp_path, Federation(rounds=1))
    with pytest.raises(TrainingError, match="no images today"):
        trainer.fit(module, datamodule=Broken())
    assert torch.equal(torch.rand(1), expected)
    assert os.environ["PL_GLOBAL_SEED"] == "7"
    assert "configure_optimizers" not in vars(module)


def test_fast_dev_run_is_one_round_and_one_batch(fed, tmp_path, captured) -> None:
    folder = tmp_path / "run"
    fed.trainer(folder, Federation(rounds=2, optimizer_state="keep")).fit(fed.student(), datamodule=fed.Hospitals())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    captured.clear()
    trainer = fed.trainer(folder, Federation(rounds=9, local_epochs=3, optimizer_state="keep"), fast_dev_run=True)
    module = fed.student()
    trainer.fit(module, datamodule=fed.Hospitals())
    assert trainer.global_step == 1
    assert [message.num_steps for message in captured if hasattr(message, "num_steps")] == [1, 1, 1]
    assert {row.id for row in module.evaluated} == {f"{c}-val-{i}" for c in "abc" for i in range(3)}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # an earlier run is left as it was


def test_validation_covers_every_client_each_round(fed, tmp_path) -> None:
    fed.trainer(tmp_path, Federation(rounds=3)).fit(fed.student(), datamodule=fed.Hospitals())
    rows = ImageTable.read(tmp_path / "images.csv").rows
    assert {(r.round, r.client, r.id) for r in rows} == {
        (round, c, f"{c}-val-{i}") for round in (1, 2, 3) for c in "abc" for i in range(3)
    }
    assert len(rows) == 27


def test_evaluation_uses_the_new_global_student(fed, tmp_path) -> None:
    """images.csv of the last round is what the final weights score."""
    module = fed.student()
    trainer = fed.trainer(tmp_path, Federation(rounds=2))
    trainer.fit(module, datamodule=fed.Hospitals())
    rows = {r.id: r.dice for r in ImageTable.read(tmp_path / "images.csv").rows if r.round == 2}
    module.eval()
    for client in "abc":
        for batch in fed.Hospitals().client_val_dataloader(client):
            with torch.no_grad():
                predicted = module(batch["image"])[:, 0] > 0
            for name, p, t in zip(batch["id"], predicted, batch["mask"], strict=True):
                total = int(p.sum() + t.sum())
                dice = 2 * int((p & (t == 1)).sum()) / total if total else 1.0
                assert rows[name] == pytest.approx(dice)


def test_best_checkpoint_is_that_of_the_best_round(fed, tmp_path) -> None:
    trainer = fed.trainer(tmp_path, Federation(rounds=4))
    trainer.fit(fed.student(), datamodule=fed.Hospitals())
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    dice = {int(step): float(value) for step, name, value in lines if name == "val/dice"}
    assert sorted(dice) == [1, 2, 3, 4]
    best = max(dice, key=lambda step: dice[step])
    callback = trainer.checkpoint_callback
    assert isinstance(callback, ModelCheckpoint)
    assert Path(callback.best_model_path).name == f"best-step={best}.ckpt"
    assert float(callback.best_model_score) == pytest.approx(dice[best])  # type: ignore[arg-type]
    stored = torch.load(callback.best_model_path, weights_only=True)
    assert stored["fkd_med"]["round"] == stored["global_step"] == best


def test_bytes_are_logged(fed, tmp_path, captured) -> None:
    fed.trainer(tmp_path, Federation(rounds=2)).fit(fed.student(), datamodule=fed.Hospitals())
    from fkd_med.communication import encode

    sizes = {"up": 0, "down": 0}
    for message in captured:
        if message.round == 2:
            up = hasattr(message, "client")
            sizes["up" if up else "down"] += len(encode(message)) * (1 if up else 3)
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    logged = {name: float(value) for step, name, value in lines if step == "2"}
    assert (logged["bytes/up"], logged["bytes/down"]) == (sizes["up"], sizes["down"])
    ledger = [line.split(",") for line in (tmp_path / "ledger.csv").read_text().splitlines()[1:]]
    assert sum(int(line[4]) for line in ledger) == logged["bytes/total"]


# --- alone ----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(fed, tmp_path, captured) -> Any:
    module = fed.student()
    trainer = fed.trainer(tmp_path, Federation(rounds=3, aggregator=None))
    trainer.fit(module, datamodule=fed.Hospitals())
    return trainer, module


def test_alone_nothing_travels_and_clients_differ(fed, tmp_path, captured, alone) -> None:
    trainer, module = alone
    assert captured == []
    ledger = tmp_path / "ledger.csv"
    assert not ledger.exists() or len(ledger.read_text().splitlines()) <= 1
    own = module.personal.by_client
    assert own.keys() == set(fed.SIZES)
    assert all(state.keys() == module.state_dict().keys() for state in own.values())
    assert not fed.same(own["a"], own["b"]) and not fed.same(own["b"], own["c"])
    assert fed.same(fed.weights(module), fed.weights(fed.student()))  # the shared one was never trained
    assert "arm" in dir(trainer) and trainer.arm() == "local-only"


def test_alone_equals_training_each_client_by_itself(fed, tmp_path, alone) -> None:
    """Budget and draws are those of the federated run, without the others."""
    _, module = alone
    single = fed.student()
    fed.trainer(tmp_path / "b", Federation(rounds=3, aggregator=None)).fit(
        single, datamodule=fed.Hospitals({"b": fed.SIZES["b"]})
    )
    assert fed.same(single.personal.by_client["b"], module.personal.by_client["b"])


def test_alone_rows_are_of_the_round_whose_weights_were_scored(fed, tmp_path, alone) -> None:
    trainer, _ = alone
    scores: dict[str, dict[int, list[float]]] = {}
    for r in ImageTable.read(tmp_path / "images.csv").of("val"):
        scores.setdefault(r.client, {}).setdefault(r.round, []).append(r.dice)
    best = {client: max(own, key=lambda r: (sum(own[r]), -r)) for client, own in scores.items()}
    assert len(set(best.values())) > 1, "hospitals that stop at different rounds"
    before = {r.key: r for r in ImageTable.read(tmp_path / "images.csv").of("val")}
    last = str(tmp_path / "checkpoints/last.ckpt")
    again = fed.student()
    for verb in (trainer.test, trainer.validate):
        verb(again, datamodule=fed.Hospitals(), ckpt_path=last, verbose=False)
        assert {row.client: row.round for row in again.evaluated} == best
    after = {r.key: r for r in ImageTable.read(tmp_path / "images.csv").of("val")}
    assert after == before, "no round is rewritten with scores of another one"


def test_alone_each_client_is_scored_with_its_own_tensors(fed, tmp_path, alone) -> None:
    _, module = alone
    rows = {r.id: r.dice for r in ImageTable.read(tmp_path / "images.csv").rows if r.round == 3}
    check = fed.student()
    differ = 0
    for client in "abc":
        for owner in "abc":
            check.load_state_dict(module.personal.by_client[owner])
            check.eval()
            for batch in fed.Hospitals().client_val_dataloader(client):
                with torch.no_grad():
                    predicted = check(batch["image"])[:, 0] > 0
                for name, p, t in zip(batch["id"], predicted, batch["mask"], strict=True):
                    total = int(p.sum() + t.sum())
                    dice = 2 * int((p & (t == 1)).sum()) / total if total else 1.0
                    if owner == client:
                        assert rows[name] == pytest.approx(dice)
                    else:
                        differ += abs(rows[name] - dice) > 1e-6
    assert differ  # another client's tensors would have shown


def test_alone_checkpoints_hold_everyones_tensors(fed, tmp_path, alone) -> None:
    """Tested after a reload, in another process in effect, the scores are the same."""
    trainer, module = alone
    trainer.test(
        module, datamodule=fed.Hospitals(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"), verbose=False
    )
    before = {(r.client, r.id): (r.dice, r.hd95) for r in module.evaluated}
    assert len(before) == 9
    other = fed.student()
    plain = FederatedTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    plain.test(other, datamodule=fed.Hospitals(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"), verbose=False)
    assert {(r.client, r.id): (r.dice, r.hd95) for r in other.evaluated} == before
    for client in "abc":
        assert fed.same(other.personal.of(client), module.personal.of(client))


def test_alone_needs_a_module_that_can_hold_it(fed, tmp_path) -> None:
    class Foreign(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = fed.network()
            self.clock: Any = None

        def training_step(self, batch: Any, index: int) -> Any:
            return self.network(batch["image"]).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(ConfigError, match=r"Foreign cannot hold.*SegmentationModule"):
        fed.trainer(tmp_path / "1", Federation(rounds=1, aggregator=None), limit_val_batches=0).fit(
            Foreign(), datamodule=fed.Hospitals()
        )
    fed.trainer(tmp_path / "2", Federation(rounds=1), limit_val_batches=0).fit(Foreign(), datamodule=fed.Hospitals())


def test_without_federation_it_is_lightning(fed, tmp_path) -> None:
    """The same numbers as lightning.Trainer, bit for bit."""
    states = []
    for kind in (L.Trainer, FederatedTrainer):
        L.seed_everything(7, verbose=False)
        module = fed.student()
        kind(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, num_sanity_val_steps=0, enable_checkpointing=False,
        ).fit(module, datamodule=fed.Hospitals())  # fmt: skip
        states.append(fed.weights(module))
    assert fed.same(*states)


def plain(folder, **flags) -> FederatedTrainer:
    return FederatedTrainer(
        **{"accelerator": "cpu", "logger": False, "default_root_dir": folder, "enable_checkpointing": False} | flags
    )


def test_epochs_are_told_as_rounds_are(fed, tmp_path, capsys, caplog) -> None:
    """A line for each, with every hospital and the time left, and why training ended early; nothing of Lightning's."""
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    notice = L.pytorch.callbacks.LambdaCallback(on_train_start=lambda *_: rank_zero_info("a notice of Lightning's"))
    early = EarlyStopping("val/dice", mode="max", patience=1, min_delta=2.0)
    plain(tmp_path, max_epochs=9, callbacks=[early, notice]).fit(fed.student(), datamodule=fed.Hospitals())
    first, second, third = capsys.readouterr().out.splitlines()
    number = r"0\.\d{3}"
    dice = rf"Dice {number} \(a {number}, b {number}, c {number}\)"
    assert re.fullmatch(rf"epoch 1/9 · loss \d\.\d{{3}} · {dice} · \d+:\d\d left", first)
    assert second.startswith("epoch 2/9 · ")
    assert third == "stopped after epoch 2: a callback or max_time asked for it"
    assert not [record for record in caplog.records if "notice" in record.message]


def test_steps_may_decide_and_scores_are_told_of_their_own_epoch_only(fed, tmp_path, capsys) -> None:
    trainer = plain(tmp_path, max_steps=5, check_val_every_n_epoch=2)
    trainer.fit(fed.student(), datamodule=fed.Hospitals())
    lines = capsys.readouterr().out.splitlines()
    assert trainer.num_training_batches == 2
    assert ["Dice" in line for line in lines[:3]] == [False, True, False]
    assert [line.split(" · ")[0] for line in lines] == [
        "epoch 1",
        "epoch 2",
        "epoch 3",
        "stopped after 5 steps: max_steps",
    ]
    assert lines[0].endswith(" left") and trainer.reporter._units == trainer.reporter._done == 5


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (None, [("", 1, 4), ("", 2, 4), ("", 3, 4), ("", 4, 4)]),
        ({"local_epochs": 2}, [(c, i + 1, n) for c, n in (("a", 4), ("b", 2), ("c", 6)) for i in range(n)]),
        ({"local_steps": 3}, [(c, i + 1, 3) for c in "abc" for i in range(3)]),
    ],
    ids=["alone", "epochs", "steps"],
)
def test_a_log_is_told_in_the_middle_of_what_takes_very_long(fed, tmp_path, monkeypatch, recipe, told) -> None:
    monkeypatch.setattr("fkd_med.federated.progress.REFRESH", -1.0)
    lines: list[str] = []
    for seconds in (600.0, -1.0):
        monkeypatch.setattr("fkd_med.federated.progress.VERY_LONG", seconds)
        folder = tmp_path / str(seconds)
        trainer = plain(folder, max_epochs=2)
        if recipe is not None:
            trainer = fed.trainer(folder, Federation(rounds=1, **recipe))
        trainer.reporter.line = lines.append
        trainer.fit(fed.student(), datamodule=fed.Hospitals())
        assert seconds < 0 or not any("batch" in line for line in lines)
    found = [re.fullmatch(r"(?:round 1/1 · (\w) · )?batch (\d)/(\d) · loss \d\.\d{3}", line) for line in lines]
    assert [(m[1] or "", int(m[2]), int(m[3])) for m in found if m] == told


def test_an_error_takes_the_bar_away(fed, tmp_path) -> None:
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            assert trainer.reporter._progress is not None
            raise ValueError("a bad batch")

    trainer = plain(tmp_path, max_epochs=1, callbacks=[Fails()])
    with pytest.raises(ValueError, match="a bad batch"):
        trainer.fit(fed.student(), datamodule=fed.Hospitals())
    assert trainer.reporter._progress is None


def test_lightnings_own_bar_takes_the_place_of_our_lines(tmp_path) -> None:
    for flags in ({"enable_progress_bar": True}, {"callbacks": [TQDMProgressBar()]}):
        trainer = plain(tmp_path, **flags)
        assert trainer.progress_bar_callback is not None
        assert not any(isinstance(callback, EpochProgress) for callback in trainer.callbacks)
    assert plain(tmp_path).progress_bar_callback is None


def test_callers_trainer_objects_are_untouched(fed, tmp_path) -> None:
    """Client callbacks are copied: one that counts in itself counts from 0 for each client and round."""

    class Count(L.Callback):
        def __init__(self) -> None:
            self.steps = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.steps += 1
            assert self.steps <= 3

    callback = Count()
    fed.trainer(tmp_path, Federation(rounds=2, client_callbacks=[callback])).fit(
        fed.student(), datamodule=fed.Hospitals()
    )
    assert callback.steps == 0
