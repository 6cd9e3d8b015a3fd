"""Companions: trained with the module, in none of its state dicts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fkd_med.distillation import Companions
from fkd_med.errors import ConfigError


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


def test_a_companion_is_taken_whole_or_not_at_all() -> None:
    owner, held = Owner(), Owner().companions.tensors()
    for changed in (
        {**held, "hint.0.weight": torch.zeros(8, 5, 1, 1)},
        {name: tensor for name, tensor in held.items() if name != "hint.0.weight"},
        {**held, "hint.0.weightier": torch.zeros(1)},
    ):
        with pytest.raises(ConfigError, match=r"kept of 'hint', .*\(hint.0.weight(ier)? differs\)"):
            owner.companions.load_tensors(changed)
    before = owner.companions.tensors()
    owner.companions.load_tensors({})  # a first round
    assert all(torch.equal(tensor, before[name]) for name, tensor in owner.companions.tensors().items())


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
