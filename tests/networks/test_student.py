"""The student keeps the paper's bound for every task, and learns."""

from __future__ import annotations

import itertools

import pytest
import torch

from fkd_med.losses import DiceCE
from fkd_med.networks import ResUNet, SlimUNet, TransUNet, count_parameters
from fkd_med.networks.student import PARAMETER_BOUND


def test_bound_is_the_papers() -> None:
    with torch.device("meta"):
        resunet, transunet = count_parameters(ResUNet(1, 2)), count_parameters(TransUNet(3, 2, 256))
    assert PARAMETER_BOUND == min(resunet // 127, transunet // 1027) == 102_553


@pytest.mark.parametrize(("in_channels", "classes"), itertools.product((1, 2, 3), (1, 2)))
def test_within_the_bound(in_channels: int, classes: int) -> None:
    network = SlimUNet(in_channels, classes)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 101_417 + 108 * (in_channels - 1) + 13 * (classes - 1)  # as its docstring says
    assert count <= 102_553


def test_shape_and_gradients() -> None:
    network = SlimUNet(in_channels=2, classes=4)
    logits = network(torch.randn(2, 2, 64, 32))
    assert logits.shape == (2, 4, 64, 32)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_sees_the_whole_image() -> None:
    """A corner's logit depends on the opposite corner of a 256-pixel image."""
    torch.manual_seed(0)
    network = SlimUNet(in_channels=1).eval()
    x = torch.rand(1, 1, 256, 256, requires_grad=True)
    network(x)[0, 0, 128, 128].backward()
    assert x.grad is not None
    rows = x.grad[0, 0].abs().sum(dim=1).nonzero().flatten()
    assert rows.min() < 16 and rows.max() >= 240


def test_overfits_a_few_blobs() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[10.0, 12.0], [20.0, 18.0], [14.0, 22.0], [21.0, 9.0]])
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    mask = ((grid[None] - centres[:, :, None, None]).square().sum(1) < 36).long()
    image = mask[:, None] * 0.8 + torch.randn(4, 1, 32, 32) * 0.5
    network, loss = SlimUNet(in_channels=1), DiceCE()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss(network(image), mask).backward()
        optimizer.step()
    with torch.no_grad():
        found = network(image)[:, 0] > 0
    dice = 2 * (found & (mask == 1)).sum() / (found.sum() + mask.sum())
    assert dice > 0.9
