"""What a file of weights from elsewhere must not do: grow in memory, or hold numbers that are none.

Reading runs no code in it (``weights_only=True``, safetensors); these are the dangers that are left.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fkd_med.errors import RunError


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
