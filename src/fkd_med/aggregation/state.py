"""Arithmetic on states (``{name: tensor}``): pure functions, in float64, cast back at the end.

Only plain element-wise operations are used, each rounded once as IEEE 754 says, so the bits depend neither on the
number of threads nor on vector width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fkd_med.communication import State
from fkd_med.errors import TrainingError

CHUNK = 32_768  # numbers combined in one go: 256 KiB of float64, so that three such vectors fit a core's cache
BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def is_buffer(name: str) -> bool:
    """Return whether a tensor of this name is a BatchNorm statistic or counter, by the names PyTorch gives them.

    A state does not say what is a parameter. What is measured must be averaged, never extrapolated: a step of
    momentum could make a variance negative.
    """
    return name.rpartition(".")[2] in BUFFERS


def parameter_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of what an optimizer may step: floating tensors that are no `is_buffer`, in their order."""
    return [name for name, tensor in state.items() if tensor.is_floating_point() and not is_buffer(name)]


def delta_norm(state: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Collection[str]) -> float:
    """Return the Euclidean norm of ``state - base`` over the tensors `names`, in float64; 0 for none."""
    memory = np.empty(max((base[name].numel() for name in names), default=0))
    return math.sqrt(math.fsum(_squares(state[name], base[name], memory) for name in names))


def _squares(one: Tensor, other: Tensor, memory: NDArray[np.float64]) -> float:
    squares = memory[: one.numel()]
    pieces = torch.split(torch.from_numpy(squares), CHUNK)  # a piece stays in the processor's cache
    vectors = (torch.split(tensor.detach().reshape(-1), CHUNK) for tensor in (one, other))
    for piece, ours, theirs in zip(pieces, *vectors, strict=True):
        piece.copy_(ours).sub_(theirs.double()).square_()
    # NumPy sums in one order; torch splits a sum among its threads, which would show in the bits.
    return float(np.sum(squares))


def assert_same_structure(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], owner: str) -> None:
    """Check that `state` has the names, shapes and dtypes of `expected`.

    Raises:
        TrainingError: naming `owner` and the first tensor that differs.
    """
    for name in sorted(state.keys() ^ expected.keys()):
        problem = "is missing" if name in expected else "is unknown to the global model"
        raise TrainingError(f"{owner}: tensor '{name}' {problem}. All sides must build the same student.")
    for name, tensor in state.items():
        like = expected[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise TrainingError(
                f"{owner}: tensor '{name}' is {tensor.dtype} {tuple(tensor.shape)}, the global model's is "
                f"{like.dtype} {tuple(like.shape)}. All sides must build the same student."
            )


def assert_finite(state: Mapping[str, Tensor], owner: str) -> None:
    """Check that `state` holds no NaN and no infinity.

    Raises:
        TrainingError: naming `owner` and the first tensor that is not finite.
    """
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise not_finite(owner, name)


def not_finite(owner: str, name: str) -> TrainingError:
    """Return the error for a tensor that holds NaN or infinity."""
    return TrainingError(
        f"{owner}: tensor '{name}' holds NaN or infinity. Its training diverged: lower the learning rate, "
        "clip gradients, or look at its images with `fkd check-data`."
    )


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; integers never do."""
    if not tensor.is_floating_point():
        return True
    # One NaN or infinity makes the sum one, and a sum needs no mask and, in the tensor's own dtype, no copy. It may
    # overflow, hence the rest.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def cast_like(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """Return `values` as new tensors in the dtypes of `like`; integers and booleans are rounded, halves to even."""
    return {
        name: (values[name] if tensor.is_floating_point() else values[name].round()).to(tensor.dtype, copy=True)
        for name, tensor in like.items()
    }


def subtract(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> State:
    """Return ``state - base`` in float64; names and shapes must agree."""
    return {name: tensor.double() - base[name].double() for name, tensor in state.items()}


def add(state: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> State:
    """Return ``state + delta``, summed in float64, in the dtypes of `state`."""
    return cast_like({name: tensor.double() + delta[name].double() for name, tensor in state.items()}, state)


def identical(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether both states have the same names, shapes, dtypes and bits (signs of zero and NaN included)."""
    return one.keys() == other.keys() and all(_same_bits(tensor, other[name]) for name, tensor in one.items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
