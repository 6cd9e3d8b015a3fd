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


def check_single_images(module: L.LightningModule, data: Any, trainer: L.Trainer) -> None:
    """Refuse a network that cannot be trained on the batches of the data, where these are one image.

    Args:
        module: what trains; it is tried in a copy.
        data: after `setup`.
        trainer: what trains it; with several devices, statistics may be of all.

    Raises:
        ConfigError: names the network, its size of images and the remedy.
    """
    if not isinstance(data, FederatedDataModule) or not isinstance(module, SegmentationModule):
        return
    alone = data.batch_size == trainer.world_size == 1 and not data.num_unlabelled(None)
    image = sample_image(data) if alone else None
    if image is None:
        return
    device = trainer.strategy.root_device
    network = copy.deepcopy(module.network).train().to(device)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward_padded(network, image.to(device))
    except ValueError as error:
        raise single_value(error, f"{type(network).__name__} at {image.shape[-1]} pixels") or error from error
