"""Companions: trained with the module, in none of its state dicts."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fkd_med.distillation import Companions


class Owner(nn.Module):
    """What trains: a network and a connector."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 4, 1)
        self.companions = Companions()
        self.companions["hint"] = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))


def test_trained_but_in_no_state_dict() -> None:
    owner = Owner()
    assert set(owner.state_dict()) == {"network.weight", "network.bias"}
    assert {name.split(".")[0] for name, _ in owner.named_parameters()} == {"network", "companions"}
    assert owner.companions.state_dict() == {}


def test_a_state_dict_loads_strictly_and_leaves_them() -> None:
    owner = Owner()
    before = owner.companions.tensors()
    owner.load_state_dict(Owner().state_dict(), strict=True)
    after = owner.companions.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_other_missing_keys_are_still_an_error() -> None:
    owner, state = Owner(), Owner().state_dict()
    del state["network.bias"]
    missing = owner.load_state_dict(state, strict=False).missing_keys
    assert missing == ["network.bias"]


def test_tensors_come_back_and_old_ones_are_left() -> None:
    one, other = Owner(), Owner()
    held = one.companions.tensors()
    assert "hint.1.running_mean" in held  # buffers too
    other.companions.load_tensors({**held, "gone.weight": torch.zeros(1)})
    assert all(torch.equal(tensor, held[name]) for name, tensor in other.companions.tensors().items())
    held["hint.0.weight"].zero_()
    assert one.companions["hint"][0].weight.abs().sum() > 0  # copies


def test_copies_are_their_own() -> None:
    owner = Owner()
    copied = copy.deepcopy(owner)
    with torch.no_grad():
        copied.companions["hint"][0].weight.zero_()
    assert owner.companions["hint"][0].weight.abs().sum() > 0
    copied.load_state_dict(owner.state_dict())


def test_of_a_term() -> None:
    owner = Owner()
    assert owner.companions.of("hint") is owner.companions["hint"] and owner.companions.of("kd") is None
