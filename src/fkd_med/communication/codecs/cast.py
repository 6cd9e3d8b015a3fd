"""Codecs that only choose a floating-point format, for every floating tensor, small ones too."""

from __future__ import annotations

import torch
from torch import Tensor

from fkd_med.communication.codecs.base import Length, Spec, TensorCodec
from fkd_med.communication.messages import State


class _Cast(TensorCodec):
    """One format for all floating tensors."""

    dtype: torch.dtype

    def codes(self, spec: Spec) -> bool:
        """Return whether it is floating."""
        return spec.dtype.is_floating_point

    def parts(self, spec: Spec, length: Length) -> dict[str, Spec]:
        """Return the tensor in this format."""
        return {"": Spec(spec.shape, self.dtype)}

    def encode_tensor(self, tensor: Tensor, seed: int) -> State:
        """Return the tensor in this format, clamped to its range."""
        limits = torch.finfo(self.dtype)
        return {"": tensor.clamp(limits.min, limits.max).to(self.dtype)}

    def decode_tensor(self, parts: State, spec: Spec) -> Tensor:
        """Return the tensor as it came."""
        return parts[""]


class Float32(_Cast):
    """Four bytes per value: nothing is lost."""

    dtype = torch.float32


class Float16(_Cast):
    """Two bytes per value: relative error 2^-11, values from 6e-5 to 65504 (larger ones are clamped)."""

    dtype = torch.float16


class BFloat16(_Cast):
    """Two bytes per value: relative error 2^-8, the range of float32; for values that float16 would lose."""

    dtype = torch.bfloat16
