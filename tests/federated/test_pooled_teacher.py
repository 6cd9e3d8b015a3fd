"""One teacher of all clients' images: trained once, that of pooled distillation, the same to everybody."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fkd_med.data import FederatedDataModule, Phantoms
from fkd_med.errors import ConfigError
from fkd_med.federated import Federation, PooledTeacherStage, TeacherStage
from fkd_med.modules import DistillationModule, SegmentationModule
from fkd_med.networks import ResUNet, SlimUNet

FLAGS = {"accelerator": "cpu", "devices": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    Phantoms(hospitals=2, images=16, size=32).prepare(folder)
    return folder


def hospitals(root: Path) -> FederatedDataModule:
    data = FederatedDataModule(str(root), image_size=32, batch_size=4, seed=3)
    data.setup("fit")
    return data


def stage(fed, folder, kind=PooledTeacherStage, **options) -> TeacherStage:
    torch.manual_seed(0)
    module = SegmentationModule(ResUNet(width=4), optimizer=fed.adam)
    return kind(module, **{"epochs": 1, "store": str(folder / "store"), **options})


def test_one_teacher_teaches_all(fed, root, tmp_path) -> None:
    source = stage(fed, tmp_path)
    module = DistillationModule(SlimUNet(), teacher=source, optimizer=fed.adam)
    fed.trainer(tmp_path / "run", Federation(rounds=1)).fit(module, datamodule=hospitals(root))
    assert [path.parent.name[:12] for path in (tmp_path / "store").glob("*/*.safetensors")] == ["all-clients-"]
    first, second = (source.load(client) for client in ("hospital-a", "hospital-b"))
    assert fed.same(fed.weights(first), fed.weights(second))
    assert source.digest("hospital-a") == source.digest("hospital-b") == source.digest(None)


def test_it_is_the_teacher_of_distillation_on_pooled_images(fed, root, tmp_path) -> None:
    central = stage(fed, tmp_path, TeacherStage)
    path = central.ensure(None, hospitals(root), flags=FLAGS)
    source = stage(fed, tmp_path)
    before = path.stat().st_mtime_ns
    assert source.ensure("hospital-b", hospitals(root), flags=FLAGS, federated=True) == path
    assert path.stat().st_mtime_ns == before, "found, not trained again"
    assert source.digest("hospital-b") == central.digest(None)


def test_alone_each_client_has_its_own(fed, root, tmp_path) -> None:
    alone = stage(fed, tmp_path).alone()
    assert type(alone) is TeacherStage
    assert alone.ensure("hospital-a", hospitals(root), flags=FLAGS).parent.name.startswith("hospital-a-")


def test_teachers_of_single_clients_are_refused(fed, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"a teacher of b, .* all clients learn from one: name it all-clients"):
        stage(fed, tmp_path, checkpoints={"b": "b.ckpt"}).check_names(["a", "b", "c"])


def test_an_untrained_one_is_refused(fed, tmp_path) -> None:
    source = stage(fed, tmp_path, epochs=0)
    with pytest.raises(ConfigError, match="teacher of all-clients would be untrained"):
        source.check_trained(["a", "b"])
