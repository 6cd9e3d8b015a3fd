"""How a message's state is made small for the way, and itself again: codec, delta, error feedback, compression.

Sender and receiver have a `Packing` each, with the same settings. The message says with which settings it was
packed and, for a delta, against which state, so two sides that differ find out instead of training on noise.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fkd_med.communication import payload, wire
from fkd_med.communication.codecs import Codec, Float32, Spec, specs
from fkd_med.communication.header import MalformedError
from fkd_med.communication.messages import Broadcast, State, Update
from fkd_med.errors import ConfigError, TrainingError


@dataclass(frozen=True, eq=False)
class Packed:
    """A message on its way.

    Args:
        data: its bytes.
        message: the message as the other side will have it.
        residual: what was lost on the way, for the next round's `Packing.pack`; tensors that lost nothing are not in
            it. ``None`` without error feedback.
    """

    data: bytes
    message: Broadcast | Update
    residual: State | None


class Packing:
    """Makes a message's state small: what is sent, in which code, what happens to the loss, compressed or not.

    Integer tensors and extras travel as they are. A state with NaN or infinity travels whole and as it is, so that
    the receiver's rules see what happened. Without codec, delta and compression the bytes are those of `encode`.

    Args:
        codec: how tensors are coded; not given, they stay float32.
        of: ``weights`` sends the state, ``delta`` its difference from a state that both sides have (`reference`).
        error_feedback: add to each message what the codec lost of the last one (Seide et al., "1-bit SGD", 2014;
            Karimireddy et al., "Error feedback fixes SignSGD", 2019).
        compress: also compress losslessly, by zlib.
        level: zlib's effort, 1 (fast) to 9.

    Raises:
        ConfigError: `of` or `level` is none of these.
    """

    def __init__(
        self,
        codec: Codec | None = None,
        of: Literal["weights", "delta"] = "weights",
        error_feedback: bool = False,
        compress: bool = True,
        level: int = 6,
    ) -> None:
        if of not in ("weights", "delta"):
            raise ConfigError(f"A packing is of 'weights' or of a 'delta', not {of!r}: correct `of`.")
        if not 1 <= level <= 9:
            raise ConfigError(f"zlib has levels 1 to 9, not {level}: correct `level`.")
        self.codec = codec or Float32()
        self.of = of
        self.error_feedback = error_feedback
        self.compress = compress
        self.level = level

    def at(self, progress: float) -> Packing:
        """Return the packing as it is when a share of the run has passed: 0 in the first round, 1 in the last."""
        now = copy.copy(self)
        now.codec = self.codec.at(progress)
        return now

    @property
    def plain(self) -> bool:
        """Whether messages travel exactly as `encode` writes them."""
        return type(self.codec) is Float32 and self.of == "weights" and not self.compress

    def describe(self) -> str:
        """Return what both sides must agree on."""
        if self.plain:
            return "plain"
        text = f"{self.of} by {self.codec.describe()}{', compressed' if self.compress else ''}"
        return text.encode("ascii", "backslashreplace").decode()

    def pack(
        self,
        message: Broadcast | Update,
        reference: Mapping[str, Tensor] | None = None,
        residual: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> Packed:
        """Return `message` on its way.

        Args:
            message: what to send.
            reference: the state that a delta is against: the broadcast as it was decoded.
            residual: what the last call returned, if there was one.
            seed: of the codec's random draws.

        Raises:
            ConfigError: something in the message cannot travel, or a delta has no fitting reference.
        """
        if self.plain:
            data = wire.encode(message)
            return Packed(data, wire.decode(data, "this side"), None)
        like = specs(message.state)
        base = self._base(like, reference)
        values = _subtract(message.state, base, residual if self.error_feedback else None)
        if not all(bool(torch.isfinite(t).all()) for t in values.values() if t.is_floating_point()):
            data = wire.encode(message, self._notes(base))
            kept = dict(residual or {}) if self.error_feedback else None
            return Packed(data, wire.decode_packed(data)[0], kept)
        coded = self.codec.encode(values, seed)
        tensors = payload.write(self.codec, coded, _coded_like(like), self.level if self.compress else None)
        data = wire.encode(replace(message, state=tensors), self._notes(base))
        sent, decoded = self._open(data, like, base, "this side")
        lost = _lost(values, decoded) if self.error_feedback else None
        return Packed(data, replace(sent, state=_add(decoded, base, like)), lost)

    def unpack(
        self,
        data: bytes,
        like: Mapping[str, Spec],
        reference: Mapping[str, Tensor] | None = None,
        sender: str = "a peer",
    ) -> Broadcast | Update:
        """Return the message in `data`, as `Packed.message` is on the other side.

        Args:
            data: bytes as `pack` makes them, from anybody.
            like: shapes and dtypes of the student's state (see `specs`).
            reference: the state that a delta is against.
            sender: whom an error names.

        Raises:
            TrainingError: the bytes are damaged, packed with other settings or against another state.
            ConfigError: a delta has no fitting reference.
        """
        if self.plain:
            message, notes = wire.decode_packed(data, sender)
            self._agree(message, notes, {}, sender)
            return message
        base = self._base(like, reference)
        message, decoded = self._open(data, like, base, sender)
        return replace(message, state=_add(decoded, base, like)) if decoded else message

    def _open(
        self, data: bytes, like: Mapping[str, Spec], base: Mapping[str, Tensor], sender: str
    ) -> tuple[Broadcast | Update, State]:
        """Return the message as it travelled and its decoded values: none if it is not finite and travelled whole."""
        message, notes = wire.decode_packed(data, sender)
        self._agree(message, notes, self._notes(base), sender)
        if message.state and message.state.keys() == like.keys():
            return message, {}
        try:
            coded_like = _coded_like(like)
            coded = payload.read(self.codec, message.state, coded_like, self.compress)
            return message, self.codec.decode(coded, coded_like)
        except MalformedError as error:
            raise wire.unreadable(sender, error) from error

    def _agree(
        self, message: Broadcast | Update, notes: Mapping[str, str], ours: Mapping[str, str], sender: str
    ) -> None:
        """Check that a message was packed as this side would pack it."""
        way = "uplink" if isinstance(message, Update) else "downlink"
        theirs = notes.get("packing", "plain")
        if theirs != self.describe():
            raise TrainingError(
                f"A message from {sender} is packed as '{_shortened(theirs)}', and this side expects "
                f"'{_shortened(self.describe())}'. Use the same federation.{way} on all sides."
            )
        if notes.get("reference") != ours.get("reference"):
            raise TrainingError(
                f"The delta from {sender} in round {message.round} is against another state than this side has: "
                "one of them holds an older broadcast. Start the round again."
            )

    def _notes(self, base: Mapping[str, Tensor]) -> dict[str, str]:
        return {"packing": self.describe()} | ({"reference": _digest(base)} if self.of == "delta" else {})

    def _base(self, like: Mapping[str, Spec], reference: Mapping[str, Tensor] | None) -> State:
        """Return the floating tensors of the reference; none when weights travel."""
        if self.of == "weights":
            return {}
        if reference is None:
            raise ConfigError("A delta is against a state that both sides have, and there is none: use `of: weights`.")
        for name, spec in like.items():
            if name not in reference or tuple(reference[name].shape) != spec.shape:
                raise ConfigError(
                    f"The state that a delta is against has no tensor '{name}' of shape {spec.shape}. "
                    "Use the same student on all sides."
                )
        return {name: reference[name].detach().cpu() for name in sorted(like) if like[name].dtype.is_floating_point}


def _coded_like(like: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return `like` with the float32 that is coded in place of each floating dtype."""
    return {n: Spec(s.shape, torch.float32 if s.dtype.is_floating_point else s.dtype) for n, s in like.items()}


def _subtract(state: Mapping[str, Tensor], base: Mapping[str, Tensor], residual: Mapping[str, Tensor] | None) -> State:
    """Return ``state - base + residual`` as float32, summed in float64; integers as they are."""
    values: State = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            value = tensor.double()
            value = value - base[name].double() if name in base else value
            value = value + residual[name].double() if residual and name in residual else value
            tensor = value.float()
        values[name] = tensor
    return values


def _add(decoded: Mapping[str, Tensor], base: Mapping[str, Tensor], like: Mapping[str, Spec]) -> State:
    """Return ``base + decoded`` in the dtypes of `like`; a rounded delta must not make a variance negative."""
    state: State = {}
    for name, value in decoded.items():
        if name in base:
            value = base[name].double() + value.double()
            value = value.clamp(min=0) if name.endswith("running_var") else value
        if value.is_floating_point():
            limits = torch.finfo(like[name].dtype)
            value = torch.where(value.isfinite(), value.double().clamp(limits.min, limits.max), value)
        state[name] = value.to(like[name].dtype)
    return state


def _lost(values: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> State:
    lost = {n: value - decoded[n] for n, value in values.items() if value.is_floating_point()}
    return {name: value for name, value in lost.items() if bool(value.any())}


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} ".encode())
        digest.update(state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else text[:397] + "..."
