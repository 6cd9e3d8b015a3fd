"""Rounds of a federation: the recipe, who takes part, the Trainer whose epochs they are, a client's part, teachers."""

from fkd_med.federated.ahead import TeachWhileAhead
from fkd_med.federated.chaos import Chaos
from fkd_med.federated.client import ClientWorker
from fkd_med.federated.client_data import ClientData
from fkd_med.federated.ensemble import EnsembleStage, EnsembleTeachers
from fkd_med.federated.feddf import FedDF
from fkd_med.federated.federation import Federation
from fkd_med.federated.global_distillation import GlobalDistillation
from fkd_med.federated.participation import Availability, ByWeight, Fraction, Number, Participation, RoundRobin
from fkd_med.federated.pooled_teacher import PooledTeacherStage
from fkd_med.federated.public_digest import PublicDigest
from fkd_med.federated.rules import ClientRule, FedNovaRule, FedProx, ScaffoldRule
from fkd_med.federated.server_distillation import ServerDistillation, ServerWork
from fkd_med.federated.teachers import TeacherStage
from fkd_med.federated.trainer import FederatedTrainer

__all__ = [
    "Availability",
    "ByWeight",
    "Chaos",
    "ClientData",
    "ClientRule",
    "ClientWorker",
    "EnsembleStage",
    "EnsembleTeachers",
    "FedDF",
    "FedNovaRule",
    "FedProx",
    "FederatedTrainer",
    "Federation",
    "Fraction",
    "GlobalDistillation",
    "Number",
    "Participation",
    "PooledTeacherStage",
    "PublicDigest",
    "RoundRobin",
    "ScaffoldRule",
    "ServerDistillation",
    "ServerWork",
    "TeachWhileAhead",
    "TeacherStage",
]
