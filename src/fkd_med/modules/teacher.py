"""What a DistillationModule knows of teachers: a source that makes sure one exists and hands it out, frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import nn


class TeacherSource(ABC):
    """Where a client's teacher comes from."""

    @abstractmethod
    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        """Return the checkpoint of the client's teacher, training it first if there is none.

        Args:
            client: the client's name; ``None`` is the pool of all clients.
            data: the client data the teacher trains on.
            options: how to train: the trainer flags and the reporter of the run.
        """

    def check_names(self, clients: list[str]) -> None:  # noqa: B027 - most sources name nobody
        """Refuse a configuration that names clients which do not exist; called before any training."""

    @abstractmethod
    def load(self, client: str | None) -> nn.Module:
        """Return the client's teacher network, on the CPU. Call `ensure` first."""


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Teaching:
        """Copy the holder, not what it holds."""
        return Teaching(self.source, self.network)
