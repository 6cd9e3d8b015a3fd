"""SegmentationModule and DistillationModule outside a federation: steps, scores, copies, checkpoints, schedules."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fkd_med.data.datasets import collate
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.losses import BoundaryKL, DiceCE, LogitKL, boundary_kl, logit_kl
from fkd_med.modules import DistillationModule, SegmentationModule, TeacherSource, WarmupCosine, predict_classes
from fkd_med.modules.personal import PersonalTensors, merge
from fkd_med.modules.schedule import advance

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
TRAINER: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "num_sanity_val_steps": 0,
}  # fmt: skip


def network(width: int = 4, classes: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, classes, 1)
    )


def items(count: int = 8, client: str = "a", size: int = 12) -> list[dict[str, Any]]:
    random, made = np.random.default_rng(1), []
    for index in range(count):
        mask = np.zeros((size, size), np.int64)
        mask[2 : 5 + index % 4, 3:9] = 1
        image = random.normal(0, 0.2, (3, size, size)) + mask
        made.append(
            {
                "image": torch.tensor(image, dtype=torch.float32),
                "mask": torch.from_numpy(mask),
                "id": f"{client}-{index}",
                "client": client,
                "size": (size, size),
            }
        )
    return made


def loader(*args: Any, **kwargs: Any) -> DataLoader:
    return DataLoader(items(*args, **kwargs), 4, collate_fn=collate)  # type: ignore[arg-type]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_predict_classes() -> None:
    assert predict_classes(torch.tensor([[[[-1.0, 2.0, 0.0]]]])).tolist() == [[[0, 1, 0]]]
    assert predict_classes(torch.tensor([[[[1.0]], [[3.0]], [[2.0]]]])).tolist() == [[[1]]]


def test_default_names_tell_student_from_teacher() -> None:
    assert SegmentationModule(network()).model_name == "student"
    assert SegmentationModule(network(5000)).model_name == "Sequential"


def test_scores_equal_hand_counted_ones() -> None:
    """Dice and IoU per image; mean over hospitals, not over images; the worst hospital."""
    module = SegmentationModule(network())
    module.arm = "pooled"
    loaders = [loader(2, "a"), loader(6, "b")]
    trainer = L.Trainer(**TRAINER)
    (found, *_) = trainer.validate(module, loaders, verbose=False)
    means = {}
    module.eval()
    for client, batches in zip("ab", loaders, strict=True):
        dice, iou = [], []
        for batch in batches:
            predicted = (module(batch["image"])[:, 0] > 0).numpy()
            for p, t in zip(predicted, batch["mask"].numpy() == 1, strict=True):
                dice.append(2 * (p & t).sum() / (p.sum() + t.sum()))
                iou.append((p & t).sum() / (p | t).sum())
        means[client] = np.mean(dice), np.mean(iou)
    assert found["val/dice"] == pytest.approx((means["a"][0] + means["b"][0]) / 2)
    assert found["val/iou"] == pytest.approx((means["a"][1] + means["b"][1]) / 2)
    assert found["val/worst_dice"] == pytest.approx(min(means["a"][0], means["b"][0]))
    assert found["b/val_dice"] == pytest.approx(means["b"][0])
    assert [(r.client, r.id) for r in module.evaluated] == sorted(
        (c, f"{c}-{i}") for c, n in (("a", 2), ("b", 6)) for i in range(n)
    )
    assert {(r.arm, r.split, r.model) for r in module.evaluated} == {("pooled", "val", "student")}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ["a-0", "a-1"]),
        ({"patient": ["p", "p"]}, ["p", "p"]),
        ({"patient": torch.tensor([0, 7])}, ["0", "7"]),
        ({"patient": [3, None]}, ["3", "a-1"]),
    ],
)
def test_batches_may_say_whose_their_images_are(given, wanted) -> None:
    module = SegmentationModule(network())
    batch = {**collate(items(2)), **given}  # type: ignore[arg-type]
    L.Trainer(**TRAINER).validate(module, DataLoader([batch], None), verbose=False)
    assert [row.patient for row in module.evaluated] == wanted


def test_test_scores_are_taken_at_the_original_size() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1] * self.scale - 0.5

    item = items(1)[0]
    item["image"] = item["mask"].float().expand(3, -1, -1).clone()  # the truth itself, at working size
    original = torch.zeros(40, 31, dtype=torch.int64)
    original[5:30, 4:20] = 1
    item |= {"size": (40, 31), "original": original}
    module = SegmentationModule(Whole())
    L.Trainer(**TRAINER).test(module, DataLoader([item], 1, collate_fn=collate), verbose=False)  # type: ignore[arg-type]
    logits = nn.functional.interpolate(
        item["image"][None, :1] - 0.5, size=(40, 31), mode="bilinear", align_corners=False
    )
    predicted, truth = (logits[0, 0] > 0).numpy(), original.numpy() == 1
    row = module.evaluated[0]
    assert row.dice == pytest.approx(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
    assert row.hd95 is not None and row.hd95 > 1


@pytest.mark.parametrize("classes", [1, 3])
def test_training_reduces_the_loss(classes) -> None:
    torch.manual_seed(0)
    module = SegmentationModule(network(classes=classes), optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    trainer = L.Trainer(**TRAINER, max_epochs=8)
    first = L.Trainer(**TRAINER).validate(module, loader(), verbose=False)[0]["val/loss"]
    trainer.fit(module, loader(), loader())
    assert float(trainer.callback_metrics["val/loss"]) < 0.7 * first


def test_only_parameters_that_ask_for_it_are_optimized() -> None:
    module = SegmentationModule(network())
    module.network[0].requires_grad_(False)
    optimizer = module.configure_optimizers()
    assert len(optimizer.param_groups[0]["params"]) == len(list(module.network.parameters())) - 2


def test_a_copy_trains_its_own_parameters() -> None:
    """And shares optimizer factories, which the command line ties to its whole parser."""
    factory = lambda p: torch.optim.SGD(p, lr=0.5)  # noqa: E731
    module = SegmentationModule(network(), optimizer=factory)
    module.personal.by_client = {"a": weights(module)}
    before, copied = weights(module), copy.deepcopy(module)
    assert copied.optimizer.function is factory
    L.Trainer(**TRAINER, max_epochs=1).fit(copied, loader())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not torch.equal(copied.state_dict()["network.0.weight"], before["network.0.weight"])


def test_a_copy_is_freed_with_its_last_reference() -> None:
    module = SegmentationModule(network())
    gc.collect()
    gc.disable()
    try:
        copied = copy.deepcopy(module)
        alive = weakref.ref(copied.network[0].weight)
        del copied
        assert alive() is None
    finally:
        gc.enable()


def test_nan_names_batch_and_images() -> None:
    bad = items()
    bad[5]["image"] = bad[5]["image"] * float("inf")
    with pytest.raises(TrainingError, match=r"client a, batch 1, images a-4, a-5, a-6, a-7") as caught:
        L.Trainer(**TRAINER, max_epochs=1).fit(SegmentationModule(network()), DataLoader(bad, 4, collate_fn=collate))  # type: ignore[arg-type]
    assert "round" not in str(caught.value)


def test_checkpoint_holds_plain_things_and_comes_back(tmp_path) -> None:
    module = SegmentationModule(network())
    trainer = L.Trainer(**TRAINER, max_epochs=1)
    trainer.fit(module, loader())
    module.personal.by_client = {"b": {"network.0.bias": torch.full((4,), 3.0)}}
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    stored = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert stored["fkd_med"]["version"] == 1 and stored["fkd_med"]["network"] is None
    assert all(value is None or isinstance(value, str) for value in stored["hyper_parameters"].values())
    other = SegmentationModule.load_from_checkpoint(tmp_path / "m.ckpt", network=network(), weights_only=True)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert other.personal.by_client["b"]["network.0.bias"].tolist() == [3.0] * 4


# --- schedules ------------------------------------------------------------------------------------------------


def test_warmup_cosine_in_a_plain_run_spans_all_its_steps() -> None:
    noted: list[float] = []

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            noted.append(optimizer.param_groups[0]["lr"])

    module = SegmentationModule(
        network(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), scheduler=lambda o: WarmupCosine(o, warmup=0.5)
    )
    L.Trainer(**TRAINER, max_epochs=4, callbacks=[Note()]).fit(module, loader())
    rise = [(step + 1) / 5 for step in range(4)]
    fall = [0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    assert noted == pytest.approx(rise + fall)


def test_warmup_cosine_ends_at_its_floor_and_stays() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, floor=0.1, total_steps=10)
    advance(schedule, 10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    advance(schedule, 5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_warmup_cosine_state_is_plain_and_resumes() -> None:
    def made() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, WarmupCosine(optimizer, warmup=0.2, total_steps=10)

    (one, first), (two, second) = made(), made()
    advance(first, 4)
    torch.save(first.state_dict(), buffer := __import__("io").BytesIO())
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    two.load_state_dict(one.state_dict())
    advance(first, 1), advance(second, 1)
    assert one.param_groups[0]["lr"] == two.param_groups[0]["lr"] < 2.0


# --- personal tensors -----------------------------------------------------------------------------------------


def test_personal_tensors_enter_and_leave() -> None:
    module = nn.Linear(2, 1)
    shared = weights(module)
    personal = PersonalTensors(module)
    personal.enter("a")  # nobody has any: nothing happens
    personal.by_client = {"a": {"bias": torch.tensor([5.0])}, "b": {"bias": torch.tensor([6.0])}}
    for client, bias in (("a", 5.0), ("b", 6.0), ("a", 5.0)):
        personal.enter(client)
        assert module.bias.item() == bias
        assert torch.equal(module.weight, shared["weight"])
    personal.enter("c")
    assert module.bias.item() == shared["bias"].item()
    personal.leave()
    assert all(torch.equal(tensor, shared[name]) for name, tensor in module.state_dict().items())
    assert merge(shared, personal.by_client["a"])["bias"].item() == 5.0


def test_best_personal_tensors_are_each_clients_own() -> None:
    module = nn.Linear(1, 1)
    personal = PersonalTensors(module)
    for round, (a, b) in enumerate([(0.1, 0.9), (0.5, 0.2), (0.3, 0.8)], start=1):
        students = {client: {"weight": torch.ones(1, 1), "bias": torch.tensor([float(round)])} for client in "ab"}
        personal.by_client = students
        personal.note("a", a, round), personal.note("b", b, round)
    restored = PersonalTensors(module)
    restored.load_state_dict(personal.state_dict())
    for holder in (personal, restored, copy.deepcopy(restored)):
        assert [holder.of(client)["bias"].item() for client in "ab"] == [2.0, 1.0]
        holder.enter("a", best=True)
        assert module.bias.item() == 2.0 and holder.round_of("a", 3) == 2
        holder.enter("a")
        assert module.bias.item() == 3.0 and holder.round_of("a", 3) == 3
        holder.leave()


# --- distillation outside a federation ------------------------------------------------------------------------


class Source(TeacherSource):
    """Hands out one network."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.asked = network, []  # type: ignore[var-annotated]

    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        self.asked.append(client)
        return Path()

    def load(self, client: str | None) -> nn.Module:
        return self.network


def test_central_distillation_gets_the_teacher_of_its_data() -> None:
    teacher = network(6)
    teacher.train()
    source = Source(teacher)
    before = weights(teacher)
    module = DistillationModule(network(), teacher=source, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    trainer = L.Trainer(**TRAINER, max_epochs=3)
    trainer.fit(module, loader())
    assert source.asked == [None]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert module.state_dict().keys() == {f"network.{name}" for name in network().state_dict()}
    assert {id(p) for p in module.parameters()} == {id(p) for p in module.network.parameters()}


def test_no_teacher_is_asked_for_to_validate_test_or_predict() -> None:
    source = Source(network(6))
    module = DistillationModule(network(), teacher=source)
    L.Trainer(**TRAINER).validate(module, loader(), verbose=False)
    L.Trainer(**TRAINER).test(module, loader(), verbose=False)
    assert source.asked == [] and module.teacher is None


def test_copies_share_the_teacher() -> None:
    module = DistillationModule(network(), teacher=Source(network()))
    module.attach_teacher(network(6))
    copied = copy.deepcopy(module)
    assert copied.teacher is module.teacher and copied.teacher_source is module.teacher_source
    copied.attach_teacher(None)
    assert module.teacher is not None


def test_teacher_of_other_classes() -> None:
    module = DistillationModule(network(), teacher=Source(network()))
    module.attach_teacher(network(classes=2))
    batch = next(iter(loader()))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"student predicts 1 classes.*the teacher 2"):
        module.loss_terms(batch)
    with pytest.raises(ConfigError, match="teacher has 2 output channels and the student 1"):
        module.rehearse(batch["image"][:1])
    module.attach_teacher(network(6))
    taught = module.teach(batch)
    assert set(taught) == {"logits"} and not taught["logits"].requires_grad


def test_loss_that_is_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="Every weight of the loss is 0"):
        DistillationModule(network(), losses={"kd": LogitKL(weight=0)}, supervised_weight=0)
    with pytest.raises(ConfigError, match="needs a teacher"):
        L.Trainer(**TRAINER, max_epochs=1).fit(DistillationModule(network()), loader())


def test_pure_distillation_pulls_the_student_to_its_teacher() -> None:
    torch.manual_seed(0)
    teacher = network(4)
    module = DistillationModule(
        network(), teacher=Source(teacher), losses={"kd": LogitKL()}, supervised_weight=0,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
    )  # fmt: skip
    trainer = L.Trainer(**TRAINER, max_epochs=15)
    trainer.fit(module, loader())
    first, images = module, torch.stack([item["image"] for item in items()])
    gap = (first.train()(images) - teacher.eval()(images)).abs().mean()
    assert gap < 0.5 * (network()(images) - teacher(images)).abs().mean()
    assert "train/kd_raw" in trainer.callback_metrics and "train/supervised" not in trainer.callback_metrics


def test_terms_get_logits_and_mask_and_are_weighted() -> None:
    torch.manual_seed(0)
    terms = {"kd": LogitKL(weight=0.5), "near": BoundaryKL(weight=2.0), "off": BoundaryKL(weight=0.0)}
    module = DistillationModule(network(), losses=terms)
    module.attach_teacher(network(4))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = next(iter(loader()))
    logits, taught = module.eval()(batch["image"]), module.teacher(batch["image"])
    found = module.loss_terms(batch)
    assert set(found) == {"supervised", "kd", "near"}
    torch.testing.assert_close(found["kd"], 0.5 * logit_kl(logits, taught, 2.0))
    torch.testing.assert_close(found["near"], 2 * boundary_kl(logits, taught, batch["mask"], 3, 2.0))


def test_default_loss_is_dice_and_cross_entropy() -> None:
    module = SegmentationModule(network())
    assert isinstance(module.loss, DiceCE)
    batch = next(iter(loader()))
    logits = module(batch["image"])
    assert float(module.loss_terms(batch)["supervised"]) == pytest.approx(
        float(DiceCE()(logits, batch["mask"])), rel=1e-4
    )
