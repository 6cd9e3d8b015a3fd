"""The server's distillation: FedDF is its equation, only travelling weights move, and rounds go on as before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fkd_med.aggregation import FedAvg
from fkd_med.communication import Update
from fkd_med.errors import ConfigError, RunError, TrainingError
from fkd_med.federated import Chaos, FedDF, Federation, ServerDistillation, ServerWork, feddf
from fkd_med.federated.policy import TensorPolicy
from fkd_med.federated.public_learning import mean_answers, minibatches
from fkd_med.modules.teacher_cache import Surroundings

HERE = Surroundings()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def run(fed: Any, folder: Path, rounds: int = 1, ckpt: str | None = None, data: Any = None, **recipe: Any) -> Any:
    options = recipe.pop("trainer", {})
    made, module = fed.trainer(folder, Federation(rounds=rounds, **recipe), **options), fed.student()
    made.fit(module, datamodule=data or fed.Hospitals(public=10), ckpt_path=ckpt)
    return made, module


# --- the equation ---------------------------------------------------------------------------------------------------


def student(classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, classes, 1))
    made(torch.randn(4, 3, 8, 8) * seed)  # statistics of its own
    return made


def by_hand(model: nn.Module, clients: list[nn.Module], images: torch.Tensor, rates: list[float], t: float) -> None:
    """FedDF's steps on all images at once, from the paper's formula."""
    with torch.no_grad():
        logits = [client.eval()(images) for client in clients]
        mean = sum(logits) / len(logits)
    for rate in rates:
        model.eval().zero_grad()
        found = model(images)
        if found.shape[1] == 1:
            p, q = torch.sigmoid(mean / t), torch.sigmoid(found / t)
            kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        else:
            p, q = torch.softmax(mean / t, 1), torch.softmax(found / t, 1)
            kl = (p * (p / q).log()).sum(1)
        (t**2 * kl.mean()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(("steps", "temperature"), [(1, 1.0), (2, 3.0)])
def test_feddf_is_its_equation(fed, classes, steps, temperature) -> None:
    clients, model = [student(classes, seed) for seed in (1, 2)], student(classes, 3)
    images, expected = fed.Public(6), copy.deepcopy(model)
    updates = [Update(str(i), 1, 0, dict(client.state_dict()), 1 + 9 * i, 1) for i, client in enumerate(clients)]
    work = ServerWork(
        model, copy.deepcopy(model), updates, TensorPolicy("average", [], []), images, round=1, seed=7, around=HERE
    )
    FedDF(steps=steps, batch_size=64, temperature=temperature, optimizer=sgd).distil(work)
    rates = [0.5 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert rates == ([0.5] if steps == 1 else [0.5, 0.25])
    start = copy.deepcopy(expected)
    by_hand(expected, clients, images.images, rates, temperature)
    for (name, one), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    assert all(moved)
    statistics = zip(start.buffers(), model.buffers(), strict=True)
    assert all(torch.equal(one, other) for one, other in statistics)  # the averaged ones


class Constant(nn.Module):
    """Answers with a multiple of the image."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value * x[:, :2]


def test_mean_logits_of_known_models(fed) -> None:
    images, positions = fed.Public(9), np.array([1, 3, 4, 7, 8])
    models = [("a", Constant(1.0)), ("b", Constant(5.0))]
    found = mean_answers(iter(models), images, positions, 2, HERE)
    torch.testing.assert_close(found.logits, 3.0 * images.images[positions, :2])
    torch.testing.assert_close(found.of(np.array([8, 3])), 3.0 * images.images[[8, 3], :2])
    with pytest.raises(TrainingError, match="The model of client b answers with NaN"):
        mean_answers([models[0], ("b", Constant(math.nan))], images, positions, 2, HERE)


def test_minibatches_depend_on_seed_and_round_alone() -> None:
    positions = np.array([2, 3, 5, 7, 11])
    drawn = minibatches(positions, 2, 10, 7, "x", 1)
    assert [batch.tolist() for batch in drawn] == [b.tolist() for b in minibatches(positions, 2, 10, 7, "x", 1)]
    assert [b.tolist() for b in drawn] != [b.tolist() for b in minibatches(positions, 2, 10, 7, "x", 2)]
    stream = np.concatenate(drawn).reshape(4, 5)
    assert all(sorted(order) == positions.tolist() for order in stream)  # all once before any twice
    assert [sorted(batch) for batch in minibatches(positions, 64, 3, 0)] == [positions.tolist()] * 3


# --- in a round -----------------------------------------------------------------------------------------------------


def test_a_round_ends_with_the_distilled_mean(fed, tmp_path, captured) -> None:
    _, plain = run(fed, tmp_path / "plain")
    captured.clear()
    _, module = run(fed, tmp_path / "df", server_distillation=FedDF(steps=1, batch_size=64, optimizer=sgd))
    clients = []
    for update in (m for m in captured if isinstance(m, Update)):
        clients.append(fed.student())
        clients[-1].load_state_dict(update.state)
    assert len(clients) == 3
    by_hand(plain, clients, fed.Public(10).images, [0.5], 1.0)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)
    assert "server/kl_first" in (tmp_path / "df" / "metrics.csv").read_text()


def test_more_steps_bring_the_student_nearer(fed, tmp_path) -> None:
    made, _ = run(fed, tmp_path, server_distillation=FedDF(steps=40, batch_size=4))
    assert made.fit_loop.metrics["server/kl_last"] < 0.5 * made.fit_loop.metrics["server/kl_first"]


class Meddler(ServerDistillation):
    """Changes every tensor, and says that it does not ask the clients."""

    needs_whole_models = False

    @torch.no_grad()
    def distil(self, work: ServerWork) -> dict[str, float]:
        for tensor in work.student.state_dict().values():
            tensor += 1
        return {}


WEIGHTS = {"network.0.weight", "network.0.bias", "network.3.weight", "network.3.bias"}
SCALES = {"network.1.weight", "network.1.bias"}


@pytest.mark.parametrize(
    ("recipe", "moves"),
    [
        ({}, WEIGHTS | SCALES),
        ({"batch_norm": "local"}, WEIGHTS),
        ({"batch_norm": "recalibrate"}, WEIGHTS | SCALES),
        ({"personal": ["network.3.*"]}, {"network.0.weight", "network.0.bias"} | SCALES),
        ({"frozen": ["network.0.*"]}, {"network.3.weight", "network.3.bias"} | SCALES),
    ],
    ids=lambda value: str(next(iter(value), "average")) if isinstance(value, dict) else "",
)
def test_only_what_travels_and_trains_moves(fed, tmp_path, monkeypatch, recipe, moves) -> None:
    give = lambda self, client: self._evaluation(client, "train")  # noqa: E731
    monkeypatch.setattr(fed.Hospitals, "client_train_eval_dataloader", give, raising=False)
    _, plain = run(fed, tmp_path / "plain", **recipe)
    _, module = run(fed, tmp_path / "meddled", server_distillation=Meddler(), **recipe)
    for name, tensor in module.state_dict().items():
        expected = plain.state_dict()[name] + (1 if name in moves else 0)
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("recipe", [{"batch_norm": "recalibrate"}, {"frozen": ["network.0.*"]}], ids=str)
def test_feddf_goes_with(fed, tmp_path, monkeypatch, recipe) -> None:
    give = lambda self, client: self._evaluation(client, "train")  # noqa: E731
    monkeypatch.setattr(fed.Hospitals, "client_train_eval_dataloader", give, raising=False)
    _, plain = run(fed, tmp_path / "plain", **recipe)
    made, module = run(fed, tmp_path / "df", server_distillation=FedDF(steps=20), **recipe)
    assert made.fit_loop.metrics["server/kl_last"] < made.fit_loop.metrics["server/kl_first"]
    same = {name for name, tensor in module.state_dict().items() if torch.equal(tensor, plain.state_dict()[name])}
    buffers = {name for name, _ in module.named_buffers()}
    assert same == buffers | ({"network.0.weight", "network.0.bias"} if "frozen" in recipe else set())


def test_statistics_that_never_travel_are_those_of_the_public_images(fed) -> None:
    model, client, images = student(1, 3), student(1, 1), fed.Public(8)
    state = {name: t for name, t in client.state_dict().items() if "running" not in name and "num_b" not in name}
    policy = TensorPolicy("recalibrate", [], [])
    work = ServerWork(model, copy.deepcopy(model), [Update("a", 1, 0, state, 1, 1)], policy, images, 1, 7, HERE)
    (_, asked), *none = list(work.models())
    inside = client[0](images.images)
    assert not none
    torch.testing.assert_close(asked[1].running_mean, inside.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(asked[1].running_var, inside.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert not asked.training


def test_a_client_set_aside_is_not_in_the_ensemble(fed, tmp_path, monkeypatch) -> None:
    asked: list[str] = []
    ask: Callable[..., Any] = feddf.mean_answers

    def spy(models: Any, *args: Any) -> Any:
        def noted() -> Any:
            for client, model in models:
                asked.append(client)
                yield client, model

        return ask(noted(), *args)

    monkeypatch.setattr(feddf, "mean_answers", spy)
    run(fed, tmp_path, quorum=0.5, chaos=Chaos(liars={"b": "nan"}), server_distillation=FedDF(steps=1))
    assert asked == ["a", "c"]


def test_resumed_run_is_bit_identical(fed, tmp_path) -> None:
    recipe = {"server_distillation": FedDF(steps=3, batch_size=4), "optimizer_state": "keep"}
    _, whole = run(fed, tmp_path / "whole", 3, **recipe)
    run(fed, tmp_path / "halves", 1, **recipe)
    _, halves = run(fed, tmp_path / "halves", 3, str(tmp_path / "halves/checkpoints/last.ckpt"), **recipe)
    assert fed.same(fed.weights(whole), fed.weights(halves))
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "halves/metrics.csv").read_text()


def test_other_public_images_are_refused_on_resume(fed, tmp_path) -> None:
    recipe = {"server_distillation": FedDF(steps=1, batch_size=4)}
    run(fed, tmp_path, 1, **recipe)
    last = str(tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(RunError, match=r"data.public holds other images"):
        run(fed, tmp_path, 2, last, data=fed.Hospitals(public=9), **recipe)
    run(fed, tmp_path, 2, last, **recipe)


def test_nothing_more_travels_and_clients_draw_the_same(fed, tmp_path, captured) -> None:
    run(fed, tmp_path / "plain")
    updates = {m.client: m for m in captured if isinstance(m, Update)}
    captured.clear()
    run(fed, tmp_path / "df", server_distillation=FedDF(steps=2))
    assert (tmp_path / "plain/ledger.csv").read_text() == (tmp_path / "df/ledger.csv").read_text()
    for message in (m for m in captured if isinstance(m, Update)):
        assert fed.same(message.state, updates[message.client].state)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_runs_in_the_trainers_precision(fed, tmp_path, precision) -> None:
    dtypes: list[torch.dtype] = []

    class Look(FedDF):
        def distil(self, work: ServerWork) -> dict[str, float]:
            look = lambda module, inputs, output: dtypes.append(output.dtype)  # noqa: E731
            work.student.network.register_forward_hook(look)  # type: ignore[union-attr, operator]
            return super().distil(work)

    made, _ = run(fed, tmp_path, server_distillation=Look(steps=20), trainer={"precision": precision})
    assert set(dtypes) == {torch.bfloat16}
    assert made.fit_loop.metrics["server/kl_last"] < made.fit_loop.metrics["server/kl_first"]


def test_a_trial_run_does_one_step(fed, tmp_path, monkeypatch) -> None:
    steps: list[int] = []
    learn: Callable[..., Any] = feddf.approach
    spy = lambda *args: (steps.append(len(args[3])), learn(*args))[1]  # noqa: E731
    monkeypatch.setattr(feddf, "approach", spy)
    run(fed, tmp_path / "whole", server_distillation=FedDF(steps=3))
    run(fed, tmp_path / "trial", server_distillation=FedDF(steps=3), trainer={"fast_dev_run": True})
    assert steps == [3, 1]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "public", "words"),
    [
        ({}, 0, r"FedDF needs public images: give data.public"),
        ({"batch_norm": "local"}, 4, r"FedDF asks every client's model.*network.1.bias stays"),
        ({"personal": ["network.3.*"]}, 4, r"network.3.bias stays.*no federation.personal"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(fed, tmp_path, recipe, public, words) -> None:
    data = fed.Hospitals(public=public)
    with pytest.raises(ConfigError, match=words):
        run(fed, tmp_path, data=data, server_distillation=FedDF(), **recipe)
    assert not data.drawn


def test_a_data_module_without_the_method_is_told_so(fed, tmp_path, monkeypatch) -> None:
    monkeypatch.delattr(fed.Hospitals, "public_images")
    run(fed, tmp_path / "plain")  # nobody else asks
    with pytest.raises(ConfigError, match="Hospitals has no method public_images"):
        run(fed, tmp_path, server_distillation=FedDF())


def test_alone_there_is_no_server(fed) -> None:
    with pytest.raises(ConfigError, match=r"server_distillation: FedDF .* no weights are aggregated"):
        Federation(aggregator=None, server_distillation=FedDF())
    recipe = Federation(server_distillation=FedDF())
    assert recipe.alone().server_distillation is None and recipe.server_distillation is not None
    assert Federation(aggregator=FedAvg()).server_distillation is None


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"temperature": 0.0}])
def test_wrong_settings_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FedDF(**wrong)


def test_a_diverging_step_is_named(fed, tmp_path) -> None:
    wild = FedDF(steps=9, optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    with pytest.raises(TrainingError, match=r"on public images is not finite at step|holds NaN"):
        run(fed, tmp_path, server_distillation=wild)
