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
from fkd_med.distillation.views import of_views
from fkd_med.errors import ConfigError
from fkd_med.federated import ClientWorker, Federation, GlobalDistillation
from fkd_med.federated.client_state import ClientStates
from fkd_med.losses import Ramp, logit_kl
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


def test_the_teacher_is_a_decaying_mean_of_global_students_that_stays_with_the_client(fed, tmp_path) -> None:
    module, states = fed.student(), ClientStates(tmp_path)
    rule = GlobalDistillation(memory=0.75)
    worker = ClientWorker(
        module, fed.Hospitals(), Federation(client_rules=[rule]), {"accelerator": "cpu", "devices": 1}, 7, states,
        fed.silent(),
    )  # fmt: skip
    sent = [fed.weights(fed.student()) for _ in range(3)]
    for place, state in enumerate(sent):
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor += place
    wanted: dict[str, torch.Tensor] = {}
    for round, state in enumerate(sent, 1):
        update = worker.fit("c", Broadcast(round, state))
        states.accept("c", round)
        wanted = {
            name: tensor if not tensor.is_floating_point() else 0.75 * wanted.get(name, tensor) + 0.25 * tensor
            for name, tensor in state.items()
        }
        kept = states.load("c").rules["GlobalDistillation"]
        for name, tensor in wanted.items():
            torch.testing.assert_close(kept[name], tensor, msg=name)
        assert update.extras == {} and update.state.keys() == sent[0].keys()


def test_its_mean_and_its_views_are_what_the_student_learns_from(fed, tmp_path) -> None:
    """The term of the first batch by hand: the mean of eight views of the averaged network."""
    module = fed.student()
    rule = GlobalDistillation(weight=2.0, temperature=1.0, memory=0.5, views=8)
    now = fed.weights(module)
    before = {n: t + 0.1 if t.is_floating_point() else t for n, t in now.items()}
    rule.begin(Broadcast(2, now), before)
    copied = copy.deepcopy(module).train()
    rule.on_train_start(None, copied)  # type: ignore[arg-type]
    batch = next(iter(fed.Hospitals().client_train_dataloader("c", 2)))
    terms = copied.loss_terms(batch)
    averaged = copy.deepcopy(module.network)
    averaged.load_state_dict({n.removeprefix("network."): (now[n] + before[n]) / 2 if now[n].is_floating_point() else
                              now[n] for n in now})  # fmt: skip
    with torch.no_grad():
        taught = of_views(averaged.eval(), 8)(batch["image"])
    with torch.no_grad():
        own = copy.deepcopy(module).train()(batch["image"])
    torch.testing.assert_close(terms["global_kd"].detach(), 2.0 * logit_kl(own, taught, 1.0))
    rule.on_train_end(None, copied)  # type: ignore[arg-type]
    assert "loss_terms" not in vars(copied) and not copied.network._forward_hooks


def test_it_can_begin_later_in_the_run(fed, tmp_path) -> None:
    rule = GlobalDistillation(schedule=Ramp(0.0, 1.0, 0.5, 0.5))
    trainer = fed.trainer(tmp_path, Federation(rounds=3, client_rules=[rule]))
    trainer.fit(fed.student(), datamodule=fed.Hospitals())
    told = [row for row in (tmp_path / "metrics.csv").read_text().splitlines() if "a/train/global_kd" in row]
    assert trainer.fit_loop.metrics["a/train/global_kd"] > 0 and len(told) == 2  # the head aside: rounds 2 and 3


def test_images_without_a_mask_are_learned_from(fed, tmp_path) -> None:
    class HalfLabelled(fed.Hospitals):
        brightness = 1.0  # of the images without a mask

        def client_train_dataloader(self, client, round=0):
            loader = super().client_train_dataloader(client, round)
            collate = loader.collate_fn

            def hide(items):
                batch = collate(items)
                batch["labelled"] = [place % 2 == 0 for place in range(len(items))]
                batch["mask"][1::2] = -1
                batch["image"][1::2] *= self.brightness
                return batch

            loader.collate_fn = hide
            return loader

    flags = {"accelerator": "cpu", "devices": 1}

    def trained(data, *rules):
        worker = ClientWorker(
            fed.student(), data, Federation(client_rules=list(rules)), flags, 7,
            ClientStates(tmp_path / str(len(list(tmp_path.iterdir())))), fed.silent(),
        )  # fmt: skip
        return worker.fit("c", Broadcast(1, fed.weights(worker.module)))

    class Brighter(HalfLabelled):
        brightness = 2.0

    without, taught = trained(HalfLabelled()), trained(HalfLabelled(), GlobalDistillation(weight=3.0))
    assert "train/global_kd" not in without.metrics and taught.metrics["train/global_kd"] > 0
    assert not fed.same(taught.state, trained(Brighter(), GlobalDistillation(weight=3.0)).state)
    assert fed.same(without.state, trained(Brighter()).state), "without the rule they are passed over"


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
    with pytest.raises(ConfigError, match="memory must be 0 or above and below 1"):
        GlobalDistillation(memory=1.0)
    with pytest.raises(ConfigError, match="views must be 1, 2, 4, 8, not 3"):
        GlobalDistillation(views=3)  # type: ignore[arg-type]

    class Foreign(L.LightningModule):
        pass

    with pytest.raises(ConfigError, match="Foreign is not"):
        GlobalDistillation().check(Foreign(), None)
