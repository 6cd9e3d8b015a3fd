"""Client rules in two processes against loops written by hand in one, on the union of both processes' batches.

Slow because each process imports the stack. No BatchNorm: its statistics are per process, so there is no such loop.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fkd_med.federated.ahead import validation_dice
from fkd_med.modules import SegmentationModule
from fkd_med.modules.teacher_cache import Surroundings

MU, RATE, DECAY, MOMENTUM = 5.0, 0.05, 0.7, 0.9
SIZES = {"a": 8, "b": 16, "c": 24}  # whole batches of 4 for each of two processes
ROUNDS = 2

PROGRAM = """
import os, sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
import lightning as L
from conftest import Hospitals, distilled, trainer
from test_ddp_rules import MU, ROUNDS, SIZES, student
from fkd_med.aggregation import FedNova, Scaffold
from fkd_med.federated import ClientWorker, FedNovaRule, FedProx, Federation, ScaffoldRule, TeachWhileAhead

L.seed_everything(7, verbose=False)
fit, sent = ClientWorker.fit, []

def spy(self, client, broadcast, attempt=0):
    update = fit(self, client, broadcast, attempt)
    message = {{"client": client, "round": broadcast.round, "start": dict(broadcast.state)}}
    message |= {{"server": broadcast.extras, "state": update.state, "extras": update.extras}}
    if "train/teacher_lead" in update.metrics:
        teacher = self.module.teacher_source.load(client).state_dict()
        message |= {{"lead": update.metrics["train/teacher_lead"], "teacher": teacher}}
    sent.append(message)
    return update

ClientWorker.fit = spy
for name, rule, aggregator in (
    ("prox", FedProx(MU), {{}}),
    ("scaffold", ScaffoldRule(), {{"aggregator": Scaffold()}}),
    ("nova", FedNovaRule(), {{"aggregator": FedNova()}}),
    ("ahead", TeachWhileAhead(), {{}}),
):
    sent.clear()
    recipe = Federation(rounds=ROUNDS, client_rules=[rule], **aggregator)
    made = trainer(Path({root!r}) / name, recipe, strategy="ddp", devices=2, limit_val_batches=0)
    module = distilled(Path({root!r}) / "teachers") if name == "ahead" else student(name)
    made.fit(module, datamodule=Hospitals(SIZES))
    torch.save(sent, f"{root}/{{name}}-{{os.environ['LOCAL_RANK']}}.pt")
"""


def student(rule: str) -> SegmentationModule:
    """A student without BatchNorm; with momentum and a schedule for FedNova, whose norm counts both."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    momentum = MOMENTUM if rule == "nova" else 0.0
    decay = DECAY if rule == "nova" else 1.0
    return SegmentationModule(
        network,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=momentum),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, decay),
    )


def by_hand(
    fed: Any, rule: str, message: dict[str, Any], correct: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Train on batches of 8, of which two processes see the even and the odd images, with SGD written out."""
    module = student(rule).train()
    module.load_state_dict(message["start"])
    steps_before = (message["round"] - 1) * SIZES[message["client"]] // 8
    velocity = {name: torch.zeros_like(w) for name, w in module.named_parameters()}
    batches = fed.Hospitals(SIZES, batch_size=8).client_train_dataloader(message["client"], message["round"])
    for step, batch in enumerate(batches):
        module.zero_grad()
        halves = (slice(0, None, 2), slice(1, None, 2))
        losses = [module.loss(module(batch["image"][half]), batch["mask"][half]) for half in halves]
        torch.stack(losses).mean().backward()
        rate = RATE * (DECAY ** (steps_before + step) if rule == "nova" else 1.0)
        with torch.no_grad():
            for name, w in module.named_parameters():
                assert w.grad is not None
                velocity[name] = (MOMENTUM if rule == "nova" else 0.0) * velocity[name] + w.grad + correct(name, w)
                w -= rate * velocity[name]
    return {name: w.detach() for name, w in module.named_parameters()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    """Equal but for float32: sums over images and processes round in another order."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What clients got and sent in two processes, by rule; the processes agree to the bit."""
    root = tmp_path_factory.mktemp("rules")
    script = root / "run.py"
    script.write_text(PROGRAM.format(folder=str(Path(__file__).parent), root=str(root)))
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "PL_GLOBAL_SEED")}
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    messages = {}
    for rule in ("prox", "scaffold", "nova", "ahead"):
        messages[rule], others = (torch.load(root / f"{rule}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert len(messages[rule]) == ROUNDS * len(SIZES)
        for one, other in zip(messages[rule], others, strict=True):
            assert all(torch.equal(tensor, other["state"][name]) for name, tensor in one["state"].items())
    return messages


@pytest.mark.slow
def test_fedprox_of_two_processes_is_the_loop_over_both_batches(fed, sent) -> None:
    for message in sent["prox"]:
        start = message["start"]
        expected = by_hand(fed, "prox", message, lambda name, w, start=start: MU * (w - start[name]))
        assert_close(message["state"], expected, 1e-6)
        plain = by_hand(fed, "prox", message, lambda name, w: torch.zeros_like(w))
        assert not torch.allclose(plain["network.0.weight"], expected["network.0.weight"], rtol=0, atol=1e-5) or (
            message["client"] == "a"  # one step: the pull begins at the second
        )


@pytest.mark.slow
def test_scaffold_of_two_processes_is_the_loop_over_both_batches(fed, sent) -> None:
    own: dict[str, dict[str, Tensor]] = {}
    for message in sent["scaffold"]:
        start, client = message["start"], message["client"]
        zero = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        server, mine = message["server"].get("scaffold", zero), own.get(client, zero)
        assert (message["round"] == 1) == (not message["server"])
        expected = by_hand(fed, "scaffold", message, lambda name, w, c=server, ci=mine: c[name] - ci[name])
        assert_close(message["state"], expected, 1e-6)
        way = SIZES[client] // 8 * RATE
        change = {name: (start[name] - expected[name]) / way - server[name] for name in start}
        assert_close(message["extras"]["scaffold"], change, 1e-6 / way)  # the error of the weights, divided likewise
        own[client] = {name: mine[name] + change[name] for name in start}


@pytest.mark.slow
def test_fednova_of_two_processes_is_the_loop_over_both_batches(fed, sent) -> None:
    for message in sent["nova"]:
        assert_close(message["state"], by_hand(fed, "nova", message, lambda name, w: torch.zeros_like(w)), 1e-6)
        steps = SIZES[message["client"]] // 8
        first = (message["round"] - 1) * steps
        counts = [sum(DECAY ** (first + k) * MOMENTUM ** (k - j) for k in range(j, steps)) for j in range(steps)]
        assert float(message["extras"]["fednova"]["a_norm"]) == pytest.approx(sum(counts), rel=1e-9)


@pytest.mark.slow
def test_the_lead_of_a_teacher_is_that_of_all_images_each_once_in_two_processes(fed, sent) -> None:
    """Three validation images for two processes: the sampler repeats one, which must not count twice."""
    teacher, student, data = fed.network(6), fed.network(), fed.Hospitals(SIZES)
    for message in sent["ahead"]:
        teacher.load_state_dict(message["teacher"])
        student.load_state_dict({name.removeprefix("network."): tensor for name, tensor in message["start"].items()})
        scores = [validation_dice(network, data, message["client"], Surroundings()) for network in (teacher, student)]
        assert message["lead"] == pytest.approx(scores[0] - scores[1], abs=1e-6)
