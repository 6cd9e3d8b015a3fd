"""Teachers are listened to only while they are ahead of the student on the client's validation images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fkd_med.aggregation import FedAvg
from fkd_med.communication import Broadcast
from fkd_med.data.datasets import collate
from fkd_med.distillation.views import of_views
from fkd_med.errors import ConfigError
from fkd_med.evaluation import score_image
from fkd_med.federated import ClientWorker, Federation, FedProx, GlobalDistillation, TeachWhileAhead
from fkd_med.federated.ahead import validation_dice
from fkd_med.federated.client_state import ClientStates
from fkd_med.losses import LogitKL, Ramp
from fkd_med.modules import DistillationModule, MutualDistillationModule, TeacherSource
from fkd_med.modules.teacher_cache import Surroundings

FLAGS = {"accelerator": "cpu", "devices": 1}


class Threshold(nn.Module):
    """Says foreground where the mean of the channels is above a bound: good at bright squares, or bad."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = nn.Parameter(torch.tensor(bound), requires_grad=False)
        self.side = nn.Parameter(torch.zeros(16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * (x.mean(1, keepdim=True) - self.bound) + self.side


class Given(TeacherSource):
    """One network for everybody, and how often it was asked for."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.loads = network, 0

    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        return Path()

    def load(self, client: str | None) -> nn.Module:
        self.loads += 1
        return copy.deepcopy(self.network)

    def digest(self, client: str | None) -> str:
        return str(float(self.network.bound))


GOOD, BAD = 0.6, 50.0  # everything is below the bound of the bad one: Dice 0


def worker_of(fed: Any, folder: Path, module: Any, *rules: Any) -> ClientWorker:
    def prepare(copied: Any, client: str) -> None:
        if isinstance(copied, DistillationModule):
            copied.learn_from(client, worker.data, None)

    worker = ClientWorker(
        module, fed.Hospitals(), Federation(client_rules=list(rules)), FLAGS, 7, ClientStates(folder), fed.silent(),
        prepare,
    )  # fmt: skip
    return worker


def fit(fed: Any, folder: Path, module: Any, *rules: Any, state: Any = None) -> Any:
    return worker_of(fed, folder, module, *rules).fit("c", Broadcast(1, state or fed.weights(module)))


def dices_by_hand(data: Any, client: str, network: nn.Module) -> list[float]:
    found = []
    for batch in data.client_val_dataloader(client):
        with torch.no_grad():
            said = network(batch["image"])[:, 0] > 0
        pairs = zip(said.numpy(), batch["mask"].numpy(), strict=True)
        found += [score_image(prediction, truth, 1, hd95=False).dice for prediction, truth in pairs]
    return found


def test_a_teacher_ahead_teaches_as_without_the_rule_and_one_behind_not_at_all(fed, tmp_path) -> None:
    good, bad = (fed.distilled(None, source=Given(Threshold(bound))) for bound in (GOOD, BAD))
    state = fed.weights(good)
    told = fit(fed, tmp_path / "1", good, TeachWhileAhead(), state=state)
    assert fed.same(told.state, fit(fed, tmp_path / "2", good, state=state).state), "ahead: the rule changes nothing"
    assert told.metrics["train/kd"] > 0 and told.metrics["train/teacher_lead"] > 0
    left = fit(fed, tmp_path / "3", bad, TeachWhileAhead(), state=state)
    assert left.metrics["train/teacher_lead"] <= 0 and "train/kd" not in left.metrics
    assert fed.same(left.state, fit(fed, tmp_path / "4", fed.student(), state=state).state), "behind: masks alone"
    assert not fed.same(left.state, fit(fed, tmp_path / "5", bad, state=state).state)
    assert bad.teaches and good.teaches, "for one round only"


@pytest.mark.parametrize("teacher_first", [True, False])
def test_the_memory_can_speak_in_the_place_of_a_silent_teacher_only(fed, tmp_path, teacher_first) -> None:
    """The order of the rules does not matter: who leads is known before the first step."""
    good, bad = (fed.distilled(None, source=Given(Threshold(bound))) for bound in (GOOD, BAD))
    state = fed.weights(good)

    def trained(name, module, *rules):
        return fit(fed, tmp_path / name, module, *(rules if teacher_first else rules[::-1]), state=state)

    led = trained("1", good, TeachWhileAhead(), GlobalDistillation(beside_teacher=False))
    assert fed.same(led.state, trained("2", good, TeachWhileAhead()).state), "the teacher speaks: the memory is silent"
    assert "train/global_kd" not in led.metrics and led.metrics["train/kd"] > 0
    left = trained("3", bad, TeachWhileAhead(), GlobalDistillation(beside_teacher=False))
    assert fed.same(left.state, trained("4", bad, TeachWhileAhead(), GlobalDistillation()).state), "and the other way"
    assert left.metrics["train/global_kd"] > 0 and "train/kd" not in left.metrics
    both = trained("5", good, TeachWhileAhead(), GlobalDistillation())
    assert both.metrics["train/global_kd"] > 0 and both.metrics["train/kd"] > 0 and not fed.same(both.state, led.state)


def test_the_memory_takes_over_from_a_teacher_whose_terms_have_faded(fed, tmp_path) -> None:
    source, faded = Given(Threshold(GOOD)), Ramp(first=1.0, last=0.0, begin=0.5, end=0.5)
    module = fed.distilled(None, source=source, losses={"kd": LogitKL(schedule=faded)})
    rule = GlobalDistillation(beside_teacher=False)
    trainer = fed.trainer(tmp_path, Federation(rounds=2, client_rules=[rule]))
    trainer.fit(module, datamodule=fed.Hospitals())
    told = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert {name: step for step, name, _ in told if name in ("a/train/kd", "a/train/global_kd")} == {
        "a/train/kd": "1", "a/train/global_kd": "2",
    }  # fmt: skip


def test_the_memory_speaks_where_there_is_no_teacher_at_all(fed, tmp_path) -> None:
    module = fed.student()
    alone = fit(fed, tmp_path / "1", module, GlobalDistillation(beside_teacher=False))
    assert fed.same(alone.state, fit(fed, tmp_path / "2", module, GlobalDistillation()).state)


def test_the_lead_is_the_difference_of_mean_dice_on_the_client_s_validation_images(fed, tmp_path) -> None:
    module = fed.distilled(None, source=Given(Threshold(GOOD)))
    update = fit(fed, tmp_path, module, TeachWhileAhead())
    data = fed.Hospitals()
    teacher = dices_by_hand(data, "c", Threshold(GOOD))
    student = dices_by_hand(data, "c", copy.deepcopy(module.network).eval())
    assert len(teacher) == 3 and 0 < sum(teacher) / 3 < 1
    assert update.metrics["train/teacher_lead"] == pytest.approx((sum(teacher) - sum(student)) / 3)


def test_a_teacher_is_scored_in_the_views_in_which_it_teaches(fed, tmp_path) -> None:
    sided = Threshold(GOOD)
    sided.side.data = torch.linspace(-9, 9, 16)  # sees more on the right
    module = fed.distilled(None, source=Given(sided), teacher_views=2)
    lead = fit(fed, tmp_path, module, TeachWhileAhead()).metrics["train/teacher_lead"]
    scores = [dices_by_hand(fed.Hospitals(), "c", network.eval()) for network in (of_views(sided, 2), sided)]
    own = sum(dices_by_hand(fed.Hospitals(), "c", copy.deepcopy(module.network).eval())) / 3
    assert sum(scores[0]) != sum(scores[1])
    assert lead == pytest.approx(sum(scores[0]) / 3 - own)


def test_scoring_leaves_the_network_and_the_random_numbers_as_they_are(fed) -> None:
    class Drawing(fed.Hospitals):
        def _evaluation(self, client: str, split: str) -> Any:
            return DataLoader(fed.Blobs(client, split, 3), 2, collate_fn=collate)  # draws from torch's own numbers

    network = fed.network().train()
    before, numbers = fed.weights(network), torch.get_rng_state()
    validation_dice(network, Drawing(), "a", Surroundings())
    assert fed.same(before, fed.weights(network)) and network.training, "BatchNorm has seen nothing"
    assert torch.equal(numbers, torch.get_rng_state())


def test_the_teacher_s_score_stays_with_the_client_until_it_or_its_images_change(fed, tmp_path) -> None:
    module = fed.distilled(None, source=Given(Threshold(GOOD)))
    worker = worker_of(fed, tmp_path, module, TeachWhileAhead())
    leads = []

    def rounds(*numbers: int) -> int:
        for number in numbers:
            leads.append(worker.fit("c", Broadcast(number, fed.weights(module))).metrics["train/teacher_lead"])
            worker.states.accept("c", number)
        return module.teacher_source.loads

    assert rounds(1) == 2 and rounds(2, 3) == 4, "once a round to teach, once more in the first to be scored"
    worker.data = fed.Hospitals(content="other images")
    assert rounds(4) == 6 and rounds(5) == 7, "scored anew, once"
    module.teacher_source.network = Threshold(BAD)
    assert rounds(6) == 9
    assert len(set(leads[:5])) == 1 and leads[5] <= 0 < leads[0]


def test_it_stands_beside_the_memory_of_a_federation(fed, tmp_path) -> None:
    module = fed.distilled(None, source=fed.teacher_stage(tmp_path / "teachers", epochs=2))
    rules = [TeachWhileAhead(), GlobalDistillation(memory=0.5, views=2)]
    trainer = fed.trainer(tmp_path / "run", Federation(rounds=2, client_rules=rules))
    trainer.fit(module, datamodule=fed.Hospitals())
    logged = (tmp_path / "run" / "metrics.csv").read_text()
    for client in "abc":
        assert f"{client}/train/teacher_lead" in logged and f"{client}/train/global_kd" in logged


def test_what_it_cannot_work_with_is_refused_before_training(fed, tmp_path) -> None:
    rule, data = TeachWhileAhead(), fed.Hospitals()
    with pytest.raises(ConfigError, match="SegmentationModule is none"):
        rule.check(fed.student(), data)
    mutual = MutualDistillationModule(fed.network(), fed.teacher_stage(tmp_path, epochs=0))
    with pytest.raises(ConfigError, match="MutualDistillationModule is none"):
        rule.check(mutual, data)
    with pytest.raises(ConfigError, match="without any loss"):
        rule.check(fed.distilled(tmp_path, supervised_weight=0.0), data)

    class Bare(fed.Hospitals):
        def _evaluation(self, client: str, split: str) -> Any:
            return [] if client == "b" else super()._evaluation(client, split)

    with pytest.raises(ConfigError, match="'b' has none"):
        rule.check(fed.distilled(tmp_path), Bare())


def test_the_student_is_compared_as_the_server_saw_it_where_statistics_neither_travel_nor_stay(
    fed, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(
        fed.Hospitals, "client_train_eval_dataloader", lambda self, client: self._evaluation(client, "train"),
        raising=False,
    )  # fmt: skip
    module = fed.distilled(None, source=Given(Threshold(GOOD)))
    recipe = Federation(rounds=3, batch_norm="recalibrate", client_rules=[TeachWhileAhead()])
    fed.trainer(tmp_path, recipe).fit(module, datamodule=fed.Hospitals())
    told = {}
    for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]:
        step, name, value = row.split(",")
        told[int(step), name] = float(value)
    for client in "abc":
        scores = dices_by_hand(fed.Hospitals(), client, Threshold(GOOD))
        for round in (2, 3):
            student = sum(scores) / len(scores) - told[round, f"{client}/train/teacher_lead"]
            assert student == pytest.approx(told[round - 1, f"{client}/val_dice"], abs=1e-6)


def test_alone_the_rule_acts_as_in_a_federation_of_one(fed, tmp_path) -> None:
    """An arm of hospitals alone is otherwise told apart from its federation by the rule, too."""
    rules = [TeachWhileAhead(), GlobalDistillation(memory=0.5, beside_teacher=False), FedProx(0.1)]
    states = []
    for name, aggregator in (("alone", None), ("one", FedAvg())):
        module = fed.distilled(None, source=Given(Threshold(BAD)))
        recipe = Federation(rounds=3, aggregator=aggregator, client_rules=rules)
        fed.trainer(tmp_path / name, recipe).fit(module, datamodule=fed.Hospitals({"a": 8}))
        states.append(module.personal.by_client["a"] if aggregator is None else fed.weights(module))
        assert "a/train/teacher_lead" in (tmp_path / name / "metrics.csv").read_text()
    assert fed.same(*states)
