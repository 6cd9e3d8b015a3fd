"""Krum and Multi-Krum: only updates that lie close to many others are taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from fkd_med.aggregation.aggregator import Aggregator
from fkd_med.aggregation.coordinate_median import median
from fkd_med.aggregation.slices import MAX_BYTES, Readings, combine
from fkd_med.aggregation.state import parameter_names
from fkd_med.aggregation.weighted_mean import WeightedMean
from fkd_med.communication import Broadcast, State, Update
from fkd_med.errors import ConfigError, TrainingError


class MultiKrum(Aggregator):
    """Mean of the updates with the best Krum scores (Multi-Krum, Blanchard et al., NeurIPS 2017).

    An update's score is the sum of its squared distances to its ``n - f - 2`` nearest others (smaller is better, ties
    go to the name that sorts first). Distances are over the parameters, from differences in float64.
    BatchNorm's statistics and integer buffers, which differ between hospitals for honest reasons, have no part in
    the score and so are not taken from the chosen either: they are the median of all clients. Clients count alike.
    Reads the updates several times, at most `max_bytes` of them at once. An update that the firewall has set aside was
    one of the f, so fewer may lie among the others.

    Args:
        byzantine: f, how many clients may lie; needs ``n >= 2 f + 3`` updates in each round.
        keep: how many updates are averaged, at most ``n - f``; null takes ``n - f``.

    Raises:
        ConfigError: a setting out of its range.
    """

    max_bytes: ClassVar[int] = MAX_BYTES

    def __init__(self, byzantine: int = 1, keep: int | None = None) -> None:
        if byzantine < 0:
            raise ConfigError(f"{type(self).__name__}: byzantine must be 0 or above, not {byzantine}.")
        if keep is not None and keep < 1:
            raise ConfigError(f"{type(self).__name__}: keep must be 1 or above, not {keep}.")
        self.byzantine = byzantine
        self.keep = keep
        self._left = byzantine

    def set_aside(self, count: int) -> None:
        """Count those set aside among the liars."""
        self._left = max(0, self.byzantine - count)

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the mean of the updates chosen; see `Aggregator.aggregate`."""
        readings = Readings(broadcast, updates, self.max_bytes)
        names = parameter_names(broadcast.state)
        chosen = self._chosen(readings, names, broadcast.round)
        taken = _mean_of(readings, chosen, names)
        rest = combine(readings, broadcast.state.keys() - set(names), median)
        return {name: (taken | rest)[name] for name in broadcast.state}

    def _chosen(self, readings: Readings, names: list[str], round: int) -> set[str]:
        keep = self._kept(len(readings.clients), round)
        scores = krum_scores(squared_distances(readings, names), self._left).tolist()
        ranked = sorted(zip(scores, readings.clients, strict=True))
        return {client for _, client in ranked[:keep]}

    def _kept(self, clients: int, round: int) -> int:
        name, f = type(self).__name__, self._left
        if clients < 2 * f + 3:
            raise TrainingError(
                f"Round {round}: {name} with byzantine {f} needs {2 * f + 3} updates, but {clients} came. "
                "Choose more clients per round, or CoordinateMedian, which works with any number."
            )
        if self.keep is not None and self.keep > clients - f:
            raise TrainingError(
                f"Round {round}: {name} keeps {self.keep} of {clients} updates, of which {f} may lie. "
                f"Set keep to {clients - f} at most."
            )
        return clients - f if self.keep is None else self.keep


class Krum(MultiKrum):
    """The one update closest to its neighbours (Krum, Blanchard et al., NeurIPS 2017).

    See `MultiKrum`, of which it is the case of one. Only one hospital's parameters survive a round, so it learns
    slowly where hospitals differ.

    Args:
        byzantine: f, how many clients may lie; needs ``n >= 2 f + 3`` updates in each round.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(self, byzantine: int = 1) -> None:
        super().__init__(byzantine, keep=1)


def _mean_of(readings: Readings, clients: set[str], names: list[str]) -> State:
    mean = WeightedMean()
    for update in readings:
        if update.client in clients:
            mean.add({name: update.state[name] for name in names}, 1)
    return mean.result(like={name: readings.state[name] for name in names})


def squared_distances(readings: Readings, names: list[str]) -> Tensor:
    """Return the squared distance of every pair of updates over the tensors `names`: (clients, clients), float64.

    Sums of squared differences: ``|a|^2 - 2ab + |b|^2`` cancels where updates are close, which is what Krum compares.
    """
    n = len(readings.clients)
    pairs = torch.zeros(n * (n - 1) // 2, dtype=torch.float64)
    for _, values in readings.columns(names):
        pairs += torch.nn.functional.pdist(values.double()).square()
    distances = torch.zeros(n, n, dtype=torch.float64)
    distances[tuple(torch.triu_indices(n, n, offset=1))] = pairs
    return distances + distances.T


def krum_scores(distances: Tensor, byzantine: int) -> Tensor:
    """Return each update's sum of squared distances to its ``n - byzantine - 2`` nearest others: (clients,)."""
    nearest = distances.sort(dim=1).values[:, 1 : len(distances) - byzantine - 1]  # the first is its own, 0
    return nearest.sum(dim=1)
