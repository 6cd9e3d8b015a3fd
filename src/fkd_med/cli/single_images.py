"""Whether a network can be trained on one image at a time: BatchNorm needs more than one value per channel.

A batch of one image, brought down to one pixel, has one. Told before anything is written, not in the first step.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch

from fkd_med.data import FederatedDataModule
from fkd_med.distillation import sample_image
from fkd_med.errors import single_value
from fkd_med.modules import SegmentationModule
from fkd_med.networks import forward_padded


def check_single_images(module: L.LightningModule, data: Any, devices: int) -> None:
    """Refuse a network that cannot be trained on the batches of the data, where these are one image.

    Args:
        module: what trains; it is tried in a copy.
        data: after `setup`.
        devices: number of devices; statistics may be of all of several.

    Raises:
        ConfigError: names the network, its size of images and the remedy.
    """
    if not isinstance(data, FederatedDataModule) or not isinstance(module, SegmentationModule):
        return
    image = sample_image(data) if data.batch_size == devices == 1 and not data.num_unlabelled(None) else None
    if image is None:
        return
    network = copy.deepcopy(module.network).train()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward_padded(network, image)
    except ValueError as error:
        raise single_value(error, f"{type(network).__name__} at {image.shape[-1]} pixels") or error from error
