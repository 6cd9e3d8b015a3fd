"""Client rules: what an algorithm changes in a client's own training, at the moment an optimizer step is due.

A rule acts once per optimizer step, after accumulation, the averaging of gradients over devices and their unscaling,
and before clipping. What it sends beside the student travels as a section of the update; what it must remember stays
with the client.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from fkd_med.communication import Broadcast, State
from fkd_med.errors import ConfigError


class ClientRule(L.Callback):
    """What an algorithm does on the client, in one round.

    The Trainer of the round calls its hooks; `begin` comes before training, `end` after it.
    """

    sections: ClassVar[frozenset[str]] = frozenset()
    """The sections of an update that this rule supplies."""
    starts_afresh: ClassVar[bool] = False
    """Whether the rule's formula is of optimizers that begin each round anew."""
    statistics: Callable[[nn.Module], State] | None = None
    """Gives a network its BatchNorm statistics where these neither travel nor stay: of the client's training images."""

    def check(self, module: nn.Module, data: Any) -> None:
        """Refuse, before any work, a module or a data module that this rule cannot use (ConfigError)."""

    def complete(self, network: nn.Module) -> None:
        """Bring a network that is about to be asked in eval mode to its own BatchNorm statistics, see `statistics`."""
        if self.statistics is not None:
            network.load_state_dict({**network.state_dict(), **self.statistics(network)})

    def meet(self, data: Any, client: str, seed: int) -> None:
        """Take the data module, the client's name and the run's seed, before `begin`; most rules need none of them."""

    def begin(self, broadcast: Broadcast, kept: State) -> None:
        """Take what the server sent, and what this client kept from its last round (empty at first)."""

    @abstractmethod
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Change the gradients of the coming optimizer step, or note what it will do."""

    def end(self, trained: State) -> tuple[dict[str, State], State]:
        """Return the sections for the server, and what the client keeps.

        Args:
            trained: the student after training, as it is sent.
        """
        return {}, {}


class FedProx(ClientRule):
    """Pull the client's weights towards the global ones: mu / 2 times their squared distance is part of the loss.

    Li et al., "Federated Optimization in Heterogeneous Networks", 2020 (FedProx).

    Args:
        mu: strength of the pull, 0 or above; 0.001 to 1 in the paper. 0 is FedAvg.

    Raises:
        ConfigError: for a negative mu.
    """

    def __init__(self, mu: float = 0.01) -> None:
        if not 0 <= mu < float("inf"):
            raise ConfigError(f"FedProx: mu must be 0 or above and finite, not {mu}; 0.001 to 1 is usual.")
        self.mu = mu
        self._anchor: State = {}

    def begin(self, broadcast: Broadcast, kept: State) -> None:
        """Remember the global weights."""
        self._anchor = dict(broadcast.state)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add mu (w - w_global) to the gradients."""
        for name, parameter in shared_parameters(pl_module, self._anchor):
            self._anchor[name] = anchor = self._anchor[name].to(parameter.device)
            _add_to_gradient(parameter, self.mu * (parameter.detach() - anchor))


class ScaffoldRule(ClientRule):
    """Correct each step by the difference of the server's control variate and the client's own.

    Karimireddy et al., "SCAFFOLD", 2020, with its option II: ``y <- y - eta (g - c_i + c)``, and afterwards
    ``c_i <- c_i - c + (x - y) / sum(eta)``, which is the paper's K eta for a constant rate. Goes with the aggregator
    `fkd_med.aggregation.Scaffold`. Plain SGD only: with momentum or an adaptive optimizer, the way from x to y says
    nothing of the mean gradient.
    """

    sections = frozenset({"scaffold"})

    def __init__(self) -> None:
        self._global: State = {}
        self._server: State = {}
        self._own: State = {}
        self._rates = 0.0
        self._touched: set[str] = set()

    def begin(self, broadcast: Broadcast, kept: State) -> None:
        """Take the server's control variate and the client's own; both are 0 at first."""
        self._global, self._server, self._own = broadcast.state, dict(broadcast.extras.get("scaffold", {})), dict(kept)
        self._rates, self._touched = 0.0, set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse optimizers for which the correction is wrong.

        Raises:
            ConfigError: the optimizer is not plain SGD; names it.
        """
        for optimizer in trainer.optimizers:
            refuse_unless_sgd(optimizer, "SCAFFOLD")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add c - c_i to the gradients, and count the learning rate of the step."""
        self._rates += float(optimizer.param_groups[0]["lr"])
        for name, parameter in shared_parameters(pl_module, self._global):
            for variates, sign in ((self._server, 1.0), (self._own, -1.0)):
                if name in variates:
                    variates[name] = variate = variates[name].to(parameter.device)
                    _add_to_gradient(parameter, sign * variate)
            self._touched.add(name)

    def end(self, trained: State) -> tuple[dict[str, State], State]:
        """Return the change of the client's control variate for the server, and the new one to keep."""
        if self._rates <= 0:
            raise ConfigError("SCAFFOLD: every learning rate of the round was 0, so there is no mean gradient.")
        change, new = {}, {}
        for name in sorted(self._touched):
            start, end = self._global[name].double().cpu(), trained[name].double().cpu()
            server = self._server[name].double().cpu() if name in self._server else torch.zeros_like(start)
            own = self._own[name].double().cpu() if name in self._own else torch.zeros_like(start)
            step = (start - end) / self._rates - server
            change[name] = step.to(self._global[name].dtype)
            new[name] = (own + step).to(self._global[name].dtype)
        return {"scaffold": change}, new


class FedNovaRule(ClientRule):
    """Tell the server how much local work an update holds, so that unequal clients pull equally per step.

    Wang et al., "Tackling the Objective Inconsistency Problem", 2020 (FedNova): the norm of a_i, the weights with which
    the client's gradients enter its update, in units of the initial learning rate. For plain SGD it is the number of
    steps; momentum rho counts each gradient 1 + rho + rho^2 + ... times, and a schedule scales each step. Goes with the
    aggregator `fkd_med.aggregation.FedNova`. SGD with or without momentum only.
    """

    sections = frozenset({"fednova"})
    starts_afresh = True

    def __init__(self) -> None:
        self._norm = self._momentum_norm = 0.0

    def begin(self, broadcast: Broadcast, kept: State) -> None:
        """Begin to count."""
        self._norm = self._momentum_norm = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse optimizers whose a_i is not known.

        Raises:
            ConfigError: the optimizer is not SGD.
        """
        for optimizer in trainer.optimizers:
            refuse_unless_sgd(optimizer, "FedNova", momentum=True)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count what the coming step adds to the norm of a_i."""
        group = optimizer.param_groups[0]
        first = float(group.get("initial_lr", group["lr"])) or 1.0
        self._momentum_norm = float(group.get("momentum", 0.0)) * self._momentum_norm + 1.0
        self._norm += self._momentum_norm * float(group["lr"]) / first

    def end(self, trained: State) -> tuple[dict[str, State], State]:
        """Return the norm of a_i for the server."""
        return {"fednova": {"a_norm": torch.tensor(self._norm, dtype=torch.float64)}}, {}


def shared_parameters(module: nn.Module, state: State) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that are trained and travel, by their name in the state; companions do not."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad and name in state]


def refuse_unless_sgd(optimizer: torch.optim.Optimizer, who: str, momentum: bool = False) -> None:
    """Refuse an optimizer other than SGD, or one with settings that a rule's formula does not know.

    Raises:
        ConfigError: names the rule, the optimizer and the setting.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ConfigError(
            f"{who} is defined for SGD only, and model.optimizer is {type(optimizer).__name__}: use torch.optim.SGD, "
            "or another algorithm."
        )
    unknown = ["dampening", "nesterov", "maximize", *([] if momentum else ["momentum"])]
    for group in optimizer.param_groups:
        if wrong := [name for name in unknown if group.get(name)]:
            raise ConfigError(f"{who} does not know SGD with {wrong[0]}={group[wrong[0]]}: leave it out.")
    if len({float(group["lr"]) for group in optimizer.param_groups}) > 1:
        raise ConfigError(f"{who} needs one learning rate for all parameters; model.optimizer has several.")


def _add_to_gradient(parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = value.clone()
    else:
        parameter.grad.add_(value)


def supplied(rules: list[ClientRule]) -> frozenset[str]:
    """Return the sections that some rules supply together."""
    return frozenset().union(*(rule.sections for rule in rules)) if rules else frozenset()
