"""What a client of a round starts from, as one digest: two trainings of equal opening give the same update.

It names the closed round before (the server's tensors and the broadcast as clients unpack it), what the client keeps,
and all settings that its training depends on; never paths, and nothing that only the server does with the updates.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fkd_med.communication import Broadcast
from fkd_med.federated.teacher_key import describe, describe_augmentation
from fkd_med.files import file_digest
from fkd_med.modules import DistillationModule, SegmentationModule
from fkd_med.modules.settings import is_plain
from fkd_med.modules.teacher_cache import unlabelled_images
from fkd_med.ranks import count_processes

if TYPE_CHECKING:
    from fkd_med.federated.client import ClientWorker

# Of a federation, what a client's own training and sending depend on.
_OF_CLIENTS = (
    "rounds", "local_epochs", "local_steps", "is_local", "client_rules", "client_callbacks", "policy",
    "optimizer_state", "chaos", "uplink", "public",
)  # fmt: skip
_OF_DATA = ("batch_size", "seed", "unlabelled")  # of a data module; images are named by their hashes
# Of a module, what the run itself changes, or another part of the opening names.
_CHANGES = {
    "training", "clock", "arm", "model_name", "evaluated", "personal", "companions", "network", "optimizer",
    "scheduler",
}  # fmt: skip
_DEPTH = 8


class Openings:
    """Computes the openings of a run.

    Args:
        worker: trains the clients; its module is the server's.
    """

    def __init__(self, worker: ClientWorker) -> None:
        self.worker = worker
        self._settings = _settings(worker)
        self._clients: dict[str, Any] = {}
        self._round: tuple[Broadcast, str] | None = None

    def digest(self, client: str, broadcast: Broadcast) -> str:
        """Return the SHA-256 of all that decides a client's training in the round of `broadcast`."""
        return _sha256([client, broadcast.round, self._settings, self._of(client), self._start(broadcast)])

    def _of(self, client: str) -> list[Any]:
        """Return what is the client's own: images, teacher, and the state it has kept."""
        worker = self.worker
        if client not in self._clients:
            module, teacher = worker.module, None
            if isinstance(module, DistillationModule) and module.active_losses and module.teacher_source is not None:
                teacher = module.teacher_source.digest(client)
            images = [worker.data.fingerprint(client), *unlabelled_images(worker.data, client).values()]
            self._clients[client] = [*images, worker.data.num_examples(client), teacher]
        version = worker.states.versions.get(client)
        state = None if version is None else file_digest(worker.states.path(client, version))
        return [*self._clients[client], state]

    def _start(self, broadcast: Broadcast) -> str:
        """Return the hash of the tensors a round begins with; they are the same for all its clients."""
        if self._round is None or self._round[0] is not broadcast:
            sent = {"state": broadcast.state, **{f"extras/{name}": state for name, state in broadcast.extras.items()}}
            tensors = {f"{part}/{name}": tensor for part, state in sent.items() for name, tensor in state.items()}
            held = {f"server/{name}": tensor for name, tensor in self.worker.module.state_dict().items()}
            self._round = (broadcast, _digest(tensors | held))
        return self._round[1]


def _settings(worker: ClientWorker) -> str:
    """Return the hash of the settings of a run that its clients' training depends on."""
    module, data, federation = worker.module, worker.data, worker.federation
    own = {name: value for name, value in vars(module).items() if name not in _CHANGES and not name.startswith("_")}
    return _sha256({
        "seed": worker.seed,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processes": count_processes(),
        "module": describe(module) if isinstance(module, SegmentationModule) else str(module),
        "configuration": dict(getattr(module, "hparams", {})),
        "attributes": _described(own),
        "federation": {name: _described(getattr(federation, name)) for name in _OF_CLIENTS},
        "flags": {name: _described(value) for name, value in sorted(worker.flags.items())},
        "data": [type(data).__qualname__, *(getattr(data, name, None) for name in _OF_DATA)],
        "augmentation": describe_augmentation(getattr(data, "augmentation", None)),
    })  # fmt: skip


def _described(thing: Any, depth: int = _DEPTH) -> Any:
    """Describe an object by its class and attributes, all the way down."""
    if is_plain(thing):
        return thing
    if depth == 0:
        return type(thing).__qualname__
    if isinstance(thing, Tensor):
        return ["tensor", _digest({"": thing})]
    if isinstance(thing, Mapping):
        return {str(key): _described(value, depth - 1) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set | frozenset):
        parts = [_described(value, depth - 1) for value in thing]
        return sorted(parts, key=str) if isinstance(thing, set | frozenset) else parts
    if isinstance(thing, type) or not hasattr(thing, "__dict__"):
        return str(thing)
    attributes = {name: _described(value, depth - 1) for name, value in sorted(vars(thing).items())}
    kind = getattr(thing, "__qualname__", type(thing).__qualname__)  # a function's own name says more than its class
    return [kind, str(thing) if isinstance(thing, nn.Module) else "", attributes]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(raw.dtype), list(raw.shape)]).encode())
        digest.update(raw.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(described: Any) -> str:
    """Hash a description; objects without a text of their own show their address, which no other process shares."""
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(described, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()
