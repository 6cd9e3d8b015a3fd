"""`fkd predict`: masks of the run's own quality, at the images' own size, and nothing lost or overwritten."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from fkd_med.checkpoints import read_checkpoint, write_checkpoint
from fkd_med.cli import main

Said = pytest.CaptureFixture[str]


def predict(ckpt: Path, *arguments: object) -> int:
    return main(["predict", "--ckpt_path", str(ckpt), "--device", "cpu", *map(str, arguments)])


def rows_of(run: Path, arm: str, model: str = "student") -> list[dict[str, str]]:
    with (run / "images.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test" and row["model"] == model]
    return [row for row in rows if row["arm"] == arm]


def dice(prediction: Path, truth: Path) -> float:
    ours, theirs = (np.asarray(Image.open(path)) for path in (prediction, truth))
    assert ours.shape == theirs.shape and set(np.unique(ours)) <= {0, 255}
    both, total = int(((ours > 0) & (theirs > 0)).sum()), int((ours > 0).sum() + (theirs > 0).sum())
    return 2 * both / total if total else 1.0


def threshold(path: Path, change: Callable[[dict[str, Any]], None] | None = None, classes: int = 1) -> Path:
    """Write a checkpoint whose network is one 1x1 convolution: class k is where the image is brighter than k/classes.

    So the mask of a picture with sharp steps is known by hand, whatever the working size.
    """
    logits = max(classes, 1)
    weight = torch.zeros(logits, 1, 1, 1)
    bias = torch.zeros(logits)
    if classes == 1:
        weight[0], bias[0] = 1.0, -0.5
    for k in range(classes if classes > 1 else 0):  # the lines k x - k^2 / (2 n) cross between k and k + 1
        weight[k], bias[k] = float(k), -k * k / (2 * (classes - 1))
    ours = {
        "version": 1,
        "network": {
            "class_path": "torch.nn.Conv2d",
            "init_args": {"in_channels": 1, "out_channels": logits, "kernel_size": 1},
        },
        "preprocessing": {
            "image_size": 16,
            "resize": "letterbox",
            "in_channels": 1,
            "mean": [0.0],
            "std": [1.0],
            "classes": classes,
            "class_values": [0, 255] if classes == 1 else [0, 7, 500],
        },
        "round": 1,
    }
    checkpoint = {"state_dict": {"network.weight": weight, "network.bias": bias}, "fkd_med": ours}
    if change is not None:
        change(checkpoint)
    write_checkpoint(checkpoint, path)
    return path


def grey(path: Path, pixels: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def half(height: int, width: int, bright: int = 255) -> NDArray[np.int64]:
    """Right half bright."""
    picture = np.zeros((height, width), dtype=np.int64)
    picture[:, width // 2 :] = bright
    return picture


def test_the_student_scores_as_the_run_said(tiny_run: Path, tmp_path: Path) -> None:
    masks = tiny_run.parents[1] / "phantoms" / "masks"
    assert predict(tiny_run / "student.ckpt", "--data.images", masks.parent / "images", "--output", tmp_path) == 0
    rows = rows_of(tiny_run, "federated")
    assert len(rows) == 8
    for row in rows:
        name = f"{row['id']}.png"
        assert dice(tmp_path / name, masks / name) == pytest.approx(float(row["dice"]), abs=1e-9), name
    assert len(list(tmp_path.rglob("*.png"))) == 40


def test_a_local_only_checkpoint_predicts_with_each_hospitals_own_network(
    tiny_run: Path, tmp_path: Path, capsys: Said
) -> None:
    local, root = tiny_run / "local", tiny_run.parents[1]
    best = next((local / "checkpoints").glob("best*.ckpt"))
    images = root / "phantoms" / "images"
    assert predict(best, "--data.images", images, "--output", tmp_path / "no") == 2
    assert "hospital-a, hospital-b: choose one with --client" in capsys.readouterr().err
    assert predict(best, "--data.images", images, "--output", tmp_path / "no", "--client", "hospital-B") == 2
    assert "did you mean 'hospital-b'?" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()

    assert predict(best, "--config", root / "tiny.yaml", "--output", tmp_path / "all") == 0
    assert predict(best, "--data.images", images, "--output", tmp_path / "a", "--client", "hospital-a") == 0
    rows = rows_of(tiny_run, "local-only")
    assert len(rows) == 8 == len(list((tmp_path / "all").rglob("*.png")))
    for row in rows:
        name = f"{row['id']}.png"
        mine, truth = tmp_path / "all" / row["client"] / name, images.parent / "masks" / name
        assert dice(mine, truth) == pytest.approx(float(row["dice"]), abs=1e-9)
        same = mine.read_bytes() == (tmp_path / "a" / name).read_bytes()
        assert same or row["client"] != "hospital-a"


def test_a_teacher_that_has_learned_back_predicts_as_the_run_said(tiny_run: Path, tmp_path: Path) -> None:
    """And those of ordinary distillation, which are as the store has them, are not copied into each run."""
    assert not list(tiny_run.rglob("teacher.ckpt"))
    config = yaml.safe_load((tiny_run.parents[1] / "tiny.yaml").read_text())
    config["model"]["class_path"] = "fkd_med.modules.MutualDistillationModule"
    config["federation"]["local_baseline"] = False
    (tmp_path / "mutual.yaml").write_text(yaml.safe_dump(config))
    run, masks = tmp_path / "run", tiny_run.parents[1] / "phantoms" / "masks"
    assert main(["fit", "--config", str(tmp_path / "mutual.yaml"), "--run_dir", str(run)]) == 0
    rows = rows_of(run, "", "teacher")
    assert len(rows) == 8
    for client in ("hospital-a", "hospital-b"):
        out, ckpt = tmp_path / client, run / "clients" / client / "teacher.ckpt"
        assert predict(ckpt, "--data.images", masks.parent / "images", "--output", out) == 0
        for row in rows:
            if row["client"] == client:
                name = f"{row['id']}.png"
                assert dice(out / name, masks / name) == pytest.approx(float(row["dice"]), abs=1e-9), name


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "config.yaml"])
def test_any_checkpoint_of_the_run_but_no_other_file(tiny_run: Path, tmp_path: Path, name: str, capsys: Said) -> None:
    image = next((tiny_run.parents[1] / "phantoms" / "images").glob("*.png"))
    code = predict(tiny_run / name, "--data.images", image, "--output", tmp_path / "out")
    assert code == (0 if name.endswith("ckpt") else 2)
    assert [path.name for path in tmp_path.rglob("*.png")] == ([image.name] if code == 0 else [])
    assert code == 0 or "is not a checkpoint" in capsys.readouterr().err


def test_a_plain_run_needs_no_federation(tiny_run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((tiny_run.parents[1] / "tiny.yaml").read_text())
    del config["federation"]
    config["model"] = config["model"]["init_args"]["teacher"]["init_args"]["module"]
    config |= {"run_dir": str(tmp_path / "run"), "trainer": config["trainer"] | {"max_epochs": 1}}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "plain.yaml")]) == 0
    images = tiny_run.parents[1] / "phantoms" / "images"
    for name in ("student.ckpt", "checkpoints/last.ckpt"):
        assert predict(tmp_path / "run" / name, "--data.images", images, "--output", tmp_path / name) == 0
    with (tmp_path / "run" / "images.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    assert len(rows) == 8
    for row in rows:
        png = f"{row['id']}.png"
        ours = dice(tmp_path / "student.ckpt" / png, images.parent / "masks" / png)
        assert ours == pytest.approx(float(row["dice"]), abs=1e-9)


def test_a_turned_photograph_gives_an_upright_mask(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise: left becomes top
    (tmp_path / "in").mkdir()
    Image.fromarray(half(64, 32).astype(np.uint8)).save(tmp_path / "in" / "a.jpg", exif=exif, quality=95)
    assert predict(threshold(tmp_path / "x.ckpt"), "--data.images", tmp_path / "in", "--output", tmp_path / "out") == 0
    mask = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert mask.shape == (32, 64) and not mask[:12].any() and (mask[20:] == 255).all()


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(40, 120), (121, 32), (6, 8), (48, 48)])
def test_geometry_is_undone(tmp_path: Path, resize: str, height: int, width: int) -> None:
    def use(checkpoint: dict[str, Any]) -> None:
        checkpoint["fkd_med"]["preprocessing"]["resize"] = resize

    ckpt = threshold(tmp_path / "x.ckpt", use)
    for turned, picture in (("a", half(height, width)), ("b", half(width, height).T)):  # right half, lower half
        grey(tmp_path / "in" / f"{turned}.png", picture)
    assert predict(ckpt, "--data.images", tmp_path / "in", "--output", tmp_path / "out") == 0
    for turned, truth in (("a", half(height, width)), ("b", half(width, height).T)):
        mask = np.asarray(Image.open(tmp_path / "out" / f"{turned}.png"))
        assert mask.shape == truth.shape
        # Exact but for the width of one working pixel at the step.
        assert (mask != truth).mean() <= 1 / 16
        along = mask[mask.shape[0] // 2] if turned == "a" else mask[:, mask.shape[1] // 2]
        step = len(along) / 16
        assert abs(int((along == 0).sum()) - len(along) / 2) <= max(1, step)


def test_classes_get_their_training_values_in_sixteen_bits(tmp_path: Path) -> None:
    picture = np.repeat(np.array([0, 128, 255]), 16)[None].repeat(48, axis=0)
    grey(tmp_path / "in" / "a.png", picture)
    ckpt = threshold(tmp_path / "x.ckpt", classes=3)
    assert predict(ckpt, "--data.images", tmp_path / "in", "--output", tmp_path / "out", "--overlay", "true") == 0
    mask = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert mask.dtype != np.uint8 and mask[24, [4, 24, 44]].tolist() == [0, 7, 500]
    overlay = np.asarray(Image.open(tmp_path / "out" / "a_overlay.png"))
    assert overlay.ndim == 3 and overlay.shape[0] % 48 == 0
    tints = [tuple(overlay[overlay.shape[0] // 2, x * overlay.shape[1] // 48]) for x in (4, 24, 44)]
    assert tints[0] == (0, 0, 0) and len(set(tints)) == 3


def test_subfolders_suffixes_and_odd_files(tmp_path: Path, capsys: Said) -> None:
    for name in ("x/a.png", "x/a.bmp", "x/y/a.png", "B c.png", ".hidden/z.png"):
        grey(tmp_path / "in" / name, half(20, 20))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    ckpt, out = threshold(tmp_path / "x.ckpt"), tmp_path / "in" / "out"
    assert predict(ckpt, "--data.images", tmp_path / "in", "--output", out) == 0
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert made == ["B c.png", "x/a.bmp.png", "x/a.png.png", "x/y/a.png"]
    assert "2 images share a name" in capsys.readouterr().out
    # Again: the first run's masks are no new images, and are not replaced unasked.
    assert predict(ckpt, "--data.images", tmp_path / "in", "--output", out) == 2
    assert "4 files exist already" in capsys.readouterr().err
    assert predict(ckpt, "--data.images", tmp_path / "in", "--output", out, "--overwrite") == 0


def test_bad_images_cost_only_themselves(tmp_path: Path, capsys: Said) -> None:
    for number in range(9):
        grey(tmp_path / "in" / f"{number}.png", half(20, 30))
    (tmp_path / "in" / "4.png").write_bytes((tmp_path / "in" / "4.png").read_bytes()[:60])
    (tmp_path / "in" / "7.png").write_bytes(b"")
    (tmp_path / "in" / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM")
    ckpt = threshold(tmp_path / "x.ckpt")
    assert predict(ckpt, "--data.images", tmp_path / "in", "--output", tmp_path / "out", "--batch_size", 2) == 2
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["0", "1", "2", "3", "5", "6", "8"]
    said = capsys.readouterr()
    assert "7 masks in" in said.out and "3 images were passed over; the other 7 are done" in said.err
    for part in ("4.png: damaged", "7.png: the file is empty", "scan.dcm: DICOM is not read"):
        assert part in said.err


def test_linked_folders_and_dicom_without_a_suffix(tmp_path: Path, capsys: Said) -> None:
    grey(tmp_path / "in" / "nord" / "a.png", half(20, 30))
    grey(tmp_path / "disk" / "b.png", half(20, 30))
    for name, target in (("west", tmp_path / "disk"), ("again", tmp_path / "in"), ("gone", tmp_path / "none")):
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "disk" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    out = tmp_path / "out"
    assert predict(threshold(tmp_path / "x.ckpt"), "--data.images", tmp_path / "in", "--output", out) == 2
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == ["nord/a.png", "west/b.png"]
    said = capsys.readouterr().err
    assert "2 images were passed over" in said and "west/IM0001: DICOM is not read" in said and "gone: a link" in said


def test_input_images_are_never_overwritten(tmp_path: Path, capsys: Said) -> None:
    image = grey(tmp_path / "in" / "a.png", half(20, 30))
    before = image.read_bytes()
    ckpt = threshold(tmp_path / "x.ckpt")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for source in (tmp_path / "in", image, tmp_path / "link"):
        assert predict(ckpt, "--data.images", source, "--output", tmp_path / "in", "--overwrite") == 2
        assert "--output" in capsys.readouterr().err
    grey(tmp_path / "in" / "a_overlay.png", half(20, 30))
    arguments = ("--data.images", tmp_path / "in", "--output", tmp_path / "out", "--overlay", "true")
    assert predict(ckpt, *arguments) == 2 and "written to one file" in capsys.readouterr().err
    assert image.read_bytes() == before and not (tmp_path / "out").exists()


def _drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(checkpoint: dict[str, Any]) -> None:
        inside = checkpoint
        for key in keys[:-1]:
            inside = inside[key]
        inside[keys[-1]] = None

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("fkd_med"), "does not say which network it holds"),
        (_drop("fkd_med", "network"), "module was built in Python"),
        (_drop("fkd_med", "preprocessing"), "does not say how images were prepared"),
        (lambda c: c["fkd_med"]["preprocessing"].pop("image_size"), "its preprocessing cannot be used"),
        (lambda c: c["state_dict"].pop("network.bias"), "do not belong to the network"),
        (lambda c: c["fkd_med"]["network"].update(class_path="os.system"), "trusted_packages"),
    ],
)
def test_checkpoints_that_cannot_be_used(
    tmp_path: Path, capsys: Said, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    grey(tmp_path / "in" / "a.png", half(20, 30))
    ckpt = threshold(tmp_path / "x.ckpt", change)
    assert predict(ckpt, "--data.images", tmp_path / "in", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("fkd: error: ") and message in said and not (tmp_path / "out").exists()


def test_own_networks_are_built_only_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    (tmp_path / "my_networks.py").write_text("from torch.nn import Conv2d as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    grey(tmp_path / "in" / "a.png", half(20, 30))
    ckpt = threshold(tmp_path / "x.ckpt", lambda c: c["fkd_med"]["network"].update(class_path="my_networks.Mine"))
    arguments = ("--data.images", tmp_path / "in", "--output", tmp_path / "out")
    assert predict(ckpt, *arguments) == 2 and "give --trusted_packages my_networks." in capsys.readouterr().err
    assert predict(ckpt, *arguments, "--trusted_packages", "other", "my_networks") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.images", "nowhere"], "no such folder or file"),
        (["--data.images", "empty"], "no image (PNG, JPEG, TIFF, BMP) in it"),
        ([], "either --data.images"),
        (["--data.images", "empty", "--config", "x.yaml"], "either --data.images"),
        (["--data.images", "empty", "--data.root", "y"], "belongs to --config"),
        (["--data.images", "full", "--batch_size", "0"], "--batch_size 0"),
        (["--data.images", "full", "--client", "a"], "is one network for all"),
        (["--data.image", "full", "--folder", "a"], "folder"),
    ],
)
def test_arguments_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.yaml").write_text("{}")
    grey(tmp_path / "full" / "a.png", half(20, 30))
    assert predict(threshold(tmp_path / "x.ckpt"), *arguments, "--output", "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("fkd: error: ") and message in said and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: Said) -> None:
    grey(tmp_path / "in" / "a.png", half(20, 30))
    given = ("--data.images", tmp_path / "in", "--output", tmp_path / "out", "--device", "cuda")
    assert predict(threshold(tmp_path / "x.ckpt"), *given) == 2
    assert "no CUDA GPU can be used here" in capsys.readouterr().err


def test_checkpoints_hold_no_teacher(tiny_run: Path) -> None:
    names = read_checkpoint(tiny_run / "student.ckpt")["state_dict"]
    assert names and all(name.startswith("network.") for name in names)


def test_help_reads_well(capsys: Said) -> None:
    assert main(["predict", "--help"]) == 0
    said = capsys.readouterr().out
    for part in (
        "fkd predict",
        "--ckpt_path",
        "--data.images",
        "--overlay",
        "{auto,cpu,cuda}",
        "values of the training",
    ):
        assert part in said
