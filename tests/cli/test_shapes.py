"""What the data decide of a network nobody has to give: neither a number nor, in the network's own code, a default."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from torch import nn

from building import CONFIGS, Parsed
from fkd_med.cli import main
from fkd_med.errors import ConfigError

CONFIG = CONFIGS / "folder" / "fedavg_student.yaml"
OWN = """
from torch import Tensor, nn


class Own(nn.Module):
    def __init__(self, in_channels: int, classes: int, width: int = 4) -> None:
        super().__init__()
        if width > 8:
            raise ValueError("width must be at most 8")
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
"""


class Sized(nn.Module):
    """Wants to know all of them."""

    def __init__(self, in_channels: int, classes: int, img_size: int) -> None:
        super().__init__()


class Derived(Sized):
    """Hands on what it does not know itself."""

    def __init__(self, extra: int = 1, **kwargs: int) -> None:
        super().__init__(**kwargs)


class Fixed(Sized):
    """Knows one of them itself."""

    def __init__(self, **kwargs: int) -> None:
        super().__init__(in_channels=3, **kwargs)


class Preset(Sized):
    """Has defaults, which give way."""

    def __init__(self, in_channels: int = 3, classes: int = 1, img_size: int = 224) -> None:
        super().__init__(in_channels, classes, img_size)


class FurtherPreset(Preset):
    """Hands on what has defaults."""

    def __init__(self, extra: int = 1, **kwargs: int) -> None:
        super().__init__(**kwargs)


def function(in_channels: int, classes: int) -> nn.Module:
    return nn.Conv2d(in_channels, classes, 1)


def settings(name: str, *options: str) -> dict[str, int]:
    """Return the settings that a network of this file gets where images of 64 px have one channel and four classes."""
    data = ("--data.in_channels=1", "--data.classes=4", "--data.image_size=64")
    arguments = ["fit", "--config", str(CONFIG), *data, f"--model.network={__name__}.{name}", *options]
    with ExitStack() as stack:
        return vars(Parsed(arguments, stack).given.model.init_args.network.init_args)


def test_what_a_network_leaves_open_follows_from_the_data() -> None:
    three = {"in_channels": 1, "classes": 4, "img_size": 64}
    assert settings("Sized") == settings("Preset") == three
    assert settings("Derived") == settings("FurtherPreset") == {"extra": 1, **three}
    assert settings("Fixed") == {"classes": 4, "img_size": 64}


@pytest.mark.parametrize("name", ["Sized", "FurtherPreset"])
def test_another_number_than_the_data_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model.network.classes is 3, but the data have classes 4"):
        settings(name, "--model.network.classes=3")


def test_a_function_is_no_network() -> None:
    with pytest.raises(ConfigError, match=r"model.network is .*function, a function, and checkpoints"):
        settings("function")


@pytest.fixture
def own(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny configuration with an own network as student and teacher, whose channels have no default."""
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((tiny_run.parents[1] / "tiny.yaml").read_text())
    for module in (config["model"], config["model"]["init_args"]["teacher"]["init_args"]["module"]):
        module["init_args"]["network"] = {"class_path": "own_networks.Own"}
    config["model"]["init_args"]["teacher"]["init_args"]["store"] = str(tmp_path / "teachers")
    config["federation"] |= {"rounds": 1, "local_baseline": False}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config | {"run_dir": str(tmp_path / "run")}))
    return tmp_path / "own.yaml"


def test_an_own_network_trains_and_comes_again(own: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through a printed configuration, a resume, a test of the run and a prediction."""
    assert main(["fit", "--config", str(own), "--print_config"]) == 0
    printed = own.with_name("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    run = own.parent / "run"
    for options in ((), ("--ckpt_path=last", "--test_after_fit=false")):
        assert main(["fit", "--config", str(printed), *options]) == 0
    assert main(["test", "--run_dir", str(run)]) == 0
    images = own.parent / "images"
    images.mkdir()
    shutil.copy(next((tiny_run.parents[1] / "phantoms" / "images").iterdir()), images)
    predict = ["predict", f"--ckpt_path={run / 'student.ckpt'}", f"--data.images={images}", "--device=cpu"]
    assert main([*predict, f"--output={own.parent / 'out'}", "--trusted_packages", "own_networks"]) == 0


def test_a_constructor_has_the_word(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(own), "--model.network.width=9"]) == 2
    error = capsys.readouterr().err
    assert "own_networks.Own cannot be built (ValueError: width must be at most 8)." in error
    assert error.count("\n") == 1
