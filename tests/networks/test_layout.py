"""Channels last: another place in memory, the same network."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fkd_med.cli.exports import _exported
from fkd_med.communication import Broadcast, decode, encode
from fkd_med.modules import SegmentationModule
from fkd_med.networks import ResUNet, SlimUNet, TransUNet, channels_last, lay_out_moments


def is_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("kind", [SlimUNet, lambda **given: ResUNet(width=4, **given)])
def test_the_same_answers_and_gradients_from_another_place(kind, in_channels: int) -> None:
    torch.manual_seed(0)
    plain = kind(
        in_channels=in_channels, classes=1
    ).double()  # BatchNorm of few pixels makes much of float32's last digits
    laid = channels_last(copy.deepcopy(plain))
    assert all(is_last(p) for p in laid.parameters() if p.dim() == 4)
    image = torch.randn(2, in_channels, 32, 32, dtype=torch.float64)
    answers = [network(image) for network in (plain, laid)]
    assert torch.allclose(*answers, atol=1e-10)
    for answer in answers:
        answer.square().mean().backward()
    for name, parameter in laid.named_parameters():
        expected = plain.get_parameter(name)
        assert torch.equal(parameter, expected), name
        assert torch.allclose(parameter.grad, expected.grad, atol=1e-9), name


def test_what_the_layers_return_lies_so_too() -> None:
    network = channels_last(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    assert is_last(network(torch.randn(2, 1, 16, 16)))


def test_tensors_of_other_dimensions_stay_as_they_are() -> None:
    network = nn.ModuleList([nn.Linear(3, 4), nn.Conv1d(3, 4, 3), nn.Conv3d(3, 4, 3)])
    before = [parameter.stride() for parameter in network.parameters()]
    assert [parameter.stride() for parameter in channels_last(network).parameters()] == before


def test_modules_lay_their_networks_out_and_keep_it_so() -> None:
    """Through copies, other weights, the optimizer and a message, whose bytes are those of the plain layout."""
    plain = SlimUNet(in_channels=3, classes=1)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    module = SegmentationModule(plain)
    module.network.load_state_dict(state)
    copied = copy.deepcopy(module)
    convolutions = [p for p in copied.network.parameters() if p.dim() == 4]
    assert convolutions and all(is_last(p) for p in convolutions)
    optimizer = torch.optim.Adam(copied.network.parameters())
    copied(torch.randn(2, 3, 32, 32)).mean().backward()
    optimizer.step()
    for parameter in convolutions:
        assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
    sent = {f"network.{name}": tensor for name, tensor in state.items()}
    messages = [encode(Broadcast(1, tensors, {})) for tensors in (sent, module.state_dict())]
    assert messages[0] == messages[1]
    assert all(tensor.is_contiguous() for tensor in decode(messages[1]).state.values())


def test_a_transformer_has_it_where_it_convolves() -> None:
    plain = TransUNet(in_channels=1, classes=1, img_size=32, trunk_args={"depth": 1}).eval()
    laid, image = channels_last(copy.deepcopy(plain)), torch.randn(1, 1, 32, 32)
    assert is_last(laid.get_parameter("head.weight")) and torch.allclose(laid(image), plain(image), atol=1e-4)


def test_moments_of_an_earlier_version_are_laid_out_as_the_weights() -> None:
    """A fused optimizer takes both for rows of numbers in the same order."""
    torch.manual_seed(0)
    networks = [nn.Conv2d(3, 4, 3, dtype=torch.float64) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [torch.optim.Adam(network.parameters(), fused=True) for network in networks]
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network(image).square().mean().backward()
        optimizer.step()

    step(networks[0], optimizers[0])
    stored = copy.deepcopy(optimizers[0].state_dict())
    networks[1].load_state_dict(networks[0].state_dict())
    channels_last(networks[1])
    optimizers[1].load_state_dict(stored)
    lay_out_moments(optimizers[1])
    for network, optimizer in zip(networks, optimizers, strict=True):
        step(network, optimizer)
    assert torch.allclose(networks[0].weight, networks[1].weight, atol=1e-12)


def test_files_hold_the_plain_layout(tmp_path: Path) -> None:
    """Other programs expect it; safetensors takes no other."""
    module = SegmentationModule(SlimUNet(in_channels=3, classes=1))
    assert not all(tensor.is_contiguous() for tensor in module.state_dict().values())
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=0)
    trainer.fit(module, DataLoader([]))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    for stored in (torch.load(tmp_path / "plain.ckpt", weights_only=True), _exported(module, module.state_dict())):
        assert stored["state_dict"].keys() == module.state_dict().keys()
        assert all(tensor.is_contiguous() for tensor in stored["state_dict"].values())
        assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in stored["state_dict"].items())
