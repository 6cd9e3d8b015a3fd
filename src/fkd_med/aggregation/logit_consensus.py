"""FedMD on the server: no weights, only the mean of what the clients' models say about public images."""

from __future__ import annotations

from collections.abc import Iterable

from fkd_med.aggregation.aggregator import Aggregator, checked
from fkd_med.aggregation.sections import section_of
from fkd_med.aggregation.weighted_mean import WeightedMean
from fkd_med.communication import PUBLIC_LOGITS, Broadcast, Extras, State, Update


class LogitConsensus(Aggregator):
    """The consensus of FedMD (Li and Wang 2019, Algorithm 1): ``f~(x) = 1/m sum_k f_k(x)``, unweighted.

    Weights never travel: every client keeps a student of its own. Each update's section ``public-logits`` holds a
    float16 map (K, H, W) for each public image of the round, named by its place in the public set; the section of the
    same name goes down with the consensus in the next round. Goes with `fkd_med.federated.PublicDigest`. Holds one
    float64 map per image, and one update.
    """

    required_sections = frozenset({PUBLIC_LOGITS})
    down_sections = frozenset({PUBLIC_LOGITS})
    memory = ("consensus",)
    weights_travel = False

    def __init__(self) -> None:
        self.consensus: State = {}

    def broadcast_extras(self) -> Extras:
        """Return the consensus of the last round; nothing before there is one."""
        return {PUBLIC_LOGITS: dict(self.consensus)} if self.consensus else {}

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Move the consensus; the state stays what was broadcast, as no weights are in it. See `Aggregator.aggregate`.

        Raises:
            TrainingError: also for a client that answers about other images than the first, or with NaN.
        """
        mean, first = WeightedMean(), State()
        for update in checked(broadcast, updates):
            first = first or update.extras.get(PUBLIC_LOGITS, {})
            mean.add(section_of(update, PUBLIC_LOGITS, first), 1)
        self.consensus = {name: tensor.half() for name, tensor in mean.values().items()}
        return dict(broadcast.state)
