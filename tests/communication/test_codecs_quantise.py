"""Quantised tensors: bytes as written here by hand, errors below a step, right on average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fkd_med.communication import Codec, Int4, Int8, specs
from fkd_med.communication.header import MalformedError

GENERATOR = torch.Generator().manual_seed(1)
WEIGHT = torch.randn(6, 5, 3, 3, generator=GENERATOR) * torch.logspace(-7, 3, 6)[:, None, None, None]


def decoded(codec: Codec, tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return codec.decode(codec.encode({"w": tensor}, seed), {"w": specs({"w": tensor})["w"]})["w"]


@pytest.mark.parametrize(("codec", "levels"), [(Int8(), 127), (Int8(levels=20), 20), (Int4(), 7)])
def test_the_error_is_below_one_step_of_the_values_own_channel(codec: Codec, levels: int) -> None:
    steps = WEIGHT.abs().amax(dim=(1, 2, 3)).double() / levels
    error = (decoded(codec, WEIGHT).double() - WEIGHT.double()).abs().amax(dim=(1, 2, 3))
    assert bool((error <= steps * (1 + 2**-7)).all())
    assert bool((error > steps * 0.4).all())  # it is not something finer either


@pytest.mark.parametrize(
    ("codec", "levels"), [(Int8(rounding="nearest"), 127), (Int8(9, "nearest"), 9), (Int4("nearest"), 7)]
)
def test_nearest_errs_half_a_step(codec: Codec, levels: int) -> None:
    steps = WEIGHT.abs().amax(dim=(1, 2, 3)).double() / levels
    error = (decoded(codec, WEIGHT).double() - WEIGHT.double()).abs().amax(dim=(1, 2, 3))
    assert bool((error <= steps * 0.5 * (1 + 2**-7) + 1e-12 * steps).all())


@pytest.mark.parametrize("codec", [Int8(levels=4), Int8(), Int4()])
def test_stochastic_rounding_is_right_on_average(codec: Codec) -> None:
    tensor = torch.linspace(-1, 1, 70).reshape(2, 35)
    draws = torch.stack([decoded(codec, tensor, seed) for seed in range(1500)]).double()
    deviation = (draws.mean(dim=0) - tensor).abs()
    assert bool((deviation <= 5 * draws.std(dim=0) / 1500**0.5 + 1e-6).all())


def test_scales_are_bfloat16_and_never_too_small() -> None:
    scale = Int8().encode({"w": WEIGHT})["w|scale"].double()
    exact = WEIGHT.abs().amax(dim=(1, 2, 3)).double() / 127
    assert bool((scale >= exact * (1 - 1e-7)).all())
    assert bool((scale <= exact * (1 + 2**-7)).all())


def test_a_channel_of_zeros_has_scale_zero_and_stays_zero() -> None:
    tensor = torch.randn(3, 40)
    tensor[1] = 0
    for codec in (Int8(), Int4()):
        assert codec.encode({"w": tensor})["w|scale"][1].item() == 0
        assert decoded(codec, tensor)[1].tolist() == [0.0] * 40


def test_four_bits_are_two_to_a_byte_the_first_one_low() -> None:
    values = np.array([[7, -7, 1, -1, 0, 3, -4] * 10, [-7, 7, 2, 5, -6, 0, 1] * 10], dtype=np.float32)[:, :33]
    coded = Int4("nearest").encode({"w": torch.from_numpy(values * 0.5)})
    assert coded["w|scale"].tolist() == [0.5, 0.5]
    nibbles = [int(v) % 16 for v in values.reshape(-1)]
    expected = [low + 16 * high for low, high in zip(nibbles[0::2], nibbles[1::2], strict=True)]
    assert coded["w|levels"].tolist() == expected
    np.testing.assert_array_equal(decoded(Int4("nearest"), torch.from_numpy(values * 0.5)), values * 0.5)


def test_an_odd_number_of_values_leaves_half_a_byte() -> None:
    tensor = torch.full((5, 13), -7.0)
    coded = Int4("nearest").encode({"w": tensor})
    assert coded["w|levels"].tolist() == [0x99] * 32 + [0x09]
    assert torch.equal(decoded(Int4("nearest"), tensor), tensor)
    with pytest.raises(MalformedError, match="unused"):
        Int4().decode(coded | {"w|levels": coded["w|levels"] | 0x10}, specs({"w": tensor}))


@pytest.mark.parametrize("codec", [Int8(), Int8(rounding="nearest"), Int4()])
def test_the_largest_and_the_smallest_numbers_survive(codec: Codec) -> None:
    tensor = torch.full((3, 30), torch.finfo(torch.float32).max)
    tensor[1] = -1e-45
    tensor[2] = 1e-38
    back = decoded(codec, tensor)
    assert bool(torch.isfinite(back).all())
    assert float(back[0].min()) > 2.8e38
    assert bool((back[1] <= 0).all())
    assert float(back[2].min()) > 0.8e-38


def test_levels_and_scales_that_no_encoder_writes_are_refused() -> None:
    like = specs({"w": WEIGHT})
    eight, four = Int8(levels=100).encode({"w": WEIGHT}), Int4().encode({"w": WEIGHT})
    with pytest.raises(MalformedError, match="beyond 100"):
        Int8(levels=100).decode(eight | {"w|levels": torch.full_like(eight["w|levels"], 101)}, like)
    with pytest.raises(MalformedError, match="beyond 100"):
        Int8(levels=100).decode(eight | {"w|levels": torch.full_like(eight["w|levels"], -128)}, like)
    with pytest.raises(MalformedError, match="beyond 7"):
        Int4().decode(four | {"w|levels": torch.full_like(four["w|levels"], 0x88)}, like)
    with pytest.raises(MalformedError, match="negative"):
        Int4().decode(four | {"w|scale": -four["w|scale"]}, like)
