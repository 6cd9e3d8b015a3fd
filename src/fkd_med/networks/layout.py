"""How a network's weights lie in memory: on a CUDA device channels last, as its convolutions want them."""

from __future__ import annotations

import torch
from torch import nn


def laid_out_for(network: nn.Module, device: torch.device) -> nn.Module:
    """Lay out a big network's weights for a device, in place, and return it; names, shapes and values stay.

    With the weights of convolutions channels last, and with them what they return, a training step of a ResUNet at
    256 px takes two thirds of the GPU's time (bf16, batch of 4, one H200; docs/RESULTS.md). On other devices nothing
    is done, so that results on a CPU are what they were.

    Args:
        network: the network, on any device.
        device: where it is about to run.
    """
    return network.to(memory_format=torch.channels_last) if device.type == "cuda" else network
