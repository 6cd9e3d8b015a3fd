"""Runs that distil from a teacher's mean over views: what is cached, what stays plain, and that a resume is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from fkd_med.data import FederatedDataModule, Phantoms
from fkd_med.distillation import MeanOfViews, TeacherMaps
from fkd_med.federated import EnsembleTeachers, FederatedTrainer, Federation, TeacherStage
from fkd_med.modules import DistillationModule, SegmentationModule, freeze
from fkd_med.modules.teacher_cache import cache_key
from fkd_med.networks import ResUNet, SlimUNet
from slowly import slow_but

SIDE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    Phantoms(hospitals=2, images=16, size=SIDE).prepare(folder)
    return folder


def hospitals(root: Path) -> FederatedDataModule:
    return FederatedDataModule(str(root), image_size=SIDE, batch_size=4, seed=3)


def stage(fed: Any, store: Path) -> TeacherStage:
    torch.manual_seed(0)
    return TeacherStage(SegmentationModule(ResUNet(width=4), optimizer=fed.adam), epochs=1, store=str(store))


def distilled(fed: Any, source: Any, views: Any = 4, **options: Any) -> DistillationModule:
    torch.manual_seed(0)
    return DistillationModule(SlimUNet(), teacher=source, optimizer=fed.adam, teacher_views=views, **options)


def run(fed: Any, folder: Path, root: Path, module: DistillationModule, rounds: int = 1, **options: Any) -> Any:
    trainer = fed.trainer(folder, Federation(rounds=rounds, **options.pop("federation", {})), **options)
    trainer.fit(module, datamodule=hospitals(root))
    return trainer


def cached(store: Path) -> list[tuple[str, Any]]:
    """Return the caches in a store: whose each is, and in how many views it was made."""
    notes = sorted((store / "maps").glob("*/maps.json"))
    return [(n.parent.name.rpartition("-")[0], json.loads(n.read_text())["description"].get("views")) for n in notes]


@pytest.mark.parametrize("shared", [False, True])
def test_a_federation_caches_the_mean_of_the_views(fed, root, tmp_path, shared) -> None:
    """Of each client's teacher, or of the ensemble of all."""
    source = EnsembleTeachers(stage(fed, tmp_path)) if shared else stage(fed, tmp_path)
    run(fed, tmp_path / "run", root, distilled(fed, source), federation={"share_teachers": shared})
    assert cached(tmp_path) == [("hospital-a", 4), ("hospital-b", 4)]
    data = hospitals(root)
    data.setup("fit")
    key, _ = cache_key(source, "hospital-b", data, [], "32-true", 4)
    maps = TeacherMaps.open(tmp_path / "maps" / f"hospital-b-{key[:16]}", key)
    assert maps is not None
    batch = next(iter(data.client_train_eval_dataloader("hospital-b")))
    network = freeze(source.load("hospital-b"))
    plain, expected = network(batch["image"]), MeanOfViews(network, 4)(batch["image"])
    found = torch.stack([torch.from_numpy(maps.read(name)["logits"]).float() for name in batch["id"]])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)
    assert not torch.allclose(found, plain, rtol=2e-2, atol=1e-2)


def test_pooled_data_too(fed, root, tmp_path) -> None:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = FederatedTrainer(max_epochs=1, default_root_dir=str(tmp_path / "run"), accelerator="cpu", **quiet)
    trainer.reporter.enabled = False
    trainer.fit(distilled(fed, stage(fed, tmp_path), views=8), datamodule=hospitals(root))
    assert cached(tmp_path) == [("all-clients", 8)]


def test_a_live_teacher_answers_in_views_too(fed, root, tmp_path) -> None:
    states, live = [], []

    class Note(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            live.append(pl_module.teacher)

        def __deepcopy__(self, memo: Any) -> Note:
            return self

    for views in (1, 4):
        module = distilled(fed, stage(fed, tmp_path), views, teacher_cache="off")
        run(fed, tmp_path / str(views), root, module, federation={"client_callbacks": [Note()]})
        states.append(fed.weights(module))
    assert not fed.same(*states) and cached(tmp_path) == []
    assert [type(teacher) for teacher in live] == [ResUNet, ResUNet, MeanOfViews, MeanOfViews]
    assert not any(parameter.requires_grad for parameter in live[-1].parameters()) and not live[-1].training


class Stop(L.Callback):
    """Stops after the first round."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize("cache", slow_but(["logits"], ["logits", "off"]))
def test_a_resume_is_exact(fed, root, tmp_path, cache) -> None:
    def build() -> DistillationModule:
        return distilled(fed, stage(fed, tmp_path), teacher_cache=cache)

    whole, rest = build(), build()
    run(fed, tmp_path / "whole", root, whole, rounds=2)
    stopped = fed.trainer(tmp_path / "halves", Federation(rounds=2), callbacks=[Stop()])
    stopped.fit(build(), datamodule=hospitals(root))
    assert stopped.global_step == 1
    last = tmp_path / "halves" / "checkpoints" / "last.ckpt"
    fed.trainer(tmp_path / "halves", Federation(rounds=2)).fit(rest, datamodule=hospitals(root), ckpt_path=str(last))
    assert fed.same(fed.weights(whole), fed.weights(rest))


def test_the_teachers_that_are_scored_stay_plain(fed, root, tmp_path) -> None:
    module = distilled(fed, stage(fed, tmp_path), views=8)
    trainer = run(fed, tmp_path / "run", root, module)
    source = trainer.teachers_after(module)
    assert source is not None and type(source.load("hospital-a")) is ResUNet
