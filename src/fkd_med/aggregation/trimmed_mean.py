"""The mean of each coordinate without its extremes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from fkd_med.aggregation.aggregator import Aggregator
from fkd_med.aggregation.slices import MAX_BYTES, Readings, combine, ordered
from fkd_med.communication import Broadcast, State, Update
from fkd_med.errors import ConfigError, TrainingError


class TrimmedMean(Aggregator):
    """Mean of every number over the clients without the largest and smallest (Yin et al., ICML 2018).

    ``fraction`` of the clients, **rounded up**, is dropped at each side: 0.1 of 4 clients drops one and one, so a
    single liar is never averaged in. Clients count alike. All tensors are treated so, BatchNorm's statistics too;
    integer buffers are rounded. Reads the updates several times, at most `max_bytes` of them at once.

    Args:
        fraction: share of the clients dropped at each side, below 0.5; at least the share that may lie.

    Raises:
        ConfigError: a fraction out of its range.
    """

    max_bytes: ClassVar[int] = MAX_BYTES

    def __init__(self, fraction: float = 0.1) -> None:
        if not 0 <= fraction < 0.5:
            raise ConfigError(f"TrimmedMean: fraction (of each side) must be 0 or above and below 0.5, not {fraction}.")
        self.fraction = fraction

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the trimmed mean of `updates`; see `Aggregator.aggregate`."""
        readings = Readings(broadcast, updates, self.max_bytes)
        drop = self._dropped(len(readings.clients), broadcast.round)
        return combine(readings, broadcast.state, lambda values: trimmed_mean(values, drop))

    def _dropped(self, clients: int, round: int) -> int:
        drop = math.ceil(Fraction(str(self.fraction)) * clients)  # 0.07 * 100 is above 7 in binary
        if 2 * drop >= clients:
            raise TrainingError(
                f"Round {round}: dropping {drop} at each side of {clients} clients leaves nobody "
                f"(TrimmedMean, fraction {self.fraction}). Lower the fraction or choose more clients per round."
            )
        return drop


def trimmed_mean(values: Tensor, drop: int) -> Tensor:
    """Return the mean without the `drop` largest and smallest, in float64: (clients, numbers) -> (numbers,)."""
    rows = ordered(values)[drop : len(values) - drop]
    mean = rows[0].double()
    for count, row in enumerate(rows[1:], start=2):
        mean += (row.double() - mean) / count  # see `WeightedMean`: equal values stay what they are
    return mean
