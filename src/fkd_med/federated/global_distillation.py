"""The global student as a second teacher: what hospitals have learned together is not unlearned at one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fkd_med.communication import Broadcast, State
from fkd_med.errors import ConfigError
from fkd_med.federated.rules import ClientRule
from fkd_med.losses import LogitKL, Pixels
from fkd_med.modules import SegmentationModule
from fkd_med.modules.teacher import freeze

Terms = Callable[[dict[str, Any]], dict[str, Tensor]]


class GlobalDistillation(ClientRule):
    """Distil the global student, as the round began with it, into the one that a client trains.

    weight T^2 KL(global || own) per pixel is part of the loss, beside the masks and the client's own teacher. The
    global student sees the same augmented images, in eval mode; it costs a forward pass of the student, and no bytes.
    Yao et al., "FedGKD: Toward Heterogeneous Federated Learning via Global Knowledge Distillation", 2021, with the
    latest global model only; the weight is ours.

    Args:
        weight: factor beside the supervised loss, 0 or above. 0 is the training without this rule.
        temperature: softens both distributions, above 0.

    Raises:
        ConfigError: for a negative weight or a temperature not above 0.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 2.0) -> None:
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"GlobalDistillation: weight must be 0 or above and finite, not {weight}.")
        self.weight = weight
        self.term = LogitKL(temperature=temperature)
        self._logits: list[Tensor] = []  # of the student and of the global student, in the step of the moment

    def begin(self, broadcast: Broadcast, kept: State) -> None:
        """Forget the last round."""
        self._logits = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a frozen copy of the student before its first step, and add the term to what it learns from.

        Raises:
            ConfigError: the module is not one of ours, so its loss is not known.
        """
        if self.weight == 0:
            return
        if not isinstance(pl_module, SegmentationModule):
            raise ConfigError(
                f"GlobalDistillation adds to the loss of a SegmentationModule or one made from it, which "
                f"{type(pl_module).__name__} is not. Remove it from federation.client_rules."
            )
        before = freeze(copy.deepcopy(pl_module.network))

        def note(network: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> None:
            if network.training:
                with torch.no_grad():
                    self._logits = [logits, before(*arguments)]

        self._hook = pl_module.network.register_forward_hook(note)
        vars(pl_module)["loss_terms"] = self._added(pl_module.loss_terms)  # for this copy of the module only

    def _added(self, terms_of: Terms) -> Terms:
        """Return a module's `loss_terms` with ours beside it."""

        def loss_terms(batch: dict[str, Any]) -> dict[str, Tensor]:
            terms = terms_of(batch)
            own, before = self._logits
            size = own.shape[-2], own.shape[-1]
            pixels = Pixels(batch["mask"], max(2, own.shape[1])).at(size)
            self._logits = []
            return {**terms, "global_kd": self.weight * self.term(own, before, pixels)}

        return loss_terms

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the global student."""
        if self.weight != 0:
            self._hook.remove()
            del vars(pl_module)["loss_terms"]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Leave the gradients as they are: the term is in the loss."""
