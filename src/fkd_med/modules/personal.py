"""Tensors that stay with a client: what a client evaluates with is always merge(global, personal[client])."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def merge(shared: Mapping[str, Tensor], personal: Mapping[str, Tensor] | None) -> State:
    """Return the shared state with a client's own tensors in place of the shared ones."""
    return {**shared, **(personal or {})}


class PersonalTensors:
    """Holds each client's personal tensors for one module and puts them in and out of it.

    Args:
        module: the network whose ``state_dict`` names the tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._shared: State | None = None
        self.by_client: dict[str, State] = {}

    def enter(self, client: str | None) -> None:
        """Load the merged state of `client`; nothing happens while no client has personal tensors."""
        if not self.by_client:
            return
        if self._shared is None:
            self._shared = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        self._module.load_state_dict(merge(self._shared, self.by_client.get(client or "")))

    def leave(self) -> None:
        """Put the shared tensors back."""
        if self._shared is not None:
            self._module.load_state_dict(self._shared)
            self._shared = None

    def state_dict(self) -> dict[str, State]:
        """Return the personal tensors by client, on the CPU."""
        return {client: {k: v.cpu() for k, v in state.items()} for client, state in self.by_client.items()}

    def load_state_dict(self, by_client: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over tensors that `state_dict` returned."""
        self._shared = None
        self.by_client = {
            client: {k: torch.as_tensor(v) for k, v in state.items()} for client, state in by_client.items()
        }
