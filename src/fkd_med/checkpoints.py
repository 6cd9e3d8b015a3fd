"""Checkpoints that are whole, verified and harmless: one file, replaced atomically, with its SHA-256 inside.

A checkpoint is torch's zip file, and its checksum is the zip's own comment: there is no second file that a crash,
a copy, a rename or a symbolic link could part from the first, and `torch.load` reads the file as ever. Nothing is
ever unpickled but tensors and plain containers (``weights_only=True``), whatever a caller asks for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO

from fkd_med.errors import ConfigError, RunError, first_line
from fkd_med.files import atomic_writer, open_regular
from fkd_med.foreign_files import refuse_inflated

_END = b"PK\x05\x06"  # a zip's last record: 22 bytes, the last two of which are the length of the comment after it
_TAG = b"fkd-sha256:"
_COMMENT = len(_TAG) + 64
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.Tensor, torch.Size, torch.dtype, torch.device)
_ADVICE = "Give another one (`--ckpt_path`), or start afresh with `--overwrite`."


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt after every round or epoch; ``--ckpt_path last`` goes on from it.

    Lightning's own ``save_last`` writes only when the monitored metric makes a new best, so that a resume would
    repeat closed rounds.

    Args:
        dirpath: folder of the checkpoints.
    """

    def __init__(self, dirpath: str | Path) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            save_top_k=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give the callbacks back what Lightning forgets of a run that goes on.

        That is the score of the last best, which it saves and does not load; and all it knows of the best so far where
        the run was moved or copied since: this folder takes the place of that one.
        """
        states = checkpoint.get("callbacks", {})
        old, new = states.get(self.state_key, {}).get("dirpath"), str(self.dirpath)
        folder = os.path.realpath(Path(str(trainer.ckpt_path)).parent)
        if old is None or folder != os.path.realpath(new):  # a checkpoint of another run
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.current_score = states.get(callback.state_key, {}).get("current_score")
        for state in states.values():
            if old != new and isinstance(state, dict) and state.get("dirpath") == old:
                state.update(_moved(state, old, new))


def _moved(value: Any, old: str, new: str) -> Any:
    """Return a callback's state with the folder `new` where it names files of `old`."""
    if isinstance(value, dict):
        return {_moved(key, old, new): _moved(inner, old, new) for key, inner in value.items()}
    if isinstance(value, str) and (value == old or os.path.dirname(value) == old):
        return new + value.removeprefix(old)
    return value


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints, written atomically with a checksum and read without running any code in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint`; see `write_checkpoint`."""
        if storage_options is not None:
            raise ConfigError("Checkpoints are files on a local disk; storage_options are not supported. Remove them.")
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, always with ``weights_only=True``; see `read_checkpoint`."""
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; a symbolic link is removed, not what it leads to."""
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> str:
    """Write `checkpoint` to `path`, durably and all at once, and return its SHA-256 (see `checkpoint_digest`).

    It is read back (without its tensors' data) before it replaces an earlier file.

    Raises:
        RunError: it holds something that could not be loaded again, or cannot be written; names the key or the file.
    """
    if "://" in str(path):
        raise ConfigError(f"Checkpoints are files on a local disk, not {path}. Give a local folder.")
    with atomic_writer(path) as file:
        torch.save(checkpoint, file)
        digest = _seal(file)
        file.seek(0)
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:
            raise RunError(
                f"Checkpoint {path} was not written, as it could not be loaded again: {_culprit(checkpoint, error)}. "
                "Keep only numbers, strings, lists, dictionaries and tensors in hyper-parameters and states."
            ) from error
    return digest


def read_checkpoint(path: str | Path, map_location: Any | None = "cpu") -> dict[str, Any]:
    """Return the checkpoint at `path`, its checksum verified; those of plain Lightning have none and are read too.

    Raises:
        RunError: there is none, or it is truncated, altered, something else, or holds objects other than tensors
            and plain containers (which are not executed). Names the file and the remedy.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            _verify(file, path)
            refuse_inflated(file, path, _ADVICE)
            file.seek(0)
            checkpoint = _load(file, path, map_location or "cpu")
    except FileNotFoundError as error:
        gone = " (it links to a file that is gone)" if path.is_symlink() else ""
        raise RunError(f"There is no checkpoint {path}{gone}. Check the path, or start without it.") from error
    except OSError as error:
        raise RunError(f"Checkpoint {path} cannot be read: {error.strerror}. Check the path.") from error
    if not isinstance(checkpoint, dict):
        raise RunError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint. {_ADVICE}")
    return checkpoint


def checkpoint_digest(path: str | Path) -> str:
    """Return the SHA-256 that names the checkpoint at `path`: over the file without the digest itself.

    Raises:
        RunError: there is no such file, or it is none of ours.
    """
    try:
        with open(path, "rb") as file:
            digest = _stored_digest(file)
    except OSError as error:
        raise RunError(f"Checkpoint {path} cannot be read: {error.strerror}. Check the path.") from error
    if len(digest) != 64:
        raise RunError(f"Checkpoint {path} carries no checksum: it is damaged or not from fkd-med. {_ADVICE}")
    return digest


def _seal(file: BinaryIO) -> str:
    """Turn the zip in `file` into one with its SHA-256 as comment."""
    file.seek(-22, os.SEEK_END)
    if file.read(4) != _END:
        raise RunError("torch.save wrote a zip file with a comment of its own, which this version does not expect.")
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT.to_bytes(2, "little"))
    file.write(b"\0" * _COMMENT)
    digest = _digest(file)
    file.seek(-_COMMENT, os.SEEK_END)
    file.write(_TAG + digest.encode())
    return digest


def _digest(file: BinaryIO) -> str:
    """SHA-256 of all but the comment, as hexadecimal."""
    rest = file.seek(0, os.SEEK_END) - _COMMENT
    file.seek(0)
    digest = hashlib.sha256()
    while rest:
        block = file.read(min(rest, 2**20))
        if not block:
            break
        digest.update(block)
        rest -= len(block)
    return digest.hexdigest()


def _stored_digest(file: BinaryIO) -> str:
    """The digest in the zip's comment, or "" if there is none; "cut" if the comment is not as long as announced."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 22 - _COMMENT))
    _, end, rest = file.read().rpartition(_END)
    comment = rest[18:]
    if end and int.from_bytes(rest[16:18], "little") != len(comment):
        return "cut"
    match = re.fullmatch(_TAG + rb"([0-9a-f]{64})", comment)
    return match[1].decode() if match else ""


def _verify(file: BinaryIO, path: Path) -> None:
    stored = _stored_digest(file)
    if stored and stored != _digest(file):
        raise RunError(f"Checkpoint {path} was altered or damaged: its checksum does not match. {_ADVICE}")
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise RunError(f"{path} is not a checkpoint, or one in torch's format before 1.6. {_ADVICE}")


def _load(file: BinaryIO, path: Path, map_location: Any) -> Any:
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({match[1]})" if match else ""
        raise RunError(
            f"Checkpoint {path} holds Python objects{what}, which fkd-med never loads: they could run any code. "
            f"Nothing was executed. {_ADVICE}"
        ) from error
    except Exception as error:  # a damaged zip gives errors of many kinds
        first = (str(error).splitlines() or [""])[0][:100]
        raise RunError(f"Checkpoint {path} is truncated or damaged ({first}). {_ADVICE}") from error


def _culprit(checkpoint: Any, error: Exception) -> str:
    """The first key that holds something else than plain containers and tensors, or else the error itself."""
    found = _find_foreign(checkpoint, "")
    return found or first_line(error)[:200]


def _find_foreign(value: Any, key: str) -> str:
    if isinstance(value, dict):
        children = [(f"{key}.{name}".lstrip("."), child) for name, child in value.items()]
    elif isinstance(value, list | tuple | set):
        children = [(f"{key}[{index}]", child) for index, child in enumerate(value)]
    else:
        plain = type(value) in _PLAIN or isinstance(value, torch.Tensor)
        return "" if plain else f"'{key}' is a {type(value).__module__}.{type(value).__qualname__}"
    return next(filter(None, (_find_foreign(child, name) for name, child in children)), "")
