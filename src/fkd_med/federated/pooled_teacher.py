"""One teacher of all clients' images: what distillation could give with a good teacher, for studies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fkd_med.errors import ConfigError
from fkd_med.federated.teachers import POOLED, TeacherStage
from fkd_med.modules import TeacherSource


class PooledTeacherStage(TeacherStage):
    """Trains one teacher on the images of all clients together and gives it to every client: a bound, not a method.

    No federation can have it, as all images would have to lie in one place. In a study it tells a bad teacher from a
    distillation that does not work: what it gives, better teachers could give, such as pretrained ones. Its bytes are
    not counted. The settings are those of TeacherStage, and so is the teacher that distillation on pooled images has.

    Args:
        module: how the teacher is trained.
        epochs: epochs over all clients' training images; the weights of the best validation Dice are kept.
        store: folder of the teachers, outside the run directory.
        checkpoints: a teacher you bring, as that of ``all-clients``.
    """

    one_for_all = True

    def check_names(self, clients: list[str]) -> None:
        """Refuse checkpoints of single clients, which nobody would learn from (ConfigError)."""
        others = sorted(self.checkpoints.keys() - {POOLED})
        if others:
            raise ConfigError(
                f"model.teacher.checkpoints brings a teacher of {others[0]}, and with PooledTeacherStage all clients "
                f"learn from one: name it {POOLED}, or use fkd_med.federated.TeacherStage."
            )
        super().check_names(clients)

    def check_trained(self, clients: Sequence[str | None]) -> None:
        """Refuse an untrained teacher."""
        super().check_trained([None])

    def alone(self) -> TeacherSource:
        """Return what a client learns from where nothing travels: a teacher of its own images."""
        return TeacherStage(self.module, self.epochs, str(self.store))

    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        """Return the one teacher, training it if there is none; see `TeacherStage.ensure`."""
        return super().ensure(None, data, **options)

    def is_busy(self, client: str | None, data: Any, **options: Any) -> bool:
        """Return whether another run trains the one teacher just now."""
        return super().is_busy(None, data, **options)

    def load(self, client: str | None) -> nn.Module:
        """Return the one teacher; call `ensure` first."""
        return super().load(None)

    def digest(self, client: str | None) -> str:
        """Return the hash of its file; call `ensure` first."""
        return super().digest(None)
