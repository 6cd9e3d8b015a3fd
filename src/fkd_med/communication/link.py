"""What bytes take in seconds, on links as fast as the user says: nothing is measured here.

Only the clients' ends count: they send and receive side by side, and the server's own line is taken to be wide enough.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

from fkd_med.errors import ConfigError

Direction: TypeAlias = Literal["up", "down"]
Rates: TypeAlias = float | dict[str, float]


class Link:
    """How fast the clients' links are.

    Args:
        uplink: Mbit/s (10^6 bits per second) from a client to the server: one number for all, or one by client.
        downlink: Mbit/s from the server to a client; as `uplink` when left out.

    Raises:
        ConfigError: a rate that is not above 0 and finite.
    """

    def __init__(self, uplink: Rates, downlink: Rates | None = None) -> None:
        self.rates: dict[str, Rates] = {"up": uplink, "down": uplink if downlink is None else downlink}
        for direction, rates in self.rates.items():
            for client, rate in rates.items() if isinstance(rates, Mapping) else [("", rates)]:
                if not 0 < rate < math.inf:
                    of = f" of client '{client}'" if client else ""
                    raise ConfigError(
                        f"federation.{direction}link_mbps{of} is {rate}: give the speed in Mbit/s, above 0."
                    )

    def check(self, clients: Collection[str]) -> None:
        """Refuse rates by client that leave a client out or name one that does not exist.

        Raises:
            ConfigError: names the client.
        """
        for direction, rates in self.rates.items():
            if not isinstance(rates, Mapping):
                continue
            key = f"federation.{direction}link_mbps"
            for client in sorted(rates.keys() - set(clients)):
                close = difflib.get_close_matches(client, sorted(clients), n=1)
                meant = f" Did you mean '{close[0]}'?" if close else ""
                raise ConfigError(f"{key} names client '{client}', which the data do not have.{meant}")
            for client in sorted(set(clients) - rates.keys()):
                raise ConfigError(f"{key} has no speed for client '{client}': add one, or give one number for all.")

    def seconds(self, client: str, direction: Direction, bytes: float) -> float:
        """Return how long `bytes` take ``"up"`` from, or ``"down"`` to, a client; to the microsecond."""
        rates = self.rates[direction]
        return round(bytes * 8e-6 / (rates[client] if isinstance(rates, Mapping) else rates), 6)

    def slowest(self, clients: Collection[str], up: float, down: float) -> float:
        """Return the seconds of a round in which every client receives `down` bytes and sends `up`."""
        return max((self.seconds(c, "up", up) + self.seconds(c, "down", down) for c in clients), default=0.0)

    def describe(self) -> str:
        """Return the speeds in words, such as ``10 Mbit/s``."""
        up, down = (_words(self.rates[direction]) for direction in ("up", "down"))
        return up if up == down else f"{up} up and {down} down"


def _words(rates: Rates) -> str:
    if not isinstance(rates, Mapping):
        return f"{rates:g} Mbit/s"
    return f"{min(rates.values()):g} to {max(rates.values()):g} Mbit/s"
