"""A codec that sends only the largest values of each tensor and where they are; for deltas with error feedback.

Source: Aji & Heafield, "Sparse communication for distributed gradient descent", 2017.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fkd_med.communication.codecs.base import Codec, Length, Spec, TensorCodec
from fkd_med.communication.codecs.cast import Float32
from fkd_med.communication.header import MalformedError
from fkd_med.communication.messages import State
from fkd_med.errors import ConfigError

_LONG = 255  # a byte of 255 means: 255 places further, and the gap goes on in the next byte


class TopK(TensorCodec):
    """The largest magnitudes of each kernel or matrix, exactly; the rest is 0. Other tensors travel as they are.

    At least one value per tensor; among equal magnitudes the first. Places travel as gaps between them (a byte per
    gap below 255) or as a bitmap, whichever is shorter.

    Args:
        fraction: share of each tensor's values, above 0 and at most 1.
        inner: codes the values kept, as a matrix of one row; not given, they are float32.

    Raises:
        ConfigError: `fraction` is none of these.
    """

    def __init__(self, fraction: float = 0.1, inner: Codec | None = None) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"TopK sends a fraction above 0 and at most 1, not {fraction}: correct `fraction`.")
        self.fraction = fraction
        self.inner = inner or Float32()

    def at(self, progress: float) -> TopK:
        """Return the same with the inner codec as it is at a share of the run."""
        return TopK(self.fraction, self.inner.at(progress))

    def parts(self, spec: Spec, length: Length) -> dict[str, Spec]:
        """Return the places, in as many bytes as they take, and the values."""
        size = length("places")
        if not 0 < size <= _bitmap_size(spec.numel):
            raise MalformedError(f"the places of a tensor take {size} bytes")
        return {"places": Spec((size,), torch.uint8), **self.inner.layout(self._values(spec), length)}

    def encode_tensor(self, tensor: Tensor, seed: int) -> State:
        """Return places and values of the largest magnitudes."""
        flat = tensor.reshape(-1)
        kept = _largest(flat.abs(), self._count(flat.numel()))
        values = self.inner.encode({"values": flat[kept][None]}, seed)
        return {"places": torch.from_numpy(_to_bytes(kept.numpy(), flat.numel())), **values}

    def decode_tensor(self, parts: State, spec: Spec) -> Tensor:
        """Return the values in their places, zeros elsewhere."""
        places = _from_bytes(parts["places"].numpy(), spec.numel)
        if len(places) != self._count(spec.numel):
            raise MalformedError(f"{len(places)} places for {self._count(spec.numel)} values")
        coded = {name: tensor for name, tensor in parts.items() if name != "places"}
        values = self.inner.decode(coded, self._values(spec))["values"]
        flat = torch.zeros(spec.numel)
        flat[torch.from_numpy(places)] = values[0]
        return flat

    def _count(self, numel: int) -> int:
        return max(1, round(self.fraction * numel))

    def _values(self, spec: Spec) -> dict[str, Spec]:
        return {"values": Spec((1, self._count(spec.numel)), torch.float32)}


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Return the ascending places of the `count` largest; torch.topk promises nothing about equal ones."""
    least = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
    kept = magnitudes > least
    ties = (magnitudes == least).nonzero()[:, 0]
    kept[ties[: count - int(kept.sum())]] = True
    return kept.nonzero()[:, 0]


def _bitmap_size(numel: int) -> int:
    return math.ceil(numel / 8)


def _to_bytes(places: NDArray[np.int64], numel: int) -> NDArray[np.uint8]:
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(gaps // _LONG + 1)  # each gap takes one byte, and one more per 255
    if ends[-1] < _bitmap_size(numel):  # never equal, so the length tells the receiver which of the two it is
        coded = np.full(ends[-1], _LONG, dtype=np.uint8)
        coded[ends - 1] = gaps % _LONG
        return coded
    bits = np.zeros(numel, dtype=bool)
    bits[places] = True
    return np.packbits(bits)


def _from_bytes(coded: NDArray[np.uint8], numel: int) -> NDArray[np.int64]:
    places: NDArray[np.int64]
    if len(coded) < _bitmap_size(numel):
        if coded[-1] == _LONG:
            raise MalformedError("the last gap between places has no end")
        after = np.cumsum(coded.astype(np.int64) + (coded != _LONG))  # one past each place
        places = after[coded != _LONG] - 1
    else:
        places = np.flatnonzero(np.unpackbits(coded))
    if places.size and places[-1] >= numel:
        raise MalformedError(f"a place is beyond the tensor's {numel} values")
    return places
