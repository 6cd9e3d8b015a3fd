"""Connectors: small layers between a student's features and its teacher's, trained with the student and by nobody else.

They belong to a client: part of training and of its optimizer, but of no state dict, so they are in no message, no
checkpoint that travels and no export.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Connectors(nn.ModuleDict):
    """Holds one layer per distillation term that has a connector.

    A registered part of the module that trains, so that it moves to the device with it and DDP averages its
    gradients; but it adds nothing to that module's ``state_dict`` and asks nothing of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_forgive)  # type: ignore[no-untyped-call]

    def of(self, term: str) -> nn.Module | None:
        """Return the layer of a term, if it has one."""
        return dict(self.items()).get(term)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Add nothing to the state dict of the module around this one."""
        return {} if destination is None else destination

    def tensors(self) -> dict[str, Tensor]:
        """Return what `load_tensors` takes: copies of all tensors on the CPU, by name."""
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor.detach().cpu().clone() for name, tensor in held.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors of an earlier training; those of terms that are gone are left."""
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, tensor in held.items():
            if name in tensors and tensors[name].shape == tensor.shape:
                tensor.data.copy_(tensors[name])


def _forgive(module: nn.Module, incompatible: Any) -> None:
    """Take these tensors off the list of those that a state dict lacks."""
    own = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not any(key == name or key.endswith(f"connectors.{name}") for name in own)]
