"""A codec that leaves each tensor to another one, by its name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from fkd_med.communication.codecs.base import Codec, TensorCodec


class Mixed(Codec):
    """Chooses a codec by the tensor's name.

    Args:
        default: codes the tensors that no pattern names.
        patterns: codecs by pattern of the tensor's name (``*`` and ``?`` as in a shell); the first that fits counts.
    """

    def __init__(self, default: Codec, patterns: dict[str, Codec]) -> None:
        self.default = default
        self.patterns = dict(patterns)

    def at(self, progress: float) -> Mixed:
        """Return the mix of the codecs as they are at a share of the run."""
        return Mixed(self.default.at(progress), {name: codec.at(progress) for name, codec in self.patterns.items()})

    def choose(self, name: str) -> TensorCodec:
        """Return the codec of the first pattern that fits `name`."""
        fitting = (codec for pattern, codec in self.patterns.items() if fnmatchcase(name, pattern))
        return next(fitting, self.default).choose(name)
