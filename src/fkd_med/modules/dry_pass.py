"""What a network and its loss must be for the data at hand, seen by one image before anything trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fkd_med.errors import ConfigError, single_value
from fkd_med.losses import supervised_loss
from fkd_med.modules.segmentation import SegmentationModule
from fkd_med.networks import forward_padded
from fkd_med.networks.eval_mode import evaluating
from fkd_med.seeding import global_seed, seeded

_PROBABILITIES = ("SigmoidBackward", "SoftmaxBackward")
_MOVES = ("SliceBackward", "ViewBackward", "AliasBackward", "CloneBackward", "ToCopyBackward", "SelectBackward")


def check_fits(
    module: SegmentationModule, image: Tensor, classes: int, alone: bool = False, key: str = "model"
) -> None:
    """Run a module's network on one image and its loss on what networks return; change nothing.

    Args:
        module: the module.
        image: one image (1, C, H, W), on the device that is to train: some networks run on no other.
        classes: `data.classes`, the background included where it is 2 or more.
        alone: whether it trains on batches of one image, which BatchNorm cannot where it has one value per channel.
        key: where the module is in the configuration, for messages.

    Raises:
        ConfigError: the network cannot take the image, or train on it alone, answers probabilities or another number of
            classes, or the loss cannot compare its answer with masks or does not depend on it; names key and remedy.
    """
    name = f"{key}.network ({_class_of(module.network)})"
    logits = _answer(module.network, image, name)
    if alone:
        _train_alone(module.network, image, name)
    if last := _last_probability(logits):
        raise ConfigError(
            f"{name} ends in a {last}, and what it returns is taken for logits: it would learn and segment badly. Take "
            "that layer away (`activation: null` in segmentation-models-pytorch)."
        )
    if max(2, logits.shape[1]) != max(2, classes):
        raise ConfigError(
            f"{name} has {logits.shape[1]} output channels, and data.classes is {classes}: give it "
            f"{'1 (or 2)' if classes <= 2 else classes}. An argument named `classes` follows the data by itself."
        )
    _check_loss(module.loss, logits.detach(), max(2, classes), f"{key}.loss ({_class_of(module.loss)})")


def _answer(network: nn.Module, image: Tensor, name: str) -> Tensor:
    """Return the logits of an image with how they were made, for which no tensor is kept."""
    if any(tensor.device != image.device for tensor in network.parameters()):
        network = copy.deepcopy(network).to(image.device)
    nothing_kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
    try:
        with evaluating(network), torch.enable_grad(), nothing_kept, torch.compiler.set_stance("force_eager"):
            return forward_padded(network, image)
    except ConfigError:
        raise
    except Exception as error:  # networks complain in their own ways
        raise ConfigError(f"{name} cannot take images of shape {tuple(image.shape)}: {error}") from error


def _train_alone(network: nn.Module, image: Tensor, name: str) -> None:
    """Ask a copy of a network for the answer it would give in training; refuse one that needs more than one image."""
    network = copy.deepcopy(network).to(image.device).train()
    with seeded(global_seed(), "dry pass"), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            forward_padded(network, image)
        except ValueError as error:
            raise single_value(error, f"{name} at {image.shape[-1]} pixels") or error from error


def _last_probability(logits: Tensor) -> str:
    """Return the name of the sigmoid or softmax that made a tensor, whatever was cut off it since; else nothing."""
    node: Any = logits.grad_fn
    while node is not None and node.name().startswith(_MOVES):
        node = node.next_functions[0][0]
    made_by = "" if node is None else str(node.name())
    return made_by.split("Backward")[0].lower() if made_by.startswith(_PROBABILITIES) else ""


def _check_loss(loss: nn.Module, logits: Tensor, classes: int, name: str) -> None:
    """Refuse a loss that fails on logits like these, or is the same whatever they are."""
    with seeded(global_seed(), "dry pass"):
        drawn = torch.randn(2, *logits.shape[1:]).to(logits.device).requires_grad_()
        mask = torch.arange(drawn[:, 0].numel(), device=drawn.device).view_as(drawn[:, 0]) % classes
        try:
            value = supervised_loss(copy.deepcopy(loss).to(drawn.device), drawn, mask)
            (slope,) = torch.autograd.grad(value, drawn, allow_unused=True)
        except Exception as error:  # so do losses
            shapes = f"logits {tuple(drawn.shape)} with masks {tuple(mask.shape)}"
            raise ConfigError(f"{name} cannot compare {shapes}: {error}") from error
    if slope is None or not slope.any():
        hint = " With one logit give torch.nn.BCEWithLogitsLoss, or data.classes 2." if drawn.shape[1] == 1 else ""
        raise ConfigError(
            f"{name} is {float(value.detach()):.3g} whatever the network says, so nothing would be learned.{hint}"
        )


def _class_of(module: nn.Module) -> str:
    return type(getattr(module, "_orig_mod", module)).__name__
