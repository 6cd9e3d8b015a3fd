"""The global student as a second teacher: what hospitals have learned together is not unlearned at one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fkd_med.communication import Broadcast, State
from fkd_med.distillation.views import NUMBERS, Views, of_views
from fkd_med.errors import ConfigError
from fkd_med.federated.rules import ClientRule
from fkd_med.losses import LogitKL, WeightSchedule
from fkd_med.modules import DistillationModule, SegmentationModule
from fkd_med.modules.labels import pixels_of
from fkd_med.modules.schedule import progress_of
from fkd_med.modules.teacher import freeze

Terms = Callable[[dict[str, Any]], dict[str, Tensor]]


class GlobalDistillation(ClientRule):
    """Distil the global student, as the round began with it, into the one that a client trains.

    weight T^2 KL(global || own) per pixel is part of the loss, beside the masks and the client's own teacher, also of
    images without masks. The global student sees the same augmented images, in eval mode; it costs a forward pass of
    the student for each view, and no bytes. Yao et al., "FedGKD: Toward Heterogeneous Federated Learning via Global
    Knowledge Distillation", 2021, which averages the last few global models; here the mean decays instead, as in
    Tarvainen and Valpola, "Mean teachers are better role models", 2017. Views and weight are ours.

    Args:
        weight: factor beside the supervised loss, 0 or above. 0 is the training without this rule.
        temperature: softens both distributions, above 0.
        memory: share of the earlier global students in the teacher's weights, 0 to below 1: a client's teacher of a
            round is ``memory * the last one + (1 - memory) * the global student``, over the rounds it takes part in.
            0 is the latest one alone. It stays with the client.
        views: over how many views of an image the teacher's probabilities are averaged: 1, 2 (and its mirror), 4
            (flips) or 8 (and quarter turns).
        schedule: changes the weight over the run; constant when left out.
        beside_teacher: false: silent while a teacher of the client's own says anything, however little its weight. Goes
            with `TeachWhileAhead` or terms that fade; beside a teacher that always teaches, the rule never speaks.

    Raises:
        ConfigError: for a negative weight, a temperature not above 0, a memory out of range or another number of views.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 2.0,
        memory: float = 0.0,
        views: Views = 1,
        schedule: WeightSchedule | None = None,
        beside_teacher: bool = True,
    ) -> None:
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"GlobalDistillation: weight must be 0 or above and finite, not {weight}.")
        if not 0 <= memory < 1:
            raise ConfigError(f"GlobalDistillation: memory must be 0 or above and below 1, not {memory}.")
        if views not in NUMBERS:
            raise ConfigError(f"GlobalDistillation: views must be {', '.join(map(str, NUMBERS))}, not {views}.")
        self.term = LogitKL(temperature, weight, schedule=schedule)
        self.memory, self.views, self.beside_teacher = memory, views, beside_teacher
        self._mean: State = {}  # of the tensors that travel; empty without memory: then the student itself teaches
        self._logits: list[Tensor] = []  # of the student and of its teacher, in the step of the moment

    def check(self, module: nn.Module, data: Any) -> None:
        """Refuse modules that are none of ours, whose loss is not known (ConfigError)."""
        if not isinstance(module, SegmentationModule):
            raise ConfigError(
                f"GlobalDistillation adds to the loss of a SegmentationModule or one made from it, which "
                f"{type(module).__name__} is not. Remove it from federation.client_rules."
            )

    def begin(self, broadcast: Broadcast, kept: State) -> None:
        """Average the global student with those of earlier rounds."""
        self._logits = []
        self._mean = mean_of(kept, broadcast.state, self.memory) if self.memory else {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a frozen copy of the student before its first step, and add the term to what it learns from."""
        weight = self._weight(trainer, pl_module)
        if weight == 0:
            return
        assert isinstance(pl_module, SegmentationModule)
        pl_module.learns_from_unlabelled = True
        before = freeze(of_views(self._teacher(pl_module), self.views))

        def note(network: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> None:
            if network.training and not self._silent(pl_module):
                with torch.no_grad():
                    self._logits = [logits, before(*arguments)]

        self._hook = pl_module.network.register_forward_hook(note)
        vars(pl_module)["loss_terms"] = self._added(pl_module.loss_terms, weight)  # for this copy of the module only

    def _silent(self, module: SegmentationModule) -> bool:
        """Tell whether a teacher of the client's own speaks for us; rules decide on that before the first step."""
        return not self.beside_teacher and isinstance(module, DistillationModule) and bool(module.term_weights)

    def _weight(self, trainer: L.Trainer | None, module: L.LightningModule) -> float:
        """Return the weight in this round."""
        if self.term.schedule is None:
            return self.term.weight
        return self.term.weight_at(progress_of(vars(module)["clock"], trainer))

    def _teacher(self, module: SegmentationModule) -> nn.Module:
        """Return a copy of a module's network with the averaged tensors."""
        teacher = copy.deepcopy(module.network)
        mean = {name.removeprefix("network."): tensor for name, tensor in self._mean.items()}
        teacher.load_state_dict({name: mean.get(name, tensor) for name, tensor in teacher.state_dict().items()})
        self.complete(teacher)
        return teacher

    def _added(self, terms_of: Terms, weight: float) -> Terms:
        """Return a module's `loss_terms` with ours beside it."""

        def loss_terms(batch: dict[str, Any]) -> dict[str, Tensor]:
            terms = terms_of(batch)
            if not self._logits:  # silent in this step
                return terms
            own, before = self._logits
            pixels = pixels_of(batch, own).at((own.shape[-2], own.shape[-1]))
            self._logits = []
            return {**terms, "global_kd": weight * self.term(own, before, pixels)}

        return loss_terms

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the global student."""
        if "loss_terms" in vars(pl_module):
            self._hook.remove()
            del vars(pl_module)["loss_terms"]

    def end(self, trained: State) -> tuple[dict[str, State], State]:
        """Send nothing; keep the mean."""
        return {}, self._mean

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Leave the gradients as they are: the term is in the loss."""


def mean_of(before: State, now: State, memory: float) -> State:
    """Return ``memory * before + (1 - memory) * now``, name by name; counters, and what is new, as they are now.

    Args:
        before: tensors of the last mean; none at first.
        now: tensors of the same shapes.
        memory: share of `before`, 0 to below 1.
    """
    return {
        name: torch.lerp(tensor.double(), before[name].double(), memory).to(tensor.dtype)
        if name in before and tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in now.items()
    }
