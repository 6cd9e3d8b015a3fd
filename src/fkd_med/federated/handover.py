"""What a process beside the run's own gets: once all that training a client needs, and what each round starts from.

Only the first is pickled, by the run for a process that it starts itself. It holds no optimizer state, no trainer and
nothing of the server; teachers and their maps are handed over as the files that they are.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from fkd_med.aggregation import FedAvg
from fkd_med.communication import Broadcast, Ledger, State
from fkd_med.distillation import TeacherMaps
from fkd_med.errors import ConfigError
from fkd_med.federated.client import ClientWorker
from fkd_med.federated.client_data import ClientData
from fkd_med.federated.exchange import Exchange
from fkd_med.federated.federation import Federation


@dataclass
class Handover:
    """All that training any client of a run needs.

    Args:
        module: the server's module, on the CPU.
        data: images by client.
        federation: the part of the recipe that is the clients' own.
        exchange: takes updates into the journal; counts nothing.
        maps: cached maps of the clients' teachers.
        flags: hardware and numerics flags of the inner Trainers.
        seed: the run's seed.
        states: folder of what clients keep.
        threads: CPU threads.
        matmul: precision of float32 products of matrices, which a script may have set.
    """

    module: L.LightningModule
    data: ClientData
    federation: Federation
    exchange: Exchange
    maps: Mapping[str, TeacherMaps]
    flags: dict[str, Any]
    seed: int
    states: Path
    threads: int
    matmul: str

    @classmethod
    def of(cls, worker: ClientWorker, exchange: Exchange, maps: Mapping[str, TeacherMaps]) -> Handover:
        """Return what goes to other processes of what the run's own has."""
        module = copy.deepcopy(worker.module).cpu()
        module.__dict__.pop("configure_optimizers", None)  # the server's stand-in, see `serving`
        data = copy.copy(worker.data)
        if hasattr(data, "trainer"):
            data.trainer = None
        sending = copy.copy(exchange)
        sending.ledger = Ledger()
        return cls(
            module, data, _of_clients(worker.federation), sending, dict(maps), worker.flags, worker.seed,
            worker.states.folder, torch.get_num_threads(), torch.get_float32_matmul_precision(),
        )  # fmt: skip

    def packed(self) -> bytes:
        """Return this as bytes; call `check` once before."""
        return pickle.dumps(self)

    def check(self) -> None:
        """Refuse what cannot go to another process.

        Raises:
            ConfigError: names the key and the reason.
        """
        parts = {
            "model": self.module,
            "data": self.data,
            "federation.client_rules": self.federation.client_rules,
            "federation.client_callbacks": self.federation.client_callbacks,
            "federation": self.federation,
            "trainer": self.flags,
            "the run": self,
        }
        for key, part in parts.items():
            try:
                pickle.Pickler(_Nowhere()).dump(part)
            except Exception as error:
                raise _stays(key, part, error) from error


class _Nowhere:
    """A file that keeps nothing: a teacher may be large."""

    def write(self, data: Any) -> int:
        """Take some bytes."""
        return len(data)


@dataclass(frozen=True)
class RoundStart:
    """What the clients of a round start from.

    Args:
        broadcast: what the server sent, as clients unpack it.
        server: all tensors of the server's module: those that do not travel too.
        versions: whose state of which round is current.
    """

    broadcast: Broadcast
    server: State
    versions: dict[str, int]

    def packed(self) -> bytes:
        """Return this as bytes."""
        buffer = io.BytesIO()
        sent = {"round": self.broadcast.round, "state": self.broadcast.state, "extras": self.broadcast.extras}
        torch.save(sent | {"server": self.server, "versions": self.versions}, buffer)
        return buffer.getvalue()

    @classmethod
    def unpacked(cls, data: bytes) -> RoundStart:
        """Return what `packed` made bytes of."""
        sent = torch.load(io.BytesIO(data), weights_only=True)
        return cls(Broadcast(sent["round"], sent["state"], sent["extras"]), sent["server"], sent["versions"])


def visible_devices(flags: Mapping[str, Any], device: torch.device) -> list[str]:
    """Return the GPUs that processes share out among them, as CUDA_VISIBLE_DEVICES names them; none to share out.

    Args:
        flags: those of the run's Trainer; a list of devices (also as text, ``1,``) is the user's choice, for all.
        device: the run's own.
    """
    asked = flags.get("devices")
    if device.type != "cuda" or isinstance(asked, list | tuple) or (isinstance(asked, str) and "," in asked):
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _of_clients(federation: Federation) -> Federation:
    """Return the recipe without what only the server does."""
    recipe = copy.copy(federation)
    recipe.server_distillation = recipe.firewall = None
    if recipe.aggregator is not None:  # that there is one is all that clients ask
        recipe.aggregator = FedAvg()
    return recipe


def _stays(key: str, part: object, error: Exception) -> ConfigError:
    name = "" if isinstance(part, list | dict) else f" ({type(part).__name__})"
    return ConfigError(
        f"federation.parallel: {key}{name} cannot go to another process: {error}. Give functions and classes that a "
        "module defines (no lambda, nothing defined inside a function) and that hold no open files or locks, or set "
        "federation.parallel: 1."
    )
