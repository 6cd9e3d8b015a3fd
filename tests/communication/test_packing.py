"""Packed messages: both sides hold the same bits, nothing is lost for ever, and two sides that differ find out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fkd_med.aggregation import identical
from fkd_med.communication import (
    BFloat16,
    Broadcast,
    Codec,
    Float16,
    Float32,
    Int4,
    Int8,
    Ledger,
    LowRank,
    Mixed,
    Packing,
    State,
    TopK,
    Update,
    decode,
    encode,
    section_bytes,
    specs,
)
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.networks import SlimUNet

CODECS: dict[str, Codec] = {
    "float32": Float32(),
    "float16": Float16(),
    "int8": Int8(),
    "int4": Int4("nearest"),
    "top-k": TopK(0.05),
    "low rank": LowRank(0.9, Int8()),
    "mixed": Mixed(Float16(), {"conv*": Int4(), "head*": TopK(0.5)}),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def a_state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(12, 8, 3, 3, generator=generator),
        "bn.weight": torch.randn(12, generator=generator),
        "bn.running_var": torch.rand(12, generator=generator),
        "bn.num_batches_tracked": torch.tensor(2**53 + 1 + seed),
        "head.weight": torch.randn(16, 16, generator=generator),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


def an_update(state: State | None = None, **changes: Any) -> Update:
    base: dict[str, Any] = {"client": "Köln", "round": 3, "attempt": 1, "num_examples": 17, "num_steps": 5}
    extras = {"scaffold": {"bn.weight": torch.tensor([math.nan] * 12), "x": torch.tensor(0.5)}, "none": {}}
    base |= {"metrics": {"dice": math.nan}, "extras": extras, "state": a_state() if state is None else state}
    return Update(**(base | changes))


def moved(state: State, by: float, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + by * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t for n, t in state.items()
    }


@pytest.mark.parametrize("message", [an_update(), Broadcast(2, a_state())])
def test_plain_messages_are_those_of_encode_byte_for_byte(message: Broadcast | Update) -> None:
    packing = Packing(compress=False)
    packed = packing.pack(message, seed=4)
    assert packed.data == encode(message)
    assert identical(packed.message.state, message.state)
    assert identical(packing.unpack(packed.data, specs(message.state)).state, message.state)
    assert packed.residual is None


@every_codec
@pytest.mark.parametrize("of", ["weights", "delta"])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_both_sides_hold_the_same(codec: Codec, of: Any, compress: bool, dtype: torch.dtype) -> None:
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in a_state().items()}
    broadcast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in a_state(1).items()}
    packing = Packing(codec, of, error_feedback=True, compress=compress)
    packed = packing.pack(an_update(state), broadcast, None, seed=9)
    back = packing.unpack(packed.data, specs(state), broadcast, "site-b")
    assert isinstance(back, Update)
    assert isinstance(packed.message, Update)
    assert identical(back.state, packed.message.state)
    assert specs(back.state) == specs(state)
    for name in ("bn.num_batches_tracked", "flag"):
        assert torch.equal(back.state[name], state[name])
    sent = an_update(state)
    assert (back.client, back.round, back.attempt, back.num_examples) == ("Köln", 3, 1, 17)
    assert back.metrics.keys() == {"dice"}
    assert back.extras.keys() == sent.extras.keys()
    assert all(identical(back.extras[section], sent.extras[section]) for section in sent.extras)


@every_codec
def test_packing_is_a_function_of_its_arguments(codec: Codec) -> None:
    packing = Packing(codec, "delta")
    one, other = an_update(), an_update(dict(reversed(a_state().items())))
    assert packing.pack(one, a_state(1), seed=3).data == packing.pack(other, a_state(1), seed=3).data


@pytest.mark.parametrize("of", ["weights", "delta"])
def test_floats_without_a_codec_come_back_exactly(of: Any) -> None:
    state = {"w": torch.randn(50, 50), "v": torch.randn(7)}
    reference = {"w": torch.zeros(50, 50), "v": torch.zeros(7)}
    packing = Packing(of=of)
    packed = packing.pack(Broadcast(1, state), reference)
    assert identical(packing.unpack(packed.data, specs(state), reference).state, state)


def test_a_delta_is_small_where_the_weights_are_not() -> None:
    broadcast = a_state(1)
    state = moved(broadcast, 1e-3, 5)
    for of, bound in (("weights", 3e-2), ("delta", 3e-5)):
        packed = Packing(Int8(), of).pack(an_update(state), broadcast)  # type: ignore[arg-type]
        error = (packed.message.state["conv.weight"] - state["conv.weight"]).abs().max()
        assert bound / 10 < float(error) < bound


@pytest.mark.parametrize("codec", [TopK(0.02), Int4(), Int4("nearest"), LowRank(0.3), TopK(0.1, Int8())])
def test_with_error_feedback_all_that_was_sent_arrives_in_the_end(codec: Codec) -> None:
    packing = Packing(codec, "delta", error_feedback=True)
    broadcast, residual = a_state(1), None
    wanted = arrived = torch.zeros(12, 8, 3, 3, dtype=torch.float64)
    for round in range(12):
        state = moved(broadcast, 0.01, round)
        packed = packing.pack(an_update(state), broadcast, residual, seed=round)
        residual = packed.residual
        assert residual is not None
        assert residual.keys() <= {"conv.weight", "head.weight"}  # nothing else loses anything
        wanted = wanted + (state["conv.weight"].double() - broadcast["conv.weight"].double())
        arrived = arrived + (packed.message.state["conv.weight"].double() - broadcast["conv.weight"].double())
        assert float((wanted - arrived - residual["conv.weight"]).abs().max()) < 1e-5
        assert float(residual["conv.weight"].abs().max()) < 0.2
    assert float((wanted - arrived).abs().max()) > 1e-4  # or the test would be of a codec that loses nothing


def test_without_error_feedback_a_residual_is_neither_used_nor_made() -> None:
    packing = Packing(TopK(0.1), "delta")
    residual = {"conv.weight": torch.ones(12, 8, 3, 3)}
    packed = packing.pack(an_update(), a_state(1), residual)
    assert packed.residual is None
    assert packed.data == packing.pack(an_update(), a_state(1)).data


def test_a_rounded_delta_makes_no_variance_negative() -> None:
    reference = {"bn.running_var": torch.linspace(1, 2, 1000)}
    state = {"bn.running_var": torch.rand(1000) * 1e-6}
    packed = Packing(Mixed(Int8(), {"*": BFloat16()}), "delta").pack(Broadcast(1, state), reference)
    assert float(packed.message.state["bn.running_var"].min()) >= 0


@pytest.mark.parametrize("of", ["weights", "delta"])
def test_rounding_makes_nothing_infinite(of: Any) -> None:
    largest = {"w": torch.full((9, 9), 65504.0, dtype=torch.float16)}  # as a bfloat16, beyond float16
    packed = Packing(BFloat16(), of).pack(Broadcast(1, largest), {"w": torch.zeros(9, 9)})
    assert identical(packed.message.state, largest)


@every_codec
@pytest.mark.parametrize("of", ["weights", "delta"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_travels_as_it_is(codec: Codec, of: Any, bad: float) -> None:
    state = a_state()
    state["conv.weight"][0, 0, 0, 0] = bad
    residual = {"conv.weight": torch.ones(12, 8, 3, 3)}
    packing = Packing(codec, of, error_feedback=True)
    packed = packing.pack(an_update(state), a_state(1), residual)
    assert identical(packed.message.state, state)
    assert identical(packing.unpack(packed.data, specs(state), a_state(1)).state, state)
    assert packed.residual is not None
    assert identical(packed.residual, residual)


def test_two_sides_that_differ_find_out() -> None:
    like, sent = specs(a_state()), an_update()
    sides = [Packing(compress=False), Packing(), Packing(Int8()), Packing(Int8(levels=63)), Packing(Int8(), "delta")]
    for sender in sides:
        data = sender.pack(sent, a_state(1)).data
        for receiver in sides:
            if receiver is sender:
                continue
            with pytest.raises(TrainingError, match=r"site-b.*Use the same federation\.uplink") as caught:
                receiver.unpack(data, like, a_state(1), "site-b")
            assert sender.describe() in str(caught.value)
            assert receiver.describe() in str(caught.value)
    with pytest.raises(TrainingError, match=r"federation\.downlink"):
        sides[0].unpack(sides[1].pack(Broadcast(1, a_state())).data, like)


def test_a_plain_reader_refuses_a_packed_message() -> None:
    with pytest.raises(TrainingError, match=r"site-b is packed as 'weights by Int8\(.*same federation settings"):
        decode(Packing(Int8()).pack(an_update()).data, "site-b")


def test_a_delta_against_another_broadcast_is_refused() -> None:
    packing = Packing(Int8(), "delta")
    data = packing.pack(an_update(), a_state(1)).data
    with pytest.raises(TrainingError, match=r"site-b in round 3 is against another state"):
        packing.unpack(data, specs(a_state()), a_state(2), "site-b")


@pytest.mark.parametrize("reference", [None, {}, {"conv.weight": torch.zeros(1)}])
def test_a_delta_needs_a_fitting_reference(reference: State | None) -> None:
    with pytest.raises(ConfigError):
        Packing(of="delta").pack(an_update(), reference)


def test_impossible_settings_and_tensors_are_refused() -> None:
    for settings in ({"of": "gradients"}, {"level": 0}, {"level": 10}):
        with pytest.raises(ConfigError):
            Packing(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="complex64"):
        Packing().pack(Broadcast(1, {"c": torch.zeros(2, dtype=torch.complex64)}))


@pytest.mark.parametrize("compress", [True, False])
def test_the_parts_in_the_ledger_add_up_to_what_travels(compress: bool) -> None:
    data = Packing(Mixed(Int8(), {"head*": TopK(0.1)}), compress=compress).pack(an_update()).data
    parts = section_bytes(data)
    assert sum(parts.values()) == len(data)
    assert parts["extras:scaffold"] == 12 * 4 + 4
    assert parts["header"] == 8 + int.from_bytes(data[:8], "little")
    ledger = Ledger()
    ledger.record_message(3, "Köln", "up", data)
    assert ledger.total() == len(data)


def slim_unet() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"network.{name}": tensor for name, tensor in SlimUNet().state_dict().items()}


@pytest.mark.parametrize(
    ("packing", "most"),
    [
        (Packing(Int8(levels=63)), 100_000),
        (Packing(Int4()), 60_000),
        (Packing(Int4(), compress=False), 60_000),
        (Packing(TopK(0.1)), 60_000),
        (Packing(Float16()), 206_000),
    ],
)
def test_one_message_of_the_default_student_takes_what_the_documents_say(packing: Packing, most: int) -> None:
    metrics = {"train/loss": 0.123456789, "train/supervised": 0.123456789, "lr": 0.00128}
    packed = packing.pack(Update("hospital-1", 100, 0, slim_unet(), 480, 120, metrics))
    assert len(packed.data) < most
    assert section_bytes(packed.data)["header"] < 700


def test_a_packing_can_be_written_in_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--uplink", type=Packing)
    room = "fkd_med.communication"
    codec = {
        "class_path": f"{room}.Mixed",
        "init_args": {
            "default": {"class_path": f"{room}.Float16"},
            "patterns": {
                "*.weight": {
                    "class_path": f"{room}.LowRank",
                    "init_args": {"energy": 0.9, "inner": {"class_path": f"{room}.Int8", "init_args": {"levels": 63}}},
                }
            },
        },
    }
    config = parser.parse_object({"uplink": {"codec": codec, "of": "delta", "error_feedback": True}})
    built = parser.instantiate_classes(parser.parse_string(parser.dump(config))).uplink
    assert built.describe() == (
        "delta by Mixed(default=Float16(), patterns={*.weight: LowRank(energy=0.9, energy_end=0.9, energy_now=0.9, "
        "inner=Int8(levels=63, rounding=stochastic))}), compressed"
    )
    assert built.error_feedback
