"""Federated training: the round recipe, the trainer that runs it, clients and their teachers."""

from fkd_med.federated.client import ClientWorker
from fkd_med.federated.client_data import ClientData
from fkd_med.federated.federation import Federation
from fkd_med.federated.teachers import TeacherStage
from fkd_med.federated.trainer import FederatedTrainer

__all__ = ["ClientData", "ClientWorker", "FederatedTrainer", "Federation", "TeacherStage"]
