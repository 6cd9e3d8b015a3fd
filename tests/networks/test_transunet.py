"""TransUNet is the network of the specification, to the parameter, and says clearly what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from fkd_med.errors import ConfigError
from fkd_med.networks import TransUNet, count_parameters

SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 1.0}


@pytest.fixture(scope="module")
def network() -> TransUNet:
    torch.manual_seed(0)
    return TransUNet(in_channels=3, classes=2, img_size=64, trunk_args=SMALL).eval()


@pytest.mark.parametrize(
    ("classes", "img_size", "count"), [(2, 256, 105_322_146), (2, 224, 105_276_066), (9, 224, 105_277_081)]
)
def test_parameter_counts_to_the_digit(classes: int, img_size: int, count: int) -> None:
    with torch.device("meta"):
        network = TransUNet(classes=classes, img_size=img_size)
    assert count_parameters(network) == count
    assert count_parameters(network.trunk) == (97_934_656 if img_size == 256 else 97_934_656 - 60 * 768)


def test_a_narrow_decoder_is_a_smaller_network() -> None:
    narrow = TransUNet(img_size=32, trunk_args=SMALL, decoder_channels=(32, 16, 8, 8, 4))
    assert narrow(torch.randn(1, 3, 32, 32)).shape == (1, 1, 32, 32)
    widths = [block.convolutions[0][0].out_channels for block in narrow.decoder]  # type: ignore[union-attr, index]
    assert [narrow.bottleneck[0].out_channels, *widths, narrow.head.in_channels] == [32, 16, 8, 8, 4, 4]
    with pytest.raises(ConfigError, match="decoder_channels must be 1 or above, not 0"):
        TransUNet(img_size=32, decoder_channels=(0, 16, 8, 8, 4))


def test_one_channel_costs_no_parameter_more() -> None:
    with torch.device("meta"):
        assert count_parameters(TransUNet(in_channels=1, classes=2)) == 105_322_146


def test_tokens_and_skips_are_those_of_timm(network: TransUNet) -> None:
    x = torch.randn(1, 3, 64, 64)
    backbone = network.trunk.patch_embed.backbone
    with torch.no_grad():
        features, skips = network._encode(x)
        tokens = network.trunk.forward_features(x)  # (1, 16, D), timm's own way through
        unpooled = backbone.stem.norm(backbone.stem.conv(x))
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens)
    assert [tuple(skip.shape[1:]) for skip in skips] == [(512, 8, 8), (256, 16, 16), (64, 32, 32)]
    torch.testing.assert_close(skips[-1], unpooled)  # half resolution: before the pool


def test_every_parameter_learns_and_the_skips_are_used() -> None:
    network = TransUNet(in_channels=1, classes=1, img_size=32, trunk_args=SMALL)
    logits = network(torch.randn(2, 1, 32, 32))
    assert logits.shape == (2, 1, 32, 32)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_one_channel_is_repeated_to_three(network: TransUNet) -> None:
    grey = TransUNet(in_channels=1, classes=2, img_size=64, trunk_args=SMALL).eval()
    grey.load_state_dict(network.state_dict())
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(grey(x), network(x.repeat(1, 3, 1, 1)))


def test_a_wrong_size_teaches(network: TransUNet) -> None:
    with pytest.raises(ConfigError, match=r"built for 64x64 .* got 96x64: set .*img_size and data.image_size"):
        network(torch.randn(1, 3, 96, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 2}, "1 or 3"),
        ({"img_size": 100}, "multiple of 16"),
        ({"trunk": "vit_nonesuch"}, "vit_nonesuch"),
        ({"trunk": "vit_tiny_r_s16_p8_224"}, "not a vision transformer over a three-stage ResNet"),
        ({"trunk_args": {"deepness": 3}}, "deepness"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        TransUNet(**arguments)


def test_pretrained_without_a_network_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        if pretrained:
            raise ConnectionError("Name or service not known\nand a long story")
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError) as caught:
        TransUNet(img_size=32, pretrained=True, trunk_args=SMALL)
    message = str(caught.value)
    assert "(Name or service not known)" in message and "pretrained: false" in message and "\n" not in message


def test_pretrained_weights_with_a_class_token_are_taken_over(tmp_path: Path) -> None:
    """The published trunks have a class token and 224 pixels, ours neither; a local file stands in for the hub's."""
    published = timm.create_model("vit_base_r50_s16_224", num_classes=0, img_size=64, **SMALL)
    save_file(published.state_dict(), tmp_path / "trunk.safetensors")
    source = {"pretrained_cfg_overlay": {"file": str(tmp_path / "trunk.safetensors")}}
    trunk = TransUNet(img_size=96, pretrained=True, trunk_args={**SMALL, **source}).trunk
    for name, weight in published.named_parameters():
        if name not in ("cls_token", "pos_embed"):
            assert torch.equal(trunk.get_parameter(name), weight), name
    positions = timm.layers.resample_abs_pos_embed(published.pos_embed[:, 1:], (6, 6), (4, 4), num_prefix_tokens=0)
    torch.testing.assert_close(trunk.pos_embed, positions)
