"""Federated averaging with momentum on the server."""

from __future__ import annotations

import torch
from torch import Tensor

from fkd_med.aggregation.server_optimizer import ServerOptimizer
from fkd_med.aggregation.settings import check_decay
from fkd_med.communication import State


class FedAvgM(ServerOptimizer):
    """FedAvg with momentum on the server (Hsu et al., arXiv:1909.06335, 2019).

    ``v <- beta v + g``, ``w <- w - server_lr v`` with ``g = sum_k (n_k / n) (w - w_k)``, ``v = 0`` at first; Nesterov's
    form steps along ``g + beta v``. ``momentum`` remembers ``-v``. For BatchNorm and memory see `ServerOptimizer`.

    Args:
        server_momentum: beta; 0 with server_lr 1 is FedAvg.
        server_lr: learning rate of the server; 1 in the paper.
        nesterov: look ahead along the momentum.

    Raises:
        ConfigError: a setting out of its range.
    """

    memory = ("momentum",)

    def __init__(self, server_momentum: float = 0.9, server_lr: float = 1.0, nesterov: bool = False) -> None:
        super().__init__(server_lr)
        check_decay(self, server_momentum=server_momentum)
        self.server_momentum = server_momentum
        self.nesterov = nesterov
        self.momentum: State = {}

    def step(self, name: str, delta: Tensor) -> Tensor:
        """Return the step of momentum; see `ServerOptimizer.step`."""
        before = self.momentum.get(name)
        momentum = self.server_momentum * (torch.zeros_like(delta) if before is None else before) + delta
        self.momentum[name] = momentum
        return self.server_lr * (delta + self.server_momentum * momentum if self.nesterov else momentum)
