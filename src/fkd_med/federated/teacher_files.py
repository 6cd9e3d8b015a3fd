"""Teachers as files: ours, and those a user brings, read without executing anything in them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from fkd_med.errors import RunError
from fkd_med.files import open_regular
from fkd_med.foreign_files import refuse_inflated, refuse_non_finite


def read_teacher(path: Path, client: str, network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a client's teacher.

    Args:
        path: a Lightning checkpoint, a state dict or a safetensors file.
        client: the client's name, for errors.
        network: what the tensors must fit; it is not changed.

    Raises:
        RunError: the file is missing, damaged or of another architecture; both architectures are named.
    """
    state = _network_state(read_tensors(path, client))
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


def is_whole(path: Path, key: str) -> bool:
    """Tell whether a teacher of our own lies at `path`, undamaged, with its note and of this key."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return bool(note["key"] == key and note["sha256"] == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_tensors(path: Path, name: str) -> Mapping[str, Any]:
    """Read tensors from a safetensors file or a torch file without executing anything in it."""
    try:
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                stored: Mapping[str, Any] = load(file.read())
            else:
                if zipfile.is_zipfile(file):
                    refuse_inflated(file, path)
                file.seek(0)
                stored = torch.load(file, map_location="cpu", weights_only=True)
        tensors: Mapping[str, Any] = stored.get("state_dict", stored)
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()):
            raise ValueError("it holds other things than named tensors")
        return tensors
    except FileNotFoundError as error:
        raise RunError(f"The teacher of {name}, {path}, does not exist: correct model.teacher.checkpoints.") from error
    except Exception as error:  # a damaged or foreign file gives errors of many kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnpicklingError):  # torch would advise to load it all the same
            first = "it holds Python objects, which could run any code; nothing was executed"
        raise RunError(
            f"The teacher of {name} in {path} cannot be read as tensors ({first}): give a "
            "Lightning checkpoint, a state dict or a safetensors file."
        ) from error


def _network_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the network's tensors out of a LightningModule's state dict."""
    inside = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    return inside or dict(state)
