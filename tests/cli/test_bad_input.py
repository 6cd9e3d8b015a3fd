"""Bad input: one clear error that names the thing and the remedy, an exit code, and nothing half-written."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fkd_med.cli import main
from fkd_med.cli.hardware import check_accelerator
from fkd_med.cli.messages import user_error
from fkd_med.errors import ConfigError

Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny phantoms as a plain folder pair, with clients.csv."""
    copy = tmp_path / "set"
    shutil.copytree(tiny_run.parents[1] / "phantoms", copy)
    (copy / "phantoms.json").unlink()
    return copy


def fit(tiny_run: Path, tmp_path: Path, *options: str) -> int:
    """Run the tiny configuration with a run directory of its own."""
    config = tiny_run.parents[1] / "tiny.yaml"
    return main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), *options])


def images(folder: Path) -> list[Path]:
    return sorted((folder / "images").iterdir())


def no_masks(folder: Path) -> None:
    for path in sorted((folder / "masks").iterdir())[:7]:
        path.unlink()


def no_images(folder: Path) -> None:
    for path in images(folder)[:7]:
        path.unlink()


def empty_masks(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        cv2.imwrite(str(path), np.zeros((48, 48), np.uint8))


def other_size(folder: Path) -> None:
    cv2.imwrite(str(sorted((folder / "masks").iterdir())[0]), np.full((40, 48), 255, np.uint8))


def three_values(folder: Path) -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[:20], mask[20:40] = 255, 128
    cv2.imwrite(str(sorted((folder / "masks").iterdir())[0]), mask)


def truncated(folder: Path) -> None:
    path = images(folder)[0]
    path.write_bytes(path.read_bytes()[:200])


def two_splits(folder: Path) -> None:
    lines = (folder / "clients.csv").read_text().splitlines()
    header, rows = lines[0] + ",split", lines[1:]
    splits = ["train" if i % 2 else "test" for i in range(len(rows))]
    text = [f"{row},{split}" for row, split in zip(rows, splits, strict=True)]
    (folder / "clients.csv").write_text("\n".join([header, *text]))


def nothing(folder: Path) -> None:
    for name in ("images", "masks"):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()


CASES: dict[str, tuple[Change, tuple[str, ...], tuple[str, ...]]] = {
    "no such root": (lambda f: shutil.rmtree(f), (), ("set", "no such folder", "--data.root")),
    "empty folder": (nothing, (), ("no image", "data.root")),
    "image without mask": (no_masks, (), ("7", "on_missing")),
    "mask without image": (no_images, (), ("7", "on_missing")),
    "unreadable image": (truncated, (), (".png",)),
    "mask of another size": (other_size, (), ("48x40", "48x48")),
    "unexpected mask values": (three_values, (), ("128",)),
    "all masks empty": (empty_masks, (), ("empty",)),
    "patient in two splits": (two_splits, (), ("patient", "split")),
    "fewer images than a batch": (lambda f: None, ("--data.batch_size=64",), ("batch_size", "hospital-a", "64")),
    "more clients than patients": (
        lambda f: None,
        ("--data.partitioner=fkd_med.data.IID", "--data.partitioner.clients=40"),
        ("40", "patient"),
    ),
    "unknown client": (lambda f: None, ("--data.client=hospital-aa",), ("hospital-aa", "hospital-a")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_one_error_before_training(
    case: str, tiny_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, options, wanted = CASES[case]
    change(folder)
    code = fit(tiny_run, tmp_path, f"--data.root={folder}", "--data.layout=fkd_med.data.FolderPair", *options)
    output = capsys.readouterr()
    assert code == 2
    assert output.err.count("fkd: error:") == 1 and "Traceback" not in output.err
    assert all(word in output.err for word in wanted), output.err
    assert not (tmp_path / "run").exists()


def test_missing_masks_are_skipped_when_asked(
    tiny_run: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path.stem for path in images(folder)}
    no_masks(folder)
    left = {path.stem for path in (folder / "masks").iterdir()}
    options = ("--data.on_missing=skip", "--data.batch_size=2", "--federation.rounds=1")
    more = ("--data.layout=fkd_med.data.FolderPair", "--federation.local_baseline=false")
    assert fit(tiny_run, tmp_path, f"--data.root={folder}", *options, *more) == 0
    with open(tmp_path / "run" / "manifest.csv") as file:
        rows = list(csv.DictReader(file))
    assert (len(before), len(rows), {Path(row["id"]).stem for row in rows}) == (40, 33, left)
    (said,) = [record.getMessage() for record in caplog.records if "without mask" in record.getMessage()]
    assert said.startswith("Left out 7 images without mask: ") and f"{min(before - left)}.png" in said


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--data.rot=x",), ("'rot' is unknown", "root")),
        (("--fedration.rounds=3",), ("fedration", "federation")),
        (("--model.network.class_path=fkd_med.networks.ResUNett",), ("ResUNett", "ResUNet")),
        (("--federation.rounds=0",), ("rounds", "1 or more")),
        (("--federation.fraction=0",), ("fraction", "above 0")),
        (("--trainer.max_epochs=3",), ("max_epochs", "federation.rounds")),
        (("--trainer.strategy=ddp_spawn",), ("ddp_spawn", "ddp")),
        (("--trainer.accelerator=tpu",), ("trainer.accelerator is 'tpu'", "finds cpu", "`auto` or `cpu`")),
        (("--trainer.accelerator=cdua",), ("trainer.accelerator: there is no 'cdua'", "Did you mean cuda?")),
        (
            ("--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor",),
            ("LearningRateMonitor", "remove it"),
        ),
        (
            (
                "--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging",
                "--trainer.callbacks.swa_lrs=0.1",
            ),
            ("StochasticWeightAveraging", "client_callbacks"),
        ),
        (("--model.network.classes=3",), ("classes", "data.classes")),
        (("--model.losses.logit_kl.temperature=0",), ("temperature",)),
        (("--data.classes=-1",), ("fkd_med.networks.student.SlimUNet cannot be built", "negative dimension -1")),
        (
            ("--model.network=segmentation_models_pytorch.Unet", "--model.network.encoder_name=resnet19"),
            ("Unet cannot be built (KeyError", "Wrong encoder name `resnet19`"),
        ),
        (
            ("--model.network=segmentation_models_pytorch.Unet", "--model.network.encoder_weights=null"),
            ("Unet cannot be built", "null becomes the word None: write `encoder_weights: null` in a file"),
        ),
        (("--data.batch_size=1",), ("network (SlimUNet) at 32 pixels", "one image at a time", "data.batch_size to 2")),
        (("--ckpt_path=last",), ("no last checkpoint",)),
        (("--ckpt_path=nowhere.ckpt",), ("nowhere.ckpt", "does not exist")),
    ],
)
def test_bad_configuration_is_one_error(
    options: tuple[str, ...],
    wanted: tuple[str, ...],
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = fit(tiny_run, tmp_path, *options)
    output = capsys.readouterr()
    assert code == 2 and output.err.count("fkd: error:") == 1 and output.err.count("\n") == 1
    assert all(word in output.err for word in wanted), output.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("wanted", "advice"), [("gpu", True), ("cuda", True), ("mps", False)])
def test_an_accelerator_that_is_not_there(wanted: str, advice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CUDAAccelerator", "MPSAccelerator"):
        monkeypatch.setattr(f"lightning.pytorch.accelerators.{kind}.is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"trainer.accelerator is '{wanted}'.*it finds cpu.*`auto` or `cpu`") as error:
        check_accelerator(wanted)
    assert ("nvidia-smi" in str(error.value)) == advice
    for fine in ("auto", "cpu", None, {"class_path": "mine.Accelerator"}):
        check_accelerator(fine)
    with pytest.raises(ConfigError, match=r"there is no 'CPU'.*auto, cpu, cuda, gpu"):
        check_accelerator("CPU")
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.is_available", lambda: True)
    check_accelerator("gpu")


def test_an_existing_run_is_refused_and_stays(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny_run / "images.csv").read_bytes()
    assert main(["fit", "--config", str(tiny_run.parents[1] / "tiny.yaml")]) == 2
    error = capsys.readouterr().err
    assert "--ckpt_path last" in error and "--overwrite" in error
    assert (tiny_run / "images.csv").read_bytes() == before


def test_a_diverged_loss_names_client_round_and_batch(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = fit(tiny_run, tmp_path, "--model.optimizer.lr=1e30", "--federation.local_baseline=false")
    error = capsys.readouterr().err
    assert code == 3
    assert "hospital-a" in error and "round 1" in error and "batch" in error and "learning rate" in error


def test_a_single_value_in_a_teacher_or_a_network_of_ones_own_is_explained() -> None:
    try:
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    except ValueError as error:
        told = user_error(error)
    assert isinstance(told, ConfigError) and "data.batch_size to 2 or more" in str(told)


def test_pretrained_weights_without_a_network(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib.error

    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in this test")

    import huggingface_hub
    import segmentation_models_pytorch.encoders as encoders

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for name in ("hf_hub_download", "load_state_dict_from_url"):
        if hasattr(encoders, name):
            monkeypatch.setattr(encoders, name, offline)
    network = ("--model.network=segmentation_models_pytorch.Unet", "--model.network.encoder_name=resnet18")
    assert fit(tiny_run, tmp_path, *network, "--model.network.encoder_weights=imagenet") == 2
    assert "encoder_weights: null" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_command_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == 2
    assert "fkd fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "named"),
    [("--model", "model.network (Unet)"), ("--model.teacher.module", "model.teacher.module.network (Unet)")],
)
def test_student_and_teacher_are_tried_before_anything_is_written(
    key: str, named: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tmp_path / "network.yaml"
    arguments = "{encoder_name: mobileone_s0, encoder_weights: null, activation: sigmoid}"
    network.write_text(f"class_path: segmentation_models_pytorch.Unet\ninit_args: {arguments}\n")
    command = ["--config", str(tiny_run.parents[1] / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
    options = [f"{key}.network={network}", f"--model.teacher.store={tmp_path / 'teachers'}"]
    assert main(["fit", *command, *options]) == 2
    assert f"{named} ends in a sigmoid" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "teachers").exists()
