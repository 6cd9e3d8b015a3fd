"""Folders in, records out: every public layout, names, missing partners and clients.csv."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from fkd_med.data.finding import find_images, real_folders
from fkd_med.data.layouts import ChestXrayMasks, CVCClinicDB, FolderPair, cvc_sequence
from fkd_med.data.pairing import OnMissing
from fkd_med.errors import DataError


def touch(root: Path, *names: str) -> Path:
    """Layouts open no file, so empty ones do."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def pairs(root: Path, *ids: str) -> Path:
    return touch(root, *[f"images/{i}.jpg" for i in ids], *[f"masks/{i}.png" for i in ids])


def table(root: Path, text: str) -> Path:
    (root / "clients.csv").write_text(text, encoding="utf-8")
    return root


def test_folder_pair_by_name_with_any_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "images/b é.tiff", "images/a.JPG", "images/c.x.bmp", "images/notes.txt", "images/.hidden.png")
    touch(tmp_path, "masks/a.png", "masks/b é.gif", "masks/c.x.png")
    found = FolderPair().records(tmp_path)
    assert [(r.id, r.image.name, r.mask and r.mask.name, r.client, r.patient) for r in found] == [
        ("a", "a.JPG", "a.png", None, "a"),
        ("b é", "b é.tiff", "b é.gif", None, "b é"),
        ("c.x", "c.x.bmp", "c.x.png", None, "c.x"),
    ]


def test_sub_folders_are_part_of_the_name(tmp_path: Path) -> None:
    pairs(tmp_path, "x/1", "y/1")
    assert [r.id for r in FolderPair().records(tmp_path)] == ["x/1", "y/1"]


def test_mask_suffix_and_one_folder_for_both(tmp_path: Path) -> None:
    touch(tmp_path, "all/1.png", "all/1_mask.png", "all/2.png", "all/2_mask.png")
    found = FolderPair("all", "all", mask_suffix="_mask").records(tmp_path)
    assert [(r.id, r.mask and r.mask.name) for r in found] == [("1", "1_mask.png"), ("2", "2_mask.png")]
    with pytest.raises(DataError, match="mask_suffix"):
        FolderPair("all", "all").records(tmp_path)


def test_masks_inside_the_image_folder(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "masks/1.png")
    assert [r.id for r in FolderPair(".", "masks").records(tmp_path)] == ["1"]


def test_no_such_root_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.*no such folder"):
        FolderPair().records(tmp_path / "gone")
    with pytest.raises(DataError, match="folder is empty"):
        FolderPair().records(tmp_path)
    (tmp_path / "images").mkdir()
    touch(tmp_path, "masks/1.png")
    with pytest.raises(DataError, match="images: no image"):
        FolderPair().records(tmp_path)
    (tmp_path / "images").rmdir()
    with pytest.raises(DataError, match="images: no such folder"):
        FolderPair().records(tmp_path)


def test_dicom_in_a_folder_says_what_to_do(tmp_path: Path) -> None:
    touch(pairs(tmp_path, "1"), "images/2.dcm")
    with pytest.raises(DataError, match=r"2\.dcm.*dcmj2pnm"):
        FolderPair().records(tmp_path)


def test_one_name_twice_is_an_error(tmp_path: Path) -> None:
    touch(pairs(tmp_path, "1"), "images/1.png")
    with pytest.raises(DataError, match=r"1\.png and 1\.jpg"):
        FolderPair().records(tmp_path)


def test_folders_behind_links_are_searched(tmp_path: Path) -> None:
    """As of a hospital whose images lie on another disk."""
    pairs(tmp_path, "nord/1")
    for part in ("images", "masks"):
        touch(tmp_path / "disk", f"{part}/{'2.jpg' if part == 'images' else '2.png'}")
        (tmp_path / part / "west").symlink_to(tmp_path / "disk" / part, target_is_directory=True)
    assert [r.id for r in FolderPair().records(tmp_path)] == ["nord/1", "west/2"]


def test_where_files_lie_is_the_folder_around_them_and_behind_each_link(tmp_path: Path) -> None:
    """The folder around two disks would be all there is, and no run could be written anywhere."""
    touch(tmp_path, "data/images/a/1.png", "data/images/b/1.png", "disk/west/1.png")
    (tmp_path / "data/images/west").symlink_to(tmp_path / "disk/west", target_is_directory=True)
    lie = real_folders(find_images(tmp_path / "data/images").values())
    assert lie == [str(tmp_path / f) for f in ("data/images", "data/images/a", "data/images/b", "disk/west")]


@pytest.mark.parametrize("target", [".", "..", "../images/a", "../other"])
def test_links_that_lead_in_a_circle_end(tmp_path: Path, target: str) -> None:
    pairs(tmp_path, "a/1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(tmp_path / "images", target_is_directory=True)
    (tmp_path / "images" / "a" / "again").symlink_to(tmp_path / "images" / target, target_is_directory=True)
    assert [r.id for r in FolderPair().records(tmp_path)] == ["a/1"]


def test_a_link_to_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    (pairs(tmp_path, "1") / "images" / "west").symlink_to(tmp_path / "disk")
    with pytest.raises(DataError, match=r"images/west: a link that leads to no file or folder"):
        FolderPair().records(tmp_path)


@pytest.mark.parametrize("name", ["IM0001", "1.2.840.113619.2"])
def test_dicom_is_known_without_its_suffix(tmp_path: Path, name: str) -> None:
    touch(pairs(tmp_path, "1"), "images/README", "images/notes.txt")
    assert [r.id for r in FolderPair().records(tmp_path)] == ["1"]
    (tmp_path / "images" / name).write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(DataError, match=rf"{name}: DICOM is not read.*dcmj2pnm"):
        FolderPair().records(tmp_path)


@pytest.mark.parametrize(("folder", "what"), [("images", "images without mask"), ("masks", "masks without image")])
def test_missing_partners(tmp_path: Path, folder: str, what: str, caplog: pytest.LogCaptureFixture) -> None:
    touch(pairs(tmp_path, "1", "2"), *[f"{folder}/lonely{i}.png" for i in range(8)])
    with pytest.raises(DataError, match=rf"8 {what}: .*lonely0\.png.*lonely4\.png and 3 more.*on_missing=skip"):
        FolderPair().records(tmp_path)
    assert [r.id for r in FolderPair().records(tmp_path, "skip")] == ["1", "2"]
    assert f"8 {what}" in caplog.text


@pytest.mark.parametrize("on_missing", ["error", "skip", "unlabelled"])
def test_nothing_pairs_and_the_suffix_is_told(tmp_path: Path, on_missing: OnMissing) -> None:
    touch(tmp_path, *(f"images/{n}.png" for n in range(12)), *(f"masks/{n}_mask.png" for n in range(12)))
    with pytest.raises(DataError, match=r"None of 12 .* --data\.layout=FolderPair --data\.layout\.mask_suffix=_mask$"):
        FolderPair().records(tmp_path, on_missing)
    assert len(FolderPair(mask_suffix="_mask").records(tmp_path)) == 12


def test_clients_csv_gives_client_patient_and_split(tmp_path: Path) -> None:
    pairs(tmp_path, "1", "é")
    decomposed = unicodedata.normalize("NFD", "é")
    table(tmp_path, f"\ufeffid, client ,patient,split\n{decomposed},Hôpital 2,p,test\n1,north,,train\n")
    assert [(r.id, r.client, r.patient, r.split) for r in FolderPair().records(tmp_path)] == [
        ("1", "north", "1", "train"),
        ("é", "Hôpital 2", "p", "test"),
    ]


def test_clients_csv_may_know_patients_only(tmp_path: Path) -> None:
    table(pairs(tmp_path, "1", "2"), "id,client,patient\n1,,p\n2,,p\n")
    assert [(r.client, r.patient) for r in FolderPair().records(tmp_path)] == [(None, "p"), (None, "p")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"lacks the columns id, client, patient; it has none"),
        ("id;client;patient\n1;a;p\n", r"lacks the columns id, client, patient; it has id;client;patient"),
        ("id,client\n1,a\n2,a\n", r"lacks the columns patient"),
        ("id,client,patient\n1,a,p\n2,a,p\n1,b,p\n", r"more than once: 1\."),
        ("id,client,patient\n1,a,p\n2,a,p\n3,a,p\n", r"1 ids without an image: 3\."),
        ("id,client,patient\n1,a,p\n2,a,p\n../../etc/passwd,a,p\n", r"1 ids without an image: \.\./\.\./etc/passwd"),
        ("id,client,patient\n1,a,p\n", r"1 images that are not in it: 2\."),
        ("id,client,patient\n1,a,p\n2,,p\n", r"client is empty for 2\."),
        ("id,client,patient,split\n1,a,p,train\n2,a,q,\n", r"split is empty for 2\."),
        ("id,client,patient,split\n1,a,p,train\n2,a,q,valid\n", r"2: the split 'valid' is not one of train, val, test"),
        ("id,client,patient\n1,a,p\n2,../b,p\n", r"2: '\.\./b' cannot name a client"),
        ("id,client,patient\n1,a,p\n2,..,p\n", r"cannot name a client"),
        ("id,client,patient\n1,Nord,p\n2,nord,q\n", r"the clients 'Nord' and 'nord' differ only"),
        ("id,client,patient\n1,St  Anna,p\n2,St Anna,q\n", r"the clients 'St  Anna' and 'St Anna' differ only"),
        ("id,client,patient\n1,Köln,p\n2,Ko\u0308ln,q\n", r"the clients 'Ko\\u0308ln' and 'K\\xf6ln' differ only"),
    ],
)
def test_clients_csv_mistakes(tmp_path: Path, text: str, message: str) -> None:
    table(pairs(tmp_path, "1", "2"), text)
    with pytest.raises(DataError, match=rf"clients\.csv.*{message}"):
        FolderPair().records(tmp_path)


def test_clients_csv_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    (pairs(tmp_path, "1") / "clients.csv").write_bytes("id,client,patient\n1,Köln,p\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        FolderPair().records(tmp_path)


def test_skipping_also_skips_what_clients_csv_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(table(pairs(tmp_path, "1", "2"), "id,client,patient\n1,a,p\nbare,a,p\n9,a,p\n"), "images/bare.png")
    assert [r.id for r in FolderPair().records(tmp_path, "skip")] == ["1"]
    assert "1 ids without an image: 9" in caplog.text and "1 images that are not in it: 2" in caplog.text


@pytest.mark.parametrize("place", ["", "PNG", "TIF"])
def test_cvc_clinicdb_as_downloaded(tmp_path: Path, place: str) -> None:
    root = tmp_path / place
    for n in (1, 25, 26, 612):
        touch(root, f"Original/{n}.tif", f"Ground Truth/{n}.tif")
    found = {r.id: (r.patient, r.client) for r in CVCClinicDB().records(tmp_path)}
    assert found == {"1": ("seq01", None), "25": ("seq01", None), "26": ("seq02", None), "612": ("seq29", None)}


def test_cvc_sequences_follow_the_published_frames() -> None:
    published = "1-25 26-50 51-67 68-78 79-103 104-126 127-151 152-177 178-199 200-205 206-227 228-252 253-277 278-297"
    published += " 298-317 318-342 343-363 364-383 384-408 409-428 429-447 448-466 467-478 479-503 504-528 529-546"
    published += " 547-571 572-591 592-612"
    for number, frames in enumerate(published.split(), 1):
        first, last = map(int, frames.split("-"))
        for frame in range(first, last + 1):
            assert cvc_sequence(str(frame), Path()) == f"seq{number:02d}"
    for name in ("0", "613", "polyp"):
        with pytest.raises(DataError, match="1 to 612"):
            cvc_sequence(name, Path(f"{name}.png"))


def test_cvc_clinicdb_as_a_folder_pair(tmp_path: Path) -> None:
    table(pairs(tmp_path, "001"), "id,client,patient\n001,a,seq01\n")
    assert [(r.id, r.client, r.patient) for r in CVCClinicDB().records(tmp_path)] == [("001", "a", "seq01")]


@pytest.mark.parametrize("place", ["", "Lung Segmentation", "data/Lung Segmentation"])
def test_chest_xrays_as_downloaded(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / place
    touch(root, "CXR_png/CHNCXR_0001_0.png", "CXR_png/CHNCXR_0002_1.png", "CXR_png/MCUCXR_0003_0.png")
    touch(root, "masks/CHNCXR_0001_0_mask.png", "masks/MCUCXR_0003_0.png")
    found = [(r.id, r.client, r.patient, r.mask and r.mask.name) for r in ChestXrayMasks().records(tmp_path)]
    assert found == [
        ("CHNCXR_0001_0", "shenzhen", "CHNCXR_0001_0", "CHNCXR_0001_0_mask.png"),
        ("MCUCXR_0003_0", "montgomery", "MCUCXR_0003_0", "MCUCXR_0003_0.png"),
    ]
    assert "1 films without mask are not used: CHNCXR_0002_1" in caplog.text


def test_chest_xrays_with_other_files_are_errors(tmp_path: Path) -> None:
    touch(tmp_path, "CXR_png/CHNCXR_0001_0.png", "masks/CHNCXR_0001_0_mask.png", "masks/CHNCXR_0009_0_mask.png")
    with pytest.raises(DataError, match="1 masks without image"):
        ChestXrayMasks().records(tmp_path)
    assert len(ChestXrayMasks().records(tmp_path, "skip")) == 1
    touch(tmp_path, "CXR_png/OTHER_1.png")
    with pytest.raises(DataError, match=r"OTHER_1\.png"):
        ChestXrayMasks().records(tmp_path, "skip")


def test_find_images_serves_prediction_folders(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a/c.tif", "x.csv")
    assert find_images(tmp_path) == {"a/c": tmp_path / "a/c.tif", "b": tmp_path / "b.png"}
