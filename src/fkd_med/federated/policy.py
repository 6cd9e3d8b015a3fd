"""Which of the student's tensors travel, which stay with each client, and which are never trained."""

from __future__ import annotations

import copy
import difflib
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from fkd_med.communication import State
from fkd_med.errors import ConfigError
from fkd_med.modules.teacher_cache import every_image_once
from fkd_med.networks.eval_mode import evaluating

BatchNormPolicy = Literal["average", "local", "recalibrate"]


class TensorPolicy:
    """Divides the tensors of a module.

    Args:
        batch_norm: what becomes of BatchNorm's tensors, see `fkd_med.federated.Federation`.
        personal: name patterns of tensors that stay with each client.
        frozen: name patterns of tensors that are not trained and do not travel.
        everything_stays: alone, all tensors stay with their client.

    Raises:
        ConfigError: an unknown BatchNorm policy.
    """

    def __init__(
        self, batch_norm: BatchNormPolicy, personal: list[str], frozen: list[str], everything_stays: bool = False
    ) -> None:
        if batch_norm not in get_args(BatchNormPolicy):
            raise ConfigError(f"federation.batch_norm is {batch_norm!r}: give {', '.join(get_args(BatchNormPolicy))}.")
        self.batch_norm, self.personal, self.frozen = batch_norm, personal, frozen
        self.everything_stays = everything_stays

    def check(self, module: nn.Module) -> None:
        """Refuse patterns that match nothing, and policies that leave nothing to send or to train.

        Raises:
            ConfigError: names the pattern and the nearest tensors.
        """
        names = list(module.state_dict())
        for key, patterns in (("personal", self.personal), ("frozen", self.frozen)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    near = difflib.get_close_matches(pattern.rstrip("*."), names, n=3, cutoff=0.3) or names[:3]
                    raise ConfigError(
                        f"federation.{key}: {pattern!r} matches no tensor of the student; there are {', '.join(near)}."
                    )
        if not self.everything_stays and not self.travelling(module):
            raise ConfigError("federation: personal and frozen patterns leave no tensor to send.")
        if all(self.is_frozen(name) for name, _ in module.named_parameters()):
            raise ConfigError("federation.frozen: every parameter of the student is frozen, so nothing would train.")

    def staying(self, module: nn.Module) -> set[str]:
        """Return the names of the tensors that stay with each client."""
        names = list(module.state_dict())
        if self.everything_stays:
            return set(names)
        stay = {name for name in names if any(fnmatchcase(name, pattern) for pattern in self.personal)}
        if self.batch_norm == "average":
            return stay
        whole = self.batch_norm == "local"
        for path, layer in batch_norms(module).items():
            held = layer.state_dict() if whole else dict(layer.named_buffers())
            stay |= {f"{path}.{name}" for name in held if f"{path}.{name}" in names}
        return stay

    def travelling(self, module: nn.Module) -> list[str]:
        """Return the names of the tensors that travel, in the order of the state."""
        stay = self.staying(module)
        return [name for name in module.state_dict() if name not in stay and not self.is_frozen(name)]

    def is_frozen(self, name: str) -> bool:
        """Tell whether a tensor is never trained."""
        return any(fnmatchcase(name, pattern) for pattern in self.frozen)

    def freeze(self, module: nn.Module) -> None:
        """Keep the frozen parameters from being trained."""
        student = module.state_dict().keys()  # companions train whatever their names
        for name, parameter in module.named_parameters():
            if self.is_frozen(name) and name in student:
                parameter.requires_grad_(False)


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of a module, by path; those of companions, outside its state, are none of it."""
    held = {name.rpartition(".")[0] for name in module.state_dict()}
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, _BatchNorm) and path in held}


def images_of(data: Any, client: str) -> DataLoader[dict[str, Tensor]]:
    """Return a client's training images, each once and in order, to recalibrate with.

    Raises:
        ConfigError: the data module does not give them.
    """
    give = getattr(data, "client_train_eval_dataloader", None)
    if give is None:
        raise ConfigError(
            f"federation.batch_norm: recalibrate needs the training images in order, and {type(data).__name__} has no "
            "client_train_eval_dataloader: use average or local."
        )
    return every_image_once(give(client))


@torch.no_grad()
def recalibrated(module: nn.Module, loader: DataLoader[dict[str, Tensor]]) -> State:
    """Return BatchNorm's statistics as a module's weights and some images give them: means over all batches.

    The module is left as it was. Cumulative means over the batches, as of torch's ``momentum=None``.

    Args:
        module: maps images (N, C, H, W) to logits; on any device.
        loader: batches with ``image``, each image once.
    """
    layers = batch_norms(module)
    before = {path: (layer.momentum, copy.deepcopy(layer.state_dict())) for path, layer in layers.items()}
    first = next(module.parameters())
    with evaluating(module):
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        for batch in loader:
            module(batch["image"].to(first.device, first.dtype))  # a true half precision has made the weights small
    found = {f"{path}.{name}": b.detach().cpu().clone() for path, n in layers.items() for name, b in n.named_buffers()}
    for path, layer in layers.items():
        layer.momentum, state = before[path]
        layer.load_state_dict(state)
    return found
