"""Trouble by configuration: as often as asked for, the same every time, and lies as they are described."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import jsonargparse
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fkd_med.aggregation import identical
from fkd_med.aggregation.firewall import Firewall, change_norm
from fkd_med.communication import AllowList, Broadcast, State, Update, decode, encode
from fkd_med.errors import ConfigError
from fkd_med.federated.chaos import Chaos, Event, Lie

CLIENTS = ["a", "b", "c"]
TRUE = ("1.running_mean", "1.running_var", "1.num_batches_tracked", "steps", "empty")  # what no lie concerns


def a_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {name: torch.randn(t.shape, generator=generator) for name, t in net.state_dict().items()}
    state["1.running_var"] = state["1.running_var"].abs()
    state["1.num_batches_tracked"] = torch.tensor(seed)
    state["half"] = torch.randn(40, generator=generator).half()
    state["scalar"] = torch.randn((), generator=generator)
    return state | {"steps": torch.tensor([seed, 2]), "empty": torch.zeros(0)}


def an_update(client: str = "liar", round: int = 3, seed: int = 1) -> Update:
    return Update(client, round, 0, a_state(seed), 10, 5, {"train/loss": 0.5}, {"x": {"a_norm": torch.tensor(2.0)}})


BROADCAST = Broadcast(3, a_state(0))


def told(lie: Lie, update: Update | None = None, seed: int = 7, **options: Any) -> Update:
    return Chaos(liars={"liar": lie}, **options).corrupt(update or an_update(), BROADCAST, seed)


def test_nothing_happens_by_default() -> None:
    chaos, update = Chaos(), an_update()
    assert {chaos.happens(client, 0, round) for client in CLIENTS for round in range(1, 50)} == {"fine"}
    assert chaos.corrupt(update, BROADCAST, 0) is update
    assert chaos.seconds == 0


@pytest.mark.parametrize(
    ("chances", "event"), [({"dropout": 1}, "dropout"), ({"straggle": 1}, "late"), ({"fail": 1.0}, "fail")]
)
def test_what_is_certain_always_happens(chances: dict[str, float], event: str) -> None:
    assert {Chaos(**chances).happens(client, 0, round) for client in CLIENTS for round in range(1, 99)} == {event}


def test_trouble_is_as_frequent_as_asked_for() -> None:
    chaos, draws = Chaos(dropout=0.1, straggle=0.25, fail=0.3), 6000
    seen = Counter(chaos.happens(client, 2, round) for client in CLIENTS for round in range(draws // 3))
    for event, chance in {"dropout": 0.1, "late": 0.25, "fail": 0.3, "fine": 0.35}.items():
        assert abs(seen[event] - draws * chance) < 4 * (draws * chance * (1 - chance)) ** 0.5, event
    assert seen.keys() == set(get_args(Event))


def test_trouble_depends_on_seed_round_and_client_alone() -> None:
    def one() -> Chaos:
        return Chaos(dropout=0.3, straggle=0.3, fail=0.3)

    asked = [(client, seed, round) for client in CLIENTS for seed in range(3) for round in range(1, 20)]
    first, second = one(), one()
    drawn = {key: first.happens(*key) for key in asked}
    assert {key: second.happens(*key) for key in reversed(asked)} == drawn
    for place, others in ((0, "client"), (1, "seed"), (2, "round")):
        groups: dict[Any, set[str]] = {}
        for key, event in drawn.items():
            groups.setdefault(key[:place] + key[place + 1 :], set()).add(event)
        assert any(len(events) > 1 for events in groups.values()), f"the {others} does not matter"


def test_clients_fall_independently() -> None:
    chaos, rounds = Chaos(dropout=0.5), 3000
    both = sum(all(chaos.happens(client, 1, round) == "dropout" for client in "ab") for round in range(rounds))
    assert abs(both - rounds / 4) < 4 * (rounds * 3 / 16) ** 0.5


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 20))
def test_outside_its_rounds_there_is_no_trouble(first: int, more: int) -> None:
    chaos = Chaos(dropout=1.0, liars={"liar": "flip"}, rounds=[first, first + more])
    for round in range(1, 45):
        inside, update = first <= round <= first + more, an_update(round=round)
        assert chaos.happens("a", 0, round) == ("dropout" if inside else "fine")
        assert (chaos.corrupt(update, BROADCAST, 0) is update) == (not inside)


@pytest.mark.parametrize("lie", get_args(Lie))
def test_only_liars_lie_and_only_about_floating_parameters(lie: Lie) -> None:
    update, before = an_update(), a_state(1)
    lied = told(lie, update)
    assert identical(update.state, before)  # the true update is never changed
    assert not identical(lied.state, before)
    assert list(lied.state) == list(before)
    for name, tensor in lied.state.items():
        assert (tensor.shape, tensor.dtype) == (before[name].shape, before[name].dtype)
        if name in TRUE:
            assert torch.equal(tensor, before[name]), name
    unchanged = ("client", "round", "attempt", "num_examples", "num_steps", "metrics", "extras")
    assert all(getattr(lied, field) is getattr(update, field) for field in unchanged)
    honest = an_update("honest")
    assert Chaos(liars={"liar": lie}).corrupt(honest, BROADCAST, 7) is honest


@pytest.mark.parametrize("lie", get_args(Lie))
def test_a_lie_travels_like_any_update(lie: Lie) -> None:
    lied = told(lie)
    AllowList(BROADCAST.state, {"x"}).check(lied)
    received = decode(encode(lied))
    assert isinstance(received, Update)
    assert identical(received.state, lied.state)


@pytest.mark.parametrize("lie", ["nan", "random"])
def test_drawn_lies_are_the_same_again_and_others_elsewhere(lie: Lie) -> None:
    assert identical(told(lie).state, told(lie).state)
    rounds = [told(lie, an_update(round=round)).state for round in range(1, 20)]
    seeds = [told(lie, seed=seed).state for seed in range(20)]
    for states in (rounds, seeds):
        assert any(not identical(states[0], state) for state in states)


def test_the_lie_nan_is_one_value_somewhere() -> None:
    hit = Counter[str]()
    for seed in range(200):
        lied = told("nan", seed=seed).state
        wrong = {name: int(tensor.isnan().sum()) for name, tensor in lied.items() if tensor.is_floating_point()}
        assert sum(wrong.values()) == 1
        (name,) = (name for name, count in wrong.items() if count)
        hit[name] += 1
        rest = ~lied[name].isnan()
        assert torch.equal(lied[name][rest], a_state(1)[name][rest])
    assert hit.keys() == a_state(1).keys() - set(TRUE)


@pytest.mark.parametrize(("lie", "options", "factor"), [
    ("scale", {}, 100.0), ("scale", {"scale": 3.5}, 3.5), ("scale", {"scale": 0.0}, 0.0),
    ("flip", {"scale": 9.0}, -1.0),
])  # fmt: skip
def test_changes_are_multiplied_as_numpy_does(lie: Lie, options: dict[str, float], factor: float) -> None:
    lied, true = told(lie, **options).state, a_state(1)
    for name in true.keys() - set(TRUE):
        start, end = (state[name].numpy().astype(np.float64) for state in (BROADCAST.state, true))
        want = (start + factor * (end - start)).astype(true[name].numpy().dtype)
        np.testing.assert_array_equal(lied[name].numpy(), want, err_msg=name)


def test_a_flip_by_hand() -> None:
    update = Update("liar", 3, 0, {"w": torch.tensor([1.0, 5.0])}, 1, 1)
    lied = Chaos(liars={"liar": "flip"}).corrupt(update, Broadcast(3, {"w": torch.tensor([3.0, 1.0])}), 0)
    assert lied.state["w"].tolist() == [5.0, -3.0]


def test_random_weights_have_the_norm_of_the_true_ones_and_nothing_else_of_them() -> None:
    state = {"big": torch.linspace(3, 5, 4000), "same": torch.linspace(3, 5, 4000), "zero": torch.zeros(5)}
    lied = told("random", Update("liar", 3, 0, state, 1, 1)).state
    for name, tensor in lied.items():
        assert np.linalg.norm(tensor.numpy().astype(np.float64)) == pytest.approx(
            np.linalg.norm(state[name].numpy().astype(np.float64)), rel=1e-6
        )
    assert abs(lied["big"].mean()) < 4 * lied["big"].std() / 4000**0.5  # the true mean is 4
    assert abs(np.corrcoef(lied["big"], lied["same"])[0, 1]) < 0.1  # each tensor has noise of its own
    assert abs(np.corrcoef(lied["big"], state["big"])[0, 1]) < 0.1


def test_a_client_without_floating_parameters_has_nothing_to_lie_about() -> None:
    update = Update("liar", 3, 0, {"n": torch.tensor(3)}, 1, 1)
    for lie in get_args(Lie):
        assert identical(Chaos(liars={"liar": lie}).corrupt(update, BROADCAST, 0).state, update.state)


def test_the_firewall_sees_the_lies_it_promises_to_see() -> None:
    updates = [an_update(client, seed=seed) for seed, client in enumerate(["liar", *CLIENTS], 1)]
    chaos, wall = Chaos(liars={"liar": "nan"}), Firewall()
    found = [wall.inspect(BROADCAST, chaos.corrupt(update, BROADCAST, 1)) for update in updates]
    assert [quarantine is not None for quarantine in found] == [True, False, False, False]

    chaos = Chaos(liars={"liar": "scale"})
    lied = [chaos.corrupt(update, BROADCAST, 1) for update in updates]
    assert all(wall.inspect(BROADCAST, update) is None for update in lied)
    norms = {update.client: change_norm(BROADCAST, update) for update in lied}
    assert norms["liar"] == pytest.approx(100 * change_norm(BROADCAST, updates[0]), rel=1e-3)
    assert wall.inspect_round(norms, 3).keys() == {"liar"}


@pytest.mark.parametrize("name", ["dropout", "straggle", "fail"])
@pytest.mark.parametrize("chance", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_chance_is_a_probability(name: str, chance: float) -> None:
    with pytest.raises(ConfigError, match=rf"Chaos: {name} is .*0 to 1"):
        Chaos(**{name: chance})


def test_chances_add_up_to_one_at_most() -> None:
    with pytest.raises(ConfigError, match=r"dropout, straggle, fail add up to 1\.1"):
        Chaos(dropout=0.5, straggle=0.5, fail=0.1)
    for dropout, straggle, fail in ((0.1, 0.2, 0.7), (0.7, 0.2, 0.1), (0.3, 0.3, 0.4), (1 / 3, 1 / 3, 1 / 3)):
        Chaos(dropout=dropout, straggle=straggle, fail=fail)


@pytest.mark.parametrize(
    "options", [{"seconds": -1}, {"seconds": float("nan")}, {"scale": float("inf")}, {"scale": -2}]
)
def test_impossible_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"Chaos: {next(iter(options))} is .*0 or above"):
        Chaos(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rounds", [[], [3], [0, 2], [3, 2], [1, 2, 3]])
def test_an_impossible_span_is_refused(rounds: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"Chaos: rounds: .* no span"):
        Chaos(rounds=rounds)


def test_unknown_lies_and_liars_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"client 'b' is 'zero': give nan, scale, flip or random"):
        Chaos(liars={"a": "nan", "b": "zero"})  # type: ignore[dict-item]
    chaos = Chaos(liars={"hospital-nrth": "nan"})
    with pytest.raises(ConfigError, match=r"Chaos: liars names client 'hospital-nrth'.*Did you mean 'hospital-north'"):
        chaos.check(["south", "hospital-north"])
    chaos.check(["hospital-nrth", "south"])


def _built(text: str) -> Any:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--chaos", type=Chaos)
    return parser.instantiate_classes(parser.parse_string(text)).chaos


def test_it_is_built_from_yaml() -> None:
    chaos = _built("""
chaos:
  class_path: fkd_med.federated.chaos.Chaos
  init_args: {dropout: 0.1, straggle: 0.2, seconds: 3, liars: {"Klinik 7.b": flip, south: nan}, rounds: [2, 5]}
""")
    assert chaos.chances == {"dropout": 0.1, "late": 0.2, "fail": 0.0}
    assert (chaos.seconds, chaos.rounds, chaos.liars) == (3, [2, 5], {"Klinik 7.b": "flip", "south": "nan"})
    with pytest.raises(jsonargparse.ArgumentError, match="zero"):
        _built("chaos: {class_path: fkd_med.federated.chaos.Chaos, init_args: {liars: {a: zero}}}")
