"""Segmentation networks: teachers, students, and what lets any other backbone take their place."""

from fkd_med.networks.axial import AxialUNet
from fkd_med.networks.context import ContextUNet
from fkd_med.networks.large_kernel import LargeKernelUNet
from fkd_med.networks.layout import channels_last, lay_out_moments
from fkd_med.networks.padding import forward_padded, padded_size, size_divisor
from fkd_med.networks.pretrained import PretrainedUNet
from fkd_med.networks.resunet import ResUNet
from fkd_med.networks.spec import ALLOWED_PACKAGES, count_parameters, network_from_spec
from fkd_med.networks.student import PARAMETER_BOUND, SlimUNet
from fkd_med.networks.transunet import TransUNet

__all__ = [
    "ALLOWED_PACKAGES",
    "PARAMETER_BOUND",
    "AxialUNet",
    "ContextUNet",
    "LargeKernelUNet",
    "PretrainedUNet",
    "ResUNet",
    "SlimUNet",
    "TransUNet",
    "channels_last",
    "count_parameters",
    "forward_padded",
    "lay_out_moments",
    "network_from_spec",
    "padded_size",
    "size_divisor",
]
