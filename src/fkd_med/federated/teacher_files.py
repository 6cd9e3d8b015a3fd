"""Teachers as files: ours, and those a user brings, read without executing anything in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fkd_med.errors import RunError
from fkd_med.foreign_files import read_tensors, refuse_non_finite

KEPT_BYTES = 1 << 30  # of teachers in memory between rounds


def read_teacher(path: Path, client: str, network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a client's teacher.

    Args:
        path: a Lightning checkpoint, a state dict or a safetensors file.
        client: the client's name, for errors.
        network: what the tensors must fit; it is not changed.

    Raises:
        RunError: the file is missing, damaged or of another architecture; both architectures are named.
    """
    state = _network_state(read_tensors(path, f"The teacher of {client}", "model.teacher.checkpoints"))
    wanted = network.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [k for k in sorted(wanted.keys() & state.keys()) if wanted[k].shape != state[k].shape]
    if not (missing or extra or shapes):
        refuse_non_finite(state, f"The teacher of {client} in {path}")
        return state
    first = f"missing {', '.join(missing[:3]) or 'nothing'}, unknown {', '.join(extra[:3]) or 'nothing'}"
    if shapes:
        name = shapes[0]
        first = f"tensor {name} is {tuple(state[name].shape)} there and {tuple(wanted[name].shape)} here"
    raise RunError(
        f"The teacher of {client} in {path} does not fit {type(network).__name__}, the network of "
        f"model.teacher.module: {first}. Configure the architecture it was trained with, or give another file."
    )


class TeacherReader:
    """Reads teachers as `read_teacher` does, and may keep what it has read.

    The rounds of a federation ask for the same few files over and over. Kept are up to `KEPT_BYTES` of tensors, in each
    process (see ``federation.parallel``); another process is sent none of them.
    """

    def __init__(self) -> None:
        self.kept: dict[Path, dict[str, Tensor]] = {}
        self._keeps = False

    def begin(self, keeps: bool) -> None:
        """Forget what is kept, since the files may be others now, and keep what is read from now on or not."""
        self.kept.clear()
        self._keeps = keeps

    def read(self, path: Path, client: str, network: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a client's teacher, not to be changed; arguments and errors as of `read_teacher`."""
        if path in self.kept:
            return self.kept[path]
        state = read_teacher(path, client, network)
        if self._keeps and sum(t.nbytes for one in (*self.kept.values(), state) for t in one.values()) <= KEPT_BYTES:
            self.kept[path] = state
        return state

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": {}}


def is_whole(path: Path, key: str) -> bool:
    """Tell whether a teacher of our own lies at `path`, undamaged, with its note and of this key."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return bool(note["key"] == key and note["sha256"] == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _network_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the network's tensors out of a LightningModule's state dict."""
    inside = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    return inside or dict(state)
