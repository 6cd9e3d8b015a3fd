"""Messages as bytes: exact there and back, and a hostile sender gets one clear error."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fkd_med.aggregation import identical
from fkd_med.communication import Broadcast, Update, decode, encode, section_bytes
from fkd_med.communication.wire import DTYPES
from fkd_med.errors import ConfigError, TrainingError


def an_update(**changes: Any) -> Update:
    generator = torch.Generator().manual_seed(0)
    base: dict[str, Any] = {
        "client": "Köln",
        "round": 3,
        "attempt": 1,
        "state": {
            "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
            "bn.num_batches_tracked": torch.tensor(2**53 + 1),
            "bn.running_mean": torch.randn(4, generator=generator).bfloat16(),
            "half": torch.randn(3, generator=generator).half(),
            "none": torch.zeros(0, 3),
            "bad": torch.tensor([math.nan, -math.inf, -0.0]),
        },
        "num_examples": 17,
        "num_steps": 5,
        "metrics": {"train/loss": 0.1, "dice": math.nan, "up": math.inf, "down": -math.inf, "whole": 3},
        "extras": {"scaffold": {"conv.weight": torch.ones(4, 3, 3, 3)}, "empty": {}},
    }
    return Update(**(base | changes))


def test_an_update_comes_back_bit_for_bit() -> None:
    sent = an_update()
    back = decode(encode(sent))
    assert isinstance(back, Update)
    assert (back.client, back.round, back.attempt, back.num_examples, back.num_steps) == ("Köln", 3, 1, 17, 5)
    assert identical(back.state, sent.state)
    assert back.extras.keys() == sent.extras.keys()
    assert back.extras["empty"] == {}
    assert identical(back.extras["scaffold"], sent.extras["scaffold"])
    assert back.metrics.pop("dice") != back.metrics.get("dice")
    assert back.metrics == {"train/loss": 0.1, "up": math.inf, "down": -math.inf, "whole": 3.0}
    assert all(type(value) is float for value in back.metrics.values())


def test_a_broadcast_comes_back_and_its_tensors_can_be_written_to() -> None:
    back = decode(encode(Broadcast(0, {"w": torch.tensor(1.5), "a/b": torch.ones(2)})))
    assert isinstance(back, Broadcast)
    assert back.round == 0
    assert back.extras == {}
    back.state["w"].add_(1)
    assert back.state["w"].item() == 2.5
    assert back.state["a/b"].tolist() == [1, 1]


def test_views_and_shared_memory_travel_as_what_they_show() -> None:
    base = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    state = {"t": base.t(), "again": base, "row": base[1], "step": base[:, ::2], "wide": torch.ones(1).expand(5)}
    back = decode(encode(Broadcast(0, state)))
    for name, tensor in state.items():
        np.testing.assert_array_equal(back.state[name].numpy(), tensor.detach().numpy())


def test_equal_messages_give_equal_bytes_whatever_their_order() -> None:
    one = an_update()
    other = an_update(
        state={name: one.state[name].clone() for name in reversed(one.state)},
        metrics=dict(reversed(one.metrics.items())),
        extras=dict(reversed(one.extras.items())),
    )
    assert encode(one) == encode(other) == encode(an_update())


def test_any_safetensors_reader_can_read_it() -> None:
    read = safetensors.torch.load(encode(an_update()))
    assert torch.equal(read["state/conv.weight"], an_update().state["conv.weight"])
    assert read["extras/scaffold/conv.weight"].shape == (4, 3, 3, 3)


def test_the_parts_add_up() -> None:
    data = encode(an_update())
    parts = section_bytes(data)
    assert sum(parts.values()) == len(data)
    assert parts["extras:scaffold"] == 4 * 3 * 3 * 3 * 4
    assert parts["state"] == 4 * 3 * 3 * 3 * 4 + 8 + 4 * 2 + 3 * 2 + 0 + 3 * 4
    assert parts["header"] == 8 + int.from_bytes(data[:8], "little")


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=33, max_codepoint=1000), min_size=1, max_size=8).filter(
            lambda name: name.isprintable() and not name.endswith("/")
        ),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    ),
    st.dictionaries(st.sampled_from(["loss", "dice/a", "x"]), st.floats(), max_size=3),
)
def test_round_trip_of_anything(specs: dict[str, tuple[str, list[int]]], metrics: dict[str, float]) -> None:
    state = {n: torch.randint(0, 2, shape).to(DTYPES[dtype]) for n, (dtype, shape) in specs.items()}
    back = decode(encode(an_update(state=state, metrics=metrics)))
    assert isinstance(back, Update)
    assert identical(back.state, state)
    assert {k: repr(v) for k, v in back.metrics.items()} == {k: repr(v) for k, v in metrics.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"client": "../etc"},
        {"client": 5},
        {"num_examples": -1},
        {"num_steps": True},
        {"round": -1},
        {"attempt": 1.0},
        {"extras": {"Bad/Section": {}}},
        {"state": {"c": torch.zeros(1, dtype=torch.complex64)}},
        {"state": {"s": torch.zeros(2, 2).to_sparse()}},
        {"state": {"m": torch.zeros(2, device="meta")}},
        {"state": {"": torch.zeros(1)}},
        {"state": {"\ud800": torch.zeros(1)}},
        {"metrics": {"\ud800": 1.0}},
    ],
)
def test_what_cannot_travel_is_refused_before_it_is_sent(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be sent"):
        encode(an_update(**changes))


def forged(
    edit: Callable[[dict[str, Any], dict[str, Any]], object] = lambda header, fields: None,
    text: Callable[[str], str] = lambda text: text,
) -> bytes:
    """A valid update, its header and description edited, put together again without our code."""
    data = encode(Update("a", 1, 0, {"w": torch.ones(2)}, 3, 4, {"loss": 0.5}, {"ctl": {"w": torch.ones(2)}}))
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    fields = json.loads(header["__metadata__"]["fkd"])
    edit(header, fields)
    if isinstance(header.get("__metadata__"), dict) and "fkd" in header["__metadata__"]:
        header["__metadata__"]["fkd"] = json.dumps(fields)
    head = text(json.dumps(header)).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def test_the_forger_forges_only_what_it_is_told() -> None:
    assert isinstance(decode(forged()), Update)


FORGERIES: dict[str, bytes] = {
    "empty": b"",
    "short": b"abc",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "header of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "not utf-8": struct.pack("<Q", 4) + b"\xff\xfe\xfd{",
    "not an object": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "huge": struct.pack("<Q", 9 * 2**20) + b" " * (9 * 2**20),
    "huge number": struct.pack("<Q", 9006) + b'{"a":' + b"9" * 9000 + b"}",
    "no metadata": forged(lambda h, f: h.pop("__metadata__")),
    "foreign metadata": forged(lambda h, f: h.update(__metadata__={"format": "pt"})),
    "metadata no object": forged(lambda h, f: h.update(__metadata__="x")),
    "twice the same tensor": forged(text=lambda t: t.replace('"extras/ctl/w"', '"state/w"')),
    "twice the same field": forged(text=lambda t: t.replace('\\"round\\": 1', '\\"round\\": 1, \\"round\\": 2')),
    "version": forged(lambda h, f: f.update(version=2)),
    "kind": forged(lambda h, f: f.update(kind="order")),
    "kind unhashable": forged(lambda h, f: f.update(kind=[])),
    "kind broadcast": forged(lambda h, f: f.update(kind="broadcast")),
    "field missing": forged(lambda h, f: f.pop("num_steps")),
    "field unknown": forged(lambda h, f: f.update(path="/etc/passwd")),
    "negative examples": forged(lambda h, f: f.update(num_examples=-5)),
    "negative round": forged(lambda h, f: f.update(round=-1)),
    "absurd count": forged(lambda h, f: f.update(num_examples=2**60)),
    "float count": forged(lambda h, f: f.update(num_examples=1.5)),
    "bool count": forged(lambda h, f: f.update(num_examples=True)),
    "text count": forged(lambda h, f: f.update(num_examples="5")),
    "traversal": forged(lambda h, f: f.update(client="../../root")),
    "client no text": forged(lambda h, f: f.update(client=["a"])),
    "client escape": forged(lambda h, f: f.update(client="\x1b[2J")),
    "client surrogate": forged(lambda h, f: f.update(client="\ud800")),
    "client long": forged(lambda h, f: f.update(client="a" * 10_000)),
    "metrics list": forged(lambda h, f: f.update(metrics=[1])),
    "metric text": forged(lambda h, f: f.update(metrics={"loss": "a lot"})),
    "metric null": forged(lambda h, f: f.update(metrics={"loss": None})),
    "metric NaN constant": forged(lambda h, f: f.update(metrics={"loss": math.nan})),
    "metric overflow": forged(text=lambda t: t.replace("0.5", "1e999")),
    "metric surrogate": forged(lambda h, f: f.update(metrics={"\ud800": 1.0})),
    "section undeclared": forged(lambda h, f: f.update(sections=[])),
    "section twice": forged(lambda h, f: f.update(sections=["ctl", "ctl"])),
    "section name": forged(lambda h, f: f.update(sections=["../ctl"])),
    "sections text": forged(lambda h, f: f.update(sections="ctl")),
    "tensor nowhere": forged(text=lambda t: t.replace('"state/w"', '"teacher.w"')),
    "tensor nameless": forged(text=lambda t: t.replace('"state/w"', '"state/"')),
    "entry": forged(lambda h, f: h.update({"state/w": 5})),
    "entry keys": forged(lambda h, f: h["state/w"].update(code="x")),
    "dtype": forged(lambda h, f: h["state/w"].update(dtype="C64")),
    "dtype unhashable": forged(lambda h, f: h["state/w"].update(dtype={})),
    "shape too big": forged(lambda h, f: h["state/w"].update(shape=[2**40, 2**40])),
    "shape negative": forged(lambda h, f: h["state/w"].update(shape=[-2])),
    "shape zero times huge": forged(
        lambda h, f: h["state/w"].update(shape=[0, 2**40, 2**40], data_offsets=[0, 0])
    ),
    "shape wrong": forged(lambda h, f: h["state/w"].update(shape=[3])),
    "many dimensions": forged(lambda h, f: h["state/w"].update(shape=[2] + [1] * 70)),
    "offsets backwards": forged(lambda h, f: h["state/w"].update(data_offsets=[8, 0])),
    "offsets overlap": forged(lambda h, f: h["state/w"].update(data_offsets=[0, 8])),
    "offsets outside": forged(lambda h, f: h["state/w"].update(data_offsets=[800, 808])),
    "trailing bytes": forged() + b"\0\0\0\0",
    "cut tensors": forged()[:-1],
}  # fmt: skip


@pytest.mark.parametrize("data", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_hostile_message_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(TrainingError, match="A message from site-b cannot be read: ") as caught:
        decode(data, sender="site-b")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_every_truncation_is_noticed() -> None:
    data = encode(an_update())
    for length in range(len(data)):
        with pytest.raises(TrainingError):
            decode(data[:length])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_altered_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    forged_bytes = bytearray(encode(an_update()))
    for _ in range(data.draw(st.integers(1, 4))):
        forged_bytes[data.draw(st.integers(0, len(forged_bytes) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TrainingError):
        decode(bytes(forged_bytes))


def test_the_parts_of_rubbish_are_a_clear_error_too() -> None:
    with pytest.raises(TrainingError, match="site-b"):
        section_bytes(b"rubbish of some length", sender="site-b")
