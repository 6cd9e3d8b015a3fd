"""Packed bytes from strangers: damaged, cut or swollen, they are one clear error and no memory."""

from __future__ import annotations

import contextlib
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fkd_med.communication import (
    Broadcast,
    Float16,
    Int8,
    LowRank,
    Mixed,
    Packing,
    State,
    TopK,
    Update,
    encode,
    payload,
    specs,
)
from fkd_med.communication.wire import decode_packed
from fkd_med.errors import TrainingError

GENERATOR = torch.Generator().manual_seed(0)
STATE: State = {
    "a": torch.randn(30, 30, generator=GENERATOR),
    "b": torch.randn(20, 20, generator=GENERATOR),
    "c": torch.outer(torch.arange(1.0, 21), torch.arange(1.0, 21)),
    "d": torch.randn(5, generator=GENERATOR),
    "n": torch.tensor(3),
    "t": torch.tensor([True, False]),
}
CODEC = Mixed(Int8(), {"b": TopK(0.1), "c": LowRank(0.9, Float16())})
PACKING, LOOSE = Packing(CODEC), Packing(CODEC, compress=False)


def forged(packing: Packing, **changes: Tensor | None) -> bytes:
    """Return a packed broadcast some of whose packed tensors are changed or, by None, left out."""
    message, notes = decode_packed(packing.pack(Broadcast(1, STATE)).data)
    state = message.state | {f"|{name}": tensor for name, tensor in changes.items()}
    return encode(Broadcast(1, {n: t for n, t in state.items() if t is not None}), notes)


def packed(name: str, packing: Packing = PACKING) -> Tensor:
    return decode_packed(packing.pack(Broadcast(1, STATE)).data)[0].state[f"|{name}"]


def as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_a_payload_is_a_few_vectors() -> None:
    one = decode_packed(PACKING.pack(Broadcast(1, STATE)).data)[0].state
    assert one.keys() == {"|deflate", "|lengths"}
    loose = decode_packed(LOOSE.pack(Broadcast(1, STATE)).data)[0].state
    dtypes = {"|I64", "|F32", "|BF16", "|F16", "|I8", "|U8", "|BOOL", "|lengths"}
    assert loose.keys() == dtypes
    assert loose["|I8"].shape == (900,)
    assert loose["|lengths"].tolist() == [loose["|U8"].numel(), 1]
    plain = decode_packed(Packing(Float16()).pack(Broadcast(1, STATE)).data)[0].state
    assert plain.keys() == {"|deflate"}  # no lengths that could not be known


def test_compressed_bytes_are_zlib_streams_of_byte_planes() -> None:
    state = {"x": torch.tensor([1.0, -2.0, 3.0]), "n": torch.tensor([1, 256])}
    stream = decode_packed(Packing().pack(Broadcast(1, state)).data)[0].state["|deflate"].numpy().tobytes()
    first = zlib.decompressobj()
    assert first.decompress(stream) == bytes([1, 0, 0, 1] + [0] * 12)  # I64 1 and 256: low bytes, then the next
    assert zlib.decompress(first.unused_data) == bytes([0, 0, 0, 0, 0, 0, 0x80, 0x00, 0x40, 0x3F, 0xC0, 0x40])


def test_the_forger_forges_only_what_it_is_told() -> None:
    for packing in (PACKING, LOOSE):
        assert forged(packing) == packing.pack(Broadcast(1, STATE)).data
        assert packing.unpack(forged(packing), specs(STATE)).state.keys() == STATE.keys()


LENGTHS = packed("lengths")
DEFLATE = packed("deflate").numpy().tobytes()
LOOSE_FORGERIES: dict[str, Callable[[], bytes]] = {
    "lengths missing": lambda: forged(LOOSE, lengths=None),
    "lengths too few": lambda: forged(LOOSE, lengths=LENGTHS[:1]),
    "lengths too many": lambda: forged(LOOSE, lengths=torch.cat([LENGTHS, LENGTHS])),
    "lengths negative": lambda: forged(LOOSE, lengths=-LENGTHS),
    "lengths huge": lambda: forged(LOOSE, lengths=torch.full_like(LENGTHS, 2**31 - 1)),
    "lengths floating": lambda: forged(LOOSE, lengths=LENGTHS.float()),
    "lengths a table": lambda: forged(LOOSE, lengths=LENGTHS[None]),
    "a vector missing": lambda: forged(LOOSE, I8=None),
    "a vector more": lambda: forged(LOOSE, F64=torch.zeros(3, dtype=torch.float64)),
    "an unknown vector": lambda: forged(LOOSE, teacher=torch.zeros(3)),
    "a vector too long": lambda: forged(LOOSE, I8=torch.zeros(901, dtype=torch.int8)),
    "a vector too short": lambda: forged(LOOSE, F32=torch.zeros(3)),
    "a vector of another dtype": lambda: forged(LOOSE, I8=torch.zeros(900, dtype=torch.uint8)),
    "a tensor among vectors": lambda: forged(LOOSE, I8=torch.zeros(30, 30, dtype=torch.int8)),
    "compressed where it must not": lambda: forged(LOOSE, deflate=as_bytes(DEFLATE)),
}
DENSE_FORGERIES: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: forged(PACKING, deflate=None),
    "only lengths": lambda: forged(PACKING, deflate=None, lengths=LENGTHS),
    "empty": lambda: forged(PACKING, deflate=torch.zeros(0, dtype=torch.uint8)),
    "no bytes": lambda: forged(PACKING, deflate=as_bytes(DEFLATE).to(torch.int64)),
    "a table": lambda: forged(PACKING, deflate=as_bytes(DEFLATE)[None]),
    "rubbish": lambda: forged(PACKING, deflate=as_bytes(b"rubbish" * 100)),
    "cut": lambda: forged(PACKING, deflate=as_bytes(DEFLATE[:-1])),
    "more": lambda: forged(PACKING, deflate=as_bytes(DEFLATE + b"\0")),
    "twice": lambda: forged(PACKING, deflate=as_bytes(DEFLATE * 2)),
    "checksum": lambda: forged(PACKING, deflate=as_bytes(DEFLATE[:-1] + bytes([DEFLATE[-1] ^ 1]))),
    "another vector": lambda: forged(PACKING, I8=torch.zeros(900, dtype=torch.int8)),
    "a shorter stream": lambda: forged(PACKING, deflate=as_bytes(zlib.compress(b"\0" * 7))),
    "lengths": lambda: forged(PACKING, lengths=LENGTHS.flip(0)),
}


@pytest.mark.parametrize("make", LOOSE_FORGERIES.values(), ids=LOOSE_FORGERIES.keys())
def test_a_hostile_payload_is_one_clear_error(make: Callable[[], bytes]) -> None:
    with pytest.raises(TrainingError, match="A message from site-b cannot be read: ") as caught:
        LOOSE.unpack(make(), specs(STATE), sender="site-b")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("make", DENSE_FORGERIES.values(), ids=DENSE_FORGERIES.keys())
def test_a_hostile_compressed_payload_is_one_clear_error(make: Callable[[], bytes]) -> None:
    with pytest.raises(TrainingError, match="A message from site-b cannot be read: ") as caught:
        PACKING.unpack(make(), specs(STATE), sender="site-b")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_truth_value_of_two_is_refused() -> None:
    state = {"t": torch.tensor([True, False])}
    _, notes = decode_packed(Packing().pack(Broadcast(1, state)).data)
    data = encode(Broadcast(1, {payload.DEFLATED: as_bytes(zlib.compress(b"\2\0"))}), notes)
    with pytest.raises(TrainingError, match="truth value"):
        Packing().unpack(data, specs(state))


def test_a_bomb_takes_no_memory() -> None:
    bomb = zlib.compress(b"\0" * 200_000_000, 9)
    data = forged(PACKING, deflate=as_bytes(bomb))
    tracemalloc.start()
    with pytest.raises(TrainingError, match="compressed bytes are not"):
        PACKING.unpack(data, specs(STATE), sender="site-b")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(data)


def test_every_truncation_is_noticed() -> None:
    data = PACKING.pack(Broadcast(1, STATE)).data
    for length in range(0, len(data), 7):
        with pytest.raises(TrainingError):
            PACKING.unpack(data[:length], specs(STATE))


@pytest.mark.parametrize("packing", [PACKING, LOOSE, Packing(CODEC, "delta")])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_altered_bytes_never_raise_anything_else(packing: Packing, data: st.DataObject) -> None:
    altered = bytearray(packing.pack(Update("a", 1, 0, STATE, 3, 4, {"loss": 0.5}), STATE).data)
    for _ in range(data.draw(st.integers(1, 4))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TrainingError):
        back = packing.unpack(bytes(altered), specs(STATE), STATE)
        assert all(name in STATE for name in back.state)


@pytest.mark.parametrize("packing", [Packing(), PACKING, LOOSE])
def test_a_message_without_tensors(packing: Packing) -> None:
    packed = packing.pack(Broadcast(1, {}))
    assert packing.unpack(packed.data, {}).state == {} == packed.message.state
    empty = {"e": torch.zeros(0, 5)}
    packed = packing.pack(Broadcast(1, empty))
    assert torch.equal(packing.unpack(packed.data, specs(empty)).state["e"], empty["e"])
