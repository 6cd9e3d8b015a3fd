"""Reading the extra sections of an update that an aggregator requires."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fkd_med.aggregation.state import assert_finite
from fkd_med.communication import State, Update
from fkd_med.errors import TrainingError


def section_of(update: Update, section: str, like: Mapping[str, Tensor]) -> State:
    """Return a section of an update: floating tensors with the names and shapes of `like`, finite.

    Args:
        update: a client's update.
        section: the name of the section.
        like: what it must hold; only names and shapes count.

    Raises:
        TrainingError: the section or a tensor of it is missing, unknown, of another shape, or not finite; names the
            client, the section and the tensor.
    """
    owner = f"Client '{update.client}', round {update.round}, section '{section}'"
    tensors = update.extras.get(section)
    if tensors is None:
        raise TrainingError(f"{owner} is missing. The clients must run the rule that goes with this aggregator.")
    for name, problem in section_faults(tensors, like):
        raise TrainingError(f"{owner}: tensor '{name}' {problem}. Use the same student and rules on all sides.")
    assert_finite(tensors, owner)
    return tensors


def section_faults(tensors: State, like: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield tensors of a section that are not floating tensors with the names and shapes of `like`, and why."""
    for name in sorted(tensors.keys() ^ like.keys()):
        yield name, "is missing" if name in like else "is not expected"
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape or not tensor.is_floating_point():
            found, wanted = tuple(tensor.shape), tuple(like[name].shape)
            yield name, f"is {tensor.dtype} {found} where floating numbers {wanted} are expected"
