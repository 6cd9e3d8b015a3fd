"""The mean of updates that may each move only so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from fkd_med.aggregation.aggregator import Aggregator
from fkd_med.aggregation.settings import Weighting, check_positive, check_weighting, weight_of
from fkd_med.aggregation.slices import Readings
from fkd_med.aggregation.state import delta_norm, is_buffer, parameter_names
from fkd_med.aggregation.weighted_mean import WeightedMean
from fkd_med.communication import Broadcast, State, Update


class NormClippedMean(Aggregator):
    """Mean of updates whose change is scaled down to a norm (Sun et al., "Can you really backdoor FL?", 2019).

    ``x <- x + sum_i p_i min(1, M / |x_i - x|) (x_i - x)``, norms over the parameters in float64. BatchNorm's
    statistics are scaled apart in the same way, always to the median of their own norms: they would drown the
    parameters' norm, and a scale of at most 1 keeps variances positive. An update within the norm is taken bit for
    bit, and integer buffers take the plain mean. Reads the updates twice, one at a time.

    Args:
        max_norm: M; null takes the median of the round's norms.
        weighting: ``examples`` weights clients by their training images, ``uniform`` all alike (a liar could claim
            any number of images).

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(self, max_norm: float | None = None, weighting: Weighting = "examples") -> None:
        check_positive(self, max_norm=1.0 if max_norm is None else max_norm)
        check_weighting(self, weighting)
        self.max_norm = max_norm
        self.weighting = weighting

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the mean of the clipped `updates`; see `Aggregator.aggregate`."""
        start = broadcast.state
        parameters = parameter_names(start)
        measured = [name for name, tensor in start.items() if tensor.is_floating_point() and is_buffer(name)]
        norms: list[tuple[float, float]] = []

        def visit(update: Update) -> None:
            norms.append((delta_norm(update.state, start, parameters), delta_norm(update.state, start, measured)))

        readings = Readings(broadcast, updates, visit=visit)
        limit = self.max_norm or statistics.median(norm for norm, _ in norms)
        measured_limit = statistics.median(norm for _, norm in norms)
        mean = WeightedMean()
        for update, (norm, measured_norm) in zip(readings, norms, strict=True):
            scales = dict.fromkeys(parameters, scale(norm, limit))
            scales |= dict.fromkeys(measured, scale(measured_norm, measured_limit))
            mean.add(Clipped(update.state, start, scales), weight_of(update, self.weighting))
        return mean.result(like=start)


def scale(norm: float, limit: float) -> float:
    """Return the factor that brings a norm down to a limit: 1 within it, so a zero change divides by nothing."""
    return 1.0 if norm <= limit else limit / norm


class Clipped(Mapping[str, Tensor]):
    """A state whose change from `start` is scaled by tensor, made one tensor at a time.

    Args:
        state: what the client sent.
        start: what it started from.
        scales: factors by name; tensors that have none, or 1, stay as they are.
    """

    def __init__(self, state: State, start: State, scales: dict[str, float]) -> None:
        self.state = state
        self.start = start
        self.scales = scales

    def __getitem__(self, name: str) -> Tensor:
        factor = self.scales.get(name, 1.0)
        if factor == 1.0:
            return self.state[name]
        start = self.start[name].double()
        return (self.state[name].double() - start).mul_(factor).add_(start)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)
