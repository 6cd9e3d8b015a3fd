"""A codec that sends two thin factors of a matrix.

Source: Wu et al., "Communication-efficient federated learning via knowledge distillation" (FedKD), 2022:
singular value decomposition of each matrix, as many singular values as reach a share of the energy; the share rises
in the course of the run, so that early, coarse updates are small and late ones exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fkd_med.communication.codecs.base import Codec, Length, Spec, TensorCodec
from fkd_med.communication.codecs.cast import Float32
from fkd_med.communication.header import MalformedError
from fkd_med.communication.messages import State
from fkd_med.errors import ConfigError


class LowRank(TensorCodec):
    """The strongest singular vectors of each kernel or matrix, seen as (out, in * k * k).

    The smallest rank whose squared singular values reach the energy in force of their sum; so the squared error of a
    tensor is at most ``1 - energy`` of its square. A tensor whose factors would be larger than itself travels whole.

    Args:
        energy: share of the squared singular values to keep, above 0 and at most 1; the first round's.
        inner: codes the factors (or the whole tensor); not given, they are float32.
        energy_end: the last round's share; in between it goes in a straight line. Not given, `energy` stays.

    Raises:
        ConfigError: `energy` or `energy_end` is none of these.
    """

    def __init__(self, energy: float = 0.95, inner: Codec | None = None, energy_end: float | None = None) -> None:
        for name, share in (("energy", energy), ("energy_end", energy if energy_end is None else energy_end)):
            if not 0 < share <= 1:
                raise ConfigError(f"LowRank keeps an energy above 0 and at most 1, not {share}: correct `{name}`.")
        self.energy, self.energy_end = energy, energy if energy_end is None else energy_end
        self.energy_now = energy
        self.inner = inner or Float32()

    def at(self, progress: float) -> LowRank:
        """Return the codec with the energy of a share of the run: energy + (energy_end - energy) * progress."""
        now = LowRank(self.energy, self.inner.at(progress), self.energy_end)
        now.energy_now = (1 - progress) * self.energy + progress * self.energy_end  # each end exactly
        return now

    def parts(self, spec: Spec, length: Length) -> dict[str, Spec]:
        """Return singular values and factors; no singular values: the whole tensor."""
        rank = length("strengths")
        if rank and not _saves(rank, _matrix(spec)):
            raise MalformedError(f"a tensor of shape {spec.shape} has factors of rank {rank}")
        strengths = {"strengths": Spec((rank,), torch.float32)}
        return strengths | self.inner.layout(_factors(_matrix(spec), rank), length)

    def encode_tensor(self, tensor: Tensor, seed: int) -> State:
        """Return the factors of a tensor, or the whole."""
        matrix = tensor.reshape(len(tensor), -1)
        left, strengths, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        rank = _rank(strengths, self.energy_now)
        strengths = strengths[:rank].float()
        if not _saves(rank, tuple(matrix.shape)) or not bool(torch.isfinite(strengths).all()):
            return {"strengths": torch.zeros(0), **self.inner.encode({"whole": matrix}, seed)}
        factors = {"left": left[:, :rank].float(), "right": right[:rank].float()}
        return {"strengths": strengths, **self.inner.encode(factors, seed)}

    def decode_tensor(self, parts: State, spec: Spec) -> Tensor:
        """Return the product of the factors."""
        strengths = parts["strengths"].double()
        coded = {name: tensor for name, tensor in parts.items() if name != "strengths"}
        factors = self.inner.decode(coded, _factors(_matrix(spec), len(strengths)))
        if "whole" in factors:
            return factors["whole"]
        return (factors["left"].double() * strengths) @ factors["right"].double()


def _matrix(spec: Spec) -> tuple[int, ...]:
    return spec.shape[0], spec.numel // spec.shape[0]


def _saves(rank: int, shape: tuple[int, ...]) -> bool:
    rows, columns = shape
    return rank * (rows + columns + 1) < rows * columns


def _rank(strengths: Tensor, energy: float) -> int:
    """Return the smallest rank that reaches `energy`, at least 1."""
    reached = strengths.square().cumsum(0)
    return min(int((reached < energy * reached[-1]).sum()) + 1, len(strengths))


def _factors(shape: tuple[int, ...], rank: int) -> dict[str, Spec]:
    if rank == 0:
        return {"whole": Spec(shape, torch.float32)}
    rows, columns = shape
    return {"left": Spec((rows, rank), torch.float32), "right": Spec((rank, columns), torch.float32)}
