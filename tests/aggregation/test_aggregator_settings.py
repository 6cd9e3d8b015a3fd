"""Every aggregator from a configuration, and what it refuses there."""

from __future__ import annotations

import math
from typing import Any

import jsonargparse
import pytest
from aggregation_cases import EVERY

from fkd_med.aggregation import Aggregator
from fkd_med.errors import ConfigError


@pytest.mark.parametrize("name", sorted({type(make()).__name__ for make in EVERY.values()}))
def test_every_aggregator_comes_from_a_configuration(name: str) -> None:
    arguments: dict[str, Any] = {
        "FedAvgM": {"server_momentum": 0.5, "nesterov": True},
        "FedAdam": {"server_lr": 0.1, "weighting": "uniform"},
        "Scaffold": {"clients": 6},
        "TrimmedMean": {"fraction": 0.2},
        "MultiKrum": {"byzantine": 1, "keep": 3},
        "NormClippedMean": {"max_norm": None, "weighting": "uniform"},
    }
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Aggregator, "aggregator")
    given = arguments.get(name, {})
    config = parser.parse_object({"aggregator": {"class_path": f"fkd_med.aggregation.{name}", "init_args": given}})
    made = parser.instantiate_classes(config).aggregator
    assert type(made).__name__ == name
    assert all(getattr(made, key) == value for key, value in given.items())


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("FedAvgM", {"server_momentum": 1.0}, "FedAvgM: server_momentum"),
        ("FedAvgM", {"server_lr": 0.0}, "FedAvgM: server_lr"),
        ("FedAdam", {"beta1": -0.1}, "FedAdam: beta1"),
        ("FedYogi", {"beta2": 1.0}, "FedYogi: beta2"),
        ("FedAdagrad", {"tau": 0.0}, "FedAdagrad: tau"),
        ("FedAdagrad", {"server_lr": math.nan}, "FedAdagrad: server_lr"),
        ("FedAdam", {"weighting": "images"}, "FedAdam: weighting.*'images'"),
        ("Scaffold", {"server_lr": math.inf}, "Scaffold: server_lr"),
        ("Scaffold", {"clients": 0}, "Scaffold: clients"),
        ("TrimmedMean", {"fraction": 0.5}, "TrimmedMean: fraction"),
        ("Krum", {"byzantine": -1}, "Krum: byzantine"),
        ("MultiKrum", {"keep": 0}, "MultiKrum: keep"),
        ("NormClippedMean", {"max_norm": 0.0}, "NormClippedMean: max_norm"),
        ("NormClippedMean", {"weighting": "steps"}, "NormClippedMean: weighting"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        type(EVERY[name]())(**arguments)
