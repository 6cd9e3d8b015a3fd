"""Small networks between a student's features and a teacher's of another number of channels.

A connector is made by a callable of both numbers of channels, which YAML names by its import path:
``connector: fkd_med.losses.pointwise``. It is trained with the student and serves no purpose afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Connector = Callable[[int, int], nn.Module]


def pointwise(in_channels: int, out_channels: int) -> nn.Module:
    """Return a 1 x 1 convolution with bias, the regressor of FitNets (Romero et al. 2015, sec. 2.2).

    Args:
        in_channels: channels of the student's features.
        out_channels: channels of the teacher's.
    """
    return nn.Conv2d(in_channels, out_channels, kernel_size=1)
