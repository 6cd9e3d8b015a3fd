"""What a stranger may say in a message's header: read with suspicion, checked alike before sending.

A header is the JSON that begins a safetensors file: an entry per tensor, and under ``__metadata__`` one string, the
JSON description with everything that is not a tensor.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from fkd_med.communication.messages import check_client_name
from fkd_med.errors import DataError

VERSION = 1
KEY = "fkd"  # one metadata key only: safetensors does not promise the order of several
MAX_HEADER = 8 * 2**20  # bytes; a header takes about 100 per tensor, so this is room for 80 000 tensors
MAX_COUNT = 2**53
COUNTS = {"broadcast": ("round",), "update": ("round", "attempt", "num_examples", "num_steps")}
NOTES = {"packing": re.compile(r"[ -~]{1,4000}"), "reference": re.compile(r"[0-9a-f]{16}")}  # how it was packed
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_SECTION = re.compile(r"[a-z][a-z0-9_-]{0,63}")


class MalformedError(Exception):
    """What is wrong with a message, before we know whom to name."""


def compact(fields: dict[str, Any]) -> str:
    """Return `fields` as JSON: the same text for the same content."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def read_header(data: bytes, dtypes: set[str]) -> tuple[dict[str, Any], int]:
    """Return the header that begins `data`, its entries checked, and its length with the 8 bytes before it.

    Raises:
        MalformedError: it is cut off, too long, no JSON, or describes impossible tensors or others than `dtypes`.
    """
    if len(data) < 8:
        raise MalformedError(f"it ends after {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise MalformedError(f"it is {len(data)} bytes long and announces a header of {length}")
    header = _parse(bytes(data[8 : 8 + length]), "header")
    for name, entry in header.items():
        if name != "__metadata__":
            _check_entry(name, entry, dtypes)
    return header, 8 + length


def read_fields(header: dict[str, Any]) -> dict[str, Any]:
    """Return the description in `header`, checked, and check that every tensor belongs to a declared section.

    Raises:
        MalformedError: it is not ours, of another version, or says something impossible.
    """
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.keys() != {KEY} or not isinstance(metadata[KEY], str):
        raise MalformedError("it is not an fkd-med message")
    fields = _parse(metadata[KEY], "description")
    if fields.get("version") != VERSION:
        raise MalformedError(f"it has version {shown(fields.get('version'))} and this side reads version {VERSION}")
    check_fields(fields)
    for name in header.keys() - {"__metadata__"}:
        group, _, rest = name.partition("/")
        section, _, last = rest.partition("/")
        if not (group == "state" and rest) and not (group == "extras" and section in fields["sections"] and last):
            raise MalformedError(f"tensor {shown(name)} belongs to no declared section")
    return fields


def check_fields(fields: dict[str, Any]) -> None:
    """Check a message's description.

    Raises:
        MalformedError: a key is missing or unknown; a count, name, section or metric is impossible.
    """
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in COUNTS:
        raise MalformedError(f"its kind is {shown(kind)}")
    keys = {"version", "kind", "sections", *COUNTS[kind], *(("client", "metrics") if kind == "update" else ())}
    if fields.keys() - NOTES.keys() != keys:
        raise MalformedError(f"a {kind} has {sorted(keys)}, not {shown(sorted(fields))}")
    for name in COUNTS[kind]:
        if not _is_count(fields[name]):
            raise MalformedError(f"its {name} is {shown(fields[name])}, not a count")
    for name in fields.keys() & NOTES.keys():
        if not isinstance(fields[name], str) or not NOTES[name].fullmatch(fields[name]):
            raise MalformedError(f"its {name} is {shown(fields[name])}")
    sections = fields["sections"]
    if not isinstance(sections, list) or not all(isinstance(s, str) and _SECTION.fullmatch(s) for s in sections):
        raise MalformedError(f"its sections are {shown(sections)}, not short lower-case names")
    if sections != sorted(set(sections)):
        raise MalformedError("its sections are not sorted and distinct")
    if kind == "update":
        _check_client(fields["client"])
        _check_metrics(fields["metrics"])


def shown(value: object) -> str:
    """Return whatever a stranger sent, short and harmless on a terminal."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _parse(text: str | bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise MalformedError(f"its {what} has a key twice")
        return found

    def refuse(constant: str) -> float:
        raise MalformedError(f"its {what} holds {constant}, which is not JSON")

    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"its {what} is not JSON") from error
    if not isinstance(parsed, dict):
        raise MalformedError(f"its {what} is not a JSON object")
    return parsed


def _check_entry(name: str, entry: object, dtypes: set[str]) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedError(f"tensor {shown(name)} is not described by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
        raise MalformedError(f"tensor {shown(name)} has dtype {shown(entry['dtype'])}, which never travels")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for sizes in (shape, offsets):
        if not isinstance(sizes, list) or len(sizes) > 64 or not all(_is_count(size) for size in sizes):
            raise MalformedError(f"tensor {shown(name)} has impossible sizes")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedError(f"tensor {shown(name)} has impossible sizes")


def _check_client(name: object) -> None:
    if not isinstance(name, str):
        raise MalformedError(f"its client is {shown(name)}, not a name")
    try:
        check_client_name(name)
    except DataError as error:
        raise MalformedError(str(error).removesuffix(".")) from error


def _check_metrics(metrics: object) -> None:
    if not isinstance(metrics, dict):
        raise MalformedError("its metrics are not a JSON object")
    for name, value in metrics.items():
        if not isinstance(name, str) or not name.isprintable():
            raise MalformedError(f"it has a metric named {shown(name)}")
        finite = _is_count(value) or (type(value) is float and math.isfinite(value))
        if not finite and not (isinstance(value, str) and value in NOT_FINITE):
            raise MalformedError(f"its metric {shown(name)} is {shown(value)}, not a number")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT
