"""The median of each coordinate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from fkd_med.aggregation.aggregator import Aggregator
from fkd_med.aggregation.slices import MAX_BYTES, Readings, combine, ordered
from fkd_med.communication import Broadcast, State, Update


class CoordinateMedian(Aggregator):
    """Median of every number over the clients (coordinate-wise median, Yin et al., ICML 2018).

    Up to half of the clients may lie. The mean of the two middle values for an even number of clients. Clients count
    alike: a liar could claim any number of images. All tensors are treated so, BatchNorm's statistics too; integer
    buffers are rounded. Reads the updates several times, at most `max_bytes` of them at once.
    """

    max_bytes: ClassVar[int] = MAX_BYTES

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the median of `updates`; see `Aggregator.aggregate`."""
        return combine(Readings(broadcast, updates, self.max_bytes), broadcast.state, median)


def median(values: Tensor) -> Tensor:
    """Return the median along the first dimension, in float64: (clients, numbers) -> (numbers,)."""
    rows = ordered(values)
    middle = len(rows) // 2
    if len(rows) % 2:
        return rows[middle].double()
    return 0.5 * rows[middle - 1].double() + 0.5 * rows[middle].double()
