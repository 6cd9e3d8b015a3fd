"""What every way of combining updates has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from fkd_med.aggregation.state import assert_finite, assert_same_structure, cast_like
from fkd_med.communication import Broadcast, Extras, State, Update
from fkd_med.errors import RunError, TrainingError


class Aggregator(ABC):
    """How the clients' updates of one round become the next global student.

    Class attributes say what a rule needs: `required_sections` names the extras that every update must carry (a
    client rule supplies them), `down_sections` those it sends along with a broadcast, `memory` the attributes, each
    a ``{name: tensor}``, that last from round to round and must survive a restart. Without `weights_travel` every
    client keeps its student, messages hold nothing but sections, and states are empty.
    """

    required_sections: ClassVar[frozenset[str]] = frozenset()
    down_sections: ClassVar[frozenset[str]] = frozenset()
    memory: ClassVar[tuple[str, ...]] = ()
    weights_travel: ClassVar[bool] = True

    def begin(self, num_clients: int) -> None:  # noqa: B027 - a hook that most rules do not need
        """Hear how many clients the federation has in all; called before the first round of a fit, resumed or not.

        Args:
            num_clients: all clients, not those of one round.
        """

    def set_aside(self, count: int) -> None:  # noqa: B027 - a hook that most rules do not need
        """Hear how many updates the firewall has set aside in a round; called before the round's `aggregate`.

        Args:
            count: updates that came and will not be given to `aggregate`.
        """

    def broadcast_extras(self) -> Extras:
        """Return what the server sends along with the next broadcast, sections of `down_sections`; none by default."""
        return {}

    @abstractmethod
    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the next global state: new tensors with the names, shapes and dtypes of ``broadcast.state``.

        Args:
            broadcast: what the clients started from.
            updates: their updates, see `checked`.

        Raises:
            TrainingError: there is no update, or one that cannot be combined; names the client and the tensor.
        """

    def faults_of_extras(self, broadcast: Broadcast, update: Update) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the sections of an update, for the firewall: (``section/tensor``, reason).

        Args:
            broadcast: what the client started from.
            update: what it sent; its `required_sections` are there and hold neither NaN nor infinity.
        """
        yield from ()

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart: plain containers and tensors, nothing for a rule without `memory`."""
        if not self.memory:
            return {}
        return {"aggregator": type(self).__name__, **{name: dict(getattr(self, name)) for name in self.memory}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            RunError: `state` is another aggregator's.
        """
        expected = {"aggregator", *self.memory} if self.memory else set[str]()
        if state.keys() != expected or (self.memory and state["aggregator"] != type(self).__name__):
            held = f"that of {state['aggregator']}" if "aggregator" in state else str(sorted(state) or "none")
            raise RunError(
                f"The checkpoint's aggregator state ({held}) is not that of {type(self).__name__}. "
                "Resume with the aggregator the run was started with."
            )
        for name in self.memory:
            setattr(self, name, dict(state[name]))

    def check_memory(self, expected: State) -> None:
        """Check that what is remembered, if anything yet, has the names and shapes of `expected`.

        Raises:
            TrainingError: naming the first tensor that differs.
        """
        for attribute in self.memory:
            held: dict[str, Tensor] = getattr(self, attribute)
            wrong = (n for n in sorted(held.keys() | expected.keys()) if not _same_shape(held, expected, n))
            if held and (name := next(wrong, None)) is not None:
                raise TrainingError(
                    f"{type(self).__name__}: its {attribute} and the global model differ in tensor '{name}'. "
                    "Resume with the student the run was started with."
                )


def _same_shape(one: State, other: State, name: str) -> bool:
    return name in one and name in other and one[name].shape == other[name].shape


def in_order(updates: Iterable[Update]) -> Iterable[Update]:
    """Return `updates` sorted by client where they are a list or tuple; anything lazy must come sorted.

    Sums depend on their order, so it is fixed; sorting what is lazy would hold all of it in memory.
    """
    return sorted(updates, key=lambda update: update.client) if isinstance(updates, list | tuple) else updates


def owner_of(update: Update) -> str:
    """Return how errors name an update."""
    return f"Client '{update.client}', round {update.round}"


def checked(broadcast: Broadcast, updates: Iterable[Update], finite: bool = True) -> Iterator[Update]:
    """Yield `updates` in the order of their clients' names, each checked just before; see `in_order`.

    Args:
        broadcast: what the clients started from.
        updates: their updates.
        finite: also look for NaN and infinity; a rule that gives all of a state to a `WeightedMean` need not.

    Raises:
        TrainingError: no update; out of order; a client twice; another round; counts that are not positive; names,
            shapes or dtypes other than the broadcast's; NaN or infinity.
    """
    previous: str | None = None
    for update in in_order(updates):
        owner = owner_of(update)
        if previous is not None and update.client <= previous:
            raise TrainingError(f"{owner}: came after '{previous}'; updates must be sorted by client, one for each.")
        previous = update.client
        check_update(broadcast, update, finite)
        yield update
    if previous is None:
        raise TrainingError(f"Round {broadcast.round}: no client sent an update, so there is nothing to combine.")


def check_update(broadcast: Broadcast, update: Update, finite: bool = True) -> None:
    """Check that one update can be combined with others of its round; see `checked`.

    Raises:
        TrainingError: another round; counts that are not positive; names, shapes or dtypes other than the
            broadcast's; NaN or infinity.
    """
    owner = owner_of(update)
    if update.round != broadcast.round:
        raise TrainingError(f"{owner}: its update answers another round than {broadcast.round}, the current one.")
    if update.num_examples <= 0:
        raise TrainingError(f"{owner}: num_examples is {update.num_examples}; a client needs at least one image.")
    assert_same_structure(update.state, broadcast.state, owner)
    if finite:
        assert_finite(update.state, owner)


def next_state(values: State, broadcast: Broadcast) -> State:
    """Return float64 `values` as the state that follows `broadcast`, in its dtypes.

    Raises:
        TrainingError: a value left the range of its dtype; names the tensor.
    """
    state = cast_like(values, broadcast.state)
    try:
        assert_finite(state, "")
    except TrainingError:
        name = next(n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all())
        raise TrainingError(
            f"Round {broadcast.round}: the combined tensor '{name}' is no longer finite, as the server's step was too "
            "large. Lower the aggregator's server_lr, or the clients' learning rate."
        ) from None
    return state
