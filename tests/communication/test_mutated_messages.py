"""Valid messages with bytes, header or description changed at random: a TrainingError or a message, never more."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fkd_med.communication import Packing, Update, specs
from fkd_med.communication.codecs import Codec, Float32, Int8, LowRank, TopK
from fkd_med.communication.wire import decode_packed, encode
from fkd_med.errors import TrainingError

STATE = {"conv.weight": torch.arange(24.0).reshape(4, 6), "norm.count": torch.tensor(3), "bias": torch.ones(4)}
UPDATE = Update("site-b", 2, 0, STATE, 5, 6, {"loss": 0.5}, {"ctl": {"bias": torch.ones(4)}})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PACKINGS: list[Codec] = [Float32(), TopK(0.5), Int8(), LowRank(0.9)]


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return a valid message with one or more values of its header, description or tensors changed."""
    header, rest = parts(valid)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(["entry", "description", "tensors", "length"]))
        name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        if where == "entry" and isinstance(header[name], dict) and header[name]:
            header[name] = {**header[name], draw(st.sampled_from(sorted(header[name]))): draw(JSON)}
        elif where == "description":
            fields = json.loads(header["__metadata__"]["fkd"])
            fields[draw(st.sampled_from(sorted(fields)))] = draw(JSON)
            header["__metadata__"]["fkd"] = json.dumps(fields)
        elif where == "tensors" and rest:
            place = draw(st.integers(0, len(rest) - 1))
            rest = rest[:place] + draw(st.binary(min_size=1, max_size=9)) + rest[place + 1 :]
        elif where == "length":
            rest = rest[: draw(st.integers(0, len(rest)))]
    return joined(header, rest)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_message_is_a_message_or_a_training_error(data: st.DataObject) -> None:
    forged = data.draw(mutated(encode(UPDATE)))
    tracemalloc.start()
    try:
        with contextlib.suppress(TrainingError):
            message, _ = decode_packed(forged, "site-b")
            held = sum(t.numel() * t.element_size() for t in message.state.values())
            assert held <= len(forged)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 20 * len(forged)
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(PACKINGS), st.booleans())
def test_a_mutated_packed_message_is_what_the_student_is_like_or_a_training_error(
    data: st.DataObject, codec: Codec, compress: bool
) -> None:
    packing = Packing(codec, compress=compress)
    forged = data.draw(mutated(packing.pack(UPDATE, seed=1).data))
    with contextlib.suppress(TrainingError):
        message = packing.unpack(forged, specs(STATE), sender="site-b")
        if message.state.keys() == STATE.keys():  # else what is not finite travelled as it is, for the allow-list
            assert specs(message.state) == specs(STATE)
