"""Asking a network in the midst of its training: in eval mode for a while, with images brought to where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Keep a module in eval mode inside the block, and put every part's mode back after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def ready(image: Tensor, model: nn.Module, device: torch.device) -> Tensor:
    """Return images (N, C, H, W) on the device, in the type of the model's weights."""
    dtype = next((p.dtype for p in model.parameters()), image.dtype)
    return image.to(device, dtype)
