"""Which clients take part in a round: pure functions of names, seed, round and sizes, so a resume draws the same."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import numpy as np

from fkd_med.errors import ConfigError
from fkd_med.seeding import derive_seed


class Participation(ABC):
    """Chooses the clients of each round."""

    @abstractmethod
    def select(self, clients: list[str], seed: int, round: int, sizes: Mapping[str, int]) -> list[str]:
        """Return the clients of a round, sorted by name; it depends on nothing but its arguments.

        Args:
            clients: all clients of the run, in any order.
            seed: the run's seed.
            round: counted from 1.
            sizes: training images by client.

        Raises:
            ConfigError: nobody, or fewer than asked for, can be chosen.
        """

    def check(self, clients: list[str], rounds: int) -> None:
        """Refuse, before training, what `select` would refuse in one of rounds 1 to `rounds`.

        Raises:
            ConfigError: naming the setting, the round or the client, and the remedy.
        """
        self._enough(1, clients)

    def _enough(self, count: int, clients: Collection[str]) -> int:
        """Return `count` if as many clients are there."""
        if not clients:
            raise ConfigError(f"{type(self).__name__}: there is no client to choose. Look at the data's clients.csv.")
        if count > len(clients):
            raise ConfigError(
                f"{type(self).__name__}: count is {count}, more than there are clients ({listing(clients)}). "
                f"Give a count of {len(clients)} or less."
            )
        return count


class Fraction(Participation):
    """Draws a share of the clients each round, all with the same chance.

    Args:
        fraction: share, above 0 and up to 1, of the clients, rounded to the nearest number (halves up), at least one.

    Raises:
        ConfigError: a share that selects no one, or more than there are.
    """

    def __init__(self, fraction: float = 1.0) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"Fraction: fraction is {fraction}: give a share above 0 and up to 1.")
        self.fraction = fraction

    def select(self, clients: list[str], seed: int, round: int, sizes: Mapping[str, int]) -> list[str]:
        """Return the clients of a round; see `Participation.select`."""
        count = max(1, round_half_up(self.fraction * len(clients)))
        return _draw(clients, self._enough(count, clients), seed, round)


class Counted(Participation):
    """What the ways to choose a fixed number of clients share.

    Args:
        count: clients of each round.

    Raises:
        ConfigError: a count below 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ConfigError(f"{type(self).__name__}: count is {count}: give 1 or more.")
        self.count = count

    def check(self, clients: list[str], rounds: int) -> None:
        """Refuse a count of more clients than there are; see `Participation.check`."""
        self._enough(self.count, clients)


class Number(Counted):
    """Draws a fixed number of clients each round, all with the same chance.

    Args:
        count: clients of each round.
    """

    def select(self, clients: list[str], seed: int, round: int, sizes: Mapping[str, int]) -> list[str]:
        """Return the clients of a round; see `Participation.select`."""
        return _draw(clients, self._enough(self.count, clients), seed, round)


class ByWeight(Counted):
    """Draws a fixed number of clients each round, one after the other, each time in proportion to training images.

    Successive sampling without replacement as a race (Efraimidis and Spirakis, Inf. Process. Lett. 97(5), 2006):
    a client of n images arrives after an Exponential(n) time, and the first `count` are taken. A client's time depends
    on its own name and size only. Large clients come often and then weigh much in a mean by images: they count twice
    unless the aggregator weights uniformly.

    Args:
        count: clients of each round.
    """

    def select(self, clients: list[str], seed: int, round: int, sizes: Mapping[str, int]) -> list[str]:
        """Return the clients of a round; see `Participation.select`."""
        self._enough(self.count, clients)
        arrival = {client: self._arrival(client, seed, round, sizes) for client in clients}
        return sorted(sorted(clients, key=lambda client: (arrival[client], client))[: self.count])

    def _arrival(self, client: str, seed: int, round: int, sizes: Mapping[str, int]) -> float:
        if sizes.get(client, 0) < 1:
            raise ConfigError(
                f"ByWeight: client '{client}' has no training images, so it cannot be drawn in proportion to them. "
                "Look at its data with `fkd check-data`, or use Number."
            )
        uniform = np.random.default_rng(derive_seed(seed, "select", round, client)).random()  # in [0, 1)
        return -math.log1p(-uniform) / sizes[client]


class RoundRobin(Counted):
    """Goes through the clients in the order of their names, a fixed number each round, and begins again at the end.

    Any rounds in a row choose every client equally often, but for one time. With `Availability` the place in the
    order still follows from the round alone, so the turns are then only about equal.

    Args:
        count: clients of each round.
    """

    def select(self, clients: list[str], seed: int, round: int, sizes: Mapping[str, int]) -> list[str]:
        """Return the clients of a round; see `Participation.select`."""
        names = sorted(clients)
        self._enough(self.count, names)
        begin = (round - 1) * self.count
        return sorted(names[(begin + place) % len(names)] for place in range(self.count))


class Availability(Participation):
    """Chooses only among the clients that are there: some join late, leave, or come and go.

    Args:
        inner: chooses among those who are there; a `Fraction` is one of them, and a count must be met in every round.
        schedule: client -> the rounds in which it is there, as [first, last] pairs, both included: ``{"b": [[1, 4],
            [9, 20]]}``. A client that is not named is always there; one with an empty list never trains.

    Raises:
        ConfigError: a pair that is no span of rounds, or one Availability inside another.
    """

    def __init__(self, inner: Participation, schedule: dict[str, list[list[int]]]) -> None:
        if isinstance(inner, Availability):
            raise ConfigError("Availability: inner is an Availability too. Write one schedule for all clients.")
        for client, spans in schedule.items():
            for span in spans:
                check_span(span, f"Availability: schedule of client '{client}'")
        self.inner = inner
        self.schedule = schedule

    def available(self, clients: Collection[str], round: int) -> list[str]:
        """Return who is there in a round, sorted by name."""
        return sorted(client for client in clients if self._is_there(client, round))

    def select(self, clients: list[str], seed: int, round: int, sizes: Mapping[str, int]) -> list[str]:
        """Return the clients of a round; see `Participation.select`."""
        return self.inner.select(self._there(clients, round), seed, round, sizes)

    def check(self, clients: list[str], rounds: int) -> None:
        """Refuse unknown names and rounds with nobody, or too few, to choose from; see `Participation.check`."""
        check_names(self.schedule, clients, "Availability: schedule")
        seen: set[tuple[str, ...]] = set()
        for round in range(1, rounds + 1):
            there = self._there(clients, round)
            if tuple(there) in seen:
                continue
            seen.add(tuple(there))
            try:
                self.inner.check(there, rounds)
            except ConfigError as error:
                raise ConfigError(f"Round {round}: {error}") from error

    def _there(self, clients: Collection[str], round: int) -> list[str]:
        there = self.available(clients, round)
        if not there:
            raise ConfigError(
                f"Availability: no client is there in round {round}. Extend a client's spans in schedule."
            )
        return there

    def _is_there(self, client: str, round: int) -> bool:
        return client not in self.schedule or any(first <= round <= last for first, last in self.schedule[client])


def check_span(span: list[int], owner: str) -> None:
    """Check that `span` is [first, last], rounds counted from 1.

    Raises:
        ConfigError: naming `owner` and the span.
    """
    if len(span) != 2 or not 1 <= span[0] <= span[1]:
        raise ConfigError(f"{owner}: {span} is no span of rounds: give [first, last], counted from 1.")


def check_names(named: Collection[str], clients: Collection[str], owner: str) -> None:
    """Check that every client that a setting names exists.

    Raises:
        ConfigError: naming `owner`, the first unknown client, and those most like it.
    """
    for client in sorted(set(named) - set(clients)):
        close = difflib.get_close_matches(client, sorted(clients), n=1)
        meant = f"Did you mean '{close[0]}'?" if close else f"There are {listing(clients)}."
        raise ConfigError(f"{owner} names client '{client}', which the data do not have. {meant}")


def listing(clients: Collection[str], most: int = 8) -> str:
    """Return sorted names for a message, the first few of many."""
    names = sorted(clients)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def round_half_up(value: float) -> int:
    """Round to the nearest whole number, halves up: 0.5 x 3 clients are 2."""
    return int(np.floor(value + 0.5))


def _draw(clients: list[str], count: int, seed: int, round: int) -> list[str]:
    """Draw `count` clients, all with the same chance, without replacement."""
    generator = np.random.default_rng(derive_seed(seed, "select", round))
    chosen = generator.choice(len(clients), size=count, replace=False)
    return [sorted(clients)[place] for place in sorted(chosen)]
