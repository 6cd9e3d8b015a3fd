"""What a codec is: a state becomes fewer bytes and, nearly, itself again; the receiver trusts none of it.

A codec turns each tensor ``<name>`` into coded tensors ``<name>`` or ``<name>|<part>``. Names, shapes and dtypes of
the coded tensors follow from those of the state (`Codec.layout`), but for a few lengths that depend on values. So
they need not be sent, and what does not fit them is refused before anything is computed from it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fkd_med.communication.header import MalformedError, shown
from fkd_med.communication.messages import State
from fkd_med.errors import ConfigError
from fkd_med.seeding import derive_seed

SMALL = 64  # elements; below, a scale or an index costs about what it saves

Length: TypeAlias = Callable[[str], int]
"""Says how many elements the coded one-dimensional tensor of that name has, where it depends on values."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def specs(state: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Return shapes and dtypes of a state."""
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def is_matrix(spec: Spec) -> bool:
    """Return whether a tensor is a kernel or matrix worth coding: floating, two dimensions, `SMALL` elements.

    Biases and the vectors of normalisation layers are not. They are about one element in a hundred, and a variance
    coded with the others' scale may become 0.
    """
    return spec.dtype.is_floating_point and len(spec.shape) >= 2 and spec.numel >= SMALL


class Codec(ABC):
    """Turns a state into fewer bytes, and back."""

    @abstractmethod
    def choose(self, name: str) -> TensorCodec:
        """Return what codes the tensor `name`."""

    def encode(self, values: Mapping[str, Tensor], seed: int = 0) -> State:
        """Return the coded tensors of `values`; equal for equal seeds, whatever the order of the names.

        Args:
            values: finite CPU tensors by name.
            seed: of everything random.

        Raises:
            ConfigError: a name holds ``|``, which separates a name from its part.
        """
        coded: State = {}
        for name in sorted(values):
            if "|" in name:
                raise ConfigError(f"Tensor '{name}' cannot be coded: its name holds '|'. Rename the module.")
            coded |= self.choose(name).encode_named(name, values[name].detach(), derive_seed(seed, name))
        return coded

    def decode(self, coded: Mapping[str, Tensor], like: Mapping[str, Spec]) -> State:
        """Return the state in `coded`, with names, shapes and dtypes of `like`, each in memory of its own.

        Raises:
            MalformedError: no `encode` gives this: names, shapes, dtypes, lengths or values are impossible.
        """

        def length(name: str) -> int:
            if name not in coded or coded[name].dim() != 1:
                raise MalformedError(f"coded tensor {shown(name)} is missing or no vector")
            return coded[name].numel()

        _check(specs(coded), self.layout(like, length))
        state: State = {}
        for name in sorted(like):
            spec = like[name]
            parts = self.choose(name).named_parts(name, spec, length)
            decoded = self.choose(name).decode_named(name, {part: coded[part] for part in parts}, spec)
            state[name] = decoded.to(spec.dtype, copy=True)
        return state

    def layout(self, like: Mapping[str, Spec], length: Length) -> dict[str, Spec]:
        """Return the coded tensors of a state like `like`, in the order in which they travel.

        Args:
            like: shapes and dtypes of the state.
            length: asked, always in the same order, for lengths that depend on values.

        Raises:
            MalformedError: an answer is impossible.
        """
        found: dict[str, Spec] = {}
        for name in sorted(like):
            found |= self.choose(name).named_parts(name, like[name], length)
        return found

    def at(self, progress: float) -> Codec:
        """Return the codec as it is when a share of the run has passed: 0 in the first round, 1 in the last.

        Itself, unless it changes in the course of a run; a codec that holds others asks them.
        """
        return self

    def describe(self) -> str:
        """Return the codec with all its settings, as both sides must have it."""
        settings = (f"{name}={_described(value)}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({', '.join(settings)})"


class TensorCodec(Codec):
    """A codec that treats tensors one by one and alike; derive from it and write the four methods below."""

    def choose(self, name: str) -> TensorCodec:
        """Return itself: every tensor is coded alike."""
        return self

    def codes(self, spec: Spec) -> bool:
        """Return whether tensors like `spec` are coded; others travel as they are."""
        return is_matrix(spec)

    @abstractmethod
    def parts(self, spec: Spec, length: Length) -> dict[str, Spec]:
        """Return the parts of one coded tensor; the part named ``""`` keeps the tensor's own name.

        Raises:
            MalformedError: a length is impossible.
        """

    @abstractmethod
    def encode_tensor(self, tensor: Tensor, seed: int) -> State:
        """Return the parts of a finite float32 tensor."""

    @abstractmethod
    def decode_tensor(self, parts: State, spec: Spec) -> Tensor:
        """Return the floating tensor in `parts`, which have the names, shapes and dtypes that `parts()` says.

        Raises:
            MalformedError: values in `parts` are impossible.
        """

    def named_parts(self, name: str, spec: Spec, length: Length) -> dict[str, Spec]:
        """Return what tensor `name` is coded into."""
        if not self.codes(spec):
            return {name: spec}
        found = self.parts(spec, lambda part: length(_join(name, part)))
        return {_join(name, part): part_spec for part, part_spec in found.items()}

    def encode_named(self, name: str, tensor: Tensor, seed: int) -> State:
        """Return tensor `name` coded, or as it is."""
        if not self.codes(Spec(tuple(tensor.shape), tensor.dtype)):
            return {name: tensor}
        parts = self.encode_tensor(tensor.to(torch.float32), seed)
        return {_join(name, part): coded for part, coded in parts.items()}

    def decode_named(self, name: str, coded: State, spec: Spec) -> Tensor:
        """Return tensor `name`, shaped like `spec`, from what it was coded into."""
        if not self.codes(spec):
            return coded[name]
        own = {key.removeprefix(name).removeprefix("|"): tensor for key, tensor in coded.items()}
        decoded = self.decode_tensor(own, spec).reshape(spec.shape)
        if not bool(torch.isfinite(decoded).all()):
            raise MalformedError(f"coded tensor {shown(name)} is not finite")
        limits = torch.finfo(spec.dtype)  # steps that were rounded up may pass the largest number
        return decoded.double().clamp(limits.min, limits.max)


def _join(name: str, part: str) -> str:
    return f"{name}|{part}" if part else name


def _check(found: dict[str, Spec], expected: dict[str, Spec]) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        raise MalformedError(f"coded tensor {shown(name)} is {'missing' if name in expected else 'unknown'}")
    for name, spec in found.items():
        if spec != expected[name]:
            wanted = expected[name]
            raise MalformedError(
                f"coded tensor {shown(name)} is {spec.dtype} {shown(spec.shape)}, not {wanted.dtype} {wanted.shape}"
            )


def _described(value: object) -> str:
    if isinstance(value, Codec):
        return value.describe()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_described(item)}" for key, item in value.items()) + "}"
    return str(value)
