"""SCAFFOLD on the server: the mean of the clients, and the control variate that corrects their drift."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fkd_med.aggregation.aggregator import Aggregator, checked, next_state, owner_of
from fkd_med.aggregation.sections import section_faults, section_of
from fkd_med.aggregation.settings import check_positive
from fkd_med.aggregation.state import parameter_names
from fkd_med.aggregation.weighted_mean import WeightedMean
from fkd_med.communication import Broadcast, Extras, State, Update
from fkd_med.errors import ConfigError, TrainingError


class Scaffold(Aggregator):
    """SCAFFOLD's server (Karimireddy et al., ICML 2020).

    ``x <- x + server_lr mean_i (y_i - x)`` and ``c <- c + (|S| / N) mean_i (c_i+ - c_i)``, means over the ``S``
    clients of the round, all alike. Each update's section ``scaffold`` holds ``c_i+ - c_i``, named and shaped as the
    student's parameters; the section of the same name goes down with ``c`` (float32; no section before the first
    round's end, when it is zero). BatchNorm's statistics and integer buffers take the mean weighted by training
    images. Streams: holds two float64 states, ``c`` and one update.

    Args:
        server_lr: eta_g of the paper, 1 in its experiments.
        clients: N, all clients of the federation; null takes the number that the run itself finds.

    Raises:
        ConfigError: a setting out of its range.
    """

    required_sections = frozenset({"scaffold"})
    down_sections = frozenset({"scaffold"})
    memory = ("control",)

    def __init__(self, server_lr: float = 1.0, clients: int | None = None) -> None:
        check_positive(self, server_lr=server_lr, clients=1 if clients is None else clients)
        self.server_lr = server_lr
        self.clients = clients
        self.total = clients
        self.control: State = {}

    def begin(self, num_clients: int) -> None:
        """Take N from the federation, unless `clients` says it.

        Raises:
            ConfigError: `clients` is less than there are.
        """
        if self.clients is not None and self.clients < num_clients:
            raise ConfigError(f"Scaffold: clients is {self.clients}, but there are {num_clients}. Leave it out.")
        self.total = self.clients or num_clients

    def broadcast_extras(self) -> Extras:
        """Return the control variate as section ``scaffold``, in float32; nothing while it is zero."""
        return {"scaffold": {name: tensor.float() for name, tensor in self.control.items()}} if self.control else {}

    def faults_of_extras(self, broadcast: Broadcast, update: Update) -> Iterator[tuple[str, str]]:
        """Yield tensors of ``scaffold`` that are not named and shaped as the student's parameters."""
        like = {name: broadcast.state[name] for name in parameter_names(broadcast.state)}
        for name, reason in section_faults(update.extras["scaffold"], like):
            yield f"scaffold/{name}", reason

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the next state and move the control variate; see `Aggregator.aggregate`."""
        parameters = {name: broadcast.state[name] for name in parameter_names(broadcast.state)}
        others = broadcast.state.keys() - parameters.keys()
        self.check_memory(parameters)
        mean, measured, drift = WeightedMean(), WeightedMean(), WeightedMean()
        for update in checked(broadcast, updates, finite=False):
            owner, section = owner_of(update), section_of(update, "scaffold", parameters)
            mean.add({name: update.state[name] for name in parameters}, 1, owner)
            measured.add({name: update.state[name] for name in others}, update.num_examples, owner)
            drift.add(section, 1, f"{owner}, section 'scaffold'")
        share = self._share(mean.count)
        values = mean.values()
        for name, tensor in parameters.items():
            start = tensor.double()
            values[name] = values[name].sub_(start).mul_(self.server_lr).add_(start)
        state = next_state(values | measured.values(), broadcast)
        moved = {name: tensor * share for name, tensor in drift.values().items()}
        self.control = {name: self.control[name] + t if self.control else t for name, t in moved.items()}
        return state

    def _share(self, participating: int) -> float:
        """|S| / N."""
        if self.total is None:
            raise ConfigError("Scaffold: the number of all clients is unknown. Set its `clients`.")
        if participating > self.total:
            raise TrainingError(
                f"Scaffold: {participating} clients sent updates, but there are {self.total}. Correct `clients`."
            )
        return participating / self.total
