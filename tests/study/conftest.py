"""A small study on paper: two data sets, two teachers, and arms with and without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fkd_med.study import Arm, Difference, Images, Job, Preset, Selection, Study, jobs_of


@pytest.fixture
def study() -> Study:
    """Two data sets, two teachers; `plain` has no teacher, `taught` has."""
    return Study(
        data={"x": Images("Set X", "setx", "images/x"), "y": Images("Set Y", "sety", "images/y")},
        teachers={"small": "Small", "large": "Large"},
        arms={
            "plain": Arm("plain student", ["{data}/plain.yaml"], ["federated"]),
            "taught": Arm("taught student", ["{data}/{teacher}.yaml"], ["federated", "{teacher}_taught"]),
            "extra": Arm("extra", ["{data}/plain.yaml"], cells=["x/small"]),
        },
        differences=[Difference("gain", of="taught", over="plain")],
        presets={
            "few": Preset(
                seeds=[0, 1],
                settings={
                    "all": {"trainer": {"accelerator": "cpu"}, "data": {"init_args": {"image_size": 32}}},
                    "x": {"data": {"init_args": {"in_channels": 1}}},
                    "federated": {"federation": {"rounds": 3}},
                    "large_taught": {"model": {"store": "{output}/teachers"}},
                },
            )
        },
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the study's file, with its configurations and images."""
    for data in ("setx", "sety"):
        for name in ("plain", "small", "large"):
            (tmp_path / "configs" / data).mkdir(parents=True, exist_ok=True)
            (tmp_path / "configs" / data / f"{name}.yaml").write_text("data: data.yaml\n")
        (tmp_path / "configs" / data / "data.yaml").write_text("batch_size: 4\n")
    for data in ("x", "y"):
        (tmp_path / "images" / data).mkdir(parents=True)
    return tmp_path / "configs"


@pytest.fixture
def jobs(study: Study, base: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """All runs of the preset."""
    monkeypatch.chdir(base.parent)
    return jobs_of(study, study.presets["few"], base, Path("results"), Selection())
