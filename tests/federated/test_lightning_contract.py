"""The private Lightning names that the federated loop stands on: gone or changed, this says so by name."""

from __future__ import annotations

import inspect
import signal
from functools import cache
from importlib.metadata import EntryPoint

import lightning as L
import pytest
from lightning.fabric.utilities import registry
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call

from fkd_med.federated import inner
from fkd_med.federated.inner import as_list, inner_trainer


@pytest.fixture(scope="module")
def trainer() -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1
    )


def test_fit_loop(trainer: L.Trainer) -> None:
    loop = trainer.fit_loop
    assert type(loop) is _FitLoop
    assert list(inspect.signature(_FitLoop.__init__).parameters) == ["self", "trainer", "min_epochs", "max_epochs"]
    for name in ("setup_data", "advance", "on_advance_end", "on_save_checkpoint", "on_load_checkpoint", "teardown"):
        assert callable(getattr(_FitLoop, name)), name
    for name in ("epoch_loop", "epoch_progress", "max_batches", "_combined_loader", "_data_source"):
        assert hasattr(loop, name), name
    assert loop.epoch_progress.current.processed == loop.epoch_progress.current.completed == 0
    source = inspect.getsource(_FitLoop.run)
    order = [source.index(f"self.{name}(") for name in ("setup_data", "on_run_start", "advance", "on_advance_end")]
    assert order == sorted(order)


def test_fit_loop_counts_the_epoch_before_its_hooks() -> None:
    """Checkpoints of `on_train_epoch_end` hold a processed epoch; a resume goes on with the next."""
    source = inspect.getsource(_FitLoop.on_advance_end)
    assert (
        source.index("increment_processed") < source.index("on_train_epoch_end") < source.index("increment_completed")
    )


def test_epoch_loop(trainer: L.Trainer) -> None:
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, _TrainingEpochLoop)
    assert list(inspect.signature(_TrainingEpochLoop.__init__).parameters)[:2] == ["self", "trainer"]
    assert isinstance(_TrainingEpochLoop.global_step, property)
    for name in ("reset_on_run", "increment_ready", "increment_started", "increment_processed", "increment_completed"):
        assert callable(getattr(loop.batch_progress, name)), name
    assert loop.batch_progress.total.completed == 0 and hasattr(loop.batch_progress, "is_last_batch")
    assert loop._batches_that_stepped == 0
    assert callable(loop._should_check_val_epoch) and callable(loop.update_lr_schedulers)
    assert callable(loop.val_loop.run) and hasattr(type(loop.val_loop), "restarting")


def test_hooks(trainer: L.Trainer) -> None:
    assert list(inspect.signature(call._call_callback_hooks).parameters)[:2] == ["trainer", "hook_name"]


def test_what_release_cuts(trainer: L.Trainer) -> None:
    for name in ("optimizers", "lr_scheduler_configs", "_lightning_module", "model"):
        assert hasattr(trainer.strategy, name), name
    assert hasattr(trainer._data_connector, "_datahook_selector")
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        assert hasattr(loop._data_source, "instance")
    assert hasattr(trainer.predict_loop._data_source, "instance")
    assert hasattr(L.LightningModule(), "_trainer")


def test_who_answers_sigterm(trainer: L.Trainer) -> None:
    """`leave_sigterm` replaces this method, since Lightning's answer in several processes is a broadcast."""
    connector = trainer._signal_connector
    assert callable(connector.register_signal_handlers)
    assert "register_signal_handlers" in inspect.getsource(L.Trainer._run)
    assert "broadcast" in inspect.getsource(type(connector)._sigterm_notifier_fn)
    several = inner_trainer({"accelerator": "cpu", "devices": 2, "strategy": "ddp"})
    before = signal.getsignal(signal.SIGTERM)
    several._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before


def test_checkpoint_callbacks_run_last() -> None:
    """So that what other callbacks do at the end of a round is in its checkpoint."""
    first, last = L.Callback(), type("Mine", (Checkpoint,), {})()
    made = L.Trainer(accelerator="cpu", logger=False, callbacks=[last, first], enable_progress_bar=False)
    assert made.callbacks.index(last) > made.callbacks.index(first)  # type: ignore[attr-defined]


def test_inner_trainers_share_one_look_for_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks that another package announces are in each, as in any Trainer."""
    looked: list[str] = []

    def entry_points(group: str) -> list[EntryPoint]:
        looked.append(group)
        return [EntryPoint(name="timer", value="lightning.pytorch.callbacks:DeviceStatsMonitor", group=group)]

    before = registry.entry_points  # type: ignore[attr-defined]
    monkeypatch.setattr(inner, "entry_points", entry_points)
    monkeypatch.setattr(inner, "_entry_points", cache(inner._entry_points.__wrapped__))
    for _ in range(2):
        made = inner_trainer({"accelerator": "cpu", "devices": 1})
        assert any(isinstance(callback, DeviceStatsMonitor) for callback in as_list(made.callbacks))  # type: ignore[attr-defined]
    assert looked == ["lightning.pytorch.callbacks_factory"]
    assert registry.entry_points is before  # type: ignore[attr-defined]
