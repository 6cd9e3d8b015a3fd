"""What a DistillationModule knows of teachers: a source that makes sure one exists and hands it out, frozen."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fkd_med.distillation import Taps
from fkd_med.errors import ConfigError


class TeacherSource(ABC):
    """Where a client's teacher comes from."""

    shares: bool = False
    """Whether clients learn from one another's teachers, which for that travel once (`share`)."""

    one_for_all: bool = False
    """Whether all clients have the same teacher: one client's `ensure` is enough."""

    @abstractmethod
    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        """Return the checkpoint of the client's teacher, training it first if there is none.

        Args:
            client: the client's name; ``None`` is the pool of all clients.
            data: the client data the teacher trains on.
            options: how to train: the trainer flags and the reporter of the run, and whether the client is one of a
                federation (``federated``).
        """

    def is_busy(self, client: str | None, data: Any, **options: Any) -> bool:
        """Return whether another run trains this client's teacher just now, so that `ensure` would wait for it."""
        return False

    def check_names(self, clients: list[str]) -> None:  # noqa: B027 - most sources name nobody
        """Refuse a configuration that names clients which do not exist; called before any training."""

    def check_trained(self, clients: Sequence[str | None]) -> None:  # noqa: B027 - most sources give trained ones
        """Refuse to give teachers that know nothing to a student that only copies them; called before any training."""

    def check_fits(self, image: Tensor, classes: int, alone: bool) -> None:  # noqa: B027 - most sources train no network
        """Refuse, by a dry pass, a network or a loss that cannot be trained on such images; before any training."""

    def check_taps(self, taps: list[str]) -> None:  # noqa: B027 - most sources hand out networks with features
        """Refuse taps of the teacher, beside its logits, that it cannot have; called when a module is built."""

    def share(self, clients: list[str], exchange: Any) -> None:  # noqa: B027 - most teachers stay where they are
        """Let every client's teacher travel to its partners, if the source `shares`; after `ensure` of all clients."""

    def alone(self) -> TeacherSource:
        """Return what a client learns from where nothing travels."""
        return self

    def forget(self) -> None:  # noqa: B027 - most sources keep nothing in memory
        """Let go of teachers that are kept in memory between rounds; called after a federated training."""

    @abstractmethod
    def load(self, client: str | None) -> nn.Module:
        """Return the client's teacher network, on the CPU. Call `ensure` first."""

    def architecture(self) -> nn.Module | None:
        """Return a network like those `load` returns, trained or not, to check taps on before any training."""
        return None

    def digest(self, client: str | None) -> str:
        """Return a hash of the weights of a client's teacher. Call `ensure` first."""
        return digest_of(self.load(client))

    def maps_folder(self) -> Path | None:
        """Return where a client's teacher cache may be kept; None keeps none, and the teacher runs at every step."""
        return None


def digest_of(network: nn.Module) -> str:
    """Return a hash of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy knows no bfloat16
        digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()


def freeze(teacher: nn.Module) -> nn.Module:
    """Put a teacher into eval mode without gradients: its BatchNorm never updates again."""
    teacher.eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


class Teaching:
    """Holds a module's teacher source and its teacher of the moment.

    A plain object, so that torch registers neither as part of the student; and copies of a student (each client
    trains one) share what it holds, instead of copying a big network.
    """

    def __init__(self, source: TeacherSource | None, network: nn.Module | None = None) -> None:
        self.source = source
        self.network = network
        self.is_prepared = False  # the teacher came from the source, as network or as cached maps
        self.is_cached = False  # batches bring the teacher's maps, so no network is needed
        self._taps: Taps | None = None

    def attach(self, network: nn.Module | None) -> None:
        """Take another network, or none, and take the hooks off the last one."""
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
        self.network, self.is_prepared, self.is_cached = network, False, False

    def taps(self, paths: list[str]) -> Taps:
        """Return the network with these taps."""
        if self.network is None:
            raise ConfigError("Distillation needs a teacher: give model.teacher, or attach_teacher(network).")
        if self._taps is None or self._taps.paths != paths:
            if self._taps is not None:
                self._taps.remove()
            self._taps = Taps(self.network, paths, f"the teacher {type(self.network).__name__}")
        return self._taps

    def __deepcopy__(self, memo: dict[int, Any]) -> Teaching:
        """Copy the holder, not what it holds."""
        copied = Teaching(self.source, self.network)
        copied.is_prepared, copied.is_cached = self.is_prepared, self.is_cached
        return copied
