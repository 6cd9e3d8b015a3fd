"""Mutual distillation: each network's loss and step as written by hand, no gradient from the other's loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fkd_med.data.datasets import collate
from fkd_med.errors import ConfigError
from fkd_med.losses import AttentionTransfer, HintMSE, LogitKL, Ramp
from fkd_med.modules import MutualDistillationModule, SegmentationModule, TeacherSource
from fkd_med.modules.mutual import SMALLEST_SUM, trust_of
from fkd_med.modules.schedule import RunClock

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
TRAINER: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "num_sanity_val_steps": 0,
}  # fmt: skip
RATE, TEACHER_RATE = 0.3, 0.7
TERMS = {
    "kd": LogitKL(temperature=2.0, weight=0.5),
    "hint": HintMSE(student_tap="2", teacher_tap="2", weight=3.0),
}


def network(width: int, classes: int = 2, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, classes, 1)
    )


def batch(classes: int = 2, count: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "image": torch.randn(count, 3, 8, 8, generator=generator),
        "mask": torch.randint(0, 2, (count, 8, 8), generator=generator),
        "id": [f"a-{index}" for index in range(count)],
        "client": ["a"] * count,
    }


def items(count: int = 4) -> list[dict[str, Any]]:
    whole = batch(count=count)
    return [{name: values[index] for name, values in whole.items()} for index in range(count)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def mutual(classes: int = 2, **options: Any) -> MutualDistillationModule:
    loss = nn.CrossEntropyLoss() if classes > 1 else nn.BCEWithLogitsLoss()
    module = MutualDistillationModule(
        network(4, classes), **{"losses": TERMS, "loss": loss, "optimizer": sgd, **options}
    )
    module.attach_teacher(network(6, classes, seed=1))
    module.rehearse(batch()["image"][:1])
    return module


def quiet(module: MutualDistillationModule) -> MutualDistillationModule:
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module


def fit(module: MutualDistillationModule, epochs: int = 1, ckpt: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**TRAINER, max_epochs=epochs, **options)
    trainer.fit(module, DataLoader(items(), 4, collate_fn=collate), ckpt_path=ckpt)  # type: ignore[arg-type]
    return trainer


def close(module: nn.Module, expected: nn.Module) -> bool:
    pairs = zip(module.state_dict().values(), expected.state_dict().values(), strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs)


def kl(target: Tensor, learner: Tensor, temperature: float) -> Tensor:
    """KL(target || learner) per pixel, mean over pixels, times T squared; of two classes or of one logit."""
    if target.shape[1] == 1:
        target, learner = (torch.cat([torch.zeros_like(z), z], dim=1) for z in (target, learner))
    p, q = (F.softmax(z / temperature, dim=1) for z in (target, learner))
    return temperature**2 * (p * (p.log() - q.log())).sum(dim=1).mean()


def by_hand(
    student: nn.Sequential, teacher: nn.Sequential, connector: nn.Module, classes: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FedKD's two losses, term by term, in plain torch."""
    data = batch()
    hidden_s, hidden_t = student[:3](data["image"]), teacher[:3](data["image"])
    s, t = student[3](hidden_s), teacher[3](hidden_t)
    if classes == 1:
        task_s, task_t = (F.binary_cross_entropy_with_logits(z[:, 0], data["mask"].float()) for z in (s, t))
    else:
        task_s, task_t = (F.cross_entropy(z, data["mask"]) for z in (s, t))
    divisor = float(task_s) + float(task_t)
    mapped = connector(hidden_s)
    ours = {
        "supervised": task_s,
        "kd": 0.5 * kl(t.detach(), s, 2.0) / divisor,
        "hint": 3.0 * (mapped - hidden_t.detach()).square().mean() / divisor,
    }
    theirs = {
        "teacher_supervised": task_t,
        "teacher_kd": 0.5 * kl(s.detach(), t, 2.0) / divisor,
        "teacher_hint": 3.0 * (hidden_t - mapped.detach()).square().mean() / divisor,
    }
    return ours, theirs


@pytest.mark.parametrize("classes", [1, 2])
def test_both_losses_are_those_of_the_paper(classes: int) -> None:
    module = quiet(mutual(classes))
    student, teacher, connector = (
        copy.deepcopy(m) for m in (module.network, module.teacher, module.companions["hint"])
    )
    ours, theirs = by_hand(student, teacher, connector, classes)  # type: ignore[arg-type]
    found = module.loss_terms(batch())
    assert found.keys() == ours.keys() | theirs.keys()
    for name, value in {**ours, **theirs}.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert float(found["hint"]) == float(found["teacher_hint"]) and float(found["kd"]) != float(found["teacher_kd"])


@pytest.mark.parametrize("teacher_rate", [None, TEACHER_RATE])
def test_one_step_moves_each_network_by_its_own_loss(teacher_rate: float | None) -> None:
    module = mutual(teacher_lr=teacher_rate)
    student, teacher, connector = (
        copy.deepcopy(m) for m in (module.network, module.teacher, module.companions["hint"])
    )
    ours, theirs = by_hand(student, teacher, connector, 2)  # type: ignore[arg-type]
    for terms, networks, rate in ((ours, [student, connector], RATE), (theirs, [teacher], teacher_rate or RATE)):
        parameters = [p for one in networks for p in one.parameters()]  # type: ignore[union-attr]
        gradients = torch.autograd.grad(sum(terms.values()), parameters)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
    fit(module)
    assert module.teacher is not None and close(module.network, student) and close(module.teacher, teacher)  # type: ignore[arg-type]
    assert torch.allclose(module.companions["hint"].weight, connector.weight, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr, arg-type]
    running = module.teacher[1].running_mean  # type: ignore[index]
    assert bool((running != 0).any())  # the teacher's BatchNorm trains too


class Leaky(LogitKL):
    """A term as users may write it, without care for who learns."""

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Any) -> Tensor:
        return (student - teacher).square().mean()


@pytest.mark.parametrize("whose", ["", "teacher_"])
def test_no_gradient_leaks(whose: str) -> None:
    """What belongs to one network's loss gives the other network no gradient at all, whatever the term."""
    module = quiet(mutual(losses=TERMS | {"leaky": Leaky()}))
    terms = module.loss_terms(batch())
    own = [value for name, value in terms.items() if name.startswith("teacher_") == bool(whose)]
    torch.stack(own).sum().backward()
    moved = {name.split(".")[0 if name.startswith("network") else 1] for name, p in module.named_parameters()
             if p.grad is not None and bool(p.grad.any())}  # fmt: skip
    assert moved == ({"teacher"} if whose else {"network", "hint"})


def test_the_divisor_is_a_constant_above_zero() -> None:
    one = torch.tensor(0.3, requires_grad=True)
    trust = trust_of(one, torch.tensor(0.2))
    assert float(trust) == pytest.approx(2.0) and not trust.requires_grad
    assert float(trust_of(torch.tensor(0.0), torch.tensor(0.0))) == pytest.approx(1 / SMALLEST_SUM)
    with pytest.raises(ConfigError, match=r"one is -0.5: choose a model.loss that is never negative"):
        trust_of(torch.tensor(-0.5), torch.tensor(2.0))


def test_a_fading_term_leaves_both_networks_their_masks() -> None:
    fading = {"kd": LogitKL(schedule=Ramp())}
    module = quiet(mutual(losses=fading))
    module.clock = RunClock(round=2, rounds=2)
    assert set(module.loss_terms(batch())) == {"supervised", "teacher_supervised"}


def test_without_terms_the_student_trains_alone() -> None:
    module = MutualDistillationModule(network(4), losses={"kd": LogitKL(weight=0.0)}, optimizer=sgd)
    fit(module)
    plain = SegmentationModule(network(4), optimizer=sgd)
    L.Trainer(**TRAINER, max_epochs=1).fit(plain, DataLoader(items(), 4, collate_fn=collate))  # type: ignore[arg-type]
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in module.state_dict().items())


def test_the_teacher_is_outside_the_state_and_copies_have_their_own() -> None:
    module = mutual()
    assert module.state_dict().keys() == {f"network.{name}" for name in network(4).state_dict()}
    assert any(name.startswith("companions.teacher.") for name, _ in module.named_parameters())
    copied = copy.deepcopy(module)
    assert copied.teacher is not module.teacher
    fit(copied)
    assert module.teacher is not None and close(module.teacher, network(6, seed=1))


def test_the_network_a_teacher_came_from_is_left_alone() -> None:
    given = network(6, seed=1)
    module = mutual()
    module.attach_teacher(given)
    fit(module)
    assert close(given, network(6, seed=1)) and not close(module.teacher, given)  # type: ignore[arg-type]


# --- outside a federation -----------------------------------------------------------------------------------------


class Source(TeacherSource):
    """Hands out one network, and counts."""

    def __init__(self) -> None:
        self.loaded: list[str | None] = []

    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        return Path()

    def load(self, client: str | None) -> nn.Module:
        self.loaded.append(client)
        return network(6, seed=1)


def central() -> MutualDistillationModule:
    terms = {"kd": LogitKL(temperature=1.0)}
    return MutualDistillationModule(
        network(4), teacher=Source(), losses=terms, optimizer=adam, teacher_lr=0.02, loss=nn.CrossEntropyLoss()
    )


def test_a_central_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = central()
    fit(whole, epochs=4)
    fit(central(), epochs=2).save_checkpoint(path := tmp_path / "half.ckpt")
    stored = torch.load(path, weights_only=True)
    assert not any("teacher" in name or "companions" in name for name in stored["state_dict"])
    rest = central()
    fit(rest, epochs=4, ckpt=path)
    for one, other in ((rest, whole), (rest.companions, whole.companions)):
        assert [n for n, _ in one.named_parameters()] == [n for n, _ in other.named_parameters()]
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))
    assert not close(rest.teacher, network(6, seed=1))  # type: ignore[arg-type]


def test_a_second_fit_goes_on_with_the_teacher() -> None:
    module = central()
    fit(module)
    middle = module.companions.tensors()
    fit(module)
    assert module.teacher_source.loaded == [None]  # type: ignore[union-attr]
    assert not torch.equal(module.companions.tensors()["teacher.0.weight"], middle["teacher.0.weight"])
    grown = module.teachers_after(lambda client: middle)
    assert grown is not None and torch.equal(grown.load(None).state_dict()["0.weight"], middle["teacher.0.weight"])


def test_a_resume_with_another_teacher_is_refused(tmp_path: Path) -> None:
    fit(central()).save_checkpoint(path := tmp_path / "one.ckpt")
    other = central()
    other.teacher_source.load = lambda client: network(5)  # type: ignore[union-attr, method-assign]
    with pytest.raises(ConfigError, match=r"trains beside the student, connectors or a teacher \(teacher.0.bias"):
        fit(other, epochs=2, ckpt=path)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "named"),
    [
        ({"mixed": AttentionTransfer(student_tap="2")}, "mixed compares logits with features"),
        ({"hint": HintMSE()}, "hint compares logits with features, or has a connector for logits"),
        ({"teacher_kd": LogitKL()}, "'teacher_kd' would be logged"),
    ],
)
def test_terms_without_a_meaning_both_ways_are_refused(terms: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MutualDistillationModule(network(4), losses=terms)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"model.teacher_lr is .*give a learning rate above 0"):
        MutualDistillationModule(network(4), teacher_lr=rate)


def test_a_frozen_teacher_or_none_is_refused() -> None:
    module = quiet(MutualDistillationModule(network(4)))
    with pytest.raises(ConfigError, match="needs a teacher"):
        module.loss_terms(batch())
    with pytest.raises(ConfigError, match="Sequential is frozen: unfreeze it, or use"):
        module.attach_teacher(network(6).requires_grad_(False))
