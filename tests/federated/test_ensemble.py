"""The ensemble of the partners' teachers: the mean of their logits, its gradient, and where it comes from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fkd_med.communication import Ledger
from fkd_med.data import FederatedDataModule, Phantoms
from fkd_med.distillation import TeacherMaps
from fkd_med.errors import ConfigError
from fkd_med.federated import EnsembleStage, EnsembleTeachers, FederatedTrainer, Federation, TeacherStage
from fkd_med.federated.ensemble import MeanLogits
from fkd_med.federated.sharing import TeacherExchange
from fkd_med.federated.teacher_key import teacher_key
from fkd_med.losses import AttentionTransfer, LogitKL
from fkd_med.modules import DistillationModule, MutualDistillationModule, SegmentationModule, freeze
from fkd_med.modules.teacher_cache import cache_key
from fkd_med.networks import ResUNet, SlimUNet

FLAGS = {"accelerator": "cpu", "devices": 1}
SIDE = 32


def ensemble(fed: Any, folder: Path, order: str = "abc", **options: Any) -> EnsembleTeachers:
    """Return an ensemble of a, b and c, shared as a federation would share it."""
    source = EnsembleTeachers(fed.teacher_stage(folder / "teachers", epochs=1, **options))
    for client in order:
        source.ensure(client, fed.Hospitals(), flags=FLAGS, federated=True)
    source.share(list(order), TeacherExchange(source.architecture(), folder / "shared", Ledger()))
    return source


def answers(fed: Any, source: EnsembleTeachers, images: Tensor) -> list[Tensor]:
    """Return what each client's teacher answers, from its file, in double precision."""
    found = []
    for client in "abc":
        network = fed.network(6).double()
        network.load_state_dict(load_file(source.teachers.files[client]))  # type: ignore[attr-defined]
        found.append(network.eval()(images.double()).detach())
    return found


# --- the equation ---------------------------------------------------------------------------------------------------


def test_the_ensemble_answers_the_mean_of_the_logits(fed, tmp_path) -> None:
    source, images = ensemble(fed, tmp_path), torch.randn(5, 3, 16, 16)
    one, two, three = answers(fed, source, images)
    assert not torch.allclose(one, two) and not torch.allclose(two, three)
    for client in "abc":
        found = freeze(source.load(client))(images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), (one + two + three) / 3, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_clients_changes_no_bit(fed, tmp_path) -> None:
    images = torch.randn(2, 3, 16, 16)
    sources = [ensemble(fed, tmp_path / order, order) for order in ("abc", "cab")]
    one, other = (freeze(source.load("b"))(images) for source in sources)
    assert torch.equal(one, other)
    assert sources[0].digest("a") == sources[1].digest("a") == sources[1].digest("c")


def test_half_precision_is_summed_in_float32() -> None:
    members = [nn.Conv2d(1, 1, 1).bfloat16() for _ in range(3)]
    for member, value in zip(members, (256.0, 1.0, 1.0), strict=True):
        nn.init.zeros_(member.weight)
        nn.init.constant_(member.bias, value)  # type: ignore[arg-type]
    mean = MeanLogits(list(members))(torch.ones(1, 1, 1, 1).bfloat16())
    assert mean.item() == 86.0  # in bfloat16, 256 + 1 is 256


def test_members_of_other_classes_have_no_mean() -> None:
    with pytest.raises(ConfigError, match=r"shapes \(1, 1, 4, 4\) and \(1, 3, 4, 4\)"):
        MeanLogits([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 3, 1)])(torch.ones(1, 1, 4, 4))


def test_members_pad_images_as_each_needs() -> None:
    torch.manual_seed(1)
    big, plain = ResUNet(width=4).eval(), nn.Conv2d(3, 1, 1)
    image = torch.randn(1, 3, 20, 20)  # no multiple of 8
    padded = big(F.pad(image, (0, 4, 0, 4), mode="replicate"))[..., :20, :20]
    assert torch.equal(MeanLogits([big, plain]).eval()(image), (padded + plain(image)) / 2)


def test_gradient_of_the_distillation_term_of_one_step(fed, tmp_path) -> None:
    """Against softmax, logarithm and means written out: weight x T^2 KL of the ensemble and the student, per pixel."""
    temperature, weight = 3.0, 0.7
    source = ensemble(fed, tmp_path)
    module = fed.distilled(tmp_path, source=source, supervised_weight=0.0)
    module.losses = {"kd": LogitKL(temperature=temperature, weight=weight)}
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    by_hand = copy.deepcopy(module.network).double()
    batch = next(iter(fed.Hospitals().client_train_dataloader("c")))
    module.attach_teacher(source.load("c"))
    module.train()
    sum(module.loss_terms(batch).values()).backward()

    taught = torch.stack(answers(fed, source, batch["image"])).mean(0)
    logits = by_hand.train()(batch["image"].double())
    p, q = (torch.cat([torch.zeros_like(z), z], 1).div(temperature) for z in (taught, logits))
    divergence = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()
    (weight * temperature**2 * divergence).backward()
    for (name, found), wanted in zip(module.network.named_parameters(), by_hand.parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None
        assert name == "0.bias" or float(wanted.grad.abs().max()) > 1e-4  # BatchNorm takes that bias away again
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-6, msg=name)


# --- where it comes from --------------------------------------------------------------------------------------------


def test_a_teacher_brought_by_checkpoint_is_shared_as_any_other(fed, tmp_path) -> None:
    brought = fed.network(6, seed=9)
    save_file(brought.state_dict(), tmp_path / "mine.safetensors")
    source = ensemble(fed, tmp_path, checkpoints={"b": str(tmp_path / "mine.safetensors")})
    members = source.load("a").members
    assert fed.same(fed.weights(members[1]), fed.weights(brought))
    assert not fed.same(fed.weights(members[0]), fed.weights(brought))
    with pytest.raises(ConfigError, match=r"name client 'b', which does not exist"):
        source.check_names(["a", "c"])


def test_features_are_refused_when_the_module_is_built(fed, tmp_path) -> None:
    source = EnsembleTeachers(fed.teacher_stage(tmp_path / "teachers"))
    losses = {"at": AttentionTransfer(student_tap="0", teacher_tap="members.0.0")}
    with pytest.raises(ConfigError, match=r"features of the teacher \(members.0.0\).*only logits.*TeacherStage"):
        DistillationModule(fed.network(), teacher=source, losses=losses, teacher_cache="taps")
    fine = {"at": AttentionTransfer(student_tap="0")}  # the student's features, the ensemble's logits
    assert DistillationModule(fed.network(), teacher=source, losses=fine).teacher_taps == []


def test_nobody_loads_what_was_not_shared(fed, tmp_path) -> None:
    source = EnsembleTeachers(fed.teacher_stage(tmp_path / "teachers", epochs=1))
    for client in ("a", None):
        with pytest.raises(ConfigError, match="are not here yet"):
            source.load(client)
    source.ensure("a", fed.Hospitals(), flags=FLAGS, federated=True)
    for ask in (source.load, source.digest):
        with pytest.raises(ConfigError, match="The teachers of a and its partners are not here yet"):
            ask("a")
    with pytest.raises(ConfigError, match="The teachers of d and its partners"):
        ensemble(fed, tmp_path).load("d")


def test_pooled_data_are_distilled_from_all_teachers(root, fed, tmp_path) -> None:
    source = EnsembleTeachers(stage(fed, tmp_path))
    module = DistillationModule(SlimUNet(), teacher=source, optimizer=fed.adam)
    trainer = central(tmp_path)
    trainer.fit(module, datamodule=hospitals(root))
    members = source.load(None).members
    assert sorted(source.teachers.files) == ["hospital-a", "hospital-b"] and len(members) == 2
    assert len(list((tmp_path / "store" / "maps").glob("all-clients-*"))) == 1
    assert not (tmp_path / "run" / "shared-teachers").exists()  # nothing travels


def test_a_client_alone_has_no_partners(root, fed, tmp_path) -> None:
    module = DistillationModule(SlimUNet(), teacher=EnsembleTeachers(stage(fed, tmp_path)), optimizer=fed.adam)
    with pytest.raises(ConfigError, match=r"client hospital-b trains alone: use its own teacher"):
        central(tmp_path).fit(module, datamodule=hospitals(root, client="hospital-b"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("nested", [False, True])
def test_an_ensemble_of_the_same_configuration_finds_the_same_teachers(fed, tmp_path, nested) -> None:
    """Lightning keeps the outer configuration with a teacher's module, and it is part of the key."""
    inner = {"module": {"class_path": "x", "init_args": {"network": {"encoder_weights": "y"}}}}
    around = {"init_args": {"teachers": {"init_args": inner}}} if nested else {"init_args": inner}
    keys = []
    for outer in ({"init_args": inner}, around, {"init_args": {}}):
        module = SegmentationModule(fed.network(6), optimizer=fed.adam)
        module.hparams["teacher"] = outer
        keys.append(teacher_key(module, 1, "a", fed.Hospitals(), FLAGS)[0])
    assert keys[0] == keys[1] != keys[2]
    module = SegmentationModule(fed.network(6), optimizer=fed.adam)
    assert EnsembleStage(module, epochs=3, store=str(tmp_path)).epochs == 3


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    Phantoms(hospitals=2, images=16, size=SIDE).prepare(folder)
    return folder


def hospitals(root: Path, **options: Any) -> FederatedDataModule:
    return FederatedDataModule(str(root), image_size=SIDE, batch_size=4, seed=3, **options)


def stage(fed: Any, folder: Path, **options: Any) -> TeacherStage:
    torch.manual_seed(0)
    module = SegmentationModule(ResUNet(width=4), optimizer=fed.adam)
    return TeacherStage(module, epochs=1, store=str(folder / "store"), **options)


def central(folder: Path) -> FederatedTrainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    made = FederatedTrainer(max_epochs=1, default_root_dir=str(folder / "run"), accelerator="cpu", **quiet)
    made.reporter.enabled = False
    return made


def federated(fed: Any, folder: Path, root: Path, source: EnsembleTeachers) -> DistillationModule:
    module = DistillationModule(SlimUNet(), teacher=source, optimizer=fed.adam)
    trainer = fed.trainer(folder / "run", Federation(rounds=1, share_teachers=True))
    trainer.fit(module, datamodule=hospitals(root))
    return module


def test_cached_maps_are_the_live_answers(fed, root, tmp_path, monkeypatch) -> None:
    source = EnsembleTeachers(stage(fed, tmp_path))
    loads: list[str | None] = []
    load = EnsembleTeachers.load
    monkeypatch.setattr(EnsembleTeachers, "load", lambda self, client: loads.append(client) or load(self, client))
    federated(fed, tmp_path, root, source)
    assert loads == ["hospital-a", "hospital-b"]  # once each, to fill the cache; the rounds load nothing
    data = hospitals(root)
    data.setup("fit")
    for client in data.client_names():
        key, _ = cache_key(source, client, data, [], "32-true")
        (folder,) = (tmp_path / "store" / "maps").glob(f"{client}-*")
        maps = TeacherMaps.open(folder, key)
        assert maps is not None and len(maps) == data.num_examples(client)
        live = freeze(source.load(client))
        for batch in data.client_train_eval_dataloader(client):
            for image, name in zip(batch["image"], batch["id"], strict=True):
                cached = torch.from_numpy(maps.read(name)["logits"].copy()).float()
                torch.testing.assert_close(cached, live(image[None])[0], rtol=1e-3, atol=1e-3)


def test_the_cache_is_found_again_and_a_new_member_makes_it_anew(fed, root, tmp_path) -> None:
    made = tmp_path / "store" / "maps"
    federated(fed, tmp_path, root, EnsembleTeachers(stage(fed, tmp_path)))
    first = {path.name for path in made.glob("hospital-*")}
    federated(fed, tmp_path / "again", root, EnsembleTeachers(stage(fed, tmp_path)))
    assert {path.name for path in made.glob("hospital-*")} == first and len(first) == 2
    torch.manual_seed(3)
    save_file(ResUNet(width=4).state_dict(), tmp_path / "b.safetensors")
    other = stage(fed, tmp_path, checkpoints={"hospital-b": str(tmp_path / "b.safetensors")})
    federated(fed, tmp_path / "other", root, EnsembleTeachers(other))
    new = {path.name for path in made.glob("hospital-*")} - first
    assert {name[:10] for name in new} == {"hospital-a", "hospital-b"}  # a's own teacher is as before


def test_teachers_command_trains_every_clients_own(fed, root, tmp_path) -> None:
    source = EnsembleTeachers(stage(fed, tmp_path))
    module = DistillationModule(SlimUNet(), teacher=source, optimizer=fed.adam)
    trainer = fed.trainer(tmp_path / "run", Federation(rounds=1))
    data = hospitals(root)
    data.setup("fit")
    with pytest.raises(ConfigError, match="share_teachers"):
        trainer.teachers(module, data)
    assert not (tmp_path / "store").exists()
    L.seed_everything(7, verbose=False)
    fed.trainer(tmp_path / "run", Federation(rounds=1, share_teachers=True)).teachers(module, data)
    assert sorted(p.parent.name[:10] for p in (tmp_path / "store").glob("*/*.safetensors")) == data.client_names()
    assert not (tmp_path / "run" / "shared-teachers").exists()


def test_an_ensemble_is_not_trained_on(fed, tmp_path) -> None:
    with pytest.raises(ConfigError, match="EnsembleTeachers gives all the same ensemble"):
        MutualDistillationModule(fed.network(), ensemble(fed, tmp_path))


def test_untrained_members_are_refused(fed, tmp_path) -> None:
    untrained = EnsembleTeachers(TeacherStage(fed.student(), epochs=0, store=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"epochs is 0, so the teacher of a would be untrained"):
        untrained.check_trained(["a", "b"])
