"""How updates become the next global student: pure tensors, no I/O, no Lightning."""

from fkd_med.aggregation.aggregator import Aggregator, check_update, checked
from fkd_med.aggregation.clipped_mean import NormClippedMean
from fkd_med.aggregation.coordinate_median import CoordinateMedian
from fkd_med.aggregation.fedavg import FedAvg
from fkd_med.aggregation.fedavgm import FedAvgM
from fkd_med.aggregation.fednova import FedNova
from fkd_med.aggregation.fedopt import FedAdagrad, FedAdam, FedYogi
from fkd_med.aggregation.firewall import Firewall, Quarantine
from fkd_med.aggregation.krum import Krum, MultiKrum
from fkd_med.aggregation.logit_consensus import LogitConsensus
from fkd_med.aggregation.scaffold import Scaffold
from fkd_med.aggregation.server_optimizer import ServerOptimizer
from fkd_med.aggregation.state import (
    add,
    assert_finite,
    assert_same_structure,
    cast_like,
    delta_norm,
    identical,
    is_buffer,
    parameter_names,
    subtract,
)
from fkd_med.aggregation.trimmed_mean import TrimmedMean
from fkd_med.aggregation.weighted_mean import WeightedMean

__all__ = [
    "Aggregator",
    "CoordinateMedian",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedYogi",
    "Firewall",
    "Krum",
    "LogitConsensus",
    "MultiKrum",
    "NormClippedMean",
    "Quarantine",
    "Scaffold",
    "ServerOptimizer",
    "TrimmedMean",
    "WeightedMean",
    "add",
    "assert_finite",
    "assert_same_structure",
    "cast_like",
    "check_update",
    "checked",
    "delta_norm",
    "identical",
    "is_buffer",
    "parameter_names",
    "subtract",
]
