"""The dry pass: a network or a loss that could not learn from the data is refused by its name."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.losses import DiceCE
from fkd_med.modules import SegmentationModule, check_fits
from fkd_med.networks import SlimUNet


class Functional(nn.Module):
    """Ends in a sigmoid that is no layer, and is asked for images that it does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.sigmoid(self.layer(image))[..., :]


class Deaf(nn.Module):
    """Says the same of all logits."""

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        return mask.sum() * 1.0


def unet(**arguments: object) -> nn.Module:
    return smp.Unet("mobileone_s0", encoder_weights=None, **arguments)


@pytest.mark.parametrize(
    ("network", "loss", "classes"),
    [
        (SlimUNet(), None, 1), (SlimUNet(classes=2), None, 1), (SlimUNet(classes=2), nn.CrossEntropyLoss(), 2),
        (SlimUNet(), None, 2), (SlimUNet(classes=3), DiceCE(), 3), (SlimUNet(), nn.BCEWithLogitsLoss(), 1),
        (SlimUNet(), smp.losses.DiceLoss("binary"), 1), (unet(), None, 1),
    ],
)  # fmt: skip
def test_what_can_learn_is_taken_and_left_as_it_was(network: nn.Module, loss: nn.Module | None, classes: int) -> None:
    module = SegmentationModule(network, loss).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    drawn = torch.random.get_rng_state()
    check_fits(module, torch.randn(1, 3, 50, 70, generator=torch.Generator().manual_seed(0)), classes)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(part.training for part in module.modules()) and all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("network", "loss", "classes", "message"),
    [
        (SlimUNet(), None, 3, r"model.network \(SlimUNet\) has 1 output channels, and data.classes is 3: give it 3"),
        (SlimUNet(classes=4), None, 1, "has 4 output channels, and data.classes is 1: give it 1"),
        (SlimUNet(in_channels=1), None, 1, r"model.network \(SlimUNet\) cannot take images of shape \(1, 3, 50, 70\)"),
        (unet(activation="sigmoid"), None, 1, r"model.network \(Unet\) ends in a sigmoid.*activation: null"),
        (unet(classes=3, activation="softmax2d"), None, 3, "ends in a softmax"),
        (Functional(), None, 1, r"model.network \(Functional\) ends in a sigmoid"),
        (SlimUNet(), nn.CrossEntropyLoss(), 1, r"model.loss \(CrossEntropyLoss\) is .* whatever .*BCEWithLogitsLoss"),
        (SlimUNet(classes=2), Deaf(), 1, r"model.loss \(Deaf\) cannot compare"),
        (SlimUNet(classes=3), nn.BCEWithLogitsLoss(), 3, r"logits \(2, 3, 50, 70\) with masks \(2, 50, 70\): T"),
    ],
)  # fmt: skip
def test_what_cannot_is_refused_by_its_key(
    network: nn.Module, loss: nn.Module | None, classes: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fits(SegmentationModule(network, loss), torch.randn(1, 3, 50, 70), classes)


def test_a_batch_of_one_image_must_leave_batch_norm_more_than_one_value() -> None:
    module, small = SegmentationModule(SlimUNet()), torch.randn(1, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    check_fits(module, small, 1)
    check_fits(module, torch.randn(1, 3, 64, 64), 1, alone=True)
    with pytest.raises(ConfigError, match=r"model.network \(SlimUNet\) at 32 pixels cannot be trained on one image"):
        check_fits(module, small, 1, alone=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
