"""Companions: what trains beside a student and stays with its client, in no state dict.

They are connectors (small layers between a student's features and its teacher's) and, in mutual distillation, the
teacher itself: part of training and of its optimizer, but in no message, no checkpoint that travels and no export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fkd_med.errors import ConfigError


class Companions(nn.ModuleDict):
    """Holds modules by name: one per distillation term that has a connector, and a teacher that trains.

    A registered part of the module that trains, so that they move to the device with it and DDP averages their
    gradients; but they add nothing to that module's ``state_dict`` and ask nothing of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_forgive)  # type: ignore[no-untyped-call]

    def of(self, name: str) -> nn.Module | None:
        """Return the connector of a term, or another companion, if there is one."""
        return dict(self.items()).get(name)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Add nothing to the state dict of the module around this one."""
        return {} if destination is None else destination

    def tensors(self) -> dict[str, Tensor]:
        """Return what `load_tensors` takes: copies of all tensors on the CPU, by name."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._held().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors of an earlier training; companions it did not have stay, those that are gone are left.

        Raises:
            ConfigError: a companion of that training had other tensors; names one.
        """
        held = self._held()
        known = {name.partition(".")[0] for name in tensors} & set(self.keys())
        for name in sorted(tensors.keys() | held.keys()):
            companion = name.partition(".")[0]
            if companion not in known:
                continue
            if name not in held or name not in tensors or held[name].shape != tensors[name].shape:
                raise ConfigError(
                    f"What was kept of {companion!r}, which trains beside the student, does not fit ({name} differs): "
                    "go on with the networks and the terms the run was started with."
                )
            held[name].data.copy_(tensors[name])

    def _held(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def _forgive(module: nn.Module, incompatible: Any) -> None:
    """Take these tensors off the list of those that a state dict lacks."""
    own = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not any(key == name or key.endswith(f"companions.{name}") for name in own)]
