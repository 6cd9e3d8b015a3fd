"""Federated averaging."""

from __future__ import annotations

from collections.abc import Iterable

from fkd_med.aggregation.aggregator import Aggregator, checked, owner_of
from fkd_med.aggregation.weighted_mean import WeightedMean
from fkd_med.communication import Broadcast, State, Update


class FedAvg(Aggregator):
    """Mean of the clients' students, weighted by their training images (McMahan et al., AISTATS 2017).

    ``w <- sum_k (n_k / n) w_k``, in float64; integer buffers (BatchNorm's counter) are rounded back to their type.
    Streams: holds one float64 state and one update, however many clients there are.
    """

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the weighted mean of `updates`; see `Aggregator.aggregate`."""
        mean = WeightedMean()
        for update in checked(broadcast, updates, finite=False):
            mean.add(update.state, update.num_examples, owner_of(update))
        return mean.result(like=broadcast.state)
