"""How updates become the next global student: pure tensors, no I/O, no Lightning."""

from fkd_med.aggregation.aggregator import Aggregator, check_update, checked
from fkd_med.aggregation.fedavg import FedAvg
from fkd_med.aggregation.state import (
    WeightedMean,
    add,
    assert_finite,
    assert_same_structure,
    cast_like,
    identical,
    subtract,
)

__all__ = [
    "Aggregator",
    "FedAvg",
    "WeightedMean",
    "add",
    "assert_finite",
    "assert_same_structure",
    "cast_like",
    "check_update",
    "checked",
    "identical",
    "subtract",
]
