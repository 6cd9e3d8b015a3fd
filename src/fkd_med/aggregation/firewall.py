"""The firewall before the aggregator: an update that would harm the global student is set aside, with a reason.

An aggregator refuses such an update by ending the run; with a firewall the round goes on without it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fkd_med.aggregation.aggregator import Aggregator
from fkd_med.aggregation.state import delta_norm, is_finite, parameter_names
from fkd_med.communication import Broadcast, State, Update
from fkd_med.communication.header import shown
from fkd_med.errors import ConfigError

_ENOUGH = 3  # updates, below which the others have no median worth the name


@dataclass(frozen=True)
class Quarantine:
    """Why an update was set aside.

    Args:
        client: who sent it.
        round: the round it was sent in.
        tensor: the first tensor at fault (``section/tensor`` for an extra), or empty: the update as a whole.
        reason: what is wrong.
    """

    client: str
    round: int
    tensor: str
    reason: str

    @property
    def text(self) -> str:
        """The line for the log."""
        what = f"tensor {shown(self.tensor)} " if self.tensor else ""
        return f"Client '{self.client}', round {self.round}: {what}{self.reason}. Its update is set aside."


class Firewall:
    """Sets aside updates that are damaged, not finite, or far larger than the others.

    Sizes are L2 norms of an update's change of the floating parameters. BatchNorm statistics are no part of them: a
    lie of any finite size in these passes, except a negative variance. Nor is `num_examples` doubted. Sections that a
    client rule adds must be what the aggregator can use, and are compared with the others': their L2 norms, and single
    numbers both ways. Honest clients differ more there (one may take fifty times the steps of another), so the factor
    is squared.

    Args:
        max_norm: largest change a client may make in a round; null for no limit.
        median_factor: how many times the median change of the others a client may make, above 1; needs three
            updates, else this rule is silent. Null for no such rule.

    Raises:
        ConfigError: a limit that is not positive and finite, or a factor of 1 or below.
    """

    def __init__(self, max_norm: float | None = None, median_factor: float | None = 10.0) -> None:
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ConfigError(f"Firewall: max_norm is {max_norm}: give a number above 0, or null for no limit.")
        if median_factor is not None and not 1 < median_factor < math.inf:
            raise ConfigError(f"Firewall: median_factor is {median_factor}: give a number above 1, or null.")
        self.max_norm = max_norm
        self.median_factor = median_factor

    def inspect(self, broadcast: Broadcast, update: Update, aggregator: Aggregator | None = None) -> Quarantine | None:
        """Return what is wrong with one update, looked at alone, or None.

        Args:
            broadcast: what the client started from.
            update: what it sent.
            aggregator: what will combine it; says what it requires beside the state.
        """
        for tensor, reason in self._faults(broadcast, update, aggregator):
            return Quarantine(update.client, broadcast.round, tensor, reason)
        return None

    def inspect_round(
        self, norms: Mapping[str, float], round: int, extras: Mapping[str, Mapping[str, float]] | None = None
    ) -> dict[str, Quarantine]:
        """Return, by client, the updates whose change or section is too large (or small) beside that of the others.

        A median of zero (the others changed nothing) sets no one aside.

        Args:
            norms: client -> `change_norm` of its update; only of those that `inspect` let pass.
            round: the round, for the report.
            extras: client -> `extra_sizes` of its update.
        """
        if self.median_factor is None or len(norms) < _ENOUGH:
            return {}
        found = self._odd_extras(extras or {}, self.median_factor**2, round)
        for client in sorted(norms):
            median = statistics.median(norm for other, norm in norms.items() if other != client)
            if median > 0 and not norms[client] <= self.median_factor * median:
                reason = (
                    f"changes the student by {norms[client]:.4g}, more than {self.median_factor:g} times the median "
                    f"of the other {len(norms) - 1} clients, {median:.4g}"
                )
                found[client] = Quarantine(client, round, "", reason)
        return found

    def _odd_extras(
        self, extras: Mapping[str, Mapping[str, float]], factor: float, round: int
    ) -> dict[str, Quarantine]:
        found: dict[str, Quarantine] = {}
        for name in sorted({name for sizes in extras.values() for name in sizes}):
            sizes = {client: extras[client][name] for client in sorted(extras) if name in extras[client]}
            for client, size in sizes.items():
                others = [other for peer, other in sizes.items() if peer != client]
                median = statistics.median(others) if len(others) >= _ENOUGH - 1 else 0.0
                small = "/" in name and size * factor < median
                if median > 0 and (small or not size <= factor * median):
                    reason = (
                        f"has the size {size:.4g}, more than {factor:g} times {'below' if small else 'above'} the "
                        f"median of the other {len(others)} clients, {median:.4g}"
                    )
                    found.setdefault(client, Quarantine(client, round, name, reason))
        return found

    def _faults(self, broadcast: Broadcast, update: Update, aggregator: Aggregator | None) -> Iterator[tuple[str, str]]:
        """Yield (tensor, reason); each check may rely on those before it."""
        if update.round != broadcast.round:
            yield "", f"answers round {update.round}"
        for name in ("num_examples", "num_steps"):
            if getattr(update, name) <= 0:
                yield "", f"reports {name} = {getattr(update, name)}"
        yield from _differences(update.state, broadcast.state)
        yield from _bad_values(update.state)
        for section in sorted(aggregator.required_sections if aggregator else ()):
            if not update.extras.get(section):
                yield "", f"does not send the section '{section}' that the aggregator needs"
        for section, tensors in sorted(update.extras.items()):
            yield from _bad_values(tensors, f"{section}/")
        if aggregator is not None:
            yield from aggregator.faults_of_extras(broadcast, update)
        for name, size in extra_sizes(update).items():
            if not size < math.inf:
                yield name, "is larger than can be measured"
        norm = change_norm(broadcast, update)
        if not norm < math.inf:
            yield "", "changes the student by more than can be measured"
        if self.max_norm is not None and norm > self.max_norm:
            yield "", f"changes the student by {norm:.4g}, more than max_norm, {self.max_norm:g}"


def change_norm(broadcast: Broadcast, update: Update) -> float:
    """Return the L2 norm, in float64, of an update's change of the floating parameters; one tensor at a time.

    Integers and BatchNorm statistics (`is_buffer`) do not count. The states must have the same structure.
    """
    return delta_norm(update.state, broadcast.state, parameter_names(broadcast.state))


def extra_sizes(update: Update) -> dict[str, float]:
    """Return how large an update's sections are: each single number as ``section/tensor``, the L2 norm of the rest.

    The norm is in float64, under the section's own name.
    """
    sizes: dict[str, float] = {}
    for section, tensors in sorted(update.extras.items()):
        single = {name: tensor for name, tensor in tensors.items() if tensor.numel() == 1 and name not in update.state}
        sizes |= {f"{section}/{name}": abs(float(tensor.item())) for name, tensor in sorted(single.items())}
        rest = [tensor.detach().double() for name, tensor in tensors.items() if name not in single]
        if rest:
            sizes[section] = math.sqrt(math.fsum(float(np.sum(tensor.square().numpy())) for tensor in rest))
    return sizes


def _differences(state: State, expected: State) -> Iterator[tuple[str, str]]:
    """Yield tensors whose name, shape or dtype is not as `expected`."""
    for name in sorted(expected.keys() - state.keys()):
        yield name, "is missing"
    for name in sorted(state.keys() - expected.keys()):
        yield name, "is unknown to the global model"
    for name, like in expected.items():
        tensor = state[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            yield name, f"is {_spec(tensor)}, the global model's is {_spec(like)}"


def _bad_values(tensors: State, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield tensors that hold NaN or infinity, and negative variances."""
    for name, tensor in sorted(tensors.items()):
        if not is_finite(tensor):
            yield prefix + name, "holds NaN or infinity"
        elif not prefix and name.endswith("running_var") and bool((tensor < 0).any()):
            yield prefix + name, "is a variance and holds negative values"


def _spec(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
