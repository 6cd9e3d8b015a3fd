"""The federated loop: Lightning's fit loop in which one epoch is one communication round.

The only file that imports private Lightning names; ``tests/federated/test_lightning_contract.py`` holds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader

from fkd_med.communication import Broadcast, Ledger, State
from fkd_med.errors import RunError
from fkd_med.federated.absences import Absences
from fkd_med.federated.client import ClientWorker
from fkd_med.federated.client_data import ClientData, client_data
from fkd_med.federated.client_state import ClientStates
from fkd_med.federated.crew import Crew
from fkd_med.federated.exchange import Exchange
from fkd_med.federated.federation import Federation
from fkd_med.federated.gathering import Gathering
from fkd_med.federated.personal_state import show_personal
from fkd_med.federated.restoring import federation_state, restore
from fkd_med.federated.server_distillation import distilled
from fkd_med.modules import RunClock
from fkd_med.modules.schedule import set_clock
from fkd_med.seeding import global_seed

if TYPE_CHECKING:
    from fkd_med.federated.trainer import FederatedTrainer


class RoundLoop(_TrainingEpochLoop):
    """The inside of one epoch: counts rounds as steps, and owns the server's validation loop."""

    @property
    def global_step(self) -> int:
        """The number of closed rounds."""
        return int(self.batch_progress.total.completed)

    def close_round(self) -> None:
        """Count one round as one step; before evaluating, so that a checkpoint of the evaluation holds it."""
        self.batch_progress.reset_on_run()
        self.batch_progress.increment_ready()
        self.batch_progress.increment_started()
        self.batch_progress.increment_processed()
        self.batch_progress.increment_completed()
        self.batch_progress.is_last_batch = True
        self._batches_that_stepped += 1

    def evaluate(self) -> None:
        """Run the server's validation, if this round is one to validate after."""
        if self._should_check_val_epoch():
            self.val_loop.restarting = False  # after a resume: this evaluation is a new one
            self.trainer.validating = True
            self.val_loop.run()
            self.trainer.training = True

    def update_lr_schedulers(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: learning rates belong to clients."""


class FederatedLoop(_FitLoop):
    """Runs communication rounds: select, fit each client, aggregate, evaluate.

    Args:
        trainer: the server's trainer.
        federation: the round recipe.
    """

    def __init__(self, trainer: FederatedTrainer, federation: Federation) -> None:
        rounds = 1 if trainer.fast_dev_run else federation.rounds
        super().__init__(trainer, min_epochs=trainer.min_epochs, max_epochs=rounds)
        self.epoch_loop: RoundLoop = RoundLoop(trainer)
        self.federation = federation
        self.metrics: dict[str, float] = {}
        self.crew: Crew | None = None
        self._restored: dict[str, Any] = {}
        self._worker: ClientWorker | None = None

    @property
    def server(self) -> L.LightningModule:
        """The module that holds the global student."""
        return self.trainer.lightning_module

    @property
    def round(self) -> int:
        """The open round, counted from 1."""
        return int(self.epoch_progress.current.processed) + 1  # type: ignore[attr-defined]

    # --- before the first round -------------------------------------------------------------------------------

    def setup_data(self) -> None:
        """Prepare clients, teachers and the exchange, once; Lightning calls this before the first round."""
        if self._worker is not None:
            return
        trainer = self._federated_trainer
        self.data: ClientData = client_data(trainer.datamodule)
        self.clients = self.data.client_names()
        self.sizes = {client: self.data.num_examples(client) for client in self.clients}
        self.states = ClientStates(trainer.run_dir.clients)
        self.federation.begin(self.server, self.clients, int(self.max_epochs or 0), self.data)
        if self._restored:
            restore(self._restored, self.federation, self.states)
        self.threads = self.federation.apply_threads()
        ledger = Ledger(trainer.run_dir.ledger if trainer.is_global_zero else None, self.federation.link)
        ledger.drop_after(self.round - 1 or -1)  # before the first closed round, what is of round 0 is another run's
        absences = Absences(trainer.run_dir.absences if trainer.is_global_zero else None)
        absences.drop_after(self.round - 1)
        self.exchange = Exchange(
            self._travelling(), self.federation.sections, ledger, trainer.run_dir.journal, trainer.is_global_zero,
            self.federation.uplink, self.federation.downlink, global_seed(), int(self.max_epochs or 1),
            self.federation.logits,
        )  # fmt: skip
        self._worker = ClientWorker(
            module=self.server,
            data=self.data,
            federation=self.federation,
            flags=trainer.inner_flags,
            seed=global_seed(),
            states=self.states,
            reporter=trainer.reporter,
            prepare=trainer.attach_teacher,
        )
        self.crew = Crew.of(self._worker, self.exchange, trainer.maps, trainer.strategy.root_device)
        self.gathering = Gathering(
            self.federation, self._worker, self.exchange, absences, trainer.reporter, trainer.world_size == 1, self.crew
        )
        self.exchange.forget(self.round - 1 if self._restored or trainer.goes_on else None)
        trainer.ensure_teachers(self.clients, ledger)
        self._combined_loader = CombinedLoader([])
        self.max_batches = self.trainer.val_check_batch = len(self._choose(1))
        left = range(self.round, int(self.max_epochs or 0) + 1)
        trainer.reporter.begin("rounds", sum(len(self._choose(round)) for round in left))
        if not left:  # killed after the last checkpoint: what its round had still to clear away
            self._prune()

    def _choose(self, round: int) -> list[str]:
        return self.federation.select(self.clients, global_seed(), round, self.sizes)

    @property
    def _federated_trainer(self) -> FederatedTrainer:
        return cast("FederatedTrainer", self.trainer)

    def _state(self) -> State:
        """Copy the global student's tensors to the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.server.state_dict().items()}

    def _travelling(self) -> State:
        """Copy those of the global student's tensors that travel."""
        state = self._state()
        return {name: state[name] for name in self.federation.policy.travelling(self.server)}

    # --- one round --------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Run one round."""
        round = self.round
        chosen = self._choose(round)
        self.max_batches = len(chosen)
        broadcast = self._broadcast(round, chosen)
        self.gathering.ask(chosen, broadcast)
        files = {client: self._fit(index, client, broadcast) for index, client in enumerate(chosen)}
        self.trainer.strategy.barrier("updates")
        usable = self.gathering.usable(broadcast, {client: path for client, path in files.items() if path is not None})
        self.gathering.check_quorum(round, chosen, len(usable))
        self._combine(broadcast, usable)
        self._close(round, list(usable))
        self.epoch_loop.evaluate()

    def _broadcast(self, round: int, chosen: list[str]) -> Broadcast:
        """Send the global student; alone, a client starts from what it has."""
        self.gathering.metrics = {}
        aggregator = self.federation.aggregator
        if aggregator is None:
            return Broadcast(round, self._state(), {})
        return self.exchange.broadcast(Broadcast(round, self._travelling(), aggregator.broadcast_extras()), chosen)

    def _fit(self, index: int, client: str, broadcast: Broadcast) -> Path | None:
        """Let one client train; return its update in the journal, or nothing if none came."""
        trainer = self._federated_trainer
        trainer.reporter.show(f"round {broadcast.round}/{self.max_epochs} · {client}")
        call._call_callback_hooks(trainer, "on_train_batch_start", client, index)
        path = self.gathering.update_of(client, broadcast)
        call._call_callback_hooks(trainer, "on_train_batch_end", None, client, index)
        trainer.reporter.advance()
        return path

    def _combine(self, broadcast: Broadcast, files: dict[str, Path]) -> None:
        """Make the updates the next global student."""
        if self.federation.aggregator is None:
            return
        updates = self.exchange.updates(files, broadcast)
        state = distilled(self._federated_trainer, self.federation.aggregator.aggregate(broadcast, updates), updates)
        self.server.load_state_dict({**self.server.state_dict(), **state})
        self.trainer.strategy.barrier("combined")  # before rank 0 may clear the journal that all ranks read

    def _close(self, round: int, chosen: list[str]) -> None:
        """Count and log the round, accept what its clients keep, show each client's own tensors to the evaluation.

        All before evaluating: a checkpoint that the evaluation writes holds a closed round.
        """
        self.epoch_loop.close_round()
        self._log(round)
        set_clock(self.server, RunClock(round=round))
        for client in chosen:
            self.states.accept(client, round)
        if self.federation.policy.staying(self.server):
            show_personal(self.server, self.federation, self.states, self.data, chosen)

    def _log(self, round: int) -> None:
        """Write the ledger, and log what the clients measured and what travelled."""
        trainer = self._federated_trainer
        ledger = self.exchange.ledger
        ledger.flush()
        self.metrics = dict(self.gathering.metrics)
        self.metrics |= {f"bytes/{way}": float(ledger.total(round, None, way)) for way in ("up", "down")}
        self.metrics |= {"bytes/total": float(ledger.total()), "seconds/link": ledger.seconds(round)}
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, step=round)

    def on_advance_end(self) -> None:
        """Report the round, then let Lightning write checkpoints."""
        round = self.round
        self._report(round)
        super().on_advance_end()
        self.exchange.forget(round)
        self._prune()

    def _prune(self) -> None:
        """Delete the clients' states that no checkpoint on disk would resume from."""
        trainer = self._federated_trainer
        if trainer.is_global_zero and self.states.versions:
            self.states.prune(trainer.needed_states())

    def _report(self, round: int) -> None:
        """Print the line of a closed round."""
        trainer, shown = self._federated_trainer, self._federated_trainer.callback_metrics
        dice = {c: float(shown[f"{c}/val_dice"]) for c in self.clients if f"{c}/val_dice" in shown}
        losses = [v for k, v in self.metrics.items() if k.endswith("/train/loss")]
        text = f"round {round}/{self.max_epochs} · loss {sum(losses) / max(1, len(losses)):.3f}"
        if dice and self.epoch_loop._should_check_val_epoch():  # else they are of an earlier round
            each = ", ".join(f"{client} {value:.3f}" for client, value in dice.items())
            text += f" · Dice {float(shown['val/dice']):.3f} ({each})"
        left = trainer.reporter.time_left()
        trainer.reporter.line(text + (f" · {left} left" if round < int(self.max_epochs or 0) else ""))

    def on_run_end(self) -> None:
        """Say why a run ends before its last round; Lightning's own notices are muted."""
        if self.trainer.should_stop and self.round <= int(self.max_epochs or 0):
            closed = self.round - 1
            self._federated_trainer.reporter.line(f"stopped after round {closed}: a callback or max_time asked for it")
        super().on_run_end()

    # --- checkpoints ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Add what a closed round needs besides the student."""
        state: dict[str, Any] = super().on_save_checkpoint()
        closed = int(self.epoch_loop.global_step)
        state["federation"] = federation_state(self.federation, self.states, closed, self.threads)
        return state

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Keep what `on_save_checkpoint` returned until the clients are set up."""
        super().on_load_checkpoint(state_dict)
        if "federation" not in state_dict:
            raise RunError(
                "This checkpoint comes from a run without federation, so no round can be resumed from it. Resume it "
                "with its own configuration, or start a federated run without --ckpt_path."
            )
        self._restored = state_dict["federation"]
        if self._restored["round"] >= self.round:
            # Written during the evaluation after a round, which Lightning takes for the middle of an epoch: the round
            # is closed, so neither train it again nor go back into it.
            self.epoch_progress.increment_processed()
            self.epoch_progress.increment_completed()

    def teardown(self) -> None:
        """Take the progress bar away."""
        self._federated_trainer.reporter.end()
        super().teardown()
