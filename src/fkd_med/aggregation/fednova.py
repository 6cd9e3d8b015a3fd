"""Federated normalised averaging: clients that take more steps count for no more than their images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fkd_med.aggregation.aggregator import Aggregator, checked, next_state, owner_of
from fkd_med.aggregation.sections import section_faults, section_of
from fkd_med.aggregation.state import parameter_names
from fkd_med.aggregation.weighted_mean import WeightedMean
from fkd_med.communication import Broadcast, State, Update
from fkd_med.errors import TrainingError

SMALLEST_RATE, LARGEST_RATE = 1e-9, 100.0  # of a step, in initial learning rates


class FedNova(Aggregator):
    """Normalised averaging (Wang et al., "Tackling the objective inconsistency problem", NeurIPS 2020, FedNova).

    ``x <- x - tau_eff sum_i p_i d_i`` with ``d_i = (x - x_i) / |a_i|_1``, ``tau_eff = sum_i p_i |a_i|_1`` and
    ``p_i = n_i / n``. The section ``fednova`` of each update holds ``a_norm``, a single number: ``|a_i|_1``, which is
    the number of steps for plain SGD. With equal ``a_norm`` it is FedAvg. BatchNorm's statistics and integer buffers
    take the mean weighted by training images. Streams: holds one float64 state and one update.
    """

    required_sections = frozenset({"fednova"})

    def faults_of_extras(self, broadcast: Broadcast, update: Update) -> Iterator[tuple[str, str]]:
        """Yield ``a_norm`` where no training of as many steps has it.

        Momentum below 1 counts the gradient of each step at most once for every step that follows. A schedule may
        multiply rates: by 100, one that begins low, and by almost nothing, one that ends there.
        """
        where = "fednova/a_norm"
        for name, reason in section_faults(update.extras["fednova"], {"a_norm": _single(update)}):
            yield f"fednova/{name}", reason
        value, steps = float(update.extras["fednova"]["a_norm"].item()), update.num_steps
        if value <= 0:
            yield where, f"is {value:g}, and it is a sum of positive numbers"
        least, most = steps * SMALLEST_RATE, steps * (steps + 1) / 2 * LARGEST_RATE
        if not least <= value <= most:
            yield where, f"is {value:.4g}, and {steps} steps can only make {least:.4g} to {most:.4g}"

    def aggregate(self, broadcast: Broadcast, updates: Iterable[Update]) -> State:
        """Return the state one normalised step after `broadcast`; see `Aggregator.aggregate`."""
        names = parameter_names(broadcast.state)
        others = broadcast.state.keys() - set(names)
        # sum_i p_i d_i is a mean as well, with weights n_i / |a_i|_1, up to one factor.
        mean, measured = WeightedMean(), WeightedMean()
        examples, steps = 0, 0.0
        for update in checked(broadcast, updates, finite=False):
            owner, a_norm = owner_of(update), _a_norm(update)
            mean.add({name: update.state[name] for name in names}, update.num_examples / a_norm, owner)
            measured.add({name: update.state[name] for name in others}, update.num_examples, owner)
            examples += update.num_examples
            steps += update.num_examples * a_norm
        factor = (steps / examples) * (mean.weight / examples)
        values = mean.values()
        for name in names:
            start = broadcast.state[name].double()
            values[name] = values[name].sub_(start).mul_(factor).add_(start)
        return next_state(values | measured.values(), broadcast)


def _single(update: Update) -> Tensor:
    """Return what ``a_norm`` must be like: a single number, (1,) will do."""
    sent = update.extras.get("fednova", {}).get("a_norm")
    return torch.zeros(()) if sent is None or sent.numel() != 1 else sent


def _a_norm(update: Update) -> float:
    value = float(section_of(update, "fednova", {"a_norm": _single(update)})["a_norm"].item())
    if value <= 0:
        raise TrainingError(
            f"Client '{update.client}', round {update.round}: a_norm is {value} in section 'fednova'; it is a sum of "
            "positive numbers. Use the same rules on all sides."
        )
    return value
