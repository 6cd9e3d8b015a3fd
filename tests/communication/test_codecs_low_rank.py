"""Low rank: the smallest rank that reaches the energy, and nothing larger than the tensor itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fkd_med.communication import Codec, Float16, Int8, LowRank, Mixed, Packing, TopK, Update, specs
from fkd_med.communication.header import MalformedError
from fkd_med.errors import ConfigError, TrainingError

KERNEL = (
    torch.randn(24, 10, 3, 3, generator=torch.Generator().manual_seed(0))
    * 2.0 ** -torch.arange(24.0)[:, None, None, None]
)


def decoded(codec: LowRank, tensor: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode({"w": tensor}), specs({"w": tensor}))["w"]


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 0.999])
def test_the_smallest_rank_that_reaches_the_energy(energy: float) -> None:
    strengths = np.linalg.svd(KERNEL.reshape(24, 90).double().numpy(), compute_uv=False)
    share = np.cumsum(strengths**2) / np.sum(strengths**2)
    rank = int(np.argmax(share >= energy)) + 1
    coded = LowRank(energy).encode({"w": KERNEL})
    assert {name: tuple(tensor.shape) for name, tensor in coded.items()} == {
        "w|strengths": (rank,),
        "w|left": (24, rank),
        "w|right": (rank, 90),
    }
    error = float((decoded(LowRank(energy), KERNEL).double() - KERNEL.double()).square().sum())
    assert error == pytest.approx((1 - share[rank - 1]) * np.sum(strengths**2), rel=1e-3)


def test_a_tensor_whose_factors_would_be_larger_travels_whole_and_exactly() -> None:
    tensor = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0))).Q
    coded = LowRank(0.95).encode({"w": tensor})
    assert coded["w|strengths"].numel() == 0
    assert torch.equal(decoded(LowRank(0.95), tensor), tensor)


def test_rank_one_comes_back_at_full_energy() -> None:
    tensor = torch.outer(torch.arange(1.0, 31), torch.linspace(-1, 1, 40))
    coded = LowRank(0.999999).encode({"w": tensor})
    assert coded["w|strengths"].numel() == 1
    torch.testing.assert_close(decoded(LowRank(0.999999), tensor), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inner", [Float16(), Int8()])
def test_factors_may_be_coded_again(inner: Float16 | Int8) -> None:
    size = sum(tensor.nbytes for tensor in LowRank(0.9).encode({"w": KERNEL}).values())
    small = sum(tensor.nbytes for tensor in LowRank(0.9, inner).encode({"w": KERNEL}).values())
    assert small < 0.6 * size
    torch.testing.assert_close(decoded(LowRank(0.9, inner), KERNEL), decoded(LowRank(0.9), KERNEL), rtol=0, atol=0.05)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_the_energy_goes_from_the_first_rounds_to_the_last(progress: float) -> None:
    codec = LowRank(0.6, energy_end=0.999).at(progress)
    assert codec.energy_now == pytest.approx(0.6 + (0.999 - 0.6) * progress)
    same = LowRank(codec.energy_now).encode({"w": KERNEL})
    assert {n: t.shape for n, t in codec.encode({"w": KERNEL}).items()} == {n: t.shape for n, t in same.items()}


def test_each_end_is_exact_and_a_constant_stays() -> None:
    rising = LowRank(0.95, energy_end=0.98)
    assert (rising.at(0.0).energy_now, rising.at(1.0).energy_now) == (0.95, 0.98)
    assert rising.energy_now == 0.95  # at() changes nothing
    assert LowRank(0.95).at(0.7).describe() == LowRank(0.95).describe()


@pytest.mark.parametrize(
    "codec",
    [
        Mixed(Float16(), {"w*": LowRank(0.6, energy_end=0.9)}),
        Mixed(LowRank(0.6, energy_end=0.9), {}),
        TopK(0.5, LowRank(0.6, energy_end=0.9)),
        LowRank(0.9, TopK(0.5, LowRank(0.6, energy_end=0.9))),
    ],
)
def test_codecs_around_it_pass_the_progress_on(codec: Codec) -> None:
    texts = [codec.at(progress).describe() for progress in (0.0, 1.0)]
    assert "energy_now=0.6" in texts[0] and texts[1] == texts[0].replace("energy_now=0.6", "energy_now=0.9")


def test_both_sides_must_be_in_the_same_round() -> None:
    """A receiver in another round of the schedule refuses the message, and so does one with another schedule."""
    packing = Packing(LowRank(0.6, energy_end=0.9))
    update = Update("a", 1, 0, {"w": KERNEL}, num_examples=1, num_steps=1, metrics={})
    data, like = packing.at(0.0).pack(update).data, specs({"w": KERNEL})
    assert packing.at(0.0).unpack(data, like).state["w"].shape == KERNEL.shape
    for other in (packing.at(1.0), Packing(LowRank(0.6, energy_end=0.8)).at(0.0)):
        with pytest.raises(TrainingError, match=r"energy_now=0.6.*Use the same federation.uplink"):
            other.unpack(data, like)


@pytest.mark.parametrize("energies", [(0.0, None), (0.9, 0.0), (0.9, 1.1), (float("nan"), None)])
def test_energies_that_are_none_are_refused(energies: tuple[float, float | None]) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        LowRank(energies[0], energy_end=energies[1])


def test_zeros_take_one_vector_each_way() -> None:
    assert LowRank(1.0).encode({"w": torch.zeros(30, 30)})["w|strengths"].tolist() == [0.0]


@pytest.mark.parametrize("fill", [0.0, 3.4e38, -1e-44])
def test_zeros_huge_and_tiny_values_survive(fill: float) -> None:
    tensor = torch.full((30, 30), fill)
    torch.testing.assert_close(decoded(LowRank(0.9), tensor), tensor, rtol=1e-5, atol=1e-44)


def test_a_rank_that_saves_nothing_is_refused() -> None:
    coded = LowRank(0.5).encode({"w": KERNEL})
    forged = {"w|strengths": torch.ones(23), "w|left": torch.ones(24, 23), "w|right": torch.ones(23, 90)}
    with pytest.raises(MalformedError, match="rank 23"):
        LowRank(0.5).decode(forged, specs({"w": KERNEL}))
    with pytest.raises(MalformedError, match="left"):
        LowRank(0.5).decode(coded | {"w|strengths": torch.ones(5)}, specs({"w": KERNEL}))
