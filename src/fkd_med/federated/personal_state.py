"""Shows an evaluation the tensors that stay with each client, as they belong to the new global student."""

from __future__ import annotations

from typing import Any

import lightning as L

from fkd_med.errors import ConfigError
from fkd_med.federated.client_state import ClientStates
from fkd_med.federated.federation import Federation
from fkd_med.federated.policy import images_of, recalibrated


def show_personal(
    server: L.LightningModule, federation: Federation, states: ClientStates, data: Any, clients: list[str]
) -> None:
    """Put the clients' own tensors where the server's evaluation, test and checkpoints find them.

    Args:
        server: the module with the new global student.
        federation: says which tensors stay, and whether BatchNorm is recalibrated.
        states: what clients keep.
        data: the data module.
        clients: those whose update is part of the round.

    Raises:
        ConfigError: the module cannot hold such tensors, or the data give no training images in order.
    """
    personal = getattr(server, "personal", None)
    if personal is None:
        raise ConfigError(
            f"This federation keeps a student, or parts of one, per client (aggregator, batch_norm or personal), "
            f"which {type(server).__name__} cannot hold: derive your module from fkd_med.modules.SegmentationModule."
        )
    personal.by_client |= {client: states.load(client).personal for client in clients}
    if federation.recalibrates:
        for client in data.client_names():
            personal.enter(client)  # statistics are of all the tensors that the client predicts with
            statistics = recalibrated(server, images_of(data, client))
            personal.leave()
            personal.by_client[client] = personal.by_client.get(client, {}) | statistics
