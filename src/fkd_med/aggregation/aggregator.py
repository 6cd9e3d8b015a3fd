"""What every way of combining updates has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from fkd_med.aggregation.state import assert_finite, assert_same_structure
from fkd_med.communication import Broadcast, State, Update
from fkd_med.errors import RunError, TrainingError


class Aggregator(ABC):
    """How the clients' updates of one round become the next global student.

    `required_sections` names the extras that every update must carry for it (a client rule supplies them).
    """

    required_sections: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the next global state: new tensors with the names, shapes and dtypes of ``broadcast.state``.

        Args:
            broadcast: what the clients started from.
            updates: their updates, see `checked`.

        Raises:
            TrainingError: there is no update, or one that cannot be combined; names the client and the tensor.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart (plain containers and tensors only)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            RunError: `state` is another aggregator's.
        """
        if state:
            raise RunError(
                f"The checkpoint holds aggregator state {sorted(state)} that {type(self).__name__} does not have. "
                "Resume with the aggregator the run was started with."
            )


def checked(broadcast: Broadcast, updates: Iterable[Update]) -> Iterator[Update]:
    """Yield `updates` in the order of their clients' names, each checked just before.

    Sums depend on their order, so it is fixed here. A list or tuple is sorted; anything lazy must come sorted,
    as sorting would hold all of it in memory.

    Raises:
        TrainingError: no update; out of order; a client twice; another round; counts that are not positive; names,
            shapes or dtypes other than the broadcast's; NaN or infinity.
    """
    if isinstance(updates, list | tuple):
        updates = sorted(updates, key=lambda update: update.client)
    previous: str | None = None
    for update in updates:
        owner = f"Client '{update.client}', round {update.round}"
        if previous is not None and update.client <= previous:
            raise TrainingError(f"{owner}: came after '{previous}'; updates must be sorted by client, one for each.")
        previous = update.client
        check_update(broadcast, update)
        yield update
    if previous is None:
        raise TrainingError(f"Round {broadcast.round}: no client sent an update, so there is nothing to combine.")


def check_update(broadcast: Broadcast, update: Update) -> None:
    """Check that one update can be combined with others of its round.

    Raises:
        TrainingError: another round; counts that are not positive; names, shapes or dtypes other than the
            broadcast's; NaN or infinity.
    """
    owner = f"Client '{update.client}', round {update.round}"
    if update.round != broadcast.round:
        raise TrainingError(f"{owner}: its update answers another round than {broadcast.round}, the current one.")
    if update.num_examples <= 0:
        raise TrainingError(f"{owner}: num_examples is {update.num_examples}; a client needs at least one image.")
    assert_same_structure(update.state, broadcast.state, owner)
    assert_finite(update.state, owner)
