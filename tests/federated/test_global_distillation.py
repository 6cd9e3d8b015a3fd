"""The global student as a second teacher, against a loop by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from fkd_med.communication import Broadcast
from fkd_med.errors import ConfigError
from fkd_med.federated import ClientWorker, Federation, GlobalDistillation
from fkd_med.federated.client_state import ClientStates
from fkd_med.modules import SegmentationModule


def fit(fed: Any, folder: Path, module: Any, *rules: Any, **flags: Any) -> Any:
    flags = {"accelerator": "cpu", "devices": 1, **flags}
    federation = Federation(client_rules=list(rules))
    worker = ClientWorker(module, fed.Hospitals(), federation, flags, 7, ClientStates(folder), fed.silent())
    return worker.fit("c", Broadcast(1, fed.weights(module)))


@pytest.mark.parametrize("classes", [1, 3])
def test_it_is_a_divergence_from_the_round_s_first_student(fed, tmp_path, classes) -> None:
    """One epoch by hand: loss + 5 x T^2 KL per pixel, the global student in eval mode on the same images."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, classes, 1)
    )
    module = SegmentationModule(network, optimizer=fed.sgd)
    trained = copy.deepcopy(module).train()
    before = copy.deepcopy(module.network).eval()
    optimizer = module.optimizer(trained.parameters())
    for batch in fed.Hospitals().client_train_dataloader("c", 1):
        logits = trained(batch["image"])
        with torch.no_grad():
            taught = before(batch["image"])
        if classes == 1:
            p, q = torch.sigmoid(taught / 2.0), torch.sigmoid(logits / 2.0)
            kl = p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))
        else:
            p = F.softmax(taught / 2.0, 1)
            kl = (p * (p.log() - F.log_softmax(logits / 2.0, 1))).sum(1)
        loss = trained.loss(logits, batch["mask"]) + 5.0 * 4.0 * kl.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    update = fit(fed, tmp_path, module, GlobalDistillation(weight=5.0, temperature=2.0))
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(update.state[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    plain = fit(fed, tmp_path / "plain", module)
    assert not torch.allclose(plain.state["network.0.weight"], update.state["network.0.weight"], atol=1e-6)
    assert update.metrics["train/global_kd"] > 0 and update.extras == {}
    assert update.state.keys() == plain.state.keys(), "the copy does not travel"


def test_a_weight_of_zero_is_training_without_it(fed, tmp_path) -> None:
    module = fed.student()
    one, other = fit(fed, tmp_path / "1", module, GlobalDistillation(weight=0)), fit(fed, tmp_path / "2", module)
    assert fed.same(one.state, other.state)


@pytest.mark.parametrize("flags", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_it_stands_beside_the_teachers_of_the_clients(fed, tmp_path, flags) -> None:
    module = fed.distilled(None, source=fed.teacher_stage(tmp_path / "teachers", epochs=1))
    trainer = fed.trainer(tmp_path / "run", Federation(rounds=2, client_rules=[GlobalDistillation()]), **flags)
    untrained = fed.weights(module)
    trainer.fit(module, datamodule=fed.Hospitals())
    logged = trainer.fit_loop.metrics
    assert logged["a/train/kd"] > 0 and logged["a/train/global_kd"] > 0
    assert not fed.same(untrained, fed.weights(module))
    assert "loss_terms" not in vars(module) and not module.network._forward_hooks


def test_bad_settings_and_foreign_modules_are_refused(fed, tmp_path) -> None:
    with pytest.raises(ConfigError, match="weight must be 0 or above"):
        GlobalDistillation(weight=-1)
    with pytest.raises(ConfigError, match="emperature"):
        GlobalDistillation(temperature=0)

    class Foreign(L.LightningModule):
        pass

    with pytest.raises(ConfigError, match="Foreign is not"):
        GlobalDistillation().on_train_start(None, Foreign())  # type: ignore[arg-type]
