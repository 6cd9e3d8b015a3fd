"""The templates of the corpus: a data set, a run that was killed in its second round, its teachers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from fkd_med.cli import main
from fkd_med.federated.loop import FederatedLoop

SIZE = 32


def write_data(folder: Path) -> None:
    """Write 2 hospitals with 3 patients of 2 images each: a bright disc on noise."""
    numbers = np.random.default_rng(0)
    rows = ["id,client,patient"]
    for number in range(12):
        name, client = f"{'ab'[number // 6]}{number % 6}", f"hospital-{'ab'[number // 6]}"
        mask = np.zeros((SIZE, SIZE), np.uint8)
        cv2.circle(mask, tuple(int(n) for n in numbers.integers(8, 24, 2)), 6, 255, -1)
        image = numbers.integers(0, 120, (SIZE, SIZE, 3), np.uint8) + (mask // 2)[..., None]
        for part, pixels in (("images", image), ("masks", mask)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / part / f"{name}.png"), pixels)
        rows.append(f"{name},{client},{client}-p{number % 6 // 2}")
    (folder / "clients.csv").write_text("\n".join(rows) + "\n")


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configuration of a pooled training and of a federated distillation."""
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 5.0e-3}}
    student = {"network": {"class_path": "fkd_med.networks.SlimUNet"}, "optimizer": optimizer}
    teacher = {"class_path": "fkd_med.networks.ResUNet", "init_args": {"width": 4}}
    stage = {"store": str(folder / "teachers"), "epochs": 1}
    stage["module"] = {
        "class_path": "fkd_med.modules.SegmentationModule",
        "init_args": {"network": teacher, "optimizer": optimizer},
    }
    common = {
        "seed_everything": 7,
        "data": {"root": str(folder / "data"), "image_size": SIZE, "batch_size": 2},
        "trainer": {"accelerator": "cpu", "logger": False},
    }
    plain = {"class_path": "fkd_med.modules.SegmentationModule", "init_args": student}
    distilled = student | {"teacher": {"class_path": "fkd_med.federated.TeacherStage", "init_args": stage}}
    model = {"class_path": "fkd_med.modules.DistillationModule", "init_args": distilled}
    federation = {"rounds": 2, "local_epochs": 1, "local_baseline": False, "threads": 1}
    run = common | {"model": model, "federation": federation, "run_dir": str(folder / "runs/run")}
    trainer = common["trainer"] | {"max_epochs": 1}
    return {"plain": common | {"model": plain, "trainer": trainer}, "run": run}


class PowerCut(Exception):
    """Ends a run as a kill would."""


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the templates; read it, never write in it."""
    folder = tmp_path_factory.mktemp("templates")
    write_data(folder / "data")
    for name, configuration in configurations(folder).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    one_round = FederatedLoop.advance

    def advance(loop: FederatedLoop) -> None:
        if loop.round == 2:
            raise PowerCut
        one_round(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FederatedLoop, "advance", advance)
        assert main(["fit", "--config", str(folder / "run.yaml")]) == 1
    run = folder / "runs/run"
    assert (run / "checkpoints/last.ckpt").is_file()
    (run / "student.ckpt").write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    gc.collect()
    gc.freeze()  # collections would walk through all that is imported, a hundred times
    yield folder
    gc.unfreeze()
