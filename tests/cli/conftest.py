"""One tiny federated run that the tests of all commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fkd_med.cli import main


def tiny_configuration(folder: Path) -> dict[str, object]:
    """Return a federated distillation of two phantom hospitals that takes seconds."""
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 5.0e-3}}
    return {
        "seed_everything": 7,
        "run_dir": str(folder / "runs" / "tiny"),
        "data": {
            "root": str(folder / "phantoms"),
            "layout": {
                "class_path": "fkd_med.data.Phantoms",
                "init_args": {"hospitals": 2, "images": 20, "size": 48},
            },
            "image_size": 32,
            "batch_size": 4,
        },
        "model": {
            "class_path": "fkd_med.modules.DistillationModule",
            "init_args": {
                "network": {"class_path": "fkd_med.networks.SlimUNet"},
                "optimizer": optimizer,
                "teacher": {
                    "class_path": "fkd_med.federated.TeacherStage",
                    "init_args": {
                        "store": str(folder / "teachers"),
                        "epochs": 1,
                        "module": {
                            "class_path": "fkd_med.modules.SegmentationModule",
                            "init_args": {
                                "network": {"class_path": "fkd_med.networks.ResUNet", "init_args": {"width": 4}},
                                "optimizer": optimizer,
                            },
                        },
                    },
                },
            },
        },
        # One thread: torch's threads wait for each other where cores are busy.
        "federation": {"rounds": 2, "local_epochs": 1, "local_baseline": True, "threads": 1},
        "trainer": {"accelerator": "cpu", "logger": False},
    }


@pytest.fixture(autouse=True)
def _fewer_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the overview of a run and not its six panels; `tiny_run` and the tests of pictures have them all."""
    monkeypatch.setattr("fkd_med.evaluation.pictures.panel", lambda *given: given[-1].touch())


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run: 2 hospitals, 2 rounds, with teachers and the local-only baseline.

    Read it, never write in it. Its configuration is ``tiny.yaml`` two folders up, its data ``phantoms`` there.
    """
    folder = tmp_path_factory.mktemp("tiny")
    configuration = tiny_configuration(folder)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    assert main(["fit", "--config", str(folder / "tiny.yaml"), "--debug"]) == 0
    return folder / "runs" / "tiny"
