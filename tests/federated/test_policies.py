"""Policies per tensor: what travels, what stays, what is frozen; BatchNorm averaged, local or recalibrated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fkd_med.checkpoints import read_checkpoint
from fkd_med.distillation import Companions
from fkd_med.errors import ConfigError
from fkd_med.federated import Availability, Federation, Fraction
from fkd_med.federated.policy import TensorPolicy, recalibrated
from fkd_med.modules.personal import merge


class Mixed(nn.Module):
    """Weights, a bias, BatchNorm with statistics and an integer counter, a plain integer buffer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.register_buffer("seen", torch.tensor(3))
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


WEIGHTS = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"]
STATISTICS = ["body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"]


@pytest.mark.parametrize(
    ("policy", "travel", "stay"),
    [
        (("average", [], []), [*WEIGHTS, *STATISTICS, "seen"], []),
        (("recalibrate", [], []), [*WEIGHTS, "seen"], STATISTICS),
        (
            ("local", [], []),
            ["body.0.weight", "body.0.bias", "head.weight", "head.bias", "seen"],
            ["body.1.weight", "body.1.bias", *STATISTICS],
        ),
        (("average", ["head.*"], []), [*WEIGHTS[:4], *STATISTICS, "seen"], ["head.weight", "head.bias"]),
        (("average", [], ["body.0.*"]), [*WEIGHTS[2:], *STATISTICS, "seen"], []),
        (("recalibrate", ["head.*"], ["body.0.*"]), ["body.1.weight", "body.1.bias", "seen"], None),
    ],
)
def test_what_travels_and_what_stays(policy, travel, stay) -> None:
    module, made = Mixed(), TensorPolicy(*policy)
    made.check(module)
    assert set(made.travelling(module)) == set(travel)
    if stay is not None:
        assert made.staying(module) == set(stay)
    assert not made.staying(module) & set(made.travelling(module))


def test_alone_everything_stays() -> None:
    made = TensorPolicy("average", [], [], everything_stays=True)
    assert made.staying(Mixed()) == set(Mixed().state_dict()) and made.travelling(Mixed()) == []


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (("average", ["hed.*"], []), r"federation.personal: 'hed.\*' matches no tensor of the student; .*head"),
        (("average", [], ["boddy.0.*"]), r"federation.frozen: 'boddy.0.\*' matches no tensor"),
        (("average", ["*"], []), "leave no tensor to send"),
        (("average", [], ["*"]), "leave no tensor to send"),
        (("average", [], ["body.*", "head.*"]), "every parameter of the student is frozen"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(policy, words) -> None:
    with pytest.raises(ConfigError, match=words):
        TensorPolicy(*policy).check(Mixed())


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_norm is 'off'"):
        TensorPolicy("off", [], [])  # type: ignore[arg-type]


def test_recalibrated_statistics_are_those_of_the_images() -> None:
    torch.manual_seed(0)
    module = Mixed()
    images = torch.randn(12, 3, 8, 8) * 2 + 1
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loader = DataLoader([{"image": image} for image in images], batch_size=4)
    found = recalibrated(module, loader)
    batches = [module.body[0](images[i : i + 4]) for i in (0, 4, 8)]
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    var = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    assert set(found) == set(STATISTICS)
    torch.testing.assert_close(found["body.1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["body.1.running_var"], var, rtol=1e-4, atol=1e-5)
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert module.training and module.body[1].training and module.body[1].momentum == 0.1


def test_recalibration_goes_with_weights_in_half_precision() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).to(torch.bfloat16)
    found = recalibrated(layers, DataLoader([{"image": torch.ones(3, 4, 4)}]))
    expected = layers[0](torch.ones(1, 3, 4, 4, dtype=torch.bfloat16))[0, :, 0, 0]
    assert torch.allclose(found["1.running_mean"].float(), expected.float(), rtol=0.02)


def test_what_trains_beside_the_student_is_no_part_of_a_policy() -> None:
    """Its BatchNorm is neither recalibrated nor local, and no pattern freezes it."""
    module = Mixed()
    module.companions = Companions()
    module.companions["body"] = nn.BatchNorm2d(3)
    loader = DataLoader([{"image": torch.randn(3, 8, 8)} for _ in range(4)], batch_size=4)  # type: ignore[arg-type]
    assert set(recalibrated(module, loader)) == set(STATISTICS)
    assert not any("companions" in name for name in TensorPolicy("local", [], []).staying(module))
    TensorPolicy("average", [], ["*body.*"]).freeze(module)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        "head.weight", "head.bias", "companions.body.weight", "companions.body.bias"
    }  # fmt: skip


def run(fed: Any, folder: Any, rounds: int = 2, ckpt: str | None = None, **recipe: Any) -> Any:
    module = fed.student()
    fed.trainer(folder, Federation(rounds=rounds, **recipe)).fit(module, datamodule=fed.Hospitals(), ckpt_path=ckpt)
    return module


@pytest.mark.parametrize("policy", ["local", "recalibrate"])
def test_statistics_never_travel_and_differ_between_clients(fed, tmp_path, captured, policy, monkeypatch) -> None:
    monkeypatch.setattr(
        fed.Hospitals, "client_train_eval_dataloader", lambda self, client: self._evaluation(client, "train"),
        raising=False,
    )  # fmt: skip
    module = run(fed, tmp_path, batch_norm=policy)
    sent = {name for message in captured for name in message.state}
    assert "network.0.weight" in sent and not any("running" in name or "num_batches" in name for name in sent)
    assert ("network.1.weight" in sent) == (policy == "recalibrate")
    own = module.personal.by_client
    assert set(own) == {"a", "b", "c"} and not module.personal.best
    assert not torch.equal(own["a"]["network.1.running_mean"], own["b"]["network.1.running_mean"])
    stored = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["fkd_med"]["personal"]["latest"]
    assert torch.equal(stored["a"]["network.1.running_mean"], own["a"]["network.1.running_mean"])


def test_evaluation_uses_each_clients_own_tensors(fed, tmp_path, monkeypatch) -> None:
    seen: dict[str, set[float]] = {}
    step = type(fed.student()).validation_step

    def spy(self: Any, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        value = float(self.state_dict()["network.1.running_mean"][0])
        seen.setdefault(batch["client"][0], set()).add(round(value, 6))
        step(self, batch, index, dataloader_idx)

    monkeypatch.setattr(type(fed.student()), "validation_step", spy)
    run(fed, tmp_path, rounds=1, batch_norm="local")
    assert set(seen) == {"a", "b", "c"} and len(set.union(*seen.values())) == 3


def test_personal_head_resumes_exactly(fed, tmp_path) -> None:
    recipe = {"personal": ["network.3.*"], "batch_norm": "local"}
    whole = run(fed, tmp_path / "whole", 3, **recipe)
    run(fed, tmp_path / "halves", 2, **recipe)
    halves = run(fed, tmp_path / "halves", 3, str(tmp_path / "halves/checkpoints/last.ckpt"), **recipe)
    assert fed.same(fed.weights(whole), fed.weights(halves))
    for client, state in whole.personal.by_client.items():
        assert fed.same(state, halves.personal.by_client[client])


def test_frozen_tensors_stay_and_do_not_travel(fed, tmp_path, captured) -> None:
    start = fed.weights(fed.student())
    module = run(fed, tmp_path, frozen=["network.0.*"])
    after = fed.weights(module)
    assert torch.equal(start["network.0.weight"], after["network.0.weight"])
    assert not torch.equal(start["network.3.weight"], after["network.3.weight"])
    assert not any(name.startswith("network.0.") for message in captured for name in message.state)


def test_a_hospital_that_never_took_part_is_scored_with_the_global_student(fed, tmp_path) -> None:
    """Otherwise the rounds, and what is kept of them, would be compared over different hospitals."""
    absent = Availability(Fraction(1.0), {"c": []})
    module = fed.student()
    trainer = fed.trainer(tmp_path, Federation(rounds=2, participation=absent, batch_norm="local"))
    trainer.fit(module, datamodule=fed.Hospitals())
    assert set(module.personal.by_client) == {"a", "b"} and not module.personal.best
    assert {row.client for row in module.evaluated} == {"a", "b", "c"}
    again = fed.student()
    fed.trainer(tmp_path, Federation(rounds=2, participation=absent, batch_norm="local")).test(
        again, datamodule=fed.Hospitals(), ckpt_path=str(tmp_path / "checkpoints/last.ckpt"), verbose=False
    )
    assert {row.client for row in again.evaluated} == {"a", "b", "c"}


def test_recalibration_is_of_all_the_tensors_that_a_hospital_predicts_with(fed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        fed.Hospitals, "client_train_eval_dataloader", lambda self, client: self._evaluation(client, "train"),
        raising=False,
    )  # fmt: skip
    module = run(fed, tmp_path, batch_norm="recalibrate", personal=["network.0.*"])
    shared = fed.weights(module)
    for client, own in module.personal.by_client.items():
        student = fed.student()
        student.load_state_dict(merge(shared, own))
        found = recalibrated(student, fed.Hospitals()._evaluation(client, "train"))
        assert found and all(torch.equal(tensor, own[name]) for name, tensor in found.items())
