"""Any image size goes through any network and comes back at its own size."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.networks import ResUNet, SlimUNet, TransUNet, forward_padded, size_divisor


class Recorder(nn.Module):
    """Returns its input and remembers it."""

    size_divisor = 8

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % 8 == 0 and x.shape[-2] % 8 == 0
        self.seen = x
        return x * 2


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (13, 8), (50, 70)])
def test_pads_below_and_right_by_repetition_and_crops_back(size: tuple[int, int]) -> None:
    network, x = Recorder(), torch.randn(2, 3, *size)
    assert torch.equal(forward_padded(network, x), 2 * x)
    height, width = size
    assert torch.equal(network.seen[..., :height, :width], x)
    assert torch.equal(network.seen[..., height:, :width], x[..., -1:, :].expand_as(network.seen[..., height:, :width]))
    assert (network.seen[..., width:] == network.seen[..., width - 1 : width]).all()
    assert network.seen.shape[-2] - height < 8 and network.seen.shape[-1] - width < 8


@pytest.mark.parametrize("network", [ResUNet(width=2), SlimUNet()], ids=lambda network: type(network).__name__)
@pytest.mark.parametrize("size", [(50, 70), (5, 3), (33, 31)])
def test_own_networks_take_odd_and_small_sizes(network: nn.Module, size: tuple[int, int]) -> None:
    assert forward_padded(network, torch.randn(2, 3, *size)).shape == (2, 1, *size)


def test_a_divisible_size_is_passed_untouched() -> None:
    network, x = Recorder(), torch.randn(1, 1, 16, 8)
    forward_padded(network, x)
    assert network.seen is x


def test_transunet_pads_only_to_its_own_size() -> None:
    network = TransUNet(img_size=32, trunk_args={"depth": 1, "embed_dim": 48, "num_heads": 3}).eval()
    with torch.no_grad():
        assert forward_padded(network, torch.randn(1, 3, 30, 25)).shape == (1, 1, 30, 25)
        with pytest.raises(ConfigError, match="built for 32x32"):
            forward_padded(network, torch.randn(1, 3, 33, 32))


def test_divisors() -> None:
    assert size_divisor(ResUNet(width=2)) == 8
    assert size_divisor(SlimUNet()) == 32
    assert (
        size_divisor(smp.Unet("mobilenet_v2", encoder_depth=3, encoder_weights=None, decoder_channels=(8, 8, 8))) == 8
    )
    assert size_divisor(nn.Conv2d(3, 1, 1)) == 1


def test_first_of_a_tuple_is_the_logits() -> None:
    network = smp.Unet("mobilenet_v2", encoder_weights=None, classes=2, aux_params={"classes": 5}).eval()
    x = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        logits = forward_padded(network, x)
    assert isinstance(logits, Tensor) and logits.shape == (1, 2, 32, 40)


class Strange(nn.Module):
    """Returns what no segmentation network should."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> object:
        return {"dict": {"out": x}, "half": x[..., ::2, ::2], "none": None}[self.out]


@pytest.mark.parametrize(
    ("out", "message"), [("dict", r"keys \['out'\]"), ("half", r"\(1, 1, 2, 2\)"), ("none", "NoneType")]
)
def test_other_outputs_are_refused_by_name(out: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"Strange returned .*{message}"):
        forward_padded(Strange(out), torch.zeros(1, 1, 4, 4))
