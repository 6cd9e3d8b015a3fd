"""`fkd check-data`: what it shows, what it writes, and that every fault is listed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fkd_med.cli import main
from fkd_med.cli.data_parser import build_data, data_parser

Said = pytest.CaptureFixture[str]


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WHOLE = [
    path.relative_to(CONFIGS).as_posix()
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if {"data", "model"} <= yaml.safe_load(path.read_text()).keys()
]


@pytest.mark.parametrize("name", WHOLE)
def test_every_shipped_configuration_is_read(name: str) -> None:
    files = [name, "small.yaml", *(["small_federated.yaml"] if "fkd" in name else [])]
    arguments = [part for file in files for part in ("--config", str(CONFIGS / file))]
    config = data_parser("test", "").parse_args([*arguments, "--data.root", "elsewhere"])
    data = build_data(config)
    assert data.root == Path("elsewhere")
    small = yaml.safe_load((CONFIGS / "small.yaml").read_text())["data"]["init_args"]
    assert (data.preprocessing.image_size, data.batch_size) == (small["image_size"], small["batch_size"])


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "phantoms"
    assert main(["phantoms", str(folder), "--hospitals=2", "--images=20", "--size=48"]) == 0
    return folder


@pytest.fixture
def copy(phantoms: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phantoms, tmp_path / "data"))


def check(output: Path, *arguments: object) -> int:
    return main(["check-data", "--output", str(output), *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "images").glob("*.png"))


def test_the_configuration_of_a_run_gives_its_manifest(tiny_run: Path, tmp_path: Path, capsys: Said) -> None:
    assert check(tmp_path / "out", "--config", tiny_run.parents[1] / "tiny.yaml") == 0
    assert (tmp_path / "out" / "manifest.csv").read_bytes() == (tiny_run / "manifest.csv").read_bytes()
    said = capsys.readouterr().out
    for part in ("hospital-a", "48x48 (20)", "colour, 8 bit (20)", "0, 255", "255 is class 1", "contact_sheet.png"):
        assert part in said
    # The configuration that a run leaves behind is one as well.
    assert check(tmp_path / "again", "--config", tiny_run / "config.yaml") == 0
    assert (tmp_path / "again" / "manifest.csv").read_bytes() == (tiny_run / "manifest.csv").read_bytes()


def test_nothing_but_the_data_is_built(phantoms: Path, tmp_path: Path) -> None:
    config = {
        "data": {"root": str(phantoms), "batch_size": 4},
        "model": {"class_path": "no_such.Module", "init_args": {"network": {"class_path": "none.Such"}}},
        "trainer": {"accelerator": "gpu", "devices": 64},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    assert check(tmp_path / "out", "--config", tmp_path / "x.yaml") == 0
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width > 6 * 200 and sheet.height > 2 * 200


def test_overlays_and_overrides_count(phantoms: Path, tmp_path: Path, capsys: Said) -> None:
    federated = {"data": {"root": "nowhere"}, "federation": {"rounds": 3}, "trainer": {"max_epochs": 2}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(federated))
    (tmp_path / "y.yaml").write_text("data: {batch_size: 13}\ntrainer: {limit_train_batches: 2}\n")
    given = ["--config", tmp_path / "x.yaml", "--config", tmp_path / "y.yaml", "--data.root", phantoms]
    assert check(tmp_path / "out", *given) == 2
    assert "'hospital-a' has 12 training image(s), fewer than one batch of 13" in capsys.readouterr().out
    assert check(tmp_path / "out", *given, "--data.batch_size=12") == 0
    # Pooled, the clients fill the batch together.
    assert check(tmp_path / "out", "--config", tmp_path / "y.yaml", "--data.root", phantoms) == 0


def test_every_fault_is_listed(copy: Path, tmp_path: Path, capsys: Said) -> None:
    first = names(copy)
    (copy / "masks" / f"{first[0]}.png").unlink()
    (copy / "images" / f"{first[1]}.png").unlink()
    (copy / "images" / f"{first[5]}.png").write_bytes(b"damaged")
    (copy / "masks" / f"{first[6]}.png").write_bytes(b"damaged")
    Image.new("L", (10, 10)).save(copy / "masks" / f"{first[7]}.png")
    assert check(tmp_path / "out", "--data.root", copy) == 2
    said = capsys.readouterr()
    wanted = [
        f"1 images without mask: {copy / 'images' / first[0]}.png",
        f"1 masks without image: {copy / 'masks' / first[1]}.png",
        f"{first[5]}.png: not an image this program reads",
        f"{first[6]}.png: not an image this program reads",
        f"{first[7]}.png: its size differs from its image's: 10x10, not 48x48 (width x height, upright)",
    ]
    for part in wanted:
        assert part in said.out
    assert said.out.count("Error: ") >= 5 and "would stop a run; they are listed above" in said.err
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_files_that_are_not_read_are_faults_among_others(copy: Path, tmp_path: Path, capsys: Said) -> None:
    first = names(copy)
    for name in ("a.dcm", "b.dcm", "c.dcm", "d.dcm", "e.dcm", "v.nii.gz", "IM0001"):
        (copy / "images" / name).write_bytes(b"\0" * 128 + b"DICM")
    (copy / "images" / f"{first[0]}.png").rename(copy / "images" / f"{first[0]}.dcm")
    Image.new("L", (10, 10)).save(copy / "masks" / f"{first[7]}.png")
    assert check(tmp_path / "out", "--data.root", copy) == 2
    said = capsys.readouterr().out
    for part in ("a.dcm: DICOM is not read", "IM0001: DICOM", "v.nii.gz: volumes are not read", "its size differs"):
        assert part in said
    assert f"1 masks without image: {copy / 'masks' / first[0]}.png" in said and "e.dcm" in said
    assert "e.dcm: DICOM" not in said and "more files have the fault of the last one" in said
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_nothing_but_dicom_is_told_as_that(copy: Path, tmp_path: Path, capsys: Said) -> None:
    for path in (copy / "images").glob("*.png"):
        path.rename(path.with_suffix(".dcm"))
    assert check(tmp_path / "out", "--data.root", copy) == 2
    assert ".dcm: DICOM is not read" in capsys.readouterr().err


def test_a_set_of_coloured_masks_is_one_fault(copy: Path, tmp_path: Path, capsys: Said) -> None:
    for path in (copy / "masks").glob("*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.stack([mask, mask * 0, mask * 0], axis=-1)).save(path)
    assert check(tmp_path / "out", "--data.root", copy) == 2
    said = capsys.readouterr().out
    assert said.count("a colour mask; its classes cannot be told") == 3 and said.count("Error: ") == 4
    assert "37 more files have the fault of the last one: " in said and "No image of this set has a mask" not in said
    # What can be told is: the images' counts and sizes.
    assert "hospital-a" in said and "48x48 (20)" in said and "0.0%" not in said


def test_a_class_that_nobody_has_is_one_warning(phantoms: Path, tmp_path: Path, capsys: Said) -> None:
    given = ("--data.root", phantoms, "--data.classes=3", "--data.class_values=[0, 255, 7]")
    assert check(tmp_path / "out", *given) == 0
    said = capsys.readouterr().out
    assert said.count("Warning: No mask of the whole set has value 7") == 1 and "no pixel of class" not in said


def test_skipping_makes_missing_pairs_a_warning(copy: Path, tmp_path: Path, capsys: Said) -> None:
    (copy / "masks" / f"{names(copy)[0]}.png").unlink()
    given = ("--data.root", copy, "--data.on_missing", "skip")
    assert check(tmp_path / "out", *given) == 0
    said = capsys.readouterr().out
    assert "Warning: Left out 1 images without mask" in said and "Error: " not in said
    assert names(copy)[0] not in (tmp_path / "out" / "manifest.csv").read_text()


def test_unlabelled_images_are_no_fault_and_lonely_masks_are(copy: Path, tmp_path: Path, capsys: Said) -> None:
    first, second, *_ = names(copy)
    (copy / "masks" / f"{first}.png").unlink()
    given = ("--data.root", copy, "--data.on_missing", "unlabelled")
    assert check(tmp_path / "out", *given) == 0
    assert "Error: " not in capsys.readouterr().out
    (copy / "images" / f"{second}.png").unlink()
    assert check(tmp_path / "out", *given) == 2
    said = capsys.readouterr().out
    assert f"1 masks without image: {copy / 'masks' / second}.png" in said and said.count("Error: ") == 1
    assert (tmp_path / "out" / "contact_sheet.png").is_file()  # and it went on


def test_masks_that_cannot_be_used_and_sites_that_are_unknown(copy: Path, tmp_path: Path, capsys: Said) -> None:
    (copy / "clients.csv").unlink()
    for path in (copy / "masks").glob("*.png"):
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    assert check(tmp_path / "out", "--data.root", copy) == 2
    said = capsys.readouterr().out
    assert "does not say which hospital" in said and "All 40 masks are empty" in said and "not partitioned" in said
    assert "is class" not in said and "has no image in" not in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["contact_sheet.png"]


def test_one_picture_in_two_splits_is_a_warning(copy: Path, tmp_path: Path, capsys: Said) -> None:
    given = ("--data.root", copy)
    assert check(tmp_path / "out", *given) == 0
    rows = [line.split(",") for line in (tmp_path / "out" / "manifest.csv").read_text().splitlines()[1:]]
    train, test = (next(row[0] for row in rows if row[2] == split) for split in ("train", "test"))
    shutil.copy(copy / "images" / f"{train}.png", copy / "images" / f"{test}.png")
    assert check(tmp_path / "out", *given) == 0
    said = capsys.readouterr().out
    assert "1 pictures are in more than one split" in said and train in said and test in said


def test_a_manifest_of_other_data(copy: Path, tmp_path: Path, capsys: Said) -> None:
    assert check(tmp_path / "out", "--data.root", copy) == 0
    manifest = tmp_path / "out" / "manifest.csv"
    assert check(tmp_path / "two", "--data.root", copy, "--data.manifest", manifest) == 0
    assert (tmp_path / "two" / "manifest.csv").read_bytes() == manifest.read_bytes()
    gone = f"{names(copy)[0]}.png"
    (copy / "images" / gone).unlink()
    (copy / "masks" / gone).unlink()
    assert check(tmp_path / "three", "--data.root", copy, "--data.manifest", manifest) == 2
    assert "1 images are not in the data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root", "nowhere"], "nowhere: no such folder"),
        (["--data.rooot", "x"], "Did you mean root"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.root", "empty"], "the folder is empty"),
    ],
)
def test_nothing_to_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert check(tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("fkd: error: ") and message in said and not (tmp_path / "out").exists()


def test_help_reads_well(capsys: Said) -> None:
    assert main(["check-data", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("fkd check-data", "--config", "--data.root DIR", "--output", "contact sheet"):
        assert part in said
    assert "--trainer" not in said and "--model" not in said
