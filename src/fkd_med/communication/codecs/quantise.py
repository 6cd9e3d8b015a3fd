"""Codecs that count in steps: a few bits per value and one scale per output channel.

A scale is the largest magnitude of its channel over the number of levels, as a bfloat16: that has the range of
float32 (a delta of 1e-6 has scales below float16's smallest number) and is rounded up, so no value is cut off; it
makes steps less than 1 % coarser. Source of the rounding: Alistarh et al., "QSGD", 2017.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fkd_med.communication.codecs.base import Length, Spec, TensorCodec
from fkd_med.communication.header import MalformedError
from fkd_med.communication.messages import State
from fkd_med.errors import ConfigError

Rounding: TypeAlias = Literal["stochastic", "nearest"]


class _Quantised(TensorCodec):
    """Whole levels from ``-levels`` to ``levels`` for tensors of two dimensions and more."""

    def __init__(self, levels: int, rounding: Rounding) -> None:
        self.levels = levels
        self.rounding = rounding

    @abstractmethod
    def _size(self, numel: int) -> tuple[torch.dtype, int]:
        """Return dtype and length of the stored levels."""

    @abstractmethod
    def _store(self, levels: Tensor) -> Tensor:
        """Return a vector of int8 levels as it travels."""

    @abstractmethod
    def _levels(self, stored: Tensor, numel: int) -> Tensor:
        """Return the vector of int8 levels."""

    def parts(self, spec: Spec, length: Length) -> dict[str, Spec]:
        """Return the levels, and a scale per output channel."""
        dtype, size = self._size(spec.numel)
        return {"levels": Spec((size,), dtype), "scale": Spec(spec.shape[:1], torch.bfloat16)}

    def encode_tensor(self, tensor: Tensor, seed: int) -> State:
        """Return levels and scales; a channel of zeros has scale 0."""
        channels = tensor.reshape(len(tensor), -1).double()
        scale = _round_up(channels.abs().amax(dim=1) / self.levels)
        ratio = channels / torch.where(scale > 0, scale, 1).double()[:, None]
        if self.rounding == "stochastic":
            generator = torch.Generator().manual_seed(seed)
            ratio = (ratio + torch.rand(ratio.shape, generator=generator)).floor_()
        else:
            ratio = ratio.round_()
        levels = ratio.clamp_(-self.levels, self.levels).to(torch.int8)
        return {"levels": self._store(levels.reshape(-1)), "scale": scale}

    def decode_tensor(self, parts: State, spec: Spec) -> Tensor:
        """Return levels times scales."""
        scale = parts["scale"].double()
        if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
            raise MalformedError("a scale is negative or not finite")
        levels = self._levels(parts["levels"], spec.numel)
        if bool((levels < -self.levels).any()) or bool((levels > self.levels).any()):
            raise MalformedError(f"a level is beyond {self.levels}")
        return levels.reshape(spec.shape[0], -1) * scale[:, None]


class Int8(_Quantised):
    """One byte per value of a kernel or matrix; other tensors travel as they are.

    Error below one step (half a step for ``nearest``); a step is the channel's largest magnitude over `levels`.

    Args:
        levels: steps from zero to the largest magnitude, 1 to 127. Fewer compress better: 31 take about 6 bits.
        rounding: ``stochastic`` is right on average, so errors of many clients cancel; ``nearest`` errs half as much.

    Raises:
        ConfigError: `levels` or `rounding` is none of these.
    """

    def __init__(self, levels: int = 127, rounding: Rounding = "stochastic") -> None:
        if not 1 <= levels <= 127:
            raise ConfigError(f"Int8 has 1 to 127 levels, not {levels}: correct `levels`.")
        super().__init__(levels, _known(rounding))

    def _size(self, numel: int) -> tuple[torch.dtype, int]:
        return torch.int8, numel

    def _store(self, levels: Tensor) -> Tensor:
        return levels

    def _levels(self, stored: Tensor, numel: int) -> Tensor:
        return stored


class Int4(_Quantised):
    """Half a byte per value of a kernel or matrix: 7 steps each way; other tensors travel as they are.

    Two values share a byte, the first in its low half, each in two's complement.

    Args:
        rounding: ``stochastic`` is right on average, so errors of many clients cancel; ``nearest`` errs half as much.

    Raises:
        ConfigError: `rounding` is none of these.
    """

    def __init__(self, rounding: Rounding = "stochastic") -> None:
        super().__init__(7, _known(rounding))

    def _size(self, numel: int) -> tuple[torch.dtype, int]:
        return torch.uint8, (numel + 1) // 2

    def _store(self, levels: Tensor) -> Tensor:
        halves = torch.nn.functional.pad(levels, (0, levels.numel() % 2)).view(torch.uint8) & 15
        return halves[0::2] | (halves[1::2] << 4)

    def _levels(self, stored: Tensor, numel: int) -> Tensor:
        halves = torch.stack([stored & 15, stored >> 4], dim=1).reshape(-1).to(torch.int8)
        levels = halves - 16 * (halves > 7).to(torch.int8)
        if bool(levels[numel:].any()):
            raise MalformedError("the unused half of the last byte is not zero")
        return levels[:numel]


def _known(rounding: Rounding) -> Rounding:
    if rounding not in ("stochastic", "nearest"):
        raise ConfigError(f"rounding is 'stochastic' or 'nearest', not {rounding!r}: correct it.")
    return rounding


def _round_up(scale: Tensor) -> Tensor:
    """Return non-negative finite numbers as bfloat16 (the upper half of a float32's bits), never smaller."""
    bits = scale.to(torch.float32).view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
