"""By what a teacher is found again: everything that decides its weights, and nothing else.

The client's images, the module's whole configuration, the seeds, the preprocessing, the precision and the network's
tensors; never devices or paths. Nor its first weights, which a run draws after those of its student: hospitals keep
their teachers whatever the student, and of two runs that would draw one differently, the first one does.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fkd_med.modules import SegmentationModule
from fkd_med.modules.settings import is_plain, teacher_configuration
from fkd_med.modules.teacher import digest_of
from fkd_med.modules.teacher_cache import signature
from fkd_med.seeding import global_seed

_NUMERICS = (
    "precision", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "limit_train_batches",
    "limit_val_batches",
)  # fmt: skip


def teacher_key(
    module: SegmentationModule, epochs: int, client: str | None, data: Any, flags: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the key of a teacher and, readable, what went into it.

    Args:
        module: how the teacher is trained.
        epochs: for how long.
        client: whose images it sees; ``None`` is the pool of all clients.
        data: the client data.
        flags: hardware and numerics flags of the training; only the numerics count.
    """
    description = {
        "images": data.fingerprint(client),
        "module": describe(module),
        "epochs": epochs,
        "seed": global_seed(),
        "data_seed": getattr(data, "seed", None),  # of order and augmentation, where it is not that of the run
        "batch_size": getattr(data, "batch_size", None),
        "augmentation": describe_augmentation(getattr(data, "augmentation", None)),
        **{name: str(flags[name]) for name in _NUMERICS if name in flags},
    }
    if epochs == 0:  # nothing but its first weights decides it
        description["weights"] = digest_of(module.network)
    # Objects without a text of their own show their address, which no other process shares.
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(description, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest(), description


def describe(module: SegmentationModule) -> dict[str, Any]:
    """Describe all that decides what a module's training gives, from the objects themselves."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = module.optimizer([parameter])
    described: dict[str, Any] = {
        "configuration": _without_files(teacher_configuration(module), getattr(module.network, "files", ())),
        "network": [str(module.network), signature(module.network)],
        "tensors": {k: [str(v.dtype), *v.shape] for k, v in module.network.state_dict().items()},
        "loss": [[type(part).__name__, _plain_attributes(part)] for part in module.loss.modules()],
        "optimizer": [type(optimizer).__name__, {k: str(v) for k, v in optimizer.defaults.items()}],
    }
    if module.scheduler is not None:
        scheduler = module.scheduler(optimizer)
        described["scheduler"] = [type(scheduler).__name__, _plain_attributes(scheduler), module.scheduler_interval]
    return described


def _without_files(configuration: Any, files: Sequence[str]) -> Any:
    """Leave out a network's arguments that name files: where a file lies says nothing, its text tells what is in it."""
    if not files or not isinstance(configuration, Mapping):
        return configuration
    left = copy.deepcopy(dict(configuration))
    arguments = left.get("init_args", {}).get("network", {}).get("init_args", {})
    for name in files:
        arguments.pop(name, None)
    return left


def _plain_attributes(thing: Any) -> dict[str, str]:
    """Return the public numbers and words of an object; anything else may show an address, different each time."""
    return {k: str(v) for k, v in sorted(vars(thing).items()) if not k.startswith("_") and is_plain(v)}


def describe_augmentation(augmentation: Any) -> Any:
    """Describe the transforms of an augmentation, or return None."""
    if augmentation is None:
        return None
    stages = {k: v for k, v in vars(augmentation).items() if v is not None}
    return {k: str(v.to_dict()) if hasattr(v, "to_dict") else str(v) for k, v in sorted(stages.items())}
