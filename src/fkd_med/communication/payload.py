"""Coded tensors as few tensors on the wire, with next to no header.

A header entry takes about 100 bytes and a student has about a hundred tensors. Names and shapes follow from the
student's and the codec, so all coded tensors of a dtype travel as one vector (``|F32``, ``|I8``, ...), or all of
them as one compressed vector (``|deflate``); lengths that depend on values travel in the vector ``|lengths``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fkd_med.communication.codecs import Codec, Spec
from fkd_med.communication.header import MalformedError, shown
from fkd_med.communication.messages import State
from fkd_med.communication.wire import DTYPES
from fkd_med.errors import ConfigError

LENGTHS, DEFLATED = "|lengths", "|deflate"


def write(codec: Codec, coded: Mapping[str, Tensor], like: Mapping[str, Spec], level: int | None) -> State:
    """Return the tensors that travel for the coded tensors of a state like `like`; `level` None: not compressed.

    Raises:
        ConfigError: a tensor's dtype is not one of those that travel.
    """
    for name, tensor in coded.items():
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(f"Tensor '{name}' is {tensor.dtype}, which cannot be sent. Convert it.")
    lengths: list[int] = []

    def length(name: str) -> int:
        lengths.append(coded[name].numel())
        return lengths[-1]

    layout = codec.layout(like, length)
    vectors = {
        dtype: torch.cat([coded[name].reshape(-1).cpu() for name in names]) for dtype, names in _groups(layout).items()
    }
    tensors = {f"|{dtype}": vector for dtype, vector in vectors.items()}
    if level is not None and vectors:
        streams = [_deflate(_to_planes(vector), level) for vector in vectors.values()]
        tensors = {DEFLATED: torch.from_numpy(np.frombuffer(b"".join(streams), dtype=np.uint8).copy())}
    return tensors | ({LENGTHS: torch.tensor(lengths, dtype=torch.int32)} if lengths else {})


def read(codec: Codec, tensors: Mapping[str, Tensor], like: Mapping[str, Spec], compressed: bool) -> State:
    """Return the coded tensors that `write` was given.

    Nothing is decompressed beyond the size that `like` and the codec imply.

    Raises:
        MalformedError: the tensors, their sizes or the compressed bytes are impossible.
    """
    layout = _read_layout(codec, tensors.get(LENGTHS), like)
    groups = _groups(layout)
    sizes = {dtype: sum(layout[name].numel for name in names) for dtype, names in groups.items()}
    vectors = {name: tensor for name, tensor in tensors.items() if name != LENGTHS}
    if compressed and groups:
        vectors = _inflated(vectors, sizes)
    _check(vectors, sizes)
    coded: State = {}
    for dtype, names in groups.items():
        pieces = torch.split_with_sizes(vectors[f"|{dtype}"], [layout[name].numel for name in names])
        coded |= {name: piece.reshape(layout[name].shape) for name, piece in zip(names, pieces, strict=True)}
    return coded | {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in layout.items() if s.numel == 0}


def _groups(layout: Mapping[str, Spec]) -> dict[str, list[str]]:
    """Return the names of the tensors that are not empty by dtype, in the order in which they travel."""
    found = {
        key: [name for name, spec in layout.items() if spec.dtype == dtype and spec.numel]
        for key, dtype in DTYPES.items()
    }
    return {key: names for key, names in found.items() if names}


def _read_layout(codec: Codec, lengths: Tensor | None, like: Mapping[str, Spec]) -> dict[str, Spec]:
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.dim() != 1 or not lengths.numel()):
        raise MalformedError("its lengths are no vector of whole numbers")
    left: Iterator[int] = iter([] if lengths is None else lengths.tolist())

    def length(name: str) -> int:
        found = next(left, -1)
        if found < 0:
            raise MalformedError(f"the length of coded tensor {shown(name)} is missing or negative")
        return found

    layout = codec.layout(like, length)
    if next(left, None) is not None:
        raise MalformedError("it has more lengths than coded tensors need")
    return layout


def _check(vectors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    for name in sorted(vectors.keys() ^ {f"|{dtype}" for dtype in sizes}):
        raise MalformedError(f"packed tensor {shown(name)} is {'unknown' if name in vectors else 'missing'}")
    for dtype, size in sizes.items():
        vector = vectors[f"|{dtype}"]
        if vector.dtype != DTYPES[dtype] or tuple(vector.shape) != (size,):
            raise MalformedError(f"packed tensor '|{dtype}' is {vector.dtype} {tuple(vector.shape)}, not {size} long")


# --- compression ----------------------------------------------------------------------------------------------------


def _deflate(data: bytes, level: int) -> bytes:
    """Return `data` compressed, with repetitions looked for or not: in noise they only get in the way.

    Measured on the student's weights and deltas, a stream per dtype is within 1 % of the entropy of its bytes, and
    lzma within 4 %, in ten times the time.
    """
    found = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        deflater = zlib.compressobj(level, strategy=strategy)
        found.append(deflater.compress(data) + deflater.flush())
    return min(found, key=len)


def _inflated(vectors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> State:
    """Return the vectors in ``|deflate``: one stream after the other, of sizes known beforehand."""
    packed = vectors.get(DEFLATED)
    if vectors.keys() != {DEFLATED} or packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise MalformedError(f"it has {shown(sorted(vectors))} where one compressed vector belongs")
    found: State = {}
    rest = packed.numpy().tobytes()
    for dtype, size in sizes.items():
        data, rest = _inflate(rest, size * DTYPES[dtype].itemsize)
        found[f"|{dtype}"] = _from_planes(data, DTYPES[dtype])
    if rest:
        raise MalformedError(f"{len(rest)} bytes follow its compressed ones")
    return found


def _inflate(data: bytes, size: int) -> tuple[bytes, bytes]:
    """Return what the stream that begins `data` holds, and the bytes after it."""
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise MalformedError("its compressed bytes are damaged") from error
    if len(found) != size or not inflater.eof:
        raise MalformedError(f"its compressed bytes are not {size} bytes")
    return found, inflater.unused_data


def _to_planes(vector: Tensor) -> bytes:
    """Return all first bytes, then all second bytes, ...: exponents are alike, low mantissas are noise."""
    raw = vector.view(torch.uint8).numpy().reshape(-1, vector.dtype.itemsize)
    return raw.T.tobytes()


def _from_planes(data: bytes, dtype: torch.dtype) -> Tensor:
    raw = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1).T
    if dtype is torch.bool and bool((raw > 1).any()):
        raise MalformedError("a truth value is neither 0 nor 1")
    return torch.from_numpy(np.ascontiguousarray(raw).reshape(-1).copy()).view(dtype)
