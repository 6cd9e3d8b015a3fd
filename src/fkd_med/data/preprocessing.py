"""How a file becomes a network's input; prediction must repeat it exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fkd_med.data.geometry import ResizeMode, fit_image, fitted_box
from fkd_med.data.images import normalise, read_image
from fkd_med.errors import ConfigError

_MEAN = {1: (0.449,), 3: (0.485, 0.456, 0.406)}  # of ImageNet, and of its grey version
_LARGEST = 8192  # pixels of a side: beyond it a single batch fills any memory
_STD = {1: (0.226,), 3: (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Preprocessing:
    """Size, channels and normalisation of images.

    Attributes:
        image_size: Side of the working square, in pixels.
        resize: ``stretch`` or ``letterbox``.
        in_channels: 1 (grey) or 3 (RGB).
        mean: Subtracted per channel, from values in [0, 1].
        std: Divides, per channel.
    """

    image_size: int
    resize: ResizeMode
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def checked(
        cls,
        image_size: int,
        resize: ResizeMode,
        in_channels: int,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> Preprocessing:
        """Return it with ImageNet's mean and std where none are given.

        Raises:
            ConfigError: Numbers that do not fit together.
        """
        if in_channels not in _MEAN:
            raise ConfigError(f"data.in_channels: {in_channels}; use 3 for colour or 1 for grey.")
        if not 1 <= image_size <= _LARGEST:
            raise ConfigError(f"data.image_size: {image_size}; use the side of the square in pixels, such as 256.")
        fitted_box(1, 1, image_size, resize)  # knows the modes
        means, stds = tuple(mean or _MEAN[in_channels]), tuple(std or _STD[in_channels])
        if len(means) != in_channels or len(stds) != in_channels or min(stds) <= 0:
            raise ConfigError(
                f"data.mean, data.std: {list(means)} and {list(stds)}; give {in_channels} number(s) each, "
                "as many as data.in_channels, with std above 0."
            )
        return cls(image_size, resize, in_channels, means, stds)

    @classmethod
    def of(cls, info: dict[str, Any]) -> Preprocessing:
        """Rebuild it from what `export` or `FederatedDataModule.export_info` gave."""
        names = ("image_size", "resize", "in_channels", "mean", "std")
        return cls.checked(*(info[name] for name in names))

    def export(self) -> dict[str, Any]:
        """Return plain containers, fit for a checkpoint or JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def read(self, path: Path) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """Return the fitted image (S, S, C) in [0, 1] and the original (H0, W0)."""
        image = read_image(path, self.in_channels)
        return fit_image(image, self.image_size, self.resize), (image.shape[0], image.shape[1])

    def tensor(self, image: NDArray[np.float32]) -> torch.Tensor:
        """Return the normalised image as a float32 tensor (C, S, S)."""
        return torch.from_numpy(np.ascontiguousarray(normalise(image, self.mean, self.std).transpose(2, 0, 1)))
