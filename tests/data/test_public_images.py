"""Public images: read as the clients' are, in order, and refused where they are damaged or a client's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fkd_med.cli import main
from fkd_med.data import FederatedDataModule, Phantoms, Record
from fkd_med.data import public as room
from fkd_med.data.preprocessing import Preprocessing
from fkd_med.data.public import read_public
from fkd_med.errors import DataError

SAME = Preprocessing.checked(32, "letterbox", 3)


def save(path: Path, seed: int, size: tuple[int, int] = (40, 30), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("c.png", "a.tif", "b/x.bmp")):
        save(tmp_path / "public" / name, number)
    (tmp_path / "public" / "notes.txt").write_text("no image")
    return tmp_path / "public"


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    Phantoms(hospitals=2, images=20, size=40).prepare(tmp_path / "clients")
    return tmp_path / "clients"


def module(clients: Path, public: Path | None, **changes: Any) -> FederatedDataModule:
    settings = {"image_size": 32, "batch_size": 4, "seed": 5} | changes
    made = FederatedDataModule(str(clients), public=None if public is None else str(public), **settings)
    made.setup("fit")
    return made


def test_a_folder_that_is_a_link_holds_images_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "disk").symlink_to(folder, target_is_directory=True)
    assert read_public(tmp_path / "linked", SAME, []).ids == ["disk/a", "disk/b/x", "disk/c"]


def test_items_are_in_order_and_prepared_as_the_clients_images(folder: Path, monkeypatch) -> None:
    images = read_public(folder, SAME, [])
    assert [images[i]["id"] for i in range(len(images))] == images.ids == ["a", "b/x", "c"]
    for index, name in enumerate(("a.tif", "b/x.bmp", "c.png")):
        expected = SAME.tensor(SAME.read(folder / name)[0])
        assert images[index].keys() == {"image", "id"}
        assert torch.equal(images[index]["image"], expected)
    monkeypatch.setattr(room, "CACHE_BYTES", 0)  # nothing is kept in memory
    assert all(torch.equal(one["image"], images[i]["image"]) for i, one in enumerate(read_public(folder, SAME, [])))


def test_the_digest_is_of_names_and_pixels(folder: Path) -> None:
    before = read_public(folder, SAME, []).digest
    Image.open(folder / "a.tif").save(folder / "a.png")  # the same pixels in another format
    (folder / "a.tif").unlink()
    assert read_public(folder, SAME, []).digest == before
    (folder / "a.png").rename(folder / "d.png")
    renamed = read_public(folder, SAME, []).digest
    save(folder / "d.png", 77)
    assert len({before, renamed, read_public(folder, SAME, []).digest}) == 3


def test_grey_pipelines_get_one_channel(folder: Path) -> None:
    grey = Preprocessing.checked(32, "stretch", 1)
    one = read_public(folder, grey, [])[2]["image"]
    assert torch.equal(one, grey.tensor(grey.read(folder / "c.png")[0])) and one.shape == (1, 32, 32)


def test_a_subfolder_images_is_taken_alone(folder: Path) -> None:
    save(folder / "images" / "z.png", 9)
    assert read_public(folder, SAME, []).ids == ["z"]


def test_faulty_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.public: .*nowhere: no such folder"):
        read_public(tmp_path / "nowhere", SAME, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data.public: .*empty: no image"):
        read_public(tmp_path / "empty", SAME, [])
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes()[:900])
    with pytest.raises(DataError, match=r"c.png: damaged or unreadable"):
        read_public(folder, SAME, [])


@pytest.mark.parametrize("suffix", [".png", ".bmp"])  # the file itself, and its pixels in another format
def test_a_clients_image_is_refused_whatever_it_is_called(folder: Path, tmp_path: Path, suffix: str) -> None:
    other, own = save(tmp_path / "other.png", 7), save(tmp_path / "own.png", 8)
    records = [Record("other", other), Record("own", own)]
    assert len(read_public(folder, SAME, records)) == 3
    if suffix == ".png":
        shutil.copy(own, folder / "renamed.png")
    else:
        Image.open(own).save(folder / "renamed.bmp")
    with pytest.raises(DataError, match=r"1 public images are also a client's .*renamed\S* \(= .*own.png\).*remove"):
        read_public(folder, SAME, records)


def test_one_of_any_split_or_client_stops_the_setup(clients: Path, folder: Path) -> None:
    assert len(module(clients, folder, client="hospital-a").public_images() or []) == 3
    for row in {(r.client, r.split): r for r in module(clients, None).manifest.rows}.values():
        stolen = Path(shutil.copy(clients / "images" / f"{row.id}.png", folder / "stolen.png"))
        with pytest.raises(DataError, match=r"stolen.png"):
            module(clients, folder, client="hospital-a")
        stolen.unlink()


def test_only_fits_read_them_and_nothing_else_changes(clients: Path, folder: Path) -> None:
    plain, made = module(clients, None), module(clients, folder)
    assert plain.public_images() is None
    assert made.fingerprint("hospital-a") == plain.fingerprint("hospital-a")
    assert made.export_info() == plain.export_info()
    scoring = FederatedDataModule(str(clients), public="nowhere", image_size=32, batch_size=4, seed=5)
    scoring.setup("test")  # their absence does not matter any more
    with pytest.raises(DataError, match="no such folder"):
        scoring.setup("fit")


def test_check_data_counts_them(clients: Path, folder: Path, tmp_path: Path, capsys) -> None:
    given = ["check-data", "--data.root", str(clients), "--data.public", str(folder), "--output", str(tmp_path / "o")]
    assert main([*given, "--data.batch_size", "4"]) == 0
    assert "Public images: 3 in" in capsys.readouterr().out
    shutil.copy(next((clients / "images").glob("*.png")), folder / "stolen.png")
    assert main([*given, "--data.batch_size", "4"]) == 2
    assert "stolen.png" in capsys.readouterr().out
