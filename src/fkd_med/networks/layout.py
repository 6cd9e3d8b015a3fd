"""How a network's weights lie in memory: channels last, as convolutions want them."""

from __future__ import annotations

import torch
from torch import nn


def channels_last(network: nn.Module) -> nn.Module:
    """Lay out a network's parameters of four dimensions channels last, in place, and return it; names and values stay.

    What convolutions return then lies so too, whatever the layout of the image. Students train and answer faster so, on
    a CPU; on a GPU a ResUNet takes a third less of it (docs/RESULTS.md, "Memory layout"). Sums are taken in another
    order, so last digits differ from those of the other layout.

    Args:
        network: the network, on any device.
    """
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Lay out what an optimizer remembers of each parameter as the parameter lies, in place.

    Where the two differ, as in files of versions before channels last, fused optimizers would mix up the numbers.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                isinstance(value, torch.Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
