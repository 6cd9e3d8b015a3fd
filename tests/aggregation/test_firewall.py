"""What the firewall sets aside, what it says, and what it lets pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fkd_med.aggregation import FedAvg, Scaffold
from fkd_med.aggregation.firewall import Firewall, Quarantine, change_norm
from fkd_med.communication import Broadcast, State, Update
from fkd_med.errors import ConfigError

BUFFERS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def a_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {name: torch.randn(t.shape, generator=generator) for name, t in net.state_dict().items()}
    state["1.running_var"] = state["1.running_var"].abs()
    state["1.num_batches_tracked"] = torch.tensor(seed)
    return state | {"half": torch.randn(9, generator=generator).half(), "scalar": torch.tensor(float(seed)),
                    "empty": torch.zeros(0), "steps": torch.tensor([seed])}  # fmt: skip


BROADCAST = Broadcast(4, a_state(0))


def an_update(**changes: Any) -> Update:
    return Update(**({"client": "north", "round": 4, "attempt": 0, "state": a_state(1), "num_examples": 9,
                      "num_steps": 3} | changes))  # fmt: skip


def with_value(name: str, value: float) -> State:
    """Return a good state with one value, the last of tensor `name`, replaced."""
    state = a_state(1)
    state[name].view(-1)[-1] = value
    return state


def numpy_norm(state: State, base: State) -> float:
    return math.sqrt(
        math.fsum(
            float(((state[n].numpy().astype(np.float64) - base[n].numpy().astype(np.float64)) ** 2).sum())
            for n in state
            if n not in (*BUFFERS, "steps")
        )
    )


def test_a_good_update_passes() -> None:
    assert Firewall(max_norm=1e9).inspect(BROADCAST, an_update()) is None
    assert Firewall(median_factor=None).inspect(BROADCAST, an_update()) is None
    assert Firewall().inspect(BROADCAST, an_update(state=BROADCAST.state)) is None


FLOATS = [name for name, tensor in a_state(1).items() if tensor.is_floating_point() and tensor.numel()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_one_value_that_is_not_finite_is_enough(name: str, value: float) -> None:
    found = Firewall().inspect(BROADCAST, an_update(state=with_value(name, value)))
    assert found == Quarantine("north", 4, name, "holds NaN or infinity")
    assert found is not None
    assert found.text == f"Client 'north', round 4: tensor '{name}' holds NaN or infinity. Its update is set aside."


def _without(name: str) -> State:
    return {other: tensor for other, tensor in a_state(1).items() if other != name}


@pytest.mark.parametrize(("changes", "tensor", "reason"), [
    ({"state": _without("0.bias")}, "0.bias", "is missing"),
    ({"state": {}}, "0.bias", "is missing"),
    ({"state": a_state(1) | {"teacher.0": torch.zeros(2)}}, "teacher.0", "is unknown"),
    ({"state": a_state(1) | {"0.bias": torch.zeros(5)}}, "0.bias", "(5,), the global model's is torch.float32 (4,)"),
    ({"state": a_state(1) | {"0.bias": torch.zeros(4, 1)}}, "0.bias", "(4, 1)"),
    ({"state": a_state(1) | {"0.bias": torch.zeros(4).double()}}, "0.bias", "is torch.float64"),
    ({"state": a_state(1) | {"steps": torch.zeros(1)}}, "steps", "is torch.float32"),
    ({"state": with_value("1.running_var", -1e-9)}, "1.running_var", "negative"),
    ({"num_examples": 0}, "", "num_examples = 0"),
    ({"num_examples": -7}, "", "num_examples = -7"),
    ({"num_steps": 0}, "", "num_steps = 0"),
    ({"round": 3}, "", "answers round 3"),
    ({"round": 5}, "", "answers round 5"),
])  # fmt: skip
def test_faults_are_named(changes: dict[str, Any], tensor: str, reason: str) -> None:
    found = Firewall().inspect(BROADCAST, an_update(**changes))
    assert found is not None
    assert (found.client, found.round, found.tensor) == ("north", 4, tensor)
    assert reason in found.reason
    assert found.reason in found.text


def test_everything_it_lets_pass_can_be_averaged() -> None:
    update = an_update()
    assert Firewall().inspect(BROADCAST, update) is None
    FedAvg().aggregate(BROADCAST, [update, replace(update, client="south")])


def test_what_a_stranger_writes_is_harmless_on_a_terminal() -> None:
    found = Firewall().inspect(BROADCAST, an_update(state=a_state(1) | {"\x1b[2Jx" + "y" * 500: torch.zeros(1)}))
    assert found is not None
    assert found.text.isprintable()
    assert len(found.text) < 250


@pytest.mark.parametrize(("extras", "tensor", "reason"), [
    ({}, "", "does not send the section 'scaffold'"),
    ({"scaffold": {}}, "", "does not send the section 'scaffold'"),
    ({"other": {"0.bias": torch.zeros(4)}}, "", "does not send the section 'scaffold'"),
    ({"scaffold": {"0.bias": torch.tensor([0, 0, math.nan, 0])}}, "scaffold/0.bias", "NaN"),
    ({"scaffold": {"0.bias": torch.zeros(4)}, "x": {"a_norm": torch.tensor(math.inf)}}, "x/a_norm", "infinity"),
])  # fmt: skip
def test_sections_must_be_there_and_finite(extras: Any, tensor: str, reason: str) -> None:
    found = Firewall().inspect(BROADCAST, an_update(extras=extras), Scaffold())
    assert found is not None
    assert found.tensor == tensor
    assert reason in found.reason


def test_sections_may_hold_negative_variances_and_integers() -> None:
    extras = {"scaffold": {"1.running_var": -torch.ones(4), "n": torch.tensor(3)}}  # a difference may be negative
    assert Firewall().inspect(BROADCAST, an_update(extras=extras)) is None


def test_the_norm_is_that_of_the_floating_parameters() -> None:
    assert change_norm(BROADCAST, an_update()) == pytest.approx(numpy_norm(a_state(1), a_state(0)), rel=1e-12)
    huge = a_state(1) | {name: a_state(1)[name] + 1000 for name in (*BUFFERS, "steps")}
    assert change_norm(BROADCAST, an_update(state=huge)) == change_norm(BROADCAST, an_update())
    assert change_norm(BROADCAST, an_update(state=BROADCAST.state)) == 0.0


def test_the_norm_by_hand() -> None:
    broadcast = Broadcast(4, {"a": torch.tensor([1.0]), "b": torch.tensor([[0.0, 2.0]])})
    update = an_update(state={"a": torch.tensor([4.0]), "b": torch.tensor([[4.0, 14.0]])})  # 3, 4, 12
    assert change_norm(broadcast, update) == 13.0


def test_the_norm_keeps_what_float32_loses() -> None:
    broadcast = Broadcast(4, {"w": torch.full((3,), 1e30), "v": torch.zeros(1)})
    update = an_update(state={"w": torch.full((3,), -1e30), "v": torch.zeros(1)})  # squares overflow float32
    assert change_norm(broadcast, update) == pytest.approx(2e30 * 3**0.5)


def test_a_change_beyond_measure_is_set_aside() -> None:
    broadcast = Broadcast(4, {"w": torch.full((2,), 1.5e308, dtype=torch.float64)})
    found = Firewall().inspect(broadcast, an_update(state={"w": -broadcast.state["w"]}))
    assert found is not None
    assert "more than can be measured" in found.reason


def test_the_absolute_limit_holds() -> None:
    norm = change_norm(BROADCAST, an_update())
    assert Firewall(max_norm=norm).inspect(BROADCAST, an_update()) is None
    found = Firewall(max_norm=norm * 0.999).inspect(BROADCAST, an_update())
    assert found is not None
    assert found.tensor == ""
    assert f"{norm:.4g}, more than max_norm" in found.reason


@pytest.mark.parametrize(("norms", "caught"), [
    ([], []),
    ([5.0], []),
    ([1.0, 1e9], []),  # of two, who is to say which one lies?
    ([1.0, 1.0, 1.0], []),
    ([1.0, 1.2, 10.9], []),  # the others' median is 1.1
    ([1.0, 1.2, 11.0], []),  # ten times it, not more
    ([1.0, 1.2, 11.1], ["c2"]),
    ([100.0, 1.0, 1.0], ["c0"]),
    ([1.0, 1.0, 1.0, 100.0, 100.0], ["c3", "c4"]),
    ([1.0, 1.0, 100.0, 100.0], ["c2", "c3"]),  # the others of c2 are 1, 1, 100
    ([1.0, 100.0, 100.0], []),  # liars are the majority
    ([0.0, 0.0, 5.0], []),  # a median of zero says nothing
    ([0.0, 0.0, 0.0], []),
    ([0.0, 1.0, 1.0], []),  # who changes nothing is not too large
    ([1.0, 1.0, math.inf], ["c2"]),
    ([1.0, 1.0, math.nan], ["c2"]),
])  # fmt: skip
def test_who_is_too_large_beside_the_others(norms: list[float], caught: list[str]) -> None:
    found = Firewall().inspect_round({f"c{place}": norm for place, norm in enumerate(norms)}, 6)
    assert sorted(found) == caught
    assert all(q == Quarantine(client, 6, "", q.reason) for client, q in found.items())


def test_the_report_says_how_much_too_large() -> None:
    found = Firewall(median_factor=3).inspect_round({"a": 2.0, "b": 4.0, "c": 9.5}, 2)
    assert found["c"].text == (
        "Client 'c', round 2: changes the student by 9.5, more than 3 times the median of the other 2 clients, 3. "
        "Its update is set aside."
    )


def test_the_rule_can_be_switched_off() -> None:
    assert Firewall(median_factor=None).inspect_round({"a": 1.0, "b": 1.0, "c": 1e9}, 1) == {}


NORMS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(2.0**-40, 2.0**40))


@settings(deadline=None)
@given(NORMS, st.integers(-20, 20), st.floats(1.5, 100), st.randoms())
def test_the_rule_is_blind_to_order_and_unit(norms: dict[str, float], power: int, factor: float, random: Any) -> None:
    wall = Firewall(median_factor=factor)
    caught = set(wall.inspect_round(norms, 1))
    items = list(norms.items())
    random.shuffle(items)
    assert set(wall.inspect_round({client: norm * 2.0**power for client, norm in items}, 1)) == caught
    want = {
        client
        for client, norm in norms.items()
        if len(norms) >= 3 and norm > factor * np.median([other for name, other in norms.items() if name != client])
    }
    assert caught == want
    if factor >= 2:
        assert len(caught) <= len(norms) // 2  # never the majority


@pytest.mark.parametrize("norm", [0, -1, math.inf, math.nan])
def test_an_impossible_limit_is_refused(norm: float) -> None:
    with pytest.raises(ConfigError, match="max_norm is"):
        Firewall(max_norm=norm)


@pytest.mark.parametrize("factor", [1, 0, -3, math.inf, math.nan])
def test_an_impossible_factor_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="median_factor is"):
        Firewall(median_factor=factor)


def test_it_is_built_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--firewall", type=Firewall)
    text = "{class_path: fkd_med.aggregation.firewall.Firewall, init_args: {max_norm: 5, median_factor: null}}"
    wall = parser.instantiate_classes(parser.parse_string(f"firewall: {text}")).firewall
    assert (wall.max_norm, wall.median_factor) == (5.0, None)
