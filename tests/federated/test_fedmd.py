"""FedMD: weights never travel, only float16 maps of public images do, and students learn from the consensus."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fkd_med.aggregation import FedAvg, Firewall, LogitConsensus
from fkd_med.checkpoints import read_checkpoint
from fkd_med.communication import PUBLIC_LOGITS, AllowList, Broadcast, Int8, Ledger, Packing, PublicLogits, Update
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.federated import FedDF, Federation, PublicDigest
from fkd_med.federated import public_digest as room
from fkd_med.modules.teacher_cache import Surroundings
from fkd_med.networks.eval_mode import evaluating


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def run(
    fed: Any,
    folder: Path,
    rounds: int = 2,
    ckpt: str | None = None,
    data: Any = None,
    digest: Any = None,
    **recipe: Any,
) -> Any:
    options = recipe.pop("trainer", {})
    recipe = {"aggregator": LogitConsensus(), "client_rules": [digest or PublicDigest()], "share_logits": True} | recipe
    made, module = fed.trainer(folder, Federation(rounds=rounds, **recipe), **options), fed.student()
    made.fit(module, datamodule=data or fed.Hospitals(public=10), ckpt_path=ckpt)
    return made, module


def own(module: Any) -> dict[str, torch.Tensor]:
    students = module.personal.by_client
    return {f"{client}/{name}": tensor for client in students for name, tensor in students[client].items()}


def section(message: Any) -> dict[str, torch.Tensor]:
    return message.extras.get(PUBLIC_LOGITS, {})


# --- the equations --------------------------------------------------------------------------------------------------


def test_logits_up_and_consensus_down(fed, tmp_path, captured) -> None:
    _, module = run(fed, tmp_path, rounds=2)
    ups = {(m.round, m.client): section(m) for m in captured if isinstance(m, Update)}
    downs = {m.round: section(m) for m in captured if isinstance(m, Broadcast)}
    assert ups.keys() == {(round, client) for round in (1, 2) for client in "abc"} and downs[1] == {}
    images = fed.Public(10).images
    for client, state in module.personal.by_client.items():  # what was sent is what the trained student answers
        student = fed.student()
        student.load_state_dict(state)
        with torch.no_grad():
            expected = student.eval()(images).half()
        assert list(ups[2, client]) == [str(i) for i in range(10)]
        for name, tensor in ups[2, client].items():
            torch.testing.assert_close(tensor, expected[int(name)], rtol=1e-3, atol=1e-3)
    for name, tensor in downs[2].items():
        mean = sum(ups[1, client][name].double() for client in "abc") / 3
        assert torch.equal(tensor, mean.half())


def test_a_digest_step_is_its_equation(fed) -> None:
    images, student = fed.Public(6), fed.student()
    student.network.train()
    consensus = {str(i): torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(i)).half() for i in (4, 1, 2)}
    expected = copy.deepcopy(student)
    rule = PublicDigest(batch_size=64, optimizer=sgd)
    rule.meet(SimpleNamespace(public_images=lambda: images), "a", 7)
    rule.begin(Broadcast(2, {}, {PUBLIC_LOGITS: consensus}), {})
    rule._digest(student, Surroundings())
    p = torch.sigmoid(torch.stack([consensus[str(i)] for i in (1, 2, 4)]).float())
    q = torch.sigmoid(expected.eval()(images.images[[1, 2, 4]]))
    (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean().backward()
    for (name, one), other in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.5 * other.grad, rtol=1e-5, atol=1e-7, msg=name)
        assert one.grad is None
    assert student.network.training  # and the modes are put back
    for one, other in zip(student.buffers(), expected.buffers(), strict=True):
        assert torch.equal(one, other)


def test_a_round_digests_before_it_trains(fed, tmp_path, captured, monkeypatch) -> None:
    """Where own training stands still (rate 0), the second round's weights are the first's after one digest step."""
    still, make = lambda p: torch.optim.SGD(p, lr=0.0), fed.student
    monkeypatch.setattr(fed, "student", lambda: make(optimizer=still))
    digest = PublicDigest(batch_size=64, optimizer=sgd)
    _, first = run(fed, tmp_path / "first", rounds=1, digest=digest)
    captured.clear()
    _, second = run(fed, tmp_path / "second", rounds=2, digest=digest)
    down = next(section(m) for m in captured if isinstance(m, Broadcast) and m.round == 2)
    p = torch.sigmoid(torch.stack([down[str(i)] for i in range(10)]).float())
    for client in "abc":
        expected = make()
        expected.load_state_dict(first.personal.by_client[client])
        q = torch.sigmoid(expected.eval()(fed.Public(10).images))
        (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean().backward()
        for name, parameter in expected.named_parameters():
            found = second.personal.by_client[client][name]
            torch.testing.assert_close(found, parameter - 0.5 * parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
            assert not torch.equal(found, parameter), name


def test_students_come_nearer_to_one_another(fed, tmp_path, captured) -> None:
    def spread(updates: list[Update]) -> float:
        maps = torch.stack([torch.stack(list(section(u).values())).float().sigmoid() for u in updates])
        return float(maps.var(0).mean())

    found = {}
    for epochs in (1, 30):
        captured.clear()
        run(fed, tmp_path / str(epochs), digest=PublicDigest(epochs=epochs, batch_size=5))
        found[epochs] = spread([m for m in captured if isinstance(m, Update) and m.round == 2])
    assert found[30] < found[1]


# --- what travels ---------------------------------------------------------------------------------------------------


def test_no_weight_travels_and_bytes_are_counted_apart(fed, tmp_path, captured) -> None:
    run(fed, tmp_path, digest=PublicDigest(images=4))
    assert all(message.state == {} for message in captured)
    for message in captured:
        assert set(message.extras) <= {PUBLIC_LOGITS}
        for name, tensor in section(message).items():
            assert name in {str(i) for i in range(10)}
            assert tensor.dtype == torch.float16 and tensor.shape == (1, 16, 16)
    rows = [r for r in Ledger(tmp_path / "ledger.csv").rows if r.section == "extras:public-logits"]
    assert {(r.round, r.direction) for r in rows} == {(1, "up"), (2, "up"), (2, "down")}
    assert {r.bytes for r in rows} == {4 * 2 * 16 * 16}


def test_the_images_of_a_round_are_the_same_for_all_and_change(fed, tmp_path, captured) -> None:
    run(fed, tmp_path, rounds=3, digest=PublicDigest(images=4))
    asked = {m.round: set(section(m)) for m in captured if isinstance(m, Update)}
    for message in captured:
        expected = asked[message.round] if isinstance(message, Update) else asked.get(message.round - 1, set())
        assert set(section(message)) == expected
    assert len(asked[1]) == 4 and len({frozenset(names) for names in asked.values()}) > 1
    rule = PublicDigest(images=3)
    assert np.array_equal(rule.chosen(9, 7, 2), rule.chosen(9, 7, 2))
    assert {tuple(rule.chosen(9, 7, r)) for r in range(9)} != {tuple(rule.chosen(9, 8, r)) for r in range(9)}


@pytest.mark.parametrize(
    ("name", "tensor", "passes"),
    [
        ("3", torch.zeros(1, 8, 8).half(), True),
        ("9", torch.zeros(1, 8, 8).half(), True),
        ("10", torch.zeros(1, 8, 8).half(), False),  # there are ten images
        ("03", torch.zeros(1, 8, 8).half(), False),
        ("-1", torch.zeros(1, 8, 8).half(), False),
        ("\u0663", torch.zeros(1, 8, 8).half(), False),
        ("patient-17.png", torch.zeros(1, 8, 8).half(), False),
        ("3", torch.zeros(3, 8, 8).half(), False),  # an image
        ("3", torch.zeros(1, 8, 8), False),
        ("3", torch.zeros(1, 8, 8, dtype=torch.uint8), False),  # a mask
        ("conv.weight", torch.zeros(2, 2).half(), False),
        ("a", torch.tensor(0.5), False),
    ],
)
def test_the_allow_list_lets_nothing_else_through(name, tensor, passes) -> None:
    message = Update("x", 1, 0, {}, 1, 1, {}, {PUBLIC_LOGITS: {name: tensor}})
    allowed = AllowList({}, {PUBLIC_LOGITS}, PublicLogits(10, (1, 8, 8)))
    if passes:
        allowed.check(message)
    else:
        with pytest.raises(TrainingError, match="only float16 maps"):
            allowed.check(message)
    with pytest.raises(TrainingError, match=r"without federation\.share_logits"):
        AllowList({}, {PUBLIC_LOGITS}).check(message)
    with pytest.raises(TrainingError, match="single numbers, may travel"):  # another section gains nothing
        other = Update("x", 1, 0, {}, 1, 1, {}, {"other": {"3": torch.zeros(1, 8, 8).half()}})
        AllowList({}, {"other"}, PublicLogits(10, (1, 8, 8))).check(other)


def test_the_firewall_looks_at_the_logits() -> None:
    bad = {"3": torch.tensor([[[float("inf")]]]).half()}
    found = Firewall().inspect(
        Broadcast(1, {}), Update("x", 1, 0, {}, 1, 1, {}, {PUBLIC_LOGITS: bad}), LogitConsensus()
    )
    assert found is not None and found.tensor == "public-logits/3"
    assert Firewall().inspect(Broadcast(1, {}), Update("x", 1, 0, {}, 1, 1), LogitConsensus()) is not None


# --- in a run -------------------------------------------------------------------------------------------------------


def test_every_client_keeps_and_evaluates_its_own_student(fed, tmp_path) -> None:
    start = fed.weights(fed.student())
    made, module = run(fed, tmp_path)
    assert set(module.personal.by_client) == set(module.personal.best) == {"a", "b", "c"}
    a, b = (module.personal.by_client[client]["network.0.weight"] for client in "ab")
    assert not torch.equal(a, b)
    assert fed.same(fed.weights(module), start)  # there is no global student
    stored = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.equal(stored["fkd_med"]["personal"]["latest"]["a"]["network.0.weight"], a)
    assert made.federation.keeps_students and not made.federation.is_local and made.arm() == "federated"


def test_resumed_run_is_bit_identical(fed, tmp_path) -> None:
    recipe = {"optimizer_state": "keep", "fraction": 0.7, "digest": PublicDigest(images=4, batch_size=3)}
    _, whole = run(fed, tmp_path / "whole", 4, **recipe)
    run(fed, tmp_path / "halves", 2, **recipe)
    _, halves = run(fed, tmp_path / "halves", 4, str(tmp_path / "halves/checkpoints/last.ckpt"), **recipe)
    assert own(whole).keys() and fed.same(own(whole), own(halves))
    for name in ("ledger.csv", "images.csv", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "halves" / name).read_text()


def test_a_client_that_answers_nonsense_is_set_aside(fed, tmp_path, monkeypatch) -> None:
    say = PublicDigest.end

    def end(self: PublicDigest, trained: Any) -> Any:
        sections, kept = say(self, trained)
        if len(asked) == 1:  # the second of the three
            sections[PUBLIC_LOGITS]["3"][0, 0, 0] = float("nan")
        asked.append(1)
        return sections, kept

    asked: list[int] = []
    monkeypatch.setattr(PublicDigest, "end", end)
    _, module = run(fed, tmp_path, rounds=1, quorum=0.5)
    text = (tmp_path / "absences.csv").read_text()
    assert "quarantined" in text and "public-logits/3" in text
    assert set(module.personal.by_client) == {"a", "c"}


def test_a_diverged_student_is_a_failed_client(fed, tmp_path, monkeypatch) -> None:
    def nan(*args: Any) -> Any:
        raise TrainingError("answers with NaN or infinity about public images")
        yield

    monkeypatch.setattr(room, "answers", nan)
    with pytest.raises(TrainingError, match="A student answers with NaN"):
        run(fed, tmp_path)


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"fast_dev_run": True}], ids=str)
def test_it_goes_with_precisions_and_trial_runs(fed, tmp_path, options) -> None:
    run(fed, tmp_path, trainer=options)


def test_it_goes_with_packings(fed, tmp_path) -> None:
    _, plain = run(fed, tmp_path / "plain")
    packing = Packing(Int8(), of="delta", error_feedback=True)
    _, packed = run(fed, tmp_path / "packed", uplink=packing, downlink=Packing(Int8()))
    assert fed.same(own(plain), own(packed))  # logits travel as they are


def test_modes_are_put_back(fed) -> None:
    module = fed.student()
    module.train()
    module.network[1].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert module.training and module.network[0].training and not module.network[1].training


# --- consent, and what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"share_logits": False}, r"set federation.share_logits: true if all clients agree"),
        ({"client_rules": None}, r"LogitConsensus needs the section 'public-logits'.*PublicDigest"),
        ({"aggregator": FedAvg()}, r"'public-logits', which FedAvg does not use"),
        ({"aggregator": FedAvg(), "client_rules": None}, r"share_logits: nothing here shares logits"),
        ({"aggregator": None}, r"share_logits: nothing here shares logits"),
        ({"server_distillation": FedDF()}, r"server_distillation: FedDF .* no weights are aggregated"),
    ],
)
def test_consent_and_parts_must_fit(recipe, words) -> None:
    whole = {"aggregator": LogitConsensus(), "client_rules": [PublicDigest()], "share_logits": True}
    alone = Federation(**whole).alone()
    assert alone.is_local and not alone.share_logits
    with pytest.raises(ConfigError, match=words):
        Federation(**whole | recipe)


@pytest.mark.parametrize(
    ("public", "digest", "words"),
    [
        (0, PublicDigest(), "PublicDigest needs public images: give data.public"),
        (4, PublicDigest(images=5), "images is 5, and data.public holds 4"),
    ],
)
def test_missing_images_are_told_before_any_work(fed, tmp_path, public, digest, words) -> None:
    data = fed.Hospitals(public=public)
    with pytest.raises(ConfigError, match=words):
        run(fed, tmp_path, data=data, digest=digest)
    assert not data.drawn


@pytest.mark.parametrize("wrong", [{"images": 0}, {"epochs": 0}, {"batch_size": 0}, {"temperature": -1.0}])
def test_wrong_settings_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PublicDigest(**wrong)
