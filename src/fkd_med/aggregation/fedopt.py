"""Adaptive optimizers on the server: FedAdam, FedYogi, FedAdagrad.

As printed in Reddi et al., "Adaptive federated optimization", ICLR 2021: no bias correction, and the
second moment starts at tau^2. The authors' code and other libraries differ from it and from each other.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fkd_med.aggregation.server_optimizer import ServerOptimizer
from fkd_med.aggregation.settings import Weighting, check_decay, check_positive
from fkd_med.communication import State


class AdaptiveServer(ServerOptimizer):
    """What the three share: ``x <- x + server_lr m / (sqrt(v) + tau)`` with ``m <- beta1 m + (1 - beta1) delta``.

    ``m = 0`` and ``v = tau^2`` at first. For weights, BatchNorm and memory see `ServerOptimizer`.
    """

    memory = ("first_moment", "second_moment")

    def __init__(self, server_lr: float, beta1: float, tau: float, weighting: Weighting) -> None:
        super().__init__(server_lr, weighting)
        check_decay(self, beta1=beta1)
        check_positive(self, tau=tau)
        self.beta1 = beta1
        self.tau = tau
        self.first_moment: State = {}
        self.second_moment: State = {}

    def step(self, name: str, delta: Tensor) -> Tensor:
        """Return the adaptive step; see `ServerOptimizer.step`."""
        if name not in self.first_moment:
            self.first_moment[name] = torch.zeros_like(delta)
            self.second_moment[name] = torch.full_like(delta, self.tau**2)
        first = self.beta1 * self.first_moment[name] + (1 - self.beta1) * delta
        second = self.accumulate(self.second_moment[name], delta.square())
        self.first_moment[name], self.second_moment[name] = first, second
        return self.server_lr * first / second.sqrt().add_(self.tau)

    @abstractmethod
    def accumulate(self, second: Tensor, square: Tensor) -> Tensor:
        """Return the next second moment from the last one and the square of delta, as a new tensor."""


class FedAdam(AdaptiveServer):
    """Adam on the server (Reddi et al., ICLR 2021): ``v <- beta2 v + (1 - beta2) delta^2``.

    Without bias correction, ``v`` from ``tau^2``, as printed. BatchNorm's statistics take the plain mean.

    Args:
        server_lr: learning rate of the server; a coordinate moves by about this much per round at most.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: adaptivity; changes well below it are scaled as by plain averaging.
        weighting: ``examples`` weights clients by their training images (the paper's experiments), ``uniform``
            all alike (its printed algorithm).

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(
        self,
        server_lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        weighting: Weighting = "examples",
    ) -> None:
        super().__init__(server_lr, beta1, tau, weighting)
        check_decay(self, beta2=beta2)
        self.beta2 = beta2

    def accumulate(self, second: Tensor, square: Tensor) -> Tensor:
        """Return Adam's second moment; see `AdaptiveServer.accumulate`."""
        return self.beta2 * second + (1 - self.beta2) * square


class FedYogi(FedAdam):
    """Yogi on the server (Reddi et al., ICLR 2021): ``v <- v - (1 - beta2) delta^2 sign(v - delta^2)``.

    Without bias correction, ``v`` from ``tau^2``, as printed. BatchNorm's statistics take the plain mean.

    Args:
        server_lr: learning rate of the server; a coordinate moves by about this much per round at most.
        beta1: decay of the first moment.
        beta2: how fast the second moment follows.
        tau: adaptivity; changes well below it are scaled as by plain averaging.
        weighting: ``examples`` weights clients by their training images (the paper's experiments), ``uniform``
            all alike (its printed algorithm).

    Raises:
        ConfigError: a setting out of its range.
    """

    def accumulate(self, second: Tensor, square: Tensor) -> Tensor:
        """Return Yogi's second moment; see `AdaptiveServer.accumulate`."""
        return second - (1 - self.beta2) * square * (second - square).sign()


class FedAdagrad(AdaptiveServer):
    """Adagrad on the server (Reddi et al., ICLR 2021): ``v <- v + delta^2``.

    ``v`` from ``tau^2``, as printed. BatchNorm's statistics take the plain mean.

    Args:
        server_lr: learning rate of the server; a coordinate moves by about this much per round at most.
        beta1: decay of the first moment; 0 in the paper's experiments.
        tau: adaptivity; changes well below it are scaled as by plain averaging.
        weighting: ``examples`` weights clients by their training images (the paper's experiments), ``uniform``
            all alike (its printed algorithm).

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(
        self, server_lr: float = 0.01, beta1: float = 0.0, tau: float = 1e-3, weighting: Weighting = "examples"
    ) -> None:
        super().__init__(server_lr, beta1, tau, weighting)

    def accumulate(self, second: Tensor, square: Tensor) -> Tensor:
        """Return Adagrad's sum of squares; see `AdaptiveServer.accumulate`."""
        return second + square
