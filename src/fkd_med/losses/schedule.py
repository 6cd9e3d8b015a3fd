"""How the weight of a distillation term changes in the course of a run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from fkd_med.errors import ConfigError


class WeightSchedule(ABC):
    """A factor of a term's weight, given how much of the run has passed."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the factor at a share of the run: 0 in the first round, 1 in the last."""


class Ramp(WeightSchedule):
    """Go in a straight line from one factor to another, and stay there.

    Args:
        first: factor until the share `begin` of the run has passed.
        last: factor from the share `end` of the run on.
        begin: share of the run, 0 to 1.
        end: share of the run, `begin` to 1; equal to `begin`, it makes a step.

    Raises:
        ConfigError: for a factor that is negative or not finite, or shares out of order or range.
    """

    def __init__(self, first: float = 1.0, last: float = 0.0, begin: float = 0.0, end: float = 1.0) -> None:
        for name, factor in (("first", first), ("last", last)):
            if not 0 <= factor < math.inf:
                raise ConfigError(f"Ramp: {name} must be 0 or above and finite, not {factor}.")
        if not 0 <= begin <= end <= 1:
            raise ConfigError(f"Ramp: it must be 0 <= begin <= end <= 1; here begin is {begin} and end {end}.")
        self.first, self.last, self.begin, self.end = first, last, begin, end

    def __call__(self, progress: float) -> float:
        """Return the factor at a share of the run."""
        if progress >= self.end:
            return self.last
        if progress <= self.begin:
            return self.first
        return self.first + (progress - self.begin) / (self.end - self.begin) * (self.last - self.first)
