"""One client's part of a round: take the broadcast, train on its own images, give back an update.

The same code serves simulation and deployment: it knows its data, its folder and the recipe, not who asks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor, nn

from fkd_med.communication import Broadcast, Extras, State, Update
from fkd_med.distillation import TeacherMaps
from fkd_med.errors import ConfigError
from fkd_med.federated.client_data import ClientData
from fkd_med.federated.client_state import ClientState, ClientStates
from fkd_med.federated.federation import Federation
from fkd_med.federated.inner import inner_trainer, is_trial, release
from fkd_med.federated.policy import images_of, recalibrated
from fkd_med.federated.progress import LossOnBar, Reporter
from fkd_med.federated.quiet import quiet
from fkd_med.modules import DistillationModule
from fkd_med.modules.personal import merge
from fkd_med.modules.schedule import RunClock, set_clock
from fkd_med.ranks import is_first_rank, mean_of_ranks
from fkd_med.seeding import seeded


class KeepOptimizers(L.Callback):
    """Gives a fresh Trainer's optimizers the moments a client had, and takes them back at the end.

    Only the moments: learning rates and the like follow the schedule, which `RunClock` puts at its place in the run
    even for a client that sat out some rounds.

    Args:
        before: what the client kept from its last round.
        keeps: whether the moments are taken back at the end.
    """

    def __init__(self, before: ClientState, keeps: bool) -> None:
        self.before, self.keeps = before, keeps
        self.after = ClientState()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the state of the client's last round.

        Raises:
            ConfigError: the optimizers remember other parameters than are trained now.
        """
        parameters = [name for name, p in pl_module.named_parameters() if p.requires_grad]
        if self.before.optimizers and self.before.parameters != parameters:
            changed = sorted(set(self.before.parameters) ^ set(parameters)) or ["their order"]
            raise ConfigError(
                f"federation.optimizer_state: keep has moments of other parameters than are trained now ({changed[0]} "
                "differs): resume with the model and the terms the run was started with, or use reset."
            )
        if self.keeps:
            self.after.parameters = parameters
        for optimizer, state in zip(trainer.optimizers, self.before.optimizers, strict=False):
            optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the state as it is after this round, if it is kept."""
        if self.keeps:
            self.after.optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]


class MeanBuffers(L.Callback):
    """Averages floating buffers over the ranks after a fit: BatchNorm statistics differ between them."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduce every floating buffer to its mean."""
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))


class LearningRateNote(L.Callback):
    """Notes the learning rate of the last step, for the curve over rounds."""

    rate = float("nan")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Read the rate the coming step uses."""
        self.rate = float(optimizer.param_groups[0]["lr"])


@dataclass
class ClientWorker:
    """Trains any of the clients that this process stands for.

    Args:
        module: the LightningModule to copy for each fit; never trained itself.
        data: images by client.
        federation: the round recipe.
        flags: hardware and numerics flags of the inner Trainers.
        seed: the run's seed.
        states: what clients keep between rounds.
        reporter: where progress is shown.
        prepare: called with the copy and the client's name before training; attaches the client's teacher.
    """

    module: L.LightningModule
    data: ClientData
    federation: Federation
    flags: dict[str, Any]
    seed: int
    states: ClientStates
    reporter: Reporter
    prepare: Callable[[L.LightningModule, str], None] | None = None

    def fit(self, client: str, broadcast: Broadcast, attempt: int = 0) -> Update:
        """Train the broadcast student on a client's images for one round.

        Raises:
            TrainingError: the loss is not finite; names client, round and batch.
            ConfigError: not one optimizer step was done, or a rule does not go with the optimizer.
        """
        before = self.states.load(client)
        worker = copy.deepcopy(self.module)
        worker.__dict__.pop("configure_optimizers", None)  # the server's stand-in, see FederatedTrainer
        worker.load_state_dict(merge(merge(worker.state_dict(), broadcast.state), before.personal))
        self.federation.policy.freeze(worker)
        rules, start = copy.deepcopy(self.federation.acting_rules), self._start(broadcast, before)
        for rule in rules:
            rule.meet(self.data, client, self.seed)
            if self.federation.recalibrates:
                rule.statistics = partial(self._statistics, client)
            rule.begin(start, before.rules.get(type(rule).__name__, {}))
        companions = worker.companions if isinstance(worker, DistillationModule) else None
        with seeded(self.seed, broadcast.round, client), quiet():
            if self.prepare is not None:
                self.prepare(worker, client)
            if companions is not None:
                companions.load_tensors(before.companions)
            loader = self.data.client_train_dataloader(client, broadcast.round)
            set_clock(worker, self._clock(broadcast.round, loader))
            keeper, rate = KeepOptimizers(before, self.federation.optimizer_state == "keep"), LearningRateNote()
            trainer = self._trainer(client, broadcast.round, [keeper, rate, *rules])
            trainer.fit(worker, loader)
        if trainer.global_step == 0:
            raise ConfigError(
                f"Client {client} did not do one optimizer step in round {broadcast.round}: it has fewer batches than "
                "trainer.accumulate_grad_batches, or trainer.limit_train_batches is 0."
            )
        state = {name: tensor.detach().cpu().clone() for name, tensor in worker.state_dict().items()}
        keeper.after.companions = {} if companions is None else companions.tensors()
        sent = {name: state[name] for name in self.federation.policy.travelling(worker)}
        extras: Extras = {}
        for rule in rules:
            sections, keeper.after.rules[type(rule).__name__] = rule.end(sent)
            extras |= sections
        stay = self.federation.policy.staying(worker)
        self._keep(client, broadcast.round, {name: state[name] for name in state if name in stay}, keeper.after)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_step")}
        metrics = mean_of_ranks({name.removesuffix("_epoch"): value for name, value in metrics.items()})
        metrics["lr"] = rate.rate
        steps = trainer.global_step
        release(trainer)
        return Update(
            client=client,
            round=broadcast.round,
            attempt=attempt,
            state=sent,
            extras=extras,
            num_examples=self.data.num_examples(client),
            num_steps=steps,
            metrics=metrics,
        )

    def _start(self, broadcast: Broadcast, before: ClientState) -> Broadcast:
        """Return what rules take for the global student; alone, a client's own is all that its federation knows."""
        alone = self.federation.is_local
        return replace(broadcast, state=merge(broadcast.state, before.personal)) if alone else broadcast

    def _statistics(self, client: str, network: nn.Module) -> State:
        return recalibrated(network, images_of(self.data, client))

    def _keep(self, client: str, round: int, personal: dict[str, Tensor], after: ClientState) -> None:
        """Write what stays with the client."""
        after.personal = personal
        after.rules = {name: tensors for name, tensors in after.rules.items() if tensors}
        if is_first_rank():
            self.states.save(client, round, after)

    def _trainer(self, client: str, round: int, callbacks: list[L.Callback]) -> L.Trainer:
        length = {"max_epochs": self.federation.local_epochs}
        if is_trial(self.flags):
            length = {"max_epochs": 1}
        elif self.federation.local_steps is not None:
            length = {"max_epochs": -1, "max_steps": self.federation.local_steps}
        text = f"round {round}/{self.federation.rounds} · {client}"
        extra = [LossOnBar(self.reporter, text), *copy.deepcopy(self.federation.client_callbacks)]
        callbacks = [MeanBuffers(), *callbacks, *extra]  # first, as rules may look at the trained student
        return inner_trainer(self.flags, callbacks=callbacks, limit_val_batches=0, **length)

    def _clock(self, round: int, loader: Any) -> RunClock:
        """Where this round stands in the run, as if the client had taken part in every round so far."""
        federation = self.federation
        batches = len(loader)
        limit = self.flags.get("limit_train_batches")
        if isinstance(limit, int):
            batches = min(batches, limit)
        elif isinstance(limit, float):
            batches = max(1, int(batches * limit))
        accumulate = int(self.flags.get("accumulate_grad_batches") or 1)
        per_epoch = max(1, -(-batches // accumulate))
        steps = federation.local_steps or federation.local_epochs * per_epoch
        epochs = federation.local_epochs if federation.local_steps is None else steps / per_epoch
        return RunClock(
            round=round,
            step=(round - 1) * steps,
            epoch=int((round - 1) * epochs),
            total_steps=federation.rounds * steps,
            rounds=federation.rounds,
        )


def give_teacher(module: L.LightningModule, client: str, data: Any, maps: Mapping[str, TeacherMaps]) -> None:
    """Give a client's copy of the module that client's teacher.

    Args:
        module: the copy; one that does not distil needs none.
        client: the client.
        data: the data module, whose batches bring cached maps.
        maps: the cached maps of teachers, by client.
    """
    if isinstance(module, DistillationModule) and module.active_losses and module.teacher_source is not None:
        module.learn_from(client, data, maps.get(client))
