"""Taps: what modules inside a network return, beside its logits, in one forward pass.

A tap is ``logits`` or the dotted path of a module, such as ``encoder.layer4``; ``encoder[3]`` is the fourth of
several maps that a module returns. Any network will do: own, segmentation-models-pytorch or timm, compiled or not.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.losses import LOGITS
from fkd_med.networks import forward_padded, padded_size

_PATH = re.compile(r"(?P<module>[^\[\]]+)(\[(?P<index>-?\d+)\])?")
_COMPILED = "_orig_mod."


class Taps:
    """Runs a network and returns its logits and what its tapped modules returned.

    Hooks are put on once, not at every step: a compiled network keeps those it was compiled with. They capture only
    during a call of this object, so that validation keeps nothing alive, and what they captured is forgotten after it.

    Args:
        network: images (N, C, H, W) to logits (N, K, H, W).
        paths: the taps; ``logits`` is always there.
        whose: the network's name in errors, such as "the teacher ResUNet".

    Raises:
        ConfigError: a path leads to no module; the nearest ones are named.
    """

    def __init__(self, network: nn.Module, paths: Iterable[str] = (), whose: str = "the network") -> None:
        self.network, self.whose = network, whose
        self.paths = sorted(set(paths) - {LOGITS})
        self._captured = _Captured()
        self._handles = [
            find_module(network, path, whose).register_forward_hook(_Hook(path, self._captured)) for path in self.paths
        ]

    def __call__(self, image: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Return the maps by tap for images (N, C, H, W).

        Logits are (N, K, H, W). Maps are (N, C', h, w) and cover the image alone, without the padding that a network
        may need; tokens (N, L, C') of a grid, with or without a class token before them, are laid out as maps.

        Args:
            image: the images.
            forward: runs the network; `forward_padded` when left out.

        Raises:
            ConfigError: a tapped module did not run, or returned something else than maps.
        """
        captured = self._captured
        captured.open = True
        try:
            maps = {LOGITS: forward(image) if forward is not None else forward_padded(self.network, image)}
            found = dict(captured.outputs)
        finally:
            captured.open = False
            captured.outputs.clear()
        size = (int(image.shape[-2]), int(image.shape[-1]))
        padded = padded_size(self.network, *size)
        for path in self.paths:
            maps[path] = crop_to_image(self._as_map(path, found, padded), size, padded)
        return maps

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _as_map(self, path: str, found: dict[str, Any], image: tuple[int, int]) -> Tensor:
        name, index = split_path(path)
        if path not in found:
            raise ConfigError(f"{self.whose}: module {name!r} did not run in the forward pass; tap another one.")
        output = found[path]
        if isinstance(output, list | tuple):
            many = len(output)
            if index is None and many != 1:
                raise ConfigError(
                    f"{self.whose}: module {name!r} returns {many} things; tap one, {name}[0] to {name}[{many - 1}]."
                )
            if not -many <= (index or 0) < many:
                raise ConfigError(f"{self.whose}: {path!r} asks for one of {many} things; use 0 to {many - 1}.")
            output = output[index or 0]
        elif index is not None:
            raise ConfigError(f"{self.whose}: module {name!r} returns one {type(output).__name__}; tap it without [].")
        if isinstance(output, Tensor) and output.ndim == 3:
            output = tokens_as_map(output, image)
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"{self.whose}: module {name!r} returns {shape}; a tap needs a map (N, C, H, W) or the tokens "
                "(N, L, C) of a grid."
            )
        height, width = output.shape[2:]
        if abs(height - width * image[0] / image[1]) > 1:
            raise ConfigError(
                f"{self.whose}: module {name!r} returns {tuple(output.shape)}, which as (N, C, H, W) is no map of "
                f"images of {image[0]} x {image[1]}: are its channels last? Tap a module that returns (N, C, H, W)."
            )
        return output


class _Captured:
    """What hooks have caught, while they may."""

    def __init__(self) -> None:
        self.open = False
        self.outputs: dict[str, Any] = {}


class _Hook:
    """Keeps what one module returns."""

    def __init__(self, path: str, captured: _Captured) -> None:
        self.path, self.captured = path, captured

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.captured.open:
            self.captured.outputs[self.path] = output


def split_path(path: str) -> tuple[str, int | None]:
    """Return the module's path and the index of a tap such as ``encoder[3]``.

    Raises:
        ConfigError: the tap is not of that form.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise ConfigError(f"{path!r} is no tap: give `logits`, a path such as encoder.layer4, or encoder[3].")
    index = match["index"]
    return match["module"], None if index is None else int(index)


def find_module(network: nn.Module, path: str, whose: str) -> nn.Module:
    """Return the module that a tap names.

    Raises:
        ConfigError: there is none; the nearest ones are named.
    """
    name, _ = split_path(path)
    known: dict[str, nn.Module] = {full.replace(_COMPILED, ""): m for full, m in network.named_modules() if full}
    if name in known:
        return known[name]
    raise ConfigError(f"{whose} has no module {name!r} to tap; {_nearest(name, list(known))}.")


def _nearest(name: str, known: list[str]) -> str:
    """Return words on the known names closest to a wrong one: similar ones, else what lies where it went wrong."""
    if close := difflib.get_close_matches(name, known, n=4, cutoff=0.6):
        return f"the nearest are {', '.join(close)}"
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        prefix = ".".join(parts[:length])
        below = [k for k in known if k.startswith(f"{prefix}." if prefix else "") and k.count(".") == length]
        if below and (not prefix or prefix in known):
            shown = ", ".join(below[:12]) + (", ..." if len(below) > 12 else "")
            return f"{f'{prefix} holds' if prefix else 'it holds'} {shown}"
    return "it has no modules inside"


def tokens_as_map(tokens: Tensor, image: tuple[int, int]) -> Tensor:
    """Lay tokens (N, L, C) out as maps (N, C, h, w) if L, or L without one class token, is a grid like the image.

    Args:
        tokens: tokens row by row.
        image: height and width of the image, of which only the ratio counts.
    """
    for skipped in (0, 1):
        count = tokens.shape[1] - skipped
        height = round(math.sqrt(max(0, count) * image[0] / image[1]))
        if height and count % height == 0 and abs(height - count // height * image[0] / image[1]) < 0.5:
            return tokens[:, skipped:].transpose(1, 2).reshape(len(tokens), -1, height, count // height)
    return tokens


def crop_to_image(maps: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Return the part of maps (N, C, h, w) that covers the image, of a network that saw it padded below and right.

    Args:
        maps: maps of the padded image.
        size: height and width of the image.
        padded: height and width of the padded image.
    """
    if size == padded:
        return maps
    shares = [image / whole for image, whole in zip(size, padded, strict=True)]
    height, width = (math.ceil(n * share) for n, share in zip(maps.shape[2:], shares, strict=True))
    scale = torch.tensor([[shares[1], 0, shares[1] - 1], [0, shares[0], shares[0] - 1]], device=maps.device)
    with torch.autocast(maps.device.type, enabled=False):
        grid = F.affine_grid(scale.expand(len(maps), 2, 3), [len(maps), 1, height, width], align_corners=False)
        return F.grid_sample(maps.float(), grid, padding_mode="border", align_corners=False)
