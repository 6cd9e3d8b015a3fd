"""Checks of the aggregators' settings: one sentence each, naming the class and the key."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from fkd_med.communication import Update
from fkd_med.errors import ConfigError

Weighting: TypeAlias = Literal["examples", "uniform"]


def check_positive(owner: object, **values: float) -> None:
    """Refuse values that are not above 0 and finite (ConfigError)."""
    for key, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{type(owner).__name__}: {key} must be above 0 and finite, not {value}.")


def check_decay(owner: object, **values: float) -> None:
    """Refuse values outside of [0, 1) (ConfigError)."""
    for key, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{type(owner).__name__}: {key} must be 0 or above and below 1, not {value}.")


def check_weighting(owner: object, weighting: str) -> None:
    """Refuse an unknown way of weighting (ConfigError)."""
    if weighting not in get_args(Weighting):
        raise ConfigError(f"{type(owner).__name__}: weighting must be examples or uniform, not '{weighting}'.")


def weight_of(update: Update, weighting: Weighting) -> int:
    """Return an update's weight: its training images, or 1."""
    return update.num_examples if weighting == "examples" else 1
