"""Messages as bytes: one safetensors file each, whose only metadata entry is a JSON object with all but the tensors.

Nothing is pickled, equal messages give equal bytes, and `decode` trusts nobody: whatever is wrong with the bytes
becomes one `TrainingError` that says what and from whom.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fkd_med.communication.header import (
    COUNTS,
    KEY,
    NOT_FINITE,
    NOTES,
    VERSION,
    MalformedError,
    check_fields,
    compact,
    read_fields,
    read_header,
    shown,
)
from fkd_med.communication.messages import Broadcast, Extras, State, Update
from fkd_med.errors import ConfigError, TrainingError

# What may travel, in the order in which safetensors lays tensors out (by dtype, then by name).
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def encode(message: Broadcast | Update, notes: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of `message`: what really travels, equal for equal messages.

    Tensors may be of any device, strides or shared memory; their dtypes must be those of `DTYPES`.

    Args:
        message: what to send.
        notes: how its state was packed, if it was (see `packing`); only `decode_packed` reads such a message.

    Raises:
        ConfigError: a tensor's dtype, a count, or the name of a tensor, section, metric or client cannot travel.
    """
    try:
        fields = _fields(message) | dict(notes or {})
        check_fields(fields)
        tensors = _portable(dict(_named_tensors(message)))
    except MalformedError as error:
        raise ConfigError(f"This {type(message).__name__} cannot be sent: {error}. Correct or rename it.") from error
    return bytes(save(tensors, metadata={KEY: compact(fields)}))


def decode(data: bytes, sender: str = "a peer") -> Broadcast | Update:
    """Return the message in `data`, with its tensors on the CPU, each in memory of its own, sorted by name.

    Args:
        data: bytes as `encode` makes them, from anybody.
        sender: whom an error names.

    Raises:
        TrainingError: the bytes are truncated, malformed, of another version, packed, or carry impossible values.
    """
    message, notes = decode_packed(data, sender)
    if notes:
        raise TrainingError(
            f"A message from {sender} is packed as {shown(notes.get('packing'))}, and this side expects it as it is. "
            "Use the same federation settings on all sides."
        )
    return message


def decode_packed(data: bytes, sender: str = "a peer") -> tuple[Broadcast | Update, dict[str, str]]:
    """Return the message in `data` as it travelled, its state perhaps packed, and the notes on how it was packed.

    Raises:
        TrainingError: as `decode` does.
    """
    try:
        header, _ = read_header(data, set(DTYPES))
        fields = read_fields(header)
        return _build(fields, _load(data)), {name: fields[name] for name in sorted(fields.keys() & NOTES.keys())}
    except MalformedError as error:
        raise unreadable(sender, error) from error


def section_bytes(data: bytes, sender: str = "a peer") -> dict[str, int]:
    """Return the bytes of each part of an encoded message: ``header``, ``state``, ``extras:<section>``.

    They add up to ``len(data)``. The header holds names, shapes, counts and metrics. What was packed or compressed
    counts as it travels.

    Raises:
        TrainingError: `data` is no message.
    """
    try:
        header, length = read_header(data, set(DTYPES))
    except MalformedError as error:
        raise unreadable(sender, error) from error
    sizes = {"header": length, "state": 0}
    for name in sorted(header.keys() - {"__metadata__"}):
        group, _, rest = name.partition("/")
        section = "state" if group == "state" else f"extras:{rest.partition('/')[0]}"
        start, end = header[name]["data_offsets"]
        sizes[section] = sizes.get(section, 0) + end - start
    return sizes


def broadcast_size(specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Return ``len(encode(Broadcast(0, state)))`` for a state of these shapes and dtypes, without making it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    ranks = {dtype: rank for rank, dtype in enumerate(names)}
    order = sorted(specs, key=lambda name: (ranks[specs[name][1]], name))  # decides the offsets, thus their digits
    header: dict[str, Any] = {"__metadata__": {KEY: compact(_fields(Broadcast(0, {})))}}
    end = 0
    for name in order:
        shape, dtype = specs[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[f"state/{name}"] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + math.ceil(length / 8) * 8 + end


def _fields(message: Broadcast | Update) -> dict[str, Any]:
    fields: dict[str, Any] = {"version": VERSION, "round": message.round, "sections": sorted(message.extras)}
    if isinstance(message, Broadcast):
        return fields | {"kind": "broadcast"}
    return fields | {
        "kind": "update",
        "client": message.client,
        "attempt": message.attempt,
        "num_examples": message.num_examples,
        "num_steps": message.num_steps,
        "metrics": {name: _number(value) for name, value in message.metrics.items()},
    }


def _number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _named_tensors(message: Broadcast | Update) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in message.state.items():
        yield f"state/{name}", tensor
    for section, tensors in message.extras.items():
        for name, tensor in tensors.items():
            yield f"extras/{section}/{name}", tensor


def _portable(tensors: State) -> State:
    """Contiguous CPU tensors that share no memory: safetensors refuses to write the same bytes twice."""
    portable: State = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if name.endswith("/") or not name.isprintable():
            raise MalformedError(f"it has a tensor named {shown(name)}")
        if tensor.dtype not in DTYPES.values() or tensor.layout is not torch.strided or tensor.is_meta:
            raise MalformedError(f"tensor '{name}' is {tensor.dtype} ({tensor.layout}, {tensor.device.type})")
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        portable[name] = tensor
    return portable


def unreadable(sender: str, error: MalformedError) -> TrainingError:
    """Return what to tell the user about a malformed message from `sender`."""
    return TrainingError(
        f"A message from {sender} cannot be read: {error}. It was damaged on its way, or the two sides run "
        "different versions of fkd-med."
    )


def _load(data: bytes) -> State:
    try:
        tensors: State = load(bytes(data))
    except Exception as error:  # the library's own, and torch's for shapes that overflow
        raise MalformedError(f"its tensors cannot be read ({shown(str(error))})") from error
    return tensors


def _build(fields: dict[str, Any], tensors: State) -> Broadcast | Update:
    state: State = {}
    extras: Extras = {section: {} for section in fields["sections"]}
    for name in sorted(tensors):
        group, _, rest = name.partition("/")
        if group == "state":
            state[rest] = tensors[name]
        else:
            section, _, last = rest.partition("/")
            extras[section][last] = tensors[name]
    if fields["kind"] == "broadcast":
        return Broadcast(fields["round"], state, extras)
    counts = {name: fields[name] for name in COUNTS["update"]}
    metrics = {name: float(NOT_FINITE.get(value, value)) for name, value in fields["metrics"].items()}
    return Update(client=fields["client"], state=state, extras=extras, metrics=metrics, **counts)
