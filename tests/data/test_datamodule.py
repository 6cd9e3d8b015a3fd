"""FederatedDataModule: same batches whatever the workers, honest shards, early errors, YAML."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import albumentations as A
import cv2
import jsonargparse
import lightning as L
import numpy as np
import pytest
import torch

from fkd_med.data import IID, Augmentation, BySite, CVCClinicDB, FederatedDataModule, FolderPair, Phantoms
from fkd_med.data.datasets import PredictionDataset, collate
from fkd_med.data.preprocessing import Preprocessing
from fkd_med.errors import ConfigError, DataError

CLIENTS = ["hospital-a", "hospital-b"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    Phantoms(hospitals=2, images=[24, 32], size=40).prepare(root)
    return root


def module(root: Path, **changes: Any) -> FederatedDataModule:
    settings: dict[str, Any] = {"image_size": 32, "batch_size": 3, "seed": 5} | changes
    made = FederatedDataModule(str(root), **settings)
    made.setup()
    return made


def digests(loader: Any, epochs: int = 2) -> list[str]:
    """One hash per epoch over ids, images and masks."""
    out = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        content = hashlib.sha256()
        for batch in loader:
            content.update(repr(batch["id"]).encode())
            content.update(batch["image"].numpy().tobytes() + batch["mask"].numpy().tobytes())
        out.append(content.hexdigest())
    return out


def with_ranks(made: FederatedDataModule, world_size: int, rank: int, **more: Any) -> FederatedDataModule:
    made.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, accelerator=None, **more)  # type: ignore
    return made


def test_workers_do_not_change_the_batches_but_epochs_and_rounds_do(phantoms: Path) -> None:
    runs = [digests(module(phantoms, num_workers=n).client_train_dataloader("hospital-a")) for n in (0, 1, 2)]
    assert runs[0] == runs[1] == runs[2]
    made = module(phantoms)
    loaders = [made.client_train_dataloader(c, r) for c, r in (("hospital-a", 1), ("hospital-a", -1), (None, 0))]
    different = [d for loader in loaders for d in digests(loader)] + runs[0]
    assert len(set(different)) == 8
    assert digests(made.client_train_dataloader("hospital-a")) == runs[0]  # whatever was drawn before


def test_iterating_leaves_the_global_generator_alone(phantoms: Path) -> None:
    made = module(phantoms)
    state = torch.get_rng_state()
    for loader in (made.client_train_dataloader("hospital-a"), made.client_val_dataloader(None)):
        list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_batches_differ_from_plain_ones_and_keep_the_mask_aligned(phantoms: Path) -> None:
    made = module(phantoms, batch_size=1)
    plain = {b["id"][0]: b for b in made.client_train_eval_dataloader("hospital-a")}
    moved = list(made.client_train_dataloader("hospital-a"))
    assert sum(not torch.equal(b["image"], plain[b["id"][0]]["image"]) for b in moved) > len(moved) / 2
    off = module(phantoms, batch_size=1, augmentation=False)
    assert all(torch.equal(b["image"], plain[b["id"][0]]["image"]) for b in off.client_train_dataloader("hospital-a"))


def test_shards_of_a_client_are_disjoint_and_cover(phantoms: Path) -> None:
    made = module(phantoms, batch_size=1)
    single = [b["id"][0] for b in made.client_train_dataloader("hospital-b")]
    shards = [
        [b["id"][0] for b in with_ranks(made, 2, rank).client_train_dataloader("hospital-b")] for rank in range(2)
    ]
    assert shards[0] == single[0::2] and shards[1] == single[1::2]
    for name in ("client_val_dataloader", "client_test_dataloader", "client_train_eval_dataloader"):
        whole = [b["id"][0] for b in getattr(with_ranks(made, 1, 0), name)("hospital-b")]
        parts = [[b["id"][0] for b in getattr(with_ranks(made, 2, rank), name)("hospital-b")] for rank in range(2)]
        assert set(parts[0] + parts[1]) == set(whole) and len(parts[0]) == len(parts[1])


def test_batches_are_as_agreed(phantoms: Path) -> None:
    made = module(phantoms)
    batch = next(iter(made.train_dataloader()))
    assert set(batch) == {"image", "mask", "id", "client", "patient", "size"}
    assert batch["image"].shape == (3, 3, 32, 32) and batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (3, 32, 32) and batch["mask"].dtype == torch.int64
    assert set(batch["mask"].unique().tolist()) <= {0, 1}
    assert batch["size"] == [(40, 40)] * 3 and all(isinstance(i, str) for i in batch["id"])
    for loaders, extra in ((made.val_dataloader(), set()), (made.test_dataloader(), {"original"})):
        assert [{c for b in loader for c in b["client"]} for loader in loaders] == [{c} for c in CLIENTS]
        assert all(set(b) == set(batch) | extra for loader in loaders for b in loader)
    test = next(iter(made.test_dataloader()[0]))
    stored = cv2.imread(str(phantoms / "masks" / f"{test['id'][0]}.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(test["original"][0].numpy(), stored // 255)


class FakeMaps:
    """Two taps per image: its id as a number, and the ramp from left to right at half resolution."""

    def read(self, id: str) -> dict[str, np.ndarray]:
        ramp = np.tile((np.arange(16) + 0.5) / 16, (16, 1))
        return {"logits": np.full((1, 32, 32), number(id), np.float16), "layer4[1]": ramp[None].astype(np.float16)}


def number(id: str) -> int:
    return int(hashlib.sha256(id.encode()).hexdigest(), 16) % 1000


def test_training_batches_carry_the_maps_of_their_images_and_coordinates(phantoms: Path) -> None:
    made = module(phantoms)
    plain = list(made.client_train_dataloader("hospital-a", 2))
    made.teacher_maps = FakeMaps()
    batches = list(made.client_train_dataloader("hospital-a", 2))
    assert len(batches) == len(plain) > 1
    for batch, before in zip(batches, plain, strict=True):
        assert set(batch) == set(before) | {"teacher", "coordinates"}
        assert torch.equal(batch["image"], before["image"]) and torch.equal(batch["mask"], before["mask"])
        assert all(batch[key] == before[key] for key in ("id", "client", "patient", "size"))
        assert list(batch["teacher"]) == ["logits", "layer4[1]"]
        logits, ramp = batch["teacher"].values()
        assert logits.shape == (3, 1, 32, 32) and ramp.shape == (3, 1, 16, 16)
        assert logits.dtype == ramp.dtype == torch.float16
        assert logits[:, 0, 5, 5].tolist() == [number(id) for id in batch["id"]]
        assert batch["coordinates"].shape == (3, 3, 32, 32) and batch["coordinates"].dtype == torch.float32
        assert set(batch["coordinates"][:, 2].unique().tolist()) <= {0.0, 1.0}


def test_maps_looked_up_at_the_coordinates_show_what_the_image_shows(phantoms: Path) -> None:
    """The maps are the images themselves, as prepared and not augmented; only brightness may differ."""

    class Images:
        def read(self, id: str) -> dict[str, np.ndarray]:
            return {"image": plain[id].numpy().astype(np.float16)}

    moves = Augmentation([A.HorizontalFlip(), A.RandomRotate90(), A.Affine(rotate=(-30, 30), scale=0.9, p=1)])
    made = module(phantoms, batch_size=1, augmentation=moves)
    plain = {b["id"][0]: b["image"][0] for b in made.client_train_eval_dataloader(None)}
    made.teacher_maps = Images()
    shares = []
    for batch in made.client_train_dataloader(None, 1):
        where = batch["coordinates"][:, :2].permute(0, 2, 3, 1)
        seen = torch.nn.functional.grid_sample(batch["teacher"]["image"].float(), where, align_corners=False)
        valid = (batch["coordinates"][:, 2:] == 1).expand_as(seen)
        assert torch.allclose(seen[valid], batch["image"][valid], atol=0.02)
        shares.append(valid.float().mean().item())
    assert min(shares) > 0.5 and max(shares) < 1


def test_only_training_loaders_of_a_round_carry_maps(phantoms: Path) -> None:
    made = module(phantoms)
    made.teacher_maps = FakeMaps()
    others = [made.client_train_dataloader(None, -1), *made.val_dataloader(), *made.test_dataloader()]
    others += [made.client_train_eval_dataloader("hospital-a"), made.client_val_dataloader(None)]
    assert all(not {"teacher", "coordinates"} & set(batch) for loader in others for batch in loader)
    assert "teacher" in next(iter(made.train_dataloader()))
    made.teacher_maps = None
    assert set(next(iter(made.train_dataloader()))) == {"image", "mask", "id", "client", "patient", "size"}
    still = module(phantoms, augmentation=False)
    still.teacher_maps = FakeMaps()
    assert set(next(iter(still.train_dataloader()))) == {"image", "mask", "id", "client", "patient", "size", "teacher"}


def test_workers_do_not_change_maps_and_coordinates(phantoms: Path) -> None:
    runs = []
    for workers in (0, 1, 2):
        made = module(phantoms, num_workers=workers)
        made.teacher_maps = FakeMaps()
        batches = list(made.client_train_dataloader("hospital-a", 1))
        runs.append([(b["id"], b["coordinates"].numpy().tobytes(), b["teacher"]["logits"].tolist()) for b in batches])
    assert runs[0] == runs[1] == runs[2]


def test_maps_enter_nothing_that_is_saved(phantoms: Path) -> None:
    made, plain = module(phantoms), module(phantoms)
    made.teacher_maps = FakeMaps()
    assert plain.teacher_maps is None
    assert made.fingerprint(None) == plain.fingerprint(None) and made.export_info() == plain.export_info()
    assert made.state_dict() == {} == dict(made.hparams)
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(FederatedDataModule, "data")
    assert "teacher_maps" not in parser.format_help()
    dataset = pickle.loads(pickle.dumps(made.client_train_dataloader(None).dataset))
    assert set(dataset[(0, 7)]) >= {"teacher", "coordinates"}  # spawned data workers


def test_images_are_normalised_by_imagenet(phantoms: Path) -> None:
    made = module(phantoms, image_size=40, batch_size=1)
    batch = next(iter(made.client_val_dataloader("hospital-a")))
    stored = cv2.imread(str(phantoms / "images" / f"{batch['id'][0]}.png"))[..., ::-1] / 255.0
    expected = (stored - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(batch["image"][0].numpy().transpose(1, 2, 0), expected, atol=1e-5)
    grey = module(phantoms, in_channels=1, mean=[0.5], std=[0.25])
    assert next(iter(grey.train_dataloader()))["image"].shape == (3, 1, 32, 32)


def test_splits_are_by_patient_and_repeat(phantoms: Path, tmp_path: Path) -> None:
    made, again = module(phantoms), module(phantoms)
    assert made.manifest == again.manifest != module(phantoms, seed=6).manifest
    assert made.client_names() == CLIENTS
    for client in CLIENTS:
        counts = [len(made.manifest.of(client, split)) for split in ("train", "val", "test")]
        assert made.num_examples(client) == counts[0] and min(counts) > 0
    made.manifest.write(tmp_path / "manifest.csv")
    given = module(phantoms, seed=9, partitioner=IID(clients=2), manifest=str(tmp_path / "manifest.csv"))
    assert given.manifest == made.manifest


def test_a_changed_file_does_not_pass_a_given_manifest(tmp_path: Path) -> None:
    root = tmp_path / "data"
    Phantoms(hospitals=1, images=24, size=32).prepare(root)
    module(root).manifest.write(tmp_path / "manifest.csv")
    image = sorted((root / "images").iterdir())[0]
    cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
    with pytest.raises(DataError, match="changed"):
        module(root, manifest=str(tmp_path / "manifest.csv"))


def test_one_client_restricts_train_and_val_but_not_test(phantoms: Path) -> None:
    made = module(phantoms, client="hospital-b")
    assert made.client_names() == ["hospital-b"] and len(made.val_dataloader()) == 1
    assert {c for b in made.train_dataloader() for c in b["client"]} == {"hospital-b"}
    assert [{c for b in loader for c in b["client"]} for loader in made.test_dataloader()] == [{c} for c in CLIENTS]
    with pytest.raises(DataError, match="hospital-b"):
        module(phantoms, client="hospital_b")


def test_too_few_images_for_a_batch_are_found_before_training(phantoms: Path) -> None:
    with pytest.raises(DataError, match=r"hospital-a.* 1[0-9] training image.*Lower data\.batch_size"):
        module(phantoms, batch_size=20)
    made = module(phantoms, batch_size=10)
    with pytest.raises(DataError, match="one batch of 20"):
        with_ranks(made, 2, 0, federation=object()).setup("fit")
    with_ranks(made, 2, 0, federation=object()).setup("test")  # needs no training batch
    with_ranks(made, 2, 0).setup("fit")  # plain Lightning pools them


def test_setup_is_idempotent(phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(phantoms)
    manifest, reader = made.manifest, made._reader
    monkeypatch.setattr(made.layout, "records", None)
    made.setup("fit")
    assert made.manifest is manifest and made._reader is reader


def test_keeping_images_in_memory_changes_no_number(phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(phantoms)
    loader = made.client_train_dataloader("hospital-a")
    first, again = digests(loader), digests(loader)
    assert made._reader._kept and first == again
    assert not pickle.loads(pickle.dumps(made._reader))._kept  # spawned workers are not sent the images
    monkeypatch.setattr("fkd_med.data.datasets.CACHE_BYTES", 0)
    fresh = module(phantoms)
    assert digests(fresh.client_train_dataloader("hospital-a")) == first and not fresh._reader._kept


def test_fingerprint_follows_contents_and_preprocessing_only(phantoms: Path, tmp_path: Path) -> None:
    here = module(phantoms).fingerprint("hospital-a")
    Phantoms(hospitals=2, images=[24, 32], size=40).prepare(tmp_path / "moved")
    assert module(tmp_path / "moved", batch_size=2, num_workers=1).fingerprint("hospital-a") == here
    others = [
        module(phantoms).fingerprint("hospital-b"),
        module(phantoms).fingerprint(None),
        module(phantoms, resize="letterbox").fingerprint("hospital-a"),
        module(phantoms, image_size=48).fingerprint("hospital-a"),
        module(phantoms, mean=[0.5] * 3).fingerprint("hospital-a"),
        module(phantoms, seed=6).fingerprint("hospital-a"),  # another split
    ]
    assert len({here, *others}) == 7


def test_prediction_repeats_preprocessing_from_plain_containers(phantoms: Path) -> None:
    made = module(phantoms, resize="letterbox")
    info = made.export_info()
    assert info["class_values"] == [0, 255] and info["mean"] == [0.485, 0.456, 0.406]
    batch = next(iter(made.client_val_dataloader("hospital-a")))
    paths = [phantoms / "images" / f"{name}.png" for name in batch["id"]]
    dataset = PredictionDataset(paths, Preprocessing.of(info))
    predicted = collate([dataset[i] for i in range(len(paths))])
    assert torch.equal(predicted["image"], batch["image"]) and "mask" not in predicted
    assert predicted["id"] == batch["id"] and predicted["size"] == batch["size"]


def test_a_broken_image_names_its_file(tmp_path: Path) -> None:
    root = tmp_path
    Phantoms(hospitals=1, images=24, size=32).prepare(root)
    made = module(root)
    path = made._records[made.manifest.of(None, "train")[0].id].image
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=path.name):
        list(made.client_train_eval_dataloader(None))


@pytest.mark.parametrize(
    "wrong",
    [{"in_channels": 2}, {"mean": [0.5]}, {"std": [0.0] * 3}, {"image_size": 0}, {"classes": 0}, {"batch_size": 0}],
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
        FederatedDataModule(".", **wrong)


class _Counting(L.LightningModule):
    """Trains nothing; notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, tuple[str, ...]]] = []
        self.tested: list[str] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, tuple(batch["id"])))
        return batch["image"].mean() * self.weight.sum()

    def validation_step(self, batch: dict[str, Any], _: int, dataloader_idx: int = 0) -> None:
        assert len(set(batch["client"])) == 1

    def test_step(self, batch: dict[str, Any], _: int, dataloader_idx: int = 0) -> None:
        self.tested += [str(tuple(m.shape)) for m in batch["original"]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(folder: Path) -> L.Trainer:
    return L.Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
    )


def test_lightning_runs_without_validation_images(phantoms: Path, tmp_path: Path) -> None:
    made = FederatedDataModule(str(phantoms), image_size=32, batch_size=3, seed=5, val_fraction=0)
    model = _Counting()
    _trainer(tmp_path).fit(model, datamodule=made)
    assert [len(loader) for loader in made.val_dataloader()] == [0, 0] and model.seen


def test_lightning_keeps_the_sampler_and_moves_its_epoch(phantoms: Path, tmp_path: Path) -> None:
    made = FederatedDataModule(str(phantoms), image_size=32, batch_size=3, seed=5)
    model, trainer = _Counting(), _trainer(tmp_path)
    trainer.fit(model, datamodule=made)
    trainer.test(model, datamodule=made, verbose=False)
    epochs = [[ids for epoch, ids in model.seen if epoch == e] for e in range(2)]
    assert epochs[0] != epochs[1] and len(epochs[0]) == len(epochs[1])
    loader = module(phantoms).client_train_dataloader(None)
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert [tuple(b["id"]) for b in loader] == epochs[1]
    assert model.tested == ["(40, 40)"] * len(made.manifest.of(None, "test"))


YAML = """
data:
  root: {root}
  layout:
    class_path: fkd_med.data.Phantoms
    init_args: {{hospitals: 2, images: [12, 16], size: 32}}
  partitioner:
    class_path: fkd_med.data.IID
    init_args: {{clients: 2}}
  augmentation:
    class_path: fkd_med.data.Augmentation
    init_args:
      geometric:
      - class_path: albumentations.HorizontalFlip
        init_args: {{p: 1.0}}
      photometric:
      - class_path: albumentations.RandomBrightnessContrast
  image_size: 32
  resize: letterbox
  batch_size: 2
"""


@pytest.mark.filterwarnings("ignore::UserWarning")  # albumentations' tuples become lists
def test_everything_can_be_said_in_yaml(tmp_path: Path) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(FederatedDataModule, "data")
    config = parser.parse_string(YAML.format(root=tmp_path / "phantoms"))
    saved = parser.dump(config, skip_none=False)  # as the run directory keeps it, tuples turned into lists
    again = parser.parse_string(saved)
    assert parser.dump(again, skip_none=False) == saved
    made = parser.instantiate_classes(again).data
    assert isinstance(made.layout, Phantoms) and isinstance(made.partitioner, IID)
    assert isinstance(made.augmentation, Augmentation)
    made.setup("fit")
    assert next(iter(made.train_dataloader()))["image"].shape == (2, 3, 32, 32)
    bare = parser.instantiate_classes(parser.parse_string("data: {root: x, augmentation: false}")).data
    assert isinstance(bare.layout, FolderPair) and isinstance(bare.partitioner, BySite) and bare.augmentation is None
    assert "Side of the square" in parser.format_help()


@pytest.mark.data
@pytest.mark.slow
def test_real_colonoscopy_in_three_hospitals(shared_data: Path) -> None:
    made = module(shared_data / "cvc-clinicdb", layout=CVCClinicDB(), partitioner=IID(clients=3), image_size=64)
    assert len(made.client_names()) == 3 and len(made.manifest) == 480
    patients = [{r.patient for r in made.manifest.of(c, s)} for c in made.client_names() for s in ("train", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients))
    batch = next(iter(made.test_dataloader()[0]))
    assert batch["original"][0].shape == (288, 384) and batch["size"][0] == (288, 384)


@pytest.mark.data
@pytest.mark.slow
def test_real_chest_films_by_site(shared_data: Path) -> None:
    made = module(shared_data / "chest-xray-lungs", in_channels=1, image_size=64, resize="letterbox")
    assert len(made.client_names()) == 7
    batch = next(iter(made.train_dataloader()))
    assert batch["image"].shape == (3, 1, 64, 64) and 0.05 < batch["mask"].float().mean() < 0.6
