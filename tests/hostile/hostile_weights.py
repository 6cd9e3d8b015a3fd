"""Checkpoints, teachers and their maps: cut, forged, with code in them, of other networks, of later versions."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_place import Case, Place
from safetensors.torch import load_file, save_file

from fkd_med.checkpoints import read_checkpoint, write_checkpoint

Spoil = Callable[[Path, Path], object]  # the file and the sentinel


HUGE = {"class_path": "fkd_med.networks.ResUNet", "init_args": {"width": 10**6}}


class Evil:
    """Makes the sentinel when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.sentinel}'",)


def zip_bomb(path: Path, sentinel: Path) -> None:
    """A checkpoint whose records are compressed zeros: 64 MiB in a file of 64 KiB."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as whole, zipfile.ZipFile(path, "w") as bomb:
        for name in whole.namelist():
            bomb.writestr(name, b"\0" * 2**26 if name.endswith("data/0") else whole.read(name), zipfile.ZIP_DEFLATED)


def changed(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    """Edit a checkpoint and seal it again with a right checksum."""

    def spoil(path: Path, sentinel: Path) -> None:
        checkpoint = read_checkpoint(path)
        edit(checkpoint)
        write_checkpoint(checkpoint, path)

    return spoil


def first_weight(checkpoint: dict[str, Any]) -> torch.Tensor:
    return next(t for t in checkpoint["state_dict"].values() if t.is_floating_point())


def other_shapes(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    state.update({name: torch.zeros(3, *tensor.shape) for name, tensor in state.items()})


def no_names(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {f"other.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}


def flipped(path: Path, sentinel: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


ANY: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "cut": (lambda path, _: path.write_bytes(path.read_bytes()[:5000]), ("truncated",)),
    "a flipped bit": (flipped, ("altered",)),
    "text": (lambda path, _: path.write_text("weights"), ("not a checkpoint",)),
    "empty": (lambda path, _: path.write_bytes(b""), ("not a checkpoint",)),
    "with code": (lambda path, sentinel: torch.save({"state_dict": Evil(sentinel)}, path), ("Python objects",)),
    "a pickle": (lambda path, sentinel: path.write_bytes(pickle.dumps(Evil(sentinel))), ("not a checkpoint",)),
    "zip bomb": (zip_bomb, ("announces more",)),
    "NaN in weights": (changed(lambda c: first_weight(c).fill_(float("nan"))), ("NaN",)),
    "other shapes": (changed(other_shapes), ("network",)),
    "other names": (changed(no_names), ("network",)),
    "a later version": (changed(lambda c: c["fkd_med"].update(version=9)), ("version 9",)),
}  # fmt: skip
STUDENT: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    **ANY,
    "a list": (lambda path, _: torch.save([1, 2], path), ("list",)),
    "a pipe": (lambda path, _: (path.unlink(), os.mkfifo(path)), ("pipe",)),
    "a folder": (lambda path, _: (path.unlink(), path.mkdir()), ("directory",)),
    "missing": (lambda path, _: path.unlink(), ("no checkpoint",)),
    "a network that runs code": (
        changed(lambda c: c["fkd_med"]["network"].update(class_path="os.system")), ("os.system", "not in a package")
    ),
    "a network out of reach": (
        changed(lambda c: c["fkd_med"]["network"].update(HUGE)), ("describes a network of",)
    ),
    "no preprocessing": (changed(lambda c: c["fkd_med"].update(preprocessing=[])), ("preprocessing",)),
    "personal tensors of rubbish": (changed(lambda c: c["fkd_med"].update(personal={"latest": 3})), ("tensors",)),
}  # fmt: skip
RESUME = ("cut", "with code", "NaN in weights", "other shapes", "a later version")


def predict(spoil: Spoil) -> Callable[[Place], list[str]]:
    def prepare(place: Place) -> list[str]:
        path = place.file("student.ckpt", (place.templates / "runs/run/student.ckpt").read_bytes())
        spoil(path, place.sentinel)
        return place.predict(path)

    return prepare


def resume(spoil: Spoil) -> Callable[[Place], list[str]]:
    def prepare(place: Place) -> list[str]:
        spoil(place.run / "checkpoints/last.ckpt", place.sentinel)
        return place.resume()

    return prepare


# --- teachers ------------------------------------------------------------------------------------------


def brought(spoil: Spoil, suffix: str = ".safetensors") -> Callable[[Place], list[str]]:
    """Bring a spoilt teacher for the second hospital; the first one's would be trained before it is read."""

    def prepare(place: Place) -> list[str]:
        stored = next((place.templates / "teachers").glob("hospital-b-*/teacher.safetensors"))
        path = place.file(f"mine{suffix}", stored.read_bytes())
        spoil(path, place.sentinel)
        teacher = {"init_args": {"checkpoints": {"hospital-b": str(path)}, "epochs": 2}}
        return place.federate(*place.overlay("mine.yaml", {"model": {"init_args": {"teacher": teacher}}}))

    return prepare


def header(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    """Forge the header of a safetensors file."""

    def spoil(path: Path, sentinel: Path) -> None:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8 : 8 + length])
        edit(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def overlapping(entries: dict[str, Any]) -> None:
    first, second = [entry for name, entry in entries.items() if name != "__metadata__"][:2]
    second["data_offsets"] = first["data_offsets"]


def tensors(edit: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda path, _: save_file({name: edit(tensor) for name, tensor in load_file(path).items()}, path)


TEACHERS = {
    "rubbish": (lambda path, _: path.write_bytes(os.urandom(4000)), ".safetensors", ("hospital-b",)),
    "overlapping tensors": (header(overlapping), ".safetensors", ("hospital-b",)),
    "other shapes": (tensors(lambda t: t[None].clone()), ".safetensors", ("hospital-b", "ResUNet")),
    "NaN": (
        tensors(lambda t: t * float("nan") if t.is_floating_point() else t), ".safetensors", ("hospital-b", "NaN")
    ),
    "code": (
        lambda path, sentinel: torch.save({"state_dict": Evil(sentinel)}, path), ".ckpt",
        ("hospital-b", "nothing was executed"),
    ),
    "a pickle": (
        lambda path, sentinel: path.write_bytes(pickle.dumps(Evil(sentinel))), ".pt",
        ("hospital-b", "nothing was executed"),
    ),
    "other things than tensors": (lambda path, _: torch.save({"a": 1}, path), ".pt", ("hospital-b", "tensors")),
    "a pipe": (lambda path, _: (path.unlink(), os.mkfifo(path)), ".pt", ("hospital-b", "pipe")),
}  # fmt: skip

WEIGHTS = {
    **{f"student: {name}": Case(predict(spoil), ("student.ckpt", *says)) for name, (spoil, says) in STUDENT.items()},
    **{f"resume: checkpoint {name}": Case(resume(ANY[name][0]), ANY[name][1]) for name in RESUME},
    **{f"teacher: {name}": Case(brought(spoil, suffix), says) for name, (spoil, suffix, says) in TEACHERS.items()},
}
