"""Images without masks: which they are, that nobody is scored by them, and how they stand in batches."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fkd_med.data import FederatedDataModule, Manifest, Phantoms
from fkd_med.errors import ConfigError, DataError

CLIENTS = ["hospital-a", "hospital-b"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "phantoms"
    Phantoms(hospitals=2, images=[40, 32], size=32).prepare(folder)
    return folder


def without_masks(root: Path, of: Any) -> list[str]:
    """Delete masks of images chosen by id; return their ids."""
    names = sorted(path.stem for path in (root / "masks").iterdir() if of(path.stem))
    for name in names:
        (root / "masks" / f"{name}.png").unlink()
    return names


def module(root: Path, **changes: Any) -> FederatedDataModule:
    made = FederatedDataModule(str(root), **({"image_size": 32, "batch_size": 4, "seed": 5} | changes))
    made.setup("fit")
    return made


def batches(loader: Any, epoch: int = 0) -> list[dict[str, Any]]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_images_without_a_mask_are_learned_from_and_never_scored(root: Path) -> None:
    whole = module(root)
    train = [row.id for row in whole.manifest.of("hospital-a", "train")]
    patients = {row.id: row.patient for row in whole.manifest.rows}
    lone = {patients[train[0]], patients[train[-1]]}  # all images of two patients who train
    gone = without_masks(root, lambda name: patients[name] in lone)
    with pytest.raises(DataError, match=r"images without mask.*on_missing=skip.*on_missing=unlabelled"):
        module(root)
    made = module(root, on_missing="unlabelled")
    assert sorted(row.id for row in made.manifest.of(None, "unlabelled")) == gone
    assert made.num_unlabelled("hospital-a") == len(gone) and made.num_unlabelled("hospital-b") == 0
    scored = [name for client in CLIENTS for load in (made.client_val_dataloader, made.client_test_dataloader)
              for batch in load(client) for name in batch["id"]]  # fmt: skip
    assert scored and not set(scored) & set(gone)
    seen = [batch for batch in made.client_train_dataloader("hospital-a", 1)]
    assert {name for b in seen for name, has in zip(b["id"], b["labelled"], strict=True) if not has} <= set(gone)
    assert "labelled" not in next(iter(made.client_train_dataloader("hospital-b", 1)))  # it has masks for all


def test_a_hospital_without_any_mask_is_told_as_that(root: Path) -> None:
    clients = {row.id: row.client for row in module(root).manifest.rows}
    without_masks(root, lambda name: clients[name] == "hospital-b")
    with pytest.raises(DataError, match=r"'hospital-b' has 32 images without a mask and .*draw masks.*clients\.csv"):
        module(root, on_missing="unlabelled")
    with pytest.raises(DataError, match="fewer than one batch of 99"):  # masks there are, but too few
        module(root, on_missing="unlabelled", batch_size=99, client="hospital-a")


def test_an_image_without_mask_of_a_tested_patient_is_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    patients = {row.id: row.patient for row in module(root).manifest.rows}
    first = {patient: name for name, patient in reversed(patients.items())}  # one image of each patient
    gone = without_masks(root, lambda name: name in first.values())
    caplog.set_level(logging.WARNING)
    made = module(root, on_missing="unlabelled")
    split = {row.patient: row.split for row in made.manifest.rows if row.split != "unlabelled"}
    left_out = [name for name in gone if split[patients[name]] != "train"]
    assert 0 < len(left_out) < len(gone)
    assert sorted(row.id for row in made.manifest.of(None, "unlabelled")) == sorted(set(gone) - set(left_out))
    assert f"Left out {len(left_out)} images without mask, since they or others of their patients" in caplog.text


def test_masks_are_hidden_by_whole_patients_and_nothing_else_changes(root: Path) -> None:
    whole, half = module(root), module(root, hidden_masks=0.5)
    for split in ("val", "test"):
        assert half.manifest.of(None, split) == whole.manifest.of(None, split)
    for client in CLIENTS:
        kept, hidden = half.manifest.of(client, "train"), half.manifest.of(client, "unlabelled")
        assert not {r.patient for r in kept} & {r.patient for r in hidden}
        assert {r.id for r in kept} | {r.id for r in hidden} == {r.id for r in whole.manifest.of(client, "train")}
        biggest = max(Counter(r.patient for r in (*kept, *hidden)).values())
        assert abs(len(hidden) - 0.5 * (len(kept) + len(hidden))) <= biggest / 2
        assert half.fingerprint(client) != whole.fingerprint(client)  # a teacher sees fewer masks
    assert module(root, hidden_masks=0.5).manifest == half.manifest
    assert module(root, hidden_masks=0.99).num_examples("hospital-a") > 0


def test_batches_with_masks_stay_as_they_are_and_others_come_behind_them(root: Path) -> None:
    mixed, plain = (module(root, hidden_masks=0.5, unlabelled=number) for number in (3, 0))
    together = batches(mixed.client_train_dataloader("hospital-a", 2), 1)
    alone = batches(plain.client_train_dataloader("hospital-a", 2), 1)
    assert len(together) == len(alone) > 0
    for one, other in zip(together, alone, strict=True):
        assert one["labelled"] == [True] * 4 + [False] * 3 and one["id"][:4] == other["id"]
        assert torch.equal(one["image"][:4], other["image"]) and torch.equal(one["mask"][:4], other["mask"])
        assert bool((one["mask"][4:] == -1).all()) and "labelled" not in other
    others = [name for batch in together for name in batch["id"][4:]]
    assert len(set(others)) == min(len(others), mixed.num_unlabelled("hospital-a"))  # each before any comes again
    again = batches(mixed.client_train_dataloader("hospital-a", 2), 2)
    assert others != [name for batch in again for name in batch["id"][4:]]
    assert module(root, hidden_masks=0.5).unlabelled == 4  # as many as masks, unless told


def test_few_images_come_again_augmented_anew(root: Path) -> None:
    made = module(root, hidden_masks=0.1, unlabelled=16)
    names = made.num_unlabelled("hospital-b")
    batch = next(iter(made.client_train_dataloader("hospital-b")))
    extra = batch["id"][4:]
    assert Counter(extra).most_common()[0][1] >= 16 // names
    same = [place + 4 for place, name in enumerate(extra) if name == extra[0]]
    assert len(same) > 1 and not torch.equal(batch["image"][same[0]], batch["image"][same[1]])


def test_workers_and_ranks_deal_the_same_images(root: Path) -> None:
    def of(rank: int, ranks: int, workers: int = 0) -> list[dict[str, Any]]:
        made = module(root, hidden_masks=0.5, batch_size=2, num_workers=workers)
        made.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, accelerator=None)  # type: ignore
        return batches(made.client_train_dataloader("hospital-a", 1))

    assert [b["id"] for b in of(0, 1)] == [b["id"] for b in of(0, 1, workers=1)]
    first, second = ([name for b in of(rank, 2) for name in b["id"][2:]] for rank in (0, 1))
    assert len(first) == len(second) and not set(first[:4]) & set(second[:4])


def test_caches_and_statistics_see_all_images_and_teachers_those_with_masks(root: Path) -> None:
    made = module(root, hidden_masks=0.5)
    seen = [name for batch in made.client_train_eval_dataloader("hospital-a") for name in batch["id"]]
    assert len(seen) == made.num_examples("hospital-a") + made.num_unlabelled("hospital-a")
    taught = [name for batch in made.client_train_dataloader("hospital-a", -1) for name in batch["id"]]
    assert set(taught) <= {row.id for row in made.manifest.of("hospital-a", "train")}
    assert made.unlabelled_fingerprint("hospital-a") and not module(root).unlabelled_fingerprint("hospital-a")


def test_a_manifest_remembers_what_was_hidden(root: Path, tmp_path: Path) -> None:
    made = module(root, hidden_masks=0.5)
    made.manifest.write(tmp_path / "manifest.csv")
    again = module(root, manifest=str(tmp_path / "manifest.csv"))
    assert again.manifest == made.manifest and again.num_unlabelled("hospital-a") == made.num_unlabelled("hospital-a")
    both = module(root, manifest=str(tmp_path / "manifest.csv"), hidden_masks=0.9)  # as a run that goes on has it
    assert both.manifest == made.manifest


def test_masks_that_are_to_be_hidden_and_are_not_are_refused(root: Path, tmp_path: Path) -> None:
    module(root).manifest.write(tmp_path / "manifest.csv")
    with pytest.raises(DataError, match=r"hidden_masks: 0.5.*manifest.csv has no image.*leave data.manifest out"):
        module(root, manifest=str(tmp_path / "manifest.csv"), hidden_masks=0.5)
    with pytest.raises(DataError, match=r"hidden_masks: 0.001.*larger share"):
        module(root, hidden_masks=0.001)


def test_a_manifest_that_wants_a_mask_that_is_not_there_is_refused(root: Path, tmp_path: Path) -> None:
    name = module(root).manifest.of("hospital-a", "val")[0].id
    without_masks(root, lambda other: other == name)
    bare = module(root, on_missing="unlabelled", val_fraction=0.0, test_fraction=0.0).manifest
    rows = [type(row)(row.id, row.client, "train", row.patient, row.sha256) for row in bare.rows]
    Manifest(rows).write(tmp_path / "m.csv")
    with pytest.raises(DataError, match=rf"1 images have no mask and are not unlabelled: .*{name}"):
        module(root, on_missing="unlabelled", manifest=str(tmp_path / "m.csv"))


def test_a_given_split_can_say_unlabelled(root: Path) -> None:
    table = root / "clients.csv"
    head, *lines = table.read_text().splitlines()
    patients = sorted({line.split(",")[2] for line in lines})
    splits = {name: ("train", "val", "test", "unlabelled")[place % 4] for place, name in enumerate(patients)}
    table.write_text("\n".join([f"{head},split", *(f"{line},{splits[line.split(',')[2]]}" for line in lines)]) + "\n")
    made = module(root)
    assert {row.split for row in made.manifest.rows} == {"train", "val", "test", "unlabelled"}
    hidden = made.manifest.of("hospital-a", "unlabelled")
    assert hidden and all(splits[row.patient] == "unlabelled" for row in hidden)


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_image_that_is_to_be_scored_and_has_no_mask_is_not_trained_on(root: Path, split: str) -> None:
    table = root / "clients.csv"
    head, *lines = table.read_text().splitlines()
    patients = sorted({line.split(",")[2] for line in lines})
    splits = {name: ("train", "val", "test")[place % 3] for place, name in enumerate(patients)}
    table.write_text("\n".join([f"{head},split", *(f"{line},{splits[line.split(',')[2]]}" for line in lines)]) + "\n")
    whole = module(root).manifest
    patient = next(row.patient for row in whole.rows if row.split == split)
    gone = without_masks(root, lambda name: name in {row.id for row in whole.rows if row.patient == patient})
    made = module(root, on_missing="unlabelled").manifest  # not one image of the patient has a mask
    assert gone and {row.id for row in whole.rows} - {row.id for row in made.rows} == set(gone)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_masks": 1.0}, "data.hidden_masks: 1.0"),
        ({"hidden_masks": -0.1}, "data.hidden_masks: -0.1"),
        ({"unlabelled": -1}, "data.unlabelled: -1"),
    ],
)
def test_settings_that_make_no_sense(root: Path, changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        module(root, **changes)


def test_a_client_with_one_patient_to_train_on_keeps_its_masks(root: Path) -> None:
    with pytest.raises(DataError, match=r"data.hidden_masks: client 'hospital-\w' has one patient"):
        module(root, hidden_masks=0.5, val_fraction=0.45, test_fraction=0.45, batch_size=1)
