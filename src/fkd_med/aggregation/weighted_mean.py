"""The mean of many states, a piece at a time that stays in the processor's cache.

NumPy instead of torch: a step over few numbers costs it half as much, and it writes where it is told to. Memory is
touched once and used again, since new memory costs more than the arithmetic in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fkd_med.aggregation.state import CHUNK, cast_like, not_finite
from fkd_med.communication import State

_EXACT = frozenset({torch.float32, torch.float64, torch.int64, torch.int32})  # NumPy turns these into float64 itself


class WeightedMean:
    """Mean of states that come one by one, in the memory of one float64 state and one tensor.

    The running mean ``m += (x - m) * (w / W)`` (D. H. D. West, CACM 22(9), 1979; ``W`` the weights so far) keeps
    two identities that ``sum(w x) / sum(w)`` loses to rounding: the mean of one state, and of equal states, is
    that state bit for bit; and multiplying all weights by one factor changes no bit. Each operation is element-wise and
    rounded once as IEEE 754 says, so no bit depends on chunks, threads or vector width.
    """

    def __init__(self) -> None:
        self.weight: float = 0
        self.count = 0
        self._blocks: list[_Block] = []
        self._step = np.empty(CHUNK)

    def add(self, state: Mapping[str, Tensor], weight: float, owner: str = "A state of the mean") -> None:
        """Take in one state of positive `weight`; names and shapes must be those of the first.

        A lazy mapping that makes its tensors as they are asked for keeps memory at one of them, or a few small ones.

        Args:
            state: CPU tensors by name.
            weight: how much it counts.
            owner: whose it is, for the error.

        Raises:
            TrainingError: NaN or infinity, found while adding, so the mean is spoilt; names `owner` and the tensor.
        """
        self.weight += weight
        self.count += 1
        if self.count == 1:
            self._blocks = _blocks(state)
        share = None if self.count == 1 else weight / self.weight
        with np.errstate(over="ignore", invalid="ignore"):
            for block in self._blocks:
                arrays = [_array(state[name]) for name in block.shapes]
                if bad := block.move(arrays, share, self._step):
                    raise not_finite(owner, bad)

    def values(self) -> State:
        """Return the mean in float64, which the caller may change; empty before the first `add`."""
        return {name: tensor for block in self._blocks for name, tensor in block.tensors().items()}

    def result(self, like: Mapping[str, Tensor]) -> State:
        """Return the mean in the dtypes of `like`; at least one state must have been added."""
        return cast_like(self.values(), like)


class _Block:
    """The mean of one large tensor, or of small neighbours that are combined in one go.

    Args:
        shapes: shapes by name.
    """

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes
        self.mean = np.empty(sum(shape.numel() for shape in shapes.values()))

    def move(self, arrays: list[NDArray[np.generic]], share: float | None, step: NDArray[np.float64]) -> str:
        """Move the mean by a share of its way to `arrays`, or put it there; return a tensor that is not finite, or "".

        Args:
            arrays: the tensors.
            share: weight of the arrays in all so far; None for the first.
            step: memory to work in, of `CHUNK` numbers.
        """
        whole = arrays[0].reshape(-1) if len(arrays) == 1 else None
        for start in range(0, len(self.mean), CHUNK):
            mean = self.mean[start : start + CHUNK]
            way = step[: len(mean)]
            parts = arrays if whole is None else [whole[start : start + CHUNK]]
            np.concatenate(parts, axis=None, out=way)
            # Squares cannot cancel, and their sum is the fastest look at all numbers; that of finite ones may overflow.
            if not math.isfinite(np.dot(way, way)) and (bad := self._not_finite(parts)):
                return bad
            if share is None:
                mean[:] = way
            else:
                np.subtract(way, mean, out=way)
                np.multiply(way, share, out=way)
                np.add(mean, way, out=mean)
        return ""

    def _not_finite(self, parts: list[NDArray[np.generic]]) -> str:
        bad = (name for name, part in zip(self.shapes, parts, strict=True) if not np.isfinite(part).all())
        return next(bad, "")

    def tensors(self) -> State:
        """Return the means by name, in the memory of the block."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(torch.from_numpy(self.mean), sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def _blocks(state: Mapping[str, Tensor]) -> list[_Block]:
    """Return blocks that together hold `state`, in its order."""
    groups: list[dict[str, torch.Size]] = []
    left = 0
    for name, tensor in state.items():
        if not groups or tensor.numel() > left:
            groups.append({})
            left = CHUNK
        groups[-1][name] = tensor.shape
        left -= tensor.numel()
    return [_Block(group) for group in groups]


def _array(tensor: Tensor) -> NDArray[np.generic]:
    """Return the tensor's numbers; float32 for a small format, some of which NumPy does not know."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype not in _EXACT:
        tensor = tensor.float() if tensor.is_floating_point() else tensor.double()
    array: NDArray[np.generic] = tensor.numpy()
    return array
