"""FedMD's server: the consensus is the unweighted mean of the clients' logits, and no weights are touched."""

from __future__ import annotations

import pytest
import torch

from fkd_med.aggregation import LogitConsensus
from fkd_med.communication import PUBLIC_LOGITS, Broadcast, Update
from fkd_med.errors import TrainingError

START = Broadcast(3, {})


def says(client: str, examples: int, **maps: float) -> Update:
    section = {name.strip("_"): torch.full((2, 4, 4), value).half() for name, value in maps.items()}
    return Update(client, 3, 0, {}, examples, 1, {}, {PUBLIC_LOGITS: section})


def test_the_consensus_is_the_mean_of_the_clients() -> None:
    made = LogitConsensus()
    assert made.broadcast_extras() == {}
    updates = [says("a", 1, _0=1.0, _7=-2.0), says("b", 99, _0=2.0, _7=4.0), says("c", 5, _0=6.0, _7=4.0)]
    assert made.aggregate(START, updates) == {}
    sent = made.broadcast_extras()[PUBLIC_LOGITS]
    assert {name: tensor.dtype for name, tensor in sent.items()} == {"0": torch.float16, "7": torch.float16}
    assert torch.equal(sent["0"], torch.full((2, 4, 4), 3.0).half())
    assert torch.equal(sent["7"], torch.full((2, 4, 4), 2.0).half())
    made.aggregate(START, [says("a", 1, _2=5.0)])
    assert list(made.broadcast_extras()[PUBLIC_LOGITS]) == ["2"]  # that of the last round, no other


def test_it_survives_a_restart() -> None:
    made, other = LogitConsensus(), LogitConsensus()
    made.aggregate(START, [says("a", 1, _0=1.0)])
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.consensus["0"], made.consensus["0"])


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ([says("a", 1, _0=1.0), says("b", 1, _1=1.0)], r"'b'.*tensor '0' is missing"),
        ([says("a", 1, _0=1.0), says("b", 1, _0=float("nan"))], r"'b'.*tensor '0' holds NaN"),
        ([Update("a", 3, 0, {}, 1, 1)], r"'a'.*section 'public-logits' is missing"),
        ([], "no client sent an update"),
    ],
)
def test_what_cannot_be_combined_is_named(updates, words) -> None:
    with pytest.raises(TrainingError, match=words):
        LogitConsensus().aggregate(START, updates)
