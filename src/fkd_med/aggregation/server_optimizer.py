"""What FedAvgM and the adaptive rules share: the mean of the updates is a gradient for an optimizer on the server."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from torch import Tensor

from fkd_med.aggregation.aggregator import Aggregator, checked, next_state, owner_of
from fkd_med.aggregation.settings import Weighting, check_positive, check_weighting, weight_of
from fkd_med.aggregation.state import parameter_names
from fkd_med.aggregation.weighted_mean import WeightedMean
from fkd_med.communication import Broadcast, State, Update


class ServerOptimizer(Aggregator):
    """Takes a step from the broadcast along ``delta``, the mean of what the clients changed.

    ``delta = sum_i p_i (x_i - x)`` is minus the pseudo-gradient of FedOpt (Reddi et al., ICLR 2021).
    BatchNorm's statistics and integer buffers take the plain mean, with the same weights (see `is_buffer`).
    Streams: holds one float64 state, its memory and one update.

    Args:
        server_lr: learning rate of the server.
        weighting: ``examples`` weights clients by their training images, ``uniform`` all alike.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(self, server_lr: float, weighting: Weighting = "examples") -> None:
        check_positive(self, server_lr=server_lr)
        check_weighting(self, weighting)
        self.server_lr = server_lr
        self.weighting = weighting

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the state one server step after `broadcast`; see `Aggregator.aggregate`."""
        mean = WeightedMean()
        for update in checked(broadcast, updates, finite=False):
            mean.add(update.state, weight_of(update, self.weighting), owner_of(update))
        values = mean.values()
        names = parameter_names(broadcast.state)
        self.check_memory({name: broadcast.state[name] for name in names})
        for name in names:
            start = broadcast.state[name].double()
            values[name] = start + self.step(name, values[name].sub_(start))
        return next_state(values, broadcast)

    @abstractmethod
    def step(self, name: str, delta: Tensor) -> Tensor:
        """Return what is added to the parameter `name`, and remember what the next round needs.

        Remembered tensors are replaced, never changed in place: a checkpoint may hold them.

        Args:
            name: the parameter.
            delta: mean change of the clients, float64, in the parameter's shape.
        """
