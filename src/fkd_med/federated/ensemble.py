"""The ensemble of the partners' teachers: every client learns from the mean of all clients' teachers.

For images x the ensemble answers the mean of the members' logits, z(x) = 1/K sum_k z_k(x): AVGLOGITS of FedDF (Lin et
al. 2020), which distils it at the server; here each client does, on its own images. Its probabilities are the geometric
mean of the members', one of the two ways in which Hinton et al. (2015) combine an ensemble. In a federation the
teachers travel once for that, if the partners agree.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.federated.sharing import TeacherExchange
from fkd_med.federated.teachers import TeacherStage
from fkd_med.modules import SegmentationModule, TeacherSource
from fkd_med.networks import forward_padded


class MeanLogits(nn.Module):
    """Answers the mean of its members' logits, computed in float32 or better, in the order of the members.

    Args:
        members: networks, images (N, C, H, W) to logits (N, K, H, W) of the same K.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits (N, K, H, W) for images (N, C, H, W); each member pads them as it needs.

        Raises:
            ConfigError: the members answer in different shapes.
        """
        total: Tensor | None = None
        for member in self.members:
            logits = forward_padded(member, x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if total is not None and total.shape != logits.shape:
                raise ConfigError(
                    f"An ensemble's teachers answer in shapes {tuple(total.shape)} and {tuple(logits.shape)}: their "
                    "logits have no mean. Give all the same classes."
                )
            total = logits if total is None else total + logits
        assert total is not None
        return total / len(self.members)


class EnsembleTeachers(TeacherSource):
    """Gives every client the mean of all clients' teachers, of which each client has trained or brought its own.

    In a federation they are shared once, before the first round (`federation.share_teachers`); where clients train
    alone, each has its own teacher and nothing else. Without a federation, the pooled data are distilled from the mean
    of the teachers of all clients in it.

    Args:
        teachers: where each client's own teacher comes from.
    """

    shares = True

    def __init__(self, teachers: TeacherSource) -> None:
        self.teachers = teachers
        self._members: list[str] = []  # by name, so that the order of the clients changes no bit
        self._exchange: TeacherExchange | None = None

    @property
    def epochs(self) -> int:
        """How long one teacher trains, for the progress bar."""
        return int(getattr(self.teachers, "epochs", 1))

    # --- before any training ----------------------------------------------------------------------------------

    def check_names(self, clients: list[str]) -> None:
        """Refuse a configuration that names clients which do not exist."""
        self.teachers.check_names(clients)

    def check_fits(self, image: Tensor, classes: int, alone: bool) -> None:
        """Refuse members that cannot be trained on such images."""
        self.teachers.check_fits(image, classes, alone)

    def check_trained(self, clients: Sequence[str | None]) -> None:
        """Refuse untrained members."""
        self.teachers.check_trained(clients)

    def check_taps(self, taps: list[str]) -> None:
        """Refuse taps on features: those of different teachers have no common channels, so their mean says nothing.

        Raises:
            ConfigError: names the taps and the remedy.
        """
        if taps:
            raise ConfigError(
                f"model.losses taps features of the teacher ({', '.join(taps)}), and an ensemble of teachers has only "
                "logits: leave teacher_tap at logits, or let each client learn from its own teacher "
                "(fkd_med.federated.TeacherStage)."
            )

    def architecture(self) -> nn.Module | None:
        """Return a network of the members' architecture, whose logits are shaped as the ensemble's."""
        return self.teachers.architecture()

    def alone(self) -> TeacherSource:
        """Return the source of each client's own teacher."""
        return self.teachers

    # --- making sure of them ----------------------------------------------------------------------------------

    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        """Make sure of a client's own teacher, its share in the ensemble; of all clients' for the pool of all.

        Args:
            client: the client; ``None`` is the pool of all clients.
            data: the client data.
            options: see `TeacherSource.ensure`; a client of a federation gets its partners' teachers by `share`.

        Returns:
            The checkpoint of the client's own teacher; of the pool, the first client's.

        Raises:
            ConfigError: there are no partners.
        """
        if client is not None and options.get("federated"):
            return self.teachers.ensure(client, data, **options)
        if client is not None or not hasattr(data, "client_names"):
            here = f"client {client} trains alone" if client is not None else f"{type(data).__name__} names no clients"
            raise ConfigError(
                f"An ensemble needs the teachers of several clients, and {here}: use its own teacher "
                "(fkd_med.federated.TeacherStage), a federation, or data of several clients."
            )
        self._members = sorted(data.client_names())
        paths = [self.teachers.ensure(name, data, **options) for name in self._members]
        return paths[0]

    def forget(self) -> None:
        """Keep no teachers in memory any longer."""
        self.teachers.forget()

    def is_busy(self, client: str | None, data: Any, **options: Any) -> bool:
        """Return whether another run trains the client's own teacher just now."""
        return client is not None and self.teachers.is_busy(client, data, **options)

    def share(self, clients: list[str], exchange: TeacherExchange) -> None:
        """Let each client's teacher travel to all others, one after the other."""
        self._members, self._exchange = sorted(clients), exchange
        for client in self._members:
            if exchange.writes:
                partners = [name for name in self._members if name != client]
                exchange.send(client, partners, self.teachers.load(client))
        exchange.barrier()

    # --- handing them out -------------------------------------------------------------------------------------

    def load(self, client: str | None) -> nn.Module:
        """Return the ensemble for a client, on the CPU; its members are those that travelled. Call `share` first.

        For the pool of all clients nothing travels; call `ensure` first.
        """
        exchange = self._exchange_of(client)
        if exchange is None:
            return MeanLogits([self.teachers.load(name) for name in self._members])
        return MeanLogits([self._received(name, exchange) for name in self._members])

    def digest(self, client: str | None) -> str:
        """Return a hash of all members' weights, in the order in which they are added."""
        exchange = self._exchange_of(client)
        member = self.teachers.digest if exchange is None else exchange.digest
        text = "\n".join(["mean of logits", *(member(name) for name in self._members)])
        return hashlib.sha256(text.encode()).hexdigest()

    def maps_folder(self) -> Path | None:
        """Return the folder of the teacher caches, that of the members."""
        return self.teachers.maps_folder()

    def _received(self, name: str, exchange: TeacherExchange) -> nn.Module:
        network = copy.deepcopy(self.architecture())
        assert network is not None
        network.load_state_dict(exchange.receive(name))
        return network

    def _exchange_of(self, client: str | None) -> TeacherExchange | None:
        """Return how the members came to a client; nothing travels to the pool of all.

        Raises:
            ConfigError: they have not come yet.
        """
        exchange = None if client is None else self._exchange
        missing = exchange is None if client is not None else not self._members
        if missing or (client is not None and client not in self._members):
            raise ConfigError(
                f"The teachers of {client or 'the clients'} and its partners are not here yet: call ensure for "
                "every client, and share in a federation, before load."
            )
        return exchange


class EnsembleStage(EnsembleTeachers):
    """Trains or takes one teacher per client, as TeacherStage, and gives every client the mean of all of them.

    Its settings are those of TeacherStage, so an overlay that names this class makes an ensemble of the teachers of any
    configuration, found again in the same store.

    Args:
        module: how a teacher is trained; each client trains a copy of it.
        epochs: epochs over the client's training images; the weights of the best validation Dice are kept.
        store: folder of the teachers, outside the run directory.
        checkpoints: teachers you bring, by client; Lightning checkpoints, state dicts or safetensors files.
    """

    def __init__(
        self,
        module: SegmentationModule,
        epochs: int = 50,
        store: str = "teachers",
        checkpoints: dict[str, str] | None = None,
    ) -> None:
        super().__init__(TeacherStage(module, epochs, store, checkpoints))
