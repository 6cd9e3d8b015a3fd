"""Federations that distil from cached teachers and tapped features: what is made once, what stays with a client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from fkd_med.checkpoints import read_checkpoint
from fkd_med.data import FederatedDataModule, Phantoms
from fkd_med.errors import ConfigError
from fkd_med.federated import Federation, TeacherStage
from fkd_med.losses import AttentionTransfer, HintMSE, LogitKL
from fkd_med.modules import DistillationModule, SegmentationModule
from fkd_med.networks import ResUNet, SlimUNet

SIDE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    Phantoms(hospitals=2, images=16, size=SIDE).prepare(folder)
    return folder


def hospitals(root: Path) -> FederatedDataModule:
    return FederatedDataModule(str(root), image_size=SIDE, batch_size=4, seed=3)


def distilled(fed: Any, store: Path, **options: Any) -> DistillationModule:
    torch.manual_seed(0)
    teacher = TeacherStage(SegmentationModule(ResUNet(width=4), optimizer=fed.adam), epochs=1, store=str(store))
    return DistillationModule(SlimUNet(), teacher=teacher, **{"optimizer": fed.adam, **options})


class Stop(L.Callback):
    """Stops after the first round."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


HINT = {"kd": LogitKL(), "hint": HintMSE(student_tap="decoder.2", teacher_tap="decoder.0")}


def run(fed: Any, folder: Path, root: Path, module: DistillationModule, rounds: int = 2, **options: Any) -> Any:
    trainer = fed.trainer(folder, Federation(rounds=rounds, **options.pop("federation", {})), **options)
    trainer.fit(module, datamodule=hospitals(root))
    return trainer


def test_the_rounds_never_load_a_teacher(fed, root, tmp_path, monkeypatch) -> None:
    module = distilled(fed, tmp_path / "store")
    asked: list[str | None] = []
    load = TeacherStage.load
    monkeypatch.setattr(TeacherStage, "load", lambda self, client: asked.append(client) or load(self, client))
    trainer = run(fed, tmp_path / "run", root, module)
    assert asked == ["hospital-a", "hospital-b"]  # once each, to fill the cache
    logged = trainer.fit_loop.metrics
    assert logged["hospital-a/train/logit_kl_raw"] == pytest.approx(logged["hospital-a/train/logit_kl"])  # weight 1
    asked.clear()
    run(fed, tmp_path / "again", root, distilled(fed, tmp_path / "store"))
    assert asked == []  # found by the next run


def test_cached_and_live_federations_end_close_to_each_other(fed, root, tmp_path) -> None:
    states = []
    for cache in ("logits", "off"):
        module = distilled(fed, tmp_path / "store", teacher_cache=cache)
        run(fed, tmp_path / cache, root, module)
        states.append(fed.weights(module))
    cached, live = states
    gap = max(float((cached[n].float() - live[n].float()).abs().max()) for n in live if "running" not in n)
    start = fed.weights(distilled(fed, tmp_path / "store"))
    moved = max(float((start[n].float() - live[n].float()).abs().max()) for n in live if "running" not in n)
    assert 0 < gap < 0.5 * moved


def test_connectors_stay_with_their_client(fed, root, tmp_path, captured) -> None:
    module = distilled(fed, tmp_path / "store", losses=HINT, teacher_cache="taps")
    run(fed, tmp_path / "run", root, module, rounds=2)
    names = {f"network.{name}" for name in SlimUNet().state_dict()}
    assert captured and all(set(message.state) == names for message in captured)
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert set(last["state_dict"]) == names and "companions" not in last["fkd_med"]
    kept = [
        read_checkpoint(path)["companions"]["hint.weight"]
        for client in ("hospital-a", "hospital-b")
        for path in sorted((tmp_path / "run" / "clients" / client).glob("state-*.pt"))[-1:]
    ]
    assert len(kept) == 2 and not torch.equal(*kept)  # each client's own


def test_connectors_go_on_where_the_clients_last_round_ended(fed, root, tmp_path) -> None:
    starts: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []

    class Note(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            starts.append(pl_module.companions.tensors()["hint.weight"])

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            ends.append(pl_module.companions.tensors()["hint.weight"])

        def __deepcopy__(self, memo: Any) -> Note:
            return self

    module = distilled(fed, tmp_path / "store", losses=HINT, teacher_cache="taps")
    run(fed, tmp_path / "run", root, module, federation={"client_callbacks": [Note()]})
    assert len(starts) == 4 and torch.equal(starts[0], starts[1])  # two clients, two rounds; all begin alike
    assert torch.equal(starts[2], ends[0]) and torch.equal(starts[3], ends[1])
    assert not torch.equal(ends[0], starts[0])


def test_connectors_resume_exactly(fed, root, tmp_path) -> None:
    def connectors(folder: Path) -> list[torch.Tensor]:
        paths = [sorted((folder / "clients" / c).glob("state-*.pt"))[-1] for c in ("hospital-a", "hospital-b")]
        return [read_checkpoint(path)["companions"]["hint.weight"] for path in paths]

    def build() -> DistillationModule:
        return distilled(fed, tmp_path / "store", losses=HINT, teacher_cache="taps")

    run(fed, tmp_path / "whole", root, build(), rounds=3)
    stopped = fed.trainer(tmp_path / "halves", Federation(rounds=3), callbacks=[Stop()])
    stopped.fit(build(), datamodule=hospitals(root))
    assert stopped.global_step == 1
    rest, module = fed.trainer(tmp_path / "halves", Federation(rounds=3)), build()
    rest.fit(module, datamodule=hospitals(root), ckpt_path=str(tmp_path / "halves" / "checkpoints" / "last.ckpt"))
    for whole, halves in zip(connectors(tmp_path / "whole"), connectors(tmp_path / "halves"), strict=True):
        assert torch.equal(whole, halves)


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_optimizer_state_covers_connectors(fed, root, tmp_path, policy) -> None:
    module = distilled(fed, tmp_path / "store", losses=HINT, teacher_cache="taps")
    run(fed, tmp_path / "run", root, module, federation={"optimizer_state": policy})
    stored = read_checkpoint(sorted((tmp_path / "run" / "clients" / "hospital-a").glob("state-*.pt"))[-1])
    assert set(stored["companions"]) == {"hint.weight", "hint.bias"} and bool(stored["optimizers"]) == (
        policy == "keep"
    )


def test_wrong_taps_are_found_before_any_teacher_trains(fed, root, tmp_path) -> None:
    losses = {"at": AttentionTransfer(student_tap="decoder.2", teacher_tap="decodr.0")}
    module = distilled(fed, tmp_path / "store", losses=losses, teacher_cache="taps")
    with pytest.raises(
        ConfigError, match=r"the teacher ResUNet has no module 'decodr.0' to tap; the nearest are decod"
    ):
        run(fed, tmp_path / "run", root, module)
    assert not (tmp_path / "store").exists()


def test_data_without_room_for_maps_are_refused_before_training(fed, tmp_path) -> None:
    module = fed.distilled(tmp_path / "store", teacher_cache="logits")
    with pytest.raises(ConfigError, match=r"Hospitals cannot carry cached teacher maps .*model.teacher_cache: off"):
        fed.trainer(tmp_path / "run").fit(module, datamodule=fed.Hospitals())
    assert not (tmp_path / "store").exists()


def test_kept_moments_of_other_terms_are_refused_on_resume(fed, root, tmp_path) -> None:
    recipe = {"optimizer_state": "keep"}
    module = distilled(fed, tmp_path / "store", losses=HINT, teacher_cache="taps")
    run(fed, tmp_path / "run", root, module, rounds=1, federation=recipe)
    changed = {"kd": LogitKL(), "other": HintMSE(student_tap="decoder.2", teacher_tap="decoder.0")}
    again = distilled(fed, tmp_path / "store", losses=changed, teacher_cache="taps")
    trainer = fed.trainer(tmp_path / "run", Federation(rounds=2, **recipe))
    with pytest.raises(ConfigError, match=r"moments of other parameters .*companions.hint"):
        trainer.fit(again, datamodule=hospitals(root), ckpt_path=str(tmp_path / "run/checkpoints/last.ckpt"))
