"""ResUNet is the network of the specification, to the parameter."""

from __future__ import annotations

import pytest
import torch

from fkd_med.networks import ResUNet, count_parameters


@pytest.mark.parametrize(
    ("in_channels", "classes", "count"), [(1, 1, 13_040_705), (1, 2, 13_040_770), (3, 2, 13_043_074)]
)
def test_parameter_counts_to_the_digit(in_channels: int, classes: int, count: int) -> None:
    with torch.device("meta"):
        network = ResUNet(in_channels, classes)
    assert count_parameters(network) == count


def test_all_convolutions_are_biased() -> None:
    convolutions = [m for m in ResUNet(width=4).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    assert len(convolutions) == 3 + 6 * 3 + 3 + 1
    assert all(convolution.bias is not None for convolution in convolutions)


def test_width_scales_every_level_and_every_parameter_learns() -> None:
    network = ResUNet(in_channels=1, classes=3, width=4)
    shapes = []
    for module in (network.stem, *network.encoder, network.bridge, *network.decoder):
        module.register_forward_hook(lambda _module, _inputs, out: shapes.append(tuple(out.shape[1:])))
    logits = network(torch.randn(2, 1, 16, 24))
    assert logits.shape == (2, 3, 16, 24)
    assert shapes == [(4, 16, 24), (8, 8, 12), (16, 4, 6), (32, 2, 3), (16, 4, 6), (8, 8, 12), (4, 16, 24)]
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_shortcut_of_the_input_block_has_no_batch_norm() -> None:
    network = ResUNet(width=4)
    assert isinstance(network.stem_shortcut, torch.nn.Conv2d)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.stem.modules()) == 1
