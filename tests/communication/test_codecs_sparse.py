"""Top-k: what is kept is exact, where it was; places in as few bytes as promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fkd_med.communication import Float16, Int8, State, TopK, specs
from fkd_med.communication.header import MalformedError


def decoded(codec: TopK, tensor: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode({"w": tensor}), specs({"w": tensor}))["w"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(64, 5000), st.floats(0.0001, 1), st.booleans())
def test_exactly_the_largest_are_kept_exactly(seed: int, size: int, fraction: float, tied: bool) -> None:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values = np.round(values) if tied else values
    count = max(1, round(fraction * size))
    expected = np.zeros(size, dtype=np.float32)
    kept = np.argsort(-np.abs(values), kind="stable")[:count]
    expected[kept] = values[kept]
    np.testing.assert_array_equal(decoded(TopK(fraction), torch.from_numpy(values)[None])[0], expected)


def test_at_least_one_value_of_each_tensor_travels() -> None:
    tensor = torch.zeros(10, 10)
    tensor[3, 4] = -2
    assert torch.equal(decoded(TopK(1e-9), tensor), tensor)
    assert torch.equal(decoded(TopK(1e-9), torch.zeros(10, 10)), torch.zeros(10, 10))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0, 1], [0, 0]),
        ([3, 10], [3, 6]),
        ([254, 255], [254, 0]),
        ([255, 511], [255, 0, 255, 0]),
        ([256, 1022], [255, 1, 255, 255, 255, 0]),
        ([998, 999], [255, 255, 255, 233, 0]),
    ],
)
def test_places_are_gaps_and_a_byte_of_255_goes_on(places: list[int], expected: list[int]) -> None:
    tensor = torch.zeros(1, 1100)
    tensor[0, places] = torch.tensor([1.0, -2.0])
    codec = TopK(2 / 1100)
    assert codec.encode({"w": tensor})["w|places"].tolist() == expected
    assert torch.equal(decoded(codec, tensor), tensor)


def test_many_places_are_a_bitmap() -> None:
    tensor = torch.zeros(1, 70)
    tensor[0, ::3] = 1.0
    coded = TopK(24 / 70).encode({"w": tensor})["w|places"]
    assert coded.tolist() == [0b10010010, 0b01001001, 0b00100100] * 3
    assert torch.equal(decoded(TopK(24 / 70), tensor), tensor)


def test_gaps_as_long_as_a_bitmap_are_a_bitmap() -> None:
    tensor = torch.zeros(1, 80)
    tensor[0, ::8] = 1.0
    assert TopK(10 / 80).encode({"w": tensor})["w|places"].tolist() == [0b10000000] * 10
    assert torch.equal(decoded(TopK(10 / 80), tensor), tensor)
    assert TopK(9 / 80).encode({"w": tensor})["w|places"].tolist() == [0] + [7] * 8


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.12, 0.13, 0.5, 1.0])
def test_places_never_take_more_than_a_bitmap(fraction: float) -> None:
    tensor = torch.randn(1, 4001, generator=torch.Generator().manual_seed(0))
    assert TopK(fraction).encode({"w": tensor})["w|places"].numel() <= 501


def test_what_is_kept_may_be_coded_again() -> None:
    tensor = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    exact = decoded(TopK(0.3), tensor)
    halves = decoded(TopK(0.3, Float16()), tensor)
    assert torch.equal(halves, exact.half().float())
    coded = TopK(0.3, Int8(rounding="nearest")).encode({"w": tensor})
    assert {name: (t.dtype, tuple(t.shape)) for name, t in coded.items() if name != "w|places"} == {
        "w|values|levels": (torch.int8, (300,)),
        "w|values|scale": (torch.bfloat16, (1,)),
    }
    bytes_ = decoded(TopK(0.3, Int8(rounding="nearest")), tensor)
    assert float((bytes_ - exact).abs().max()) <= float(tensor.abs().max()) / 127


PLACES: dict[str, tuple[float, list[int]]] = {
    "beyond the end": (2 / 100, [99, 0]),
    "far beyond the end": (2 / 100, [255, 255, 1, 2]),
    "too few": (2 / 100, [5]),
    "too many": (2 / 100, [5, 5, 5]),
    "no end": (2 / 100, [1, 1, 255]),
    "none": (2 / 100, []),
    "longer than a bitmap": (2 / 100, [0] * 14),
    "bitmap of too few": (20 / 100, [1] * 13),
    "bitmap beyond the end": (1 / 100, [0] * 12 + [0b00001000]),
}


@pytest.mark.parametrize(("fraction", "places"), PLACES.values(), ids=PLACES.keys())
def test_places_that_no_encoder_writes_are_refused(fraction: float, places: list[int]) -> None:
    tensor = torch.randn(10, 10)
    coded: State = TopK(fraction).encode({"w": tensor})
    with pytest.raises(MalformedError):
        TopK(fraction).decode(coded | {"w|places": torch.tensor(places, dtype=torch.uint8)}, specs({"w": tensor}))


def test_the_same_places_rightly_written_are_taken() -> None:
    tensor = torch.zeros(10, 10)
    coded = TopK(2 / 100).encode({"w": tensor}) | {"w|values": torch.tensor([[5.0, 6.0]])}
    back = TopK(2 / 100).decode(coded | {"w|places": torch.tensor([98, 0], dtype=torch.uint8)}, specs({"w": tensor}))
    assert back["w"].reshape(-1).nonzero()[:, 0].tolist() == [98, 99]
