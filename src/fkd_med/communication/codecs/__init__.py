"""Codecs: how a state becomes fewer bytes."""

from fkd_med.communication.codecs.base import Codec, Length, Spec, TensorCodec, is_matrix, specs
from fkd_med.communication.codecs.cast import BFloat16, Float16, Float32
from fkd_med.communication.codecs.low_rank import LowRank
from fkd_med.communication.codecs.mixed import Mixed
from fkd_med.communication.codecs.quantise import Int4, Int8
from fkd_med.communication.codecs.topk import TopK

__all__ = [
    "BFloat16",
    "Codec",
    "Float16",
    "Float32",
    "Int4",
    "Int8",
    "Length",
    "LowRank",
    "Mixed",
    "Spec",
    "TensorCodec",
    "TopK",
    "is_matrix",
    "specs",
]
