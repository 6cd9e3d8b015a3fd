"""Files of weights from elsewhere, read as tensors: no code in them is run (``weights_only=True``, safetensors).

Dangers that are left are refused: a file that grows in memory, and numbers that are none.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from safetensors.torch import load
from torch import Tensor

from fkd_med.errors import RunError, first_line
from fkd_med.files import open_regular


def read_tensors(path: Path, what: str, setting: str) -> Mapping[str, Tensor]:
    """Read named tensors from a safetensors or torch file, or a Lightning checkpoint, and run nothing in it.

    Args:
        path: the file.
        what: how errors call its content, as "The teacher of a".
        setting: the key to correct where there is no such file.

    Raises:
        RunError: it is missing, damaged, or holds other things.
    """
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
        raise RunError(f"{what}, {path}, does not exist: correct {setting}.") from error
    except Exception as error:  # a damaged or foreign file gives errors of many kinds
        first = first_line(error)
        if isinstance(error, UnpicklingError):  # torch would advise to load it all the same
            first = "it holds Python objects, which could run any code; nothing was executed"
        raise RunError(
            f"{what} in {path} cannot be read as tensors ({first}): give a "
            "Lightning checkpoint, a state dict or a safetensors file."
        ) from error


def refuse_inflated(file: BinaryIO, path: Path, advice: str = "Give another file.") -> None:
    """Refuse a zip that would grow in memory: torch stores its tensors as they are, so no file of its own does.

    Raises:
        RunError: it is no readable zip, or holds compressed or overlapping records.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise RunError(f"{path} is truncated or damaged ({error}). {advice}") from error
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > size:
        raise RunError(f"{path} announces more than it holds, as no checkpoint of torch does. {advice}")


def refuse_non_finite(state: Mapping[str, Any], what: str) -> None:
    """Refuse weights with NaN or infinity: a network with such answers nonsense, and as calmly as any other.

    Raises:
        RunError: names the first such tensor.
    """
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise RunError(
                f"{what} has NaN or infinity in {name}: its training diverged, or it was altered. Give another file."
            )
