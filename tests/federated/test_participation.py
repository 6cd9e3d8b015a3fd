"""Who takes part: pure draws, pinned where results were published, and settings refused before training."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import jsonargparse
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fkd_med.errors import ConfigError
from fkd_med.federated.participation import (
    Availability,
    ByWeight,
    Fraction,
    Number,
    Participation,
    RoundRobin,
    round_half_up,
)
from fkd_med.seeding import derive_seed

ABCDE = ["a", "b", "c", "d", "e"]
SIZES = {"a": 10, "b": 200, "c": 31, "d": 4, "e": 55}

PINNED = {  # what Federation.select drew before there was this file: (fraction, clients, seed) -> rounds 1 to 4
    (0.3, "a b c", 0): ["b", "a", "a", "a"],
    (0.3, "a b c", 42): ["b", "c", "a", "b"],
    (0.3, "n s e w", 0): ["s", "e", "e", "e"],
    (0.3, "n s e w", 42): ["s", "s", "e", "s"],
    (0.3, "a b c d e f g", 0): ["a d", "a g", "a b", "a f"],
    (0.3, "a b c d e f g", 42): ["d g", "d e", "a b", "d e"],
    (0.5, "a b c", 0): ["a b", "a c", "a c", "a c"],
    (0.5, "a b c", 42): ["b c", "b c", "a c", "b c"],
    (0.5, "n s e w", 0): ["e n", "e w", "e w", "e s"],
    (0.5, "n s e w", 42): ["n w", "s w", "e w", "n s"],
    (0.5, "a b c d e f g", 0): ["a c e f", "a b d e", "a e f g", "a d e g"],
    (0.5, "a b c d e f g", 42): ["b c e g", "c e f g", "a d e f", "b c d g"],
    (0.67, "a b c", 0): ["a b", "a c", "a c", "a c"],
    (0.67, "a b c", 42): ["b c", "b c", "a c", "b c"],
    (0.67, "n s e w", 0): ["e n s", "e n s", "e s w", "e s w"],
    (0.67, "n s e w", 42): ["e n s", "n s w", "e s w", "n s w"],
    (0.67, "a b c d e f g", 0): ["a b c d e", "a b d f g", "a c d e f", "a c d f g"],
    (0.67, "a b c d e f g", 42): ["a b d f g", "c d e f g", "a c d e f", "b c e f g"],
    (1.0, "n s e w", 42): ["e n s w", "e n s w", "e n s w", "e n s w"],
}

WAYS: dict[str, Participation] = {
    "fraction": Fraction(0.5),
    "number": Number(2),
    "by weight": ByWeight(2),
    "round robin": RoundRobin(2),
    "availability": Availability(Number(1), {"b": [[1, 3], [6, 9]], "c": []}),
}


@pytest.mark.parametrize(("fraction", "clients", "seed"), PINNED)
def test_a_fraction_selects_what_it_always_did(fraction: float, clients: str, seed: int) -> None:
    names = clients.split()
    drawn = [" ".join(Fraction(fraction).select(names, seed, round, {})) for round in range(1, 5)]
    assert drawn == PINNED[fraction, clients, seed]


@settings(deadline=None)
@given(st.floats(0.001, 1.0), st.integers(1, 30), st.integers(0, 2**32), st.integers(1, 10**6))
def test_a_fraction_follows_its_recipe(fraction: float, clients: int, seed: int, round: int) -> None:
    names = [f"c{place:02d}" for place in range(clients)]
    count = max(1, int(np.floor(fraction * clients + 0.5)))
    rng = np.random.default_rng(derive_seed(seed, "select", round))
    want = sorted(names[i] for i in rng.choice(clients, size=count, replace=False))
    assert Fraction(fraction).select(names, seed, round, {}) == want
    assert Number(count).select(names, seed, round, {}) == want


@pytest.mark.parametrize(
    ("fraction", "clients", "count"), [(0.5, 3, 2), (0.5, 5, 3), (0.01, 3, 1), (1.0, 4, 4), (0.3, 5, 2)]
)
def test_a_fraction_is_rounded_halves_up_and_never_to_nobody(fraction: float, clients: int, count: int) -> None:
    assert len(Fraction(fraction).select(ABCDE[:clients], 0, 1, {})) == count


def test_halves_go_up() -> None:
    assert [round_half_up(value) for value in (0.49, 0.5, 1.5, 2.5, 2.4)] == [0, 1, 2, 3, 2]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@settings(deadline=None)
@given(seed=st.integers(0, 2**32), round=st.integers(1, 10**5), order=st.permutations(ABCDE))
def test_a_selection_is_sorted_distinct_and_blind_to_the_order(
    way: Participation, seed: int, round: int, order: list[str]
) -> None:
    chosen = way.select(order, seed, round, SIZES)
    assert chosen == sorted(set(chosen))
    assert chosen
    assert set(chosen) <= set(ABCDE)
    assert way.select(ABCDE, seed, round, dict(reversed(SIZES.items()))) == chosen
    assert way.select(ABCDE, seed, round, SIZES) == chosen  # nothing is remembered


@pytest.mark.parametrize("way", [Fraction(0.4), Number(2), ByWeight(2)], ids=["fraction", "number", "by weight"])
def test_rounds_and_seeds_draw_differently(way: Participation) -> None:
    assert len({tuple(way.select(ABCDE, 7, round, SIZES)) for round in range(1, 60)}) >= 6
    assert len({tuple(way.select(ABCDE, seed, 1, SIZES)) for seed in range(60)}) >= 6


def test_a_number_gives_every_client_the_same_chance() -> None:
    seen = Counter(name for round in range(1, 3001) for name in Number(2).select(ABCDE, 3, round, {}))
    want, spread = 3000 * 2 / 5, (3000 * 0.4 * 0.6) ** 0.5
    assert all(abs(seen[name] - want) < 4 * spread for name in ABCDE)


def _inclusion(sizes: dict[str, int], count: int) -> dict[str, float]:
    """Return each client's chance to be among `count` drawn one after the other in proportion to size."""
    if count == 0:
        return dict.fromkeys(sizes, 0.0)
    total, chance = sum(sizes.values()), Counter[str]()
    for first, size in sizes.items():
        rest = _inclusion({name: other for name, other in sizes.items() if name != first}, count - 1)
        chance.update({first: size / total} | {name: size / total * later for name, later in rest.items()})
    return dict(chance)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_large_clients_are_drawn_in_proportion_to_their_images(count: int) -> None:
    rounds = 3000
    seen = Counter(name for round in range(1, rounds + 1) for name in ByWeight(count).select(ABCDE, 11, round, SIZES))
    for name, chance in _inclusion(SIZES, count).items():
        assert abs(seen[name] - rounds * chance) < 4 * (rounds * chance * (1 - chance)) ** 0.5 + 1, name


def test_a_client_that_is_not_drawn_by_weight_plays_no_part() -> None:
    for round in range(1, 50):
        chosen = ByWeight(2).select(ABCDE, 5, round, SIZES)
        left_out = next(name for name in ABCDE if name not in chosen)
        assert ByWeight(2).select([name for name in ABCDE if name != left_out], 5, round, SIZES) == chosen


def test_turns_go_round_in_the_order_of_the_names() -> None:
    turns = [" ".join(RoundRobin(2).select(["c", "a", "e", "b", "d"], 0, round, {})) for round in range(1, 7)]
    assert turns == ["a b", "c d", "a e", "b c", "d e", "a b"]
    assert RoundRobin(5).select(ABCDE, 0, 9, {}) == ABCDE


@settings(deadline=None)
@given(st.integers(1, 12), st.data(), st.integers(1, 1000), st.integers(1, 40))
def test_turns_are_fair_over_any_rounds_in_a_row(clients: int, data: st.DataObject, begin: int, rounds: int) -> None:
    names = [f"c{place:02d}" for place in range(clients)]
    way = RoundRobin(data.draw(st.integers(1, clients)))
    seen = Counter(name for round in range(begin, begin + rounds) for name in way.select(names, 0, round, {}))
    turns = [seen[name] for name in names]
    assert max(turns) - min(turns) <= 1
    assert sum(turns) == rounds * way.count


def test_only_those_who_are_there_are_chosen() -> None:
    way = Availability(Fraction(), {"b": [[2, 3], [5, 5]], "c": [[4, 100]], "d": []})
    rounds = [" ".join(way.select(["a", "b", "c", "d"], 0, round, {})) for round in range(1, 7)]
    assert rounds == ["a", "a b", "a b", "a c", "a b c", "a c"]


@pytest.mark.parametrize("inner", [Fraction(0.5), Number(2), ByWeight(2), RoundRobin(2)])
def test_the_inner_way_sees_only_those_who_are_there(inner: Participation) -> None:
    way = Availability(inner, {"a": [[3, 9]], "e": []})
    for round in range(1, 6):
        there = ["b", "c", "d"] if round < 3 else ["a", "b", "c", "d"]
        assert way.select(ABCDE, 4, round, SIZES) == inner.select(there, 4, round, SIZES)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_fraction_of_nobody_or_of_too_many_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"fraction is .*above 0 and up to 1"):
        Fraction(fraction)


@pytest.mark.parametrize("way", [Number, ByWeight, RoundRobin])
def test_an_impossible_count_is_refused(way: Any) -> None:
    for count in (0, -3):
        with pytest.raises(ConfigError, match=rf"{way.__name__}: count is {count}: give 1 or more"):
            way(count)
    with pytest.raises(ConfigError, match=rf"{way.__name__}: count is 4, .*\(a, b, c\).* of 3 or less"):
        way(4).check(["c", "b", "a"], 9)
    with pytest.raises(ConfigError, match="of 3 or less"):
        way(4).select(["c", "b", "a"], 0, 1, SIZES)
    way(3).check(["c", "b", "a"], 9)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_without_clients_nothing_can_be_chosen(way: Participation) -> None:
    for act in (lambda: way.select([], 0, 1, {}), lambda: way.check([], 3)):
        with pytest.raises(ConfigError, match=r"no client|does not have|do not have"):
            act()


@pytest.mark.parametrize("sizes", [{"a": 1}, {"a": 1, "b": 0}])
def test_a_client_without_images_cannot_be_drawn_by_them(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"client 'b' has no training images.*check-data"):
        ByWeight(1).select(["a", "b"], 0, 1, sizes)


@pytest.mark.parametrize("span", [[], [1], [1, 2, 3], [0, 4], [-2, 4], [5, 4]])
def test_a_span_that_is_none_is_refused(span: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"schedule of client 'b': .* is no span of rounds"):
        Availability(Fraction(), {"a": [[1, 1]], "b": [[1, 2], span]})


def test_one_schedule_holds_no_other() -> None:
    with pytest.raises(ConfigError, match="one schedule"):
        Availability(Availability(Fraction(), {}), {})


@pytest.mark.parametrize(
    ("name", "hint"), [("hospital-nrth", "Did you mean 'hospital-north'"), ("zzz", "There are hospital-north, south")]
)
def test_a_schedule_of_an_unknown_client_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"client '{name}', which the data do not have. {hint}"):
        Availability(Fraction(), {name: [[1, 2]]}).check(["south", "hospital-north"], 5)


def test_a_round_with_nobody_is_refused_before_training() -> None:
    way = Availability(Fraction(), {"a": [[1, 4], [6, 9]], "b": [[3, 4], [7, 7]]})
    way.check(["a", "b"], 4)
    with pytest.raises(ConfigError, match="no client is there in round 5"):
        way.check(["a", "b"], 9)
    with pytest.raises(ConfigError, match="no client is there in round 5"):
        way.select(["a", "b"], 0, 5, {})


def test_a_count_must_be_met_in_every_round() -> None:
    way = Availability(Number(2), {"b": [[1, 6]], "c": [[1, 3]]})
    way.check(["a", "b", "c"], 6)
    with pytest.raises(ConfigError, match=r"Round 7: Number: count is 2, more than there are clients \(a\)"):
        way.check(["a", "b", "c"], 20)


SPANS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 5)).map(lambda s: [s[0], s[0] + s[1]]), max_size=3)
INNER = st.one_of(st.just(Fraction(0.3)), *(st.integers(1, 4).map(way) for way in (Number, ByWeight, RoundRobin)))


@settings(deadline=None)
@given(INNER, st.dictionaries(st.sampled_from(ABCDE), SPANS), st.integers(1, 10))
def test_what_the_check_lets_pass_can_be_selected_and_only_that(
    inner: Participation, schedule: dict[str, list[list[int]]], rounds: int
) -> None:
    way = Availability(inner, schedule)

    def passes(act: Any) -> bool:
        try:
            act()
        except ConfigError:
            return False
        return True

    selectable = all(passes(lambda r=r: way.select(ABCDE, 1, r, SIZES)) for r in range(1, rounds + 1))
    assert passes(lambda: way.check(ABCDE, rounds)) == selectable


def test_names_in_messages_are_few() -> None:
    with pytest.raises(ConfigError, match=r"c000, c001, .* and 92 more"):
        Number(101).check([f"c{place:03d}" for place in range(100)], 1)


YAML = """
participation:
  class_path: fkd_med.federated.participation.Availability
  init_args:
    inner:
      class_path: fkd_med.federated.participation.RoundRobin
      init_args: {count: 2}
    schedule:
      "Klinik 7.b": [[1, 4], [9, 20]]
      south: []
"""


def _built(text: str) -> Any:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Participation, "participation")
    return parser.instantiate_classes(parser.parse_string(text)).participation


def test_they_are_built_from_yaml() -> None:
    way = _built(YAML)
    assert isinstance(way, Availability)
    assert isinstance(way.inner, RoundRobin)
    assert way.inner.count == 2
    assert way.schedule == {"Klinik 7.b": [[1, 4], [9, 20]], "south": []}
    for name, key, value in (("Fraction", "fraction", 0.25), ("Number", "count", 3), ("ByWeight", "count", 4)):
        made = _built(
            f"participation: {{class_path: fkd_med.federated.participation.{name}, init_args: {{{key}: {value}}}}}"
        )
        assert (type(made).__name__, getattr(made, key)) == (name, value)


def test_the_order_of_rounds_asked_for_changes_nothing() -> None:
    way = Number(2)
    forth = [way.select(ABCDE, 9, round, {}) for round in range(1, 20)]
    back = [way.select(ABCDE, 9, round, {}) for round in range(19, 0, -1)]
    assert forth == back[::-1]
    assert any(one != other for one, other in pairwise(forth))
