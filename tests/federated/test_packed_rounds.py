"""Packed messages in the loop: fewer bytes, everyone holds what was decoded, nothing lost on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_med.aggregation import FedAvg
from fkd_med.checkpoints import read_checkpoint
from fkd_med.communication import Broadcast, Packing, Update
from fkd_med.communication.codecs import Int4, Int8, TopK
from fkd_med.errors import ConfigError
from fkd_med.federated import Federation
from fkd_med.modules import SegmentationModule
from fkd_med.networks import SlimUNet


def run(fed: Any, folder: Path, rounds: int = 3, ckpt: str | None = None, **recipe: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    module = SegmentationModule(SlimUNet(), optimizer=fed.adam)
    trainer = fed.trainer(folder, Federation(rounds=rounds, **recipe))
    trainer.fit(module, datamodule=fed.Hospitals({"a": 4, "b": 4}), ckpt_path=ckpt)
    return module, trainer.fit_loop.exchange.ledger


FEEDBACK = {"uplink": Packing(Int4(rounding="nearest"), of="delta", error_feedback=True)}


def test_small_messages_are_small_and_still_learn(fed, tmp_path) -> None:
    small = {"downlink": Packing(Int8(levels=63, rounding="nearest")), **FEEDBACK}
    _, ledger = run(fed, tmp_path / "packed", **small)
    _, reference = run(fed, tmp_path / "plain")
    assert ledger.mean_per_message("up") < 0.13 * reference.mean_per_message("up")
    assert ledger.mean_per_message("down") < 0.25 * reference.mean_per_message("down")
    first, _ = losses(fed, tmp_path / "first", rounds=1, **small)
    last, _ = losses(fed, tmp_path / "last", rounds=10, **small)
    assert last < 0.9 * first


def losses(fed: Any, folder: Path, **recipe: Any) -> tuple[float, Any]:
    """Return the mean training loss of the clients in the last round."""
    _, ledger = run(fed, folder, **recipe)
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    final = str(recipe["rounds"])
    found = [float(value) for step, name, value in rows if step == final and name.endswith("/train/loss")]
    return sum(found) / len(found), ledger


def test_plain_packing_is_the_bytes_of_no_packing(fed, tmp_path) -> None:
    one, ledger = run(fed, tmp_path / "one", rounds=1, uplink=Packing(compress=False))
    other, reference = run(fed, tmp_path / "other", rounds=1)
    assert fed.same(fed.weights(one), fed.weights(other)) and ledger.total() == reference.total()


def test_clients_train_from_what_was_decoded_and_it_is_what_is_combined(fed, tmp_path, monkeypatch) -> None:
    seen: list[Any] = []
    aggregate = FedAvg.aggregate

    def spy(self: Any, broadcast: Broadcast, updates: Any) -> Any:
        seen.append((broadcast, list(updates)))
        return aggregate(self, broadcast, seen[-1][1])

    monkeypatch.setattr(FedAvg, "aggregate", spy)
    packing = Packing(Int8(rounding="nearest"))
    module, _ = run(fed, tmp_path, rounds=1, downlink=packing, uplink=packing)
    ((broadcast, updates),) = seen
    torch.manual_seed(3)
    sent = SegmentationModule(SlimUNet()).state_dict()
    decoded = packing.pack(Broadcast(1, {n: t.clone() for n, t in sent.items()})).message
    assert fed.same(broadcast.state, decoded.state) and not fed.same(broadcast.state, dict(sent))
    for update in updates:
        assert isinstance(update, Update)
        again = packing.pack(update).message  # what was decoded once does not change when it is coded again
        weight = "network.encoder.1.0.0.weight"
        torch.testing.assert_close(again.state[weight], update.state[weight], rtol=0.02, atol=1e-4)
    assert fed.same(fed.weights(module), aggregate(FedAvg(), broadcast, updates))


@pytest.mark.parametrize("codec", [Int4(), pytest.param(TopK(fraction=0.1), marks=pytest.mark.slow)])
def test_residuals_survive_a_resume(fed, tmp_path, codec) -> None:
    recipe = {"uplink": Packing(codec, of="delta", error_feedback=True)}
    whole, _ = run(fed, tmp_path / "whole", **recipe)
    run(fed, tmp_path / "halves", rounds=2, **recipe)
    path = sorted((tmp_path / "halves/clients/a").glob("state-*.pt"))[-1]
    assert any(float(tensor.abs().sum()) > 0 for tensor in read_checkpoint(path)["residual"].values())
    halves, _ = run(fed, tmp_path / "halves", ckpt=str(tmp_path / "halves/checkpoints/last.ckpt"), **recipe)
    assert fed.same(fed.weights(whole), fed.weights(halves))


def test_statistics_kept_at_home_make_messages_smaller_still(fed, tmp_path) -> None:
    _, ledger = run(fed, tmp_path / "local", rounds=1, batch_norm="local", **FEEDBACK)
    _, reference = run(fed, tmp_path / "average", rounds=1, **FEEDBACK)
    assert ledger.mean_per_message("up") < reference.mean_per_message("up")


@pytest.mark.parametrize("options", [{"of": "delta"}, {"error_feedback": True}])
def test_a_downlink_of_deltas_is_refused(options) -> None:
    with pytest.raises(ConfigError, match=r"federation.downlink: a delta, or error feedback"):
        Federation(downlink=Packing(Int8(), **options))
