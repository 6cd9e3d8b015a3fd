"""Every segmentation-models-pytorch architecture is usable as teacher or student, at a size that divides by nothing.

What smp itself cannot do, and so neither can we:
- PAN needs 113 pixels or more on each side (its attention pools the 1/16 map three times);
- DPT takes `tu-` encoders only; over a vision transformer it needs `dynamic_img_size: true` (else the transformer's
  own size) and square images;
- plain vision transformers are encoders of DPT only;
- UnetPlusPlus and Linknet refuse `mit_*` encoders.
"""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch

from fkd_med.networks import forward_padded

ARCHITECTURES = sorted(architecture.__name__ for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values())


def test_the_list_of_architectures_is_smps() -> None:
    assert len(ARCHITECTURES) >= 12 and {"Unet", "Segformer", "DPT", "UPerNet"} <= set(ARCHITECTURES)


@pytest.mark.filterwarnings("ignore:Encoder does not have prefix tokens")
@pytest.mark.parametrize(("encoder", "in_channels"), [("mobilenet_v2", 1), ("tu-resnet10t", 3), ("tu-resnet10t", 1)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_padded(architecture: str, encoder: str, in_channels: int) -> None:
    if architecture == "DPT" and not encoder.startswith("tu-"):
        pytest.skip("DPT takes timm encoders only")
    size = (115, 131) if architecture == "PAN" else (50, 70)
    network = getattr(smp, architecture)(
        encoder_name=encoder, encoder_weights=None, in_channels=in_channels, classes=2
    ).eval()
    with torch.no_grad():
        logits = forward_padded(network, torch.randn(1, in_channels, *size))
    assert logits.shape == (1, 2, *size)


def test_dpt_over_a_vision_transformer_takes_square_sizes() -> None:
    network = smp.DPT(
        "tu-vit_tiny_patch16_224",
        encoder_weights=None,
        classes=2,
        encoder_depth=2,
        decoder_intermediate_channels=(8, 8),
        decoder_fusion_channels=8,
        dynamic_img_size=True,
    ).eval()
    with torch.no_grad():
        assert forward_padded(network, torch.randn(1, 3, 50, 50)).shape == (1, 2, 50, 50)
