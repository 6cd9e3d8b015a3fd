"""What every codec promises: shapes and dtypes come back, equal seeds give equal bits, strangers are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fkd_med.aggregation import identical
from fkd_med.communication import BFloat16, Codec, Float16, Float32, Int4, Int8, LowRank, Mixed, Spec, TopK, specs
from fkd_med.communication.header import MalformedError
from fkd_med.communication.wire import DTYPES
from fkd_med.errors import ConfigError

CODECS: dict[str, Codec] = {
    "float32": Float32(),
    "float16": Float16(),
    "bfloat16": BFloat16(),
    "int8": Int8(),
    "int8 nearest": Int8(levels=31, rounding="nearest"),
    "int4": Int4(),
    "top-k": TopK(0.05),
    "top-k all": TopK(1.0),
    "top-k int8": TopK(0.3, Int8()),
    "low rank": LowRank(0.8),
    "low rank int8": LowRank(0.9, Int8()),
    "low rank top-k": LowRank(0.9, TopK(0.5)),
    "mixed": Mixed(Int4(), {"a*": TopK(0.1), "b*": Mixed(LowRank(0.5, Float16()), {"*7": Float32()})}),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def a_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(8, 4, 3, 3, generator=generator),
        "b.weight": torch.randn(40, 2, generator=generator) @ torch.randn(2, 50, generator=generator),
        "b7": torch.randn(9, 9, generator=generator) * 1e-6,
        "bias": torch.randn(8, generator=generator),
        "long.running_var": torch.rand(500, generator=generator),
        "steps": torch.tensor(2**53 + 1),
    }


def scalars() -> st.SearchStrategy[float]:
    finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
    return st.one_of(finite, st.sampled_from([0.0, -0.0, 1e-45, -1.2e-38, 3.4028234663852886e38, -3.4e38]))


@every_codec
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_names_shapes_and_dtypes_of_anything_come_back(codec: Codec, data: st.DataObject) -> None:
    shapes = st.one_of(st.lists(st.integers(0, 3), max_size=3), st.lists(st.integers(5, 12), min_size=2, max_size=3))
    names = st.sampled_from(["a", "b", "b7", "c/d", "é"])
    described = data.draw(st.dictionaries(names, st.tuples(shapes, st.sampled_from([*DTYPES.values()])), max_size=4))
    values = data.draw(st.lists(scalars(), min_size=1, max_size=7))
    state: dict[str, Tensor] = {}
    for name, (shape, dtype) in described.items():
        flat = torch.tensor([values[i % len(values)] for i in range(math.prod(shape))], dtype=torch.float32)
        flat = flat.nan_to_num().clamp(-6e4, 6e4) if dtype == torch.float16 else flat
        state[name] = flat.clamp(-100, 100).to(dtype) if not dtype.is_floating_point else flat.to(dtype)
        state[name] = state[name].nan_to_num(posinf=3e38, neginf=-3e38).reshape(shape)
    back = codec.decode(codec.encode(state, 3), specs(state))
    assert specs(back) == specs(state)
    for name, tensor in back.items():
        assert bool(torch.isfinite(tensor).all())
        if not tensor.is_floating_point():
            assert torch.equal(tensor, state[name])


@every_codec
def test_equal_seeds_give_equal_bits_in_any_order_and_company(codec: Codec) -> None:
    state = a_state()
    coded = codec.encode(state, 5)
    assert identical(coded, codec.encode(dict(reversed(state.items())), 5))
    alone = codec.encode({"b7": state["b7"]}, 5)
    assert identical(alone, {name: tensor for name, tensor in coded.items() if name.split("|")[0] == "b7"})


@pytest.mark.parametrize("codec", [Int8(), Int4(), TopK(0.5, Int4())])
def test_other_seeds_round_otherwise(codec: Codec) -> None:
    assert not identical(codec.encode(a_state(), 1), codec.encode(a_state(), 2))


@every_codec
def test_only_dtypes_that_travel_and_a_layout_known_beforehand(codec: Codec) -> None:
    coded = codec.encode(a_state(), 0)
    asked: list[str] = []

    def length(name: str) -> int:
        asked.append(name)
        return coded[name].numel()

    layout = codec.layout(specs(a_state()), length)
    assert specs(coded) == layout
    assert all(tensor.dtype in DTYPES.values() for tensor in coded.values())
    before = len(asked)
    codec.layout(specs(a_state()), length)
    assert asked[:before] == asked[before:]  # the same questions in the same order


@every_codec
def test_what_is_decoded_shares_no_memory(codec: Codec) -> None:
    state = a_state()
    coded = codec.encode(state, 0)
    back = codec.decode(coded, specs(state))
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in back.values():
        tensor.zero_()
    assert identical(state, kept)
    assert identical(coded, codec.encode(kept, 0))


@pytest.mark.parametrize("codec", [c for n, c in CODECS.items() if "float" not in n])
def test_vectors_small_tensors_and_integers_travel_as_they_are(codec: Codec) -> None:
    state = {
        "v": torch.rand(1000),
        "small": torch.randn(9, 7),
        "one": torch.tensor(0.1),
        "none": torch.zeros(0, 70),
        "whole": torch.arange(100).reshape(10, 10),
        "true": torch.ones(10, 10, dtype=torch.bool),
    }
    coded = codec.encode(state, 0)
    assert identical(coded, state)
    assert identical(codec.decode(coded, specs(state)), state)


def test_formats_lose_what_the_format_loses_and_never_become_infinite() -> None:
    state = {"a": torch.tensor([1.0, 1 + 2**-9, 70000.0, -1e30, 1e-9, 3.4028234e38])}
    like = specs(state)
    assert Float16().decode(Float16().encode(state), like)["a"].tolist() == [1, 1 + 2**-9, 65504, -65504, 0, 65504]
    b16 = BFloat16().decode(BFloat16().encode(state), like)["a"]
    assert b16[:2].tolist() == [1, 1]
    assert bool(torch.isfinite(b16).all())
    assert b16[4].item() == pytest.approx(1e-9, rel=2**-8)
    assert identical(Float32().decode(Float32().encode(state), like), state)


def test_a_mix_takes_the_first_pattern_that_fits() -> None:
    state = {"encoder.weight": torch.randn(10, 10), "decoder.weight": torch.randn(10, 10), "x": torch.randn(3)}
    mixed = Mixed(Float16(), {"encoder.*": Int8(), "*.weight": Int4()})
    kinds = {name: tensor.dtype for name, tensor in mixed.encode(state).items()}
    assert kinds == {
        "encoder.weight|levels": torch.int8,
        "encoder.weight|scale": torch.bfloat16,
        "decoder.weight|levels": torch.uint8,
        "decoder.weight|scale": torch.bfloat16,
        "x": torch.float16,
    }


def test_descriptions_hold_all_settings() -> None:
    codec = Mixed(
        Int8(levels=63), {"a": TopK(0.25, Float16()), "b": LowRank(0.9), "c": LowRank(0.8, None, 0.9).at(0.5)}
    )
    assert codec.describe() == (
        "Mixed(default=Int8(levels=63, rounding=stochastic), patterns={a: TopK(fraction=0.25, inner=Float16()), "
        "b: LowRank(energy=0.9, energy_end=0.9, energy_now=0.9, inner=Float32()), "
        "c: LowRank(energy=0.8, energy_end=0.9, energy_now=0.8500000000000001, inner=Float32())})"
    )
    assert all(one.describe() != other.describe() for one, other in pairwise(CODECS.values()))


@pytest.mark.parametrize(
    "build",
    [
        lambda: TopK(0),
        lambda: TopK(-0.1),
        lambda: TopK(1.5),
        lambda: TopK(math.nan),
        lambda: LowRank(0),
        lambda: LowRank(1.1),
        lambda: Int8(levels=0),
        lambda: Int8(levels=128),
        lambda: Int8(rounding="up"),  # type: ignore[arg-type]
        lambda: Int4(rounding="up"),  # type: ignore[arg-type]
        lambda: Int8().encode({"a|b": torch.zeros(1)}),
    ],
)
def test_impossible_settings_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        build()


@every_codec
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_coded_state_that_does_not_fit_is_refused(codec: Codec, data: st.DataObject) -> None:
    state = a_state()
    coded = codec.encode(state, 0)
    name = data.draw(st.sampled_from(sorted(coded)))
    tensor = coded[name]
    forged = data.draw(
        st.sampled_from(
            [
                {n: t for n, t in coded.items() if n != name},
                coded | {f"{name}|more": tensor},
                coded | {"teacher": tensor},
                coded | {name: tensor.to(torch.float64)},
                coded | {name: tensor[None]},
                coded | {name: tensor.new_zeros(10_000_000)},
            ]
        )
    )
    with pytest.raises(MalformedError):
        codec.decode(forged, specs(state))


@pytest.mark.parametrize("codec", [Float32(), Float16(), Int8(), TopK(0.5), TopK(0.5, Int8()), LowRank(0.5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_coded_values_that_are_not_finite_are_refused(codec: Codec, bad: float) -> None:
    state = {"w": torch.outer(torch.arange(1.0, 11), torch.arange(1.0, 11))}
    coded = codec.encode(state, 0)
    for name in [name for name, tensor in coded.items() if tensor.is_floating_point()]:
        forged = coded[name].clone()
        forged.view(-1)[0] = bad
        with pytest.raises(MalformedError):
            codec.decode(coded | {name: forged}, specs(state))


def test_wrong_expectations_are_refused_too() -> None:
    coded = Int8().encode({"w": torch.randn(10, 10)})
    with pytest.raises(MalformedError, match="levels"):
        Int8().decode(coded, {"w": Spec((10, 11), torch.float32)})
    with pytest.raises(MalformedError, match="missing"):
        Int8().decode(coded, {"v": Spec((10, 10), torch.float32)})
