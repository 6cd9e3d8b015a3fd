"""Client rules against loops written by hand from the papers, in plain torch on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fkd_med.aggregation import FedAvg, FedNova, Scaffold
from fkd_med.communication import Broadcast
from fkd_med.errors import ConfigError
from fkd_med.federated import ClientWorker, Federation, FedNovaRule, FedProx, ScaffoldRule
from fkd_med.federated.client_state import ClientStates

Correct = Callable[[str, nn.Parameter], Tensor]


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def worker(fed: Any, folder: Path, federation: Federation, module: Any, **flags: Any) -> ClientWorker:
    flags = {"accelerator": "cpu", "devices": 1, **flags}
    states = ClientStates(folder)
    return ClientWorker(module, fed.Hospitals(), federation, flags, 7, states, fed.silent())


def by_hand(
    fed: Any, module: Any, client: str, round: int, correct: Correct, accumulate: int = 1, clip: float | None = None,
    bf16: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Train a copy for one epoch of a round, adding `correct` to each gradient, and return its state."""
    trained = copy.deepcopy(module).train()
    optimizer = module.optimizer(trained.parameters())
    batches = list(fed.Hospitals().client_train_dataloader(client, round))
    for first in range(0, len(batches), accumulate):
        group = batches[first : first + accumulate]
        optimizer.zero_grad()
        for batch in group:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = trained.loss(trained(batch["image"]), batch["mask"])
            (loss / accumulate).backward()
        for name, parameter in trained.named_parameters():
            parameter.grad = parameter.grad + correct(name, parameter.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.parameters(), clip)
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in trained.state_dict().items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **options: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name, **options)


@pytest.mark.parametrize(
    "flags", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fedprox_is_a_pull_to_the_global_weights(fed, tmp_path, flags, optimizer) -> None:
    mu, module = 5.0, fed.student(optimizer=getattr(fed, optimizer))
    start = fed.weights(module)
    federation = Federation(client_rules=[FedProx(mu)])
    update = worker(fed, tmp_path, federation, module, **flags).fit("c", Broadcast(1, start))
    expected = by_hand(
        fed, module, "c", 1, lambda name, w: mu * (w - start[name]),
        flags.get("accumulate_grad_batches", 1), flags.get("gradient_clip_val"), "precision" in flags,
    )  # fmt: skip
    assert_close(update.state, expected)
    plain = worker(fed, tmp_path, Federation(), module, **flags).fit("c", Broadcast(1, start))
    assert not torch.allclose(plain.state["network.0.weight"], update.state["network.0.weight"], rtol=0, atol=1e-6)
    assert update.extras == {}


def test_fedprox_of_zero_is_fedavg(fed, tmp_path) -> None:
    module = fed.student()
    start = fed.weights(module)
    one = worker(fed, tmp_path, Federation(client_rules=[FedProx(0.0)]), module).fit("c", Broadcast(1, start))
    other = worker(fed, tmp_path, Federation(), module).fit("c", Broadcast(1, start))
    assert fed.same(one.state, other.state)


def test_fedprox_never_changes_the_broadcast(fed, tmp_path) -> None:
    module = fed.student()
    start = fed.weights(module)
    kept = {name: tensor.clone() for name, tensor in start.items()}
    worker(fed, tmp_path, Federation(client_rules=[FedProx(1.0)]), module).fit("c", Broadcast(1, start))
    assert fed.same(start, kept)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scaffold_over_rounds_is_the_papers_algorithm(fed, tmp_path, accumulate) -> None:
    """Algorithm 1, option II, all clients: y corrected by c - c_i, uniform mean of y, means of the control variates."""
    module = fed.student(optimizer=plain_sgd)
    clients, rounds = ["a", "b", "c"], 3
    x = {name: tensor.double() for name, tensor in fed.weights(module).items()}
    names = [name for name, _ in module.named_parameters()]
    c = {name: torch.zeros_like(x[name]) for name in names}
    own = {client: {name: torch.zeros_like(x[name]) for name in names} for client in clients}
    for round in range(1, rounds + 1):
        module.load_state_dict({name: tensor.to(module.state_dict()[name].dtype) for name, tensor in x.items()})
        ys, changes = {}, {}
        for client in clients:
            difference = {name: (c[name] - own[client][name]).float() for name in names}
            ys[client] = by_hand(fed, module, client, round, lambda name, w, d=difference: d[name], accumulate)
            steps = -(-len(list(fed.Hospitals().client_train_dataloader(client, round))) // accumulate)
            new = {n: own[client][n] - c[n] + (x[n] - ys[client][n].double()) / (steps * 0.05) for n in names}
            changes[client] = {name: new[name] - own[client][name] for name in names}
            own[client] = new
        weights = fed.SIZES
        total = sum(weights.values())
        for name in x:
            if name in names:
                x[name] = x[name] + torch.stack([ys[k][name].double() - x[name] for k in clients]).mean(0)
                c[name] = c[name] + torch.stack([changes[k][name] for k in clients]).mean(0)
            else:
                x[name] = sum(weights[k] / total * ys[k][name].double() for k in clients)

    found = fed.student(optimizer=plain_sgd)
    recipe = Federation(rounds=rounds, aggregator=Scaffold(), client_rules=[ScaffoldRule()])
    fed.trainer(tmp_path, recipe, accumulate_grad_batches=accumulate).fit(found, datamodule=fed.Hospitals())
    for name, tensor in fed.weights(found).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), x[name], rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_scaffold_corrects_in_any_precision(fed, tmp_path, precision) -> None:
    """Two rounds of one client: the second with a control variate of its own, and another of the server's."""
    module = fed.student(optimizer=plain_sgd)
    names = [name for name, _ in module.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    server = {name: 0.3 * torch.randn(module.state_dict()[name].shape, generator=generator) for name in names}
    own = {name: torch.zeros_like(tensor) for name, tensor in server.items()}
    recipe = Federation(aggregator=Scaffold(), client_rules=[ScaffoldRule()])
    one = worker(fed, tmp_path, recipe, module, precision=precision)
    for round, c in ((1, {name: torch.zeros_like(tensor) for name, tensor in server.items()}), (2, server)):
        start = fed.weights(module)
        update = one.fit("c", Broadcast(round, start, {"scaffold": c}))
        one.states.accept("c", round)
        expected = by_hand(
            fed, module, "c", round, lambda name, w, c=c, own=own: c[name] - own[name], bf16=precision == "bf16-mixed"
        )
        assert_close(update.state, expected)
        change = {name: (start[name] - expected[name]) / (3 * 0.05) - c[name] for name in names}
        for name in names:
            torch.testing.assert_close(update.extras["scaffold"][name], change[name], rtol=1e-3, atol=1e-4, msg=name)
        own = {name: own[name] + change[name] for name in names}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fednova_trains_as_plain_and_counts_in_any_precision(fed, tmp_path, precision) -> None:
    module = fed.student(optimizer=fed.sgd)  # momentum 0.9
    federation = Federation(aggregator=FedNova(), client_rules=[FedNovaRule()])
    start = fed.weights(module)
    update = worker(fed, tmp_path, federation, module, precision=precision).fit("c", Broadcast(1, start))
    expected = by_hand(fed, module, "c", 1, lambda name, w: torch.zeros_like(w), bf16=precision == "bf16-mixed")
    assert_close(update.state, expected)
    a_norm = update.extras["fednova"]["a_norm"]
    assert a_norm.dtype == torch.float64 and float(a_norm) == pytest.approx(1 + 1.9 + 2.71, rel=1e-12)


def test_scaffold_resumes_to_the_same_bits(fed, tmp_path) -> None:
    def run(folder: Path, rounds: int, ckpt: str | None = None) -> dict[str, Tensor]:
        module = fed.student(optimizer=plain_sgd)
        recipe = Federation(rounds=rounds, aggregator=Scaffold(), client_rules=[ScaffoldRule()])
        fed.trainer(folder, recipe).fit(module, datamodule=fed.Hospitals(), ckpt_path=ckpt)
        return fed.weights(module)

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "halves", 2)
    assert fed.same(run(tmp_path / "halves", 3, str(tmp_path / "halves/checkpoints/last.ckpt")), whole)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_counts_how_often_each_gradient_counts(fed, tmp_path, momentum) -> None:
    """The norm of a_i, from the definition: how much of each gradient is in the way from start to end."""
    rate, decay = 0.05, 0.7

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum)

    module = fed.student(optimizer=sgd, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, decay))
    federation = Federation(local_epochs=2, aggregator=FedNova(), client_rules=[FedNovaRule()])
    update = worker(fed, tmp_path, federation, module).fit("c", Broadcast(1, fed.weights(module)))
    steps = update.num_steps
    assert steps == 6
    weights = [0.0] * steps  # of gradient j in the sum of all steps
    for j in range(steps):
        weights[j] = sum(decay**k * momentum ** (k - j) for k in range(j, steps))
    assert float(update.extras["fednova"]["a_norm"]) == pytest.approx(sum(weights), rel=1e-9)


def test_fednova_runs_and_equals_fedavg_for_equal_work(fed, tmp_path) -> None:
    def run(aggregator: Any, rules: list[Any], sizes: dict[str, int]) -> dict[str, Tensor]:
        module = fed.student(optimizer=plain_sgd)
        recipe = Federation(rounds=2, aggregator=aggregator, client_rules=rules)
        folder = tmp_path / f"{type(aggregator).__name__}-{len(sizes)}-{sizes['a']}"
        fed.trainer(folder, recipe).fit(module, datamodule=fed.Hospitals(sizes))
        return fed.weights(module)

    equal = {"a": 8, "b": 8}
    for name, tensor in run(FedNova(), [FedNovaRule()], equal).items():
        torch.testing.assert_close(tensor, run(FedAvg(), [], equal)[name], rtol=1e-5, atol=1e-7)
    unequal = {"a": 4, "b": 16}
    one, other = run(FedNova(), [FedNovaRule()], unequal), run(FedAvg(), [], unequal)
    assert not torch.allclose(one["network.0.weight"], other["network.0.weight"], atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"aggregator": Scaffold()}, r"Scaffold needs the section 'scaffold' .*client_rules \(.*ScaffoldRule"),
        ({"aggregator": FedNova()}, r"FedNova needs the section 'fednova' .*FedNovaRule"),
        ({"client_rules": [ScaffoldRule()]}, "sends the section 'scaffold', which FedAvg does not use"),
    ],
)
def test_aggregator_and_rule_must_go_together(recipe, words) -> None:
    with pytest.raises(ConfigError, match=words):
        Federation(**recipe)


@pytest.mark.parametrize(
    ("rule", "optimizer", "words"),
    [
        (ScaffoldRule(), "adam", "SCAFFOLD is defined for SGD only, and model.optimizer is Adam"),
        (ScaffoldRule(), "sgd", "SCAFFOLD does not know SGD with momentum=0.9"),
        (FedNovaRule(), "adam", "FedNova is defined for SGD only"),
    ],
)
def test_optimizers_a_rule_does_not_know_are_refused(fed, tmp_path, rule, optimizer, words) -> None:
    aggregator = Scaffold() if isinstance(rule, ScaffoldRule) else FedNova()
    module = fed.student(optimizer=getattr(fed, optimizer))
    federation = Federation(aggregator=aggregator, client_rules=[rule])
    with pytest.raises(ConfigError, match=words):
        worker(fed, tmp_path, federation, module).fit("c", Broadcast(1, fed.weights(module)))


def test_mu_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="mu must be 0 or above"):
        FedProx(-1.0)


def test_moments_of_earlier_rounds_are_refused_where_a_rule_counts_gradients_of_one() -> None:
    """Before any work: found in the second round, the teachers and the first would be lost."""
    recipe = {"aggregator": FedNova(), "client_rules": [FedNovaRule()]}
    with pytest.raises(ConfigError, match=r"FedNovaRule is defined for .* set it to reset"):
        Federation(**recipe, optimizer_state="keep")
    Federation(**recipe)
