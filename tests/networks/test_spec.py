"""A checkpoint's description of its network is hostile input: it is built, never obeyed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from fkd_med.errors import RunError
from fkd_med.networks import ResUNet, TransUNet, count_parameters, network_from_spec

UNET = {"class_path": "segmentation_models_pytorch.Unet", "init_args": {"encoder_name": "mobilenet_v2", "classes": 2}}


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where smp or timm would fetch weights or configurations."""

    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise AssertionError("a download was asked for")

    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", refuse)
    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", refuse, raising=False)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)


def test_rebuilds_the_same_state_dict() -> None:
    network = network_from_spec({"class_path": "fkd_med.networks.ResUNet", "init_args": {"width": 4, "classes": 2}})
    assert isinstance(network, ResUNet)
    network.load_state_dict(ResUNet(width=4, classes=2).state_dict())


def test_init_args_may_be_missing() -> None:
    assert isinstance(network_from_spec({"class_path": "torch.nn.Identity"}), nn.Identity)


@pytest.mark.parametrize("weights", ["imagenet", None, "left out"])
def test_weights_are_never_downloaded(weights: str | None) -> None:
    given = {} if weights == "left out" else {"encoder_weights": weights}  # smp's default is imagenet
    network = network_from_spec({**UNET, "init_args": {**UNET["init_args"], **given}})  # type: ignore[dict-item]
    assert isinstance(network, smp.Unet)


def test_pretrained_is_switched_off() -> None:
    arguments = {"img_size": 32, "pretrained": True, "trunk_args": {"depth": 1, "embed_dim": 48, "num_heads": 3}}
    with torch.device("meta"):
        network = network_from_spec({"class_path": "fkd_med.networks.TransUNet", "init_args": arguments})
    assert isinstance(network, TransUNet)


def test_dict_kwargs_of_jsonargparse_are_used() -> None:
    spec = {
        "class_path": "segmentation_models_pytorch.Unet",
        "init_args": {"encoder_name": "tu-resnet10t"},
        "dict_kwargs": {"drop_path_rate": 0.5},
    }
    assert any(isinstance(m, timm.layers.DropPath) for m in network_from_spec(spec).modules())


class Wrapper(nn.Module):
    """Holds a network and a list of networks."""

    def __init__(self, inner: nn.Module, more: list[nn.Module], options: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.more, self.options = inner, nn.ModuleList(more), options


def test_nested_specs() -> None:
    inner = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    arguments = {"inner": inner, "more": [inner, inner], "options": {"depth": 2}}
    spec = {"class_path": f"{__name__}.Wrapper", "init_args": arguments}
    with pytest.raises(RunError, match="not in a package"):
        network_from_spec(spec)
    network = network_from_spec(spec, trusted_packages=[__name__])
    assert count_parameters(network) == 3 * 9
    assert isinstance(network, Wrapper) and network.options == {"depth": 2}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os.system", "not in a package that a checkpoint may name"),
        ("timm_evil.Network", "not in a package"),
        ("torch.load", "not in a package"),
        ("torch.nnx.Linear", "not in a package"),
        ("Linear", "not in a package"),
        ("", "not in a package"),
        ("torch.nn.functional.relu", "not a torch.nn.Module class"),
        ("segmentation_models_pytorch.create_model", "not a torch.nn.Module class"),
        ("torchvision.models.segmentation.fcn_resnet50", "not a torch.nn.Module class"),
        ("fkd_med.networks.resunet.torch.hub.load", "cannot be imported"),
        ("fkd_med.networks.NoNet", "cannot be imported"),
    ],
)
def test_only_module_classes_of_allowed_packages(path: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        network_from_spec({"class_path": path, "init_args": {}})


def test_a_foreign_package_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = tmp_path / "witness"
    (tmp_path / "hostile_package.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in (
        {"class_path": "hostile_package.Network"},
        {"class_path": "torch.nn.Sequential", "init_args": {"a": {"class_path": "hostile_package.Network"}}},
    ):
        with pytest.raises(RunError, match=r"hostile_package.*trusted_packages"):
            network_from_spec(spec)
    assert not witness.exists() and "hostile_package" not in sys.modules


@pytest.mark.parametrize("name", ["tu-hf-hub:someone/something", "tu-local-dir:/nowhere/x", "https://example.org/x.pt"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(RunError, match="nothing is fetched"):
        network_from_spec({"class_path": "segmentation_models_pytorch.Unet", "init_args": {"encoder_name": name}})


@pytest.mark.parametrize(
    "spec",
    [
        None,
        "segmentation_models_pytorch.Unet",
        {"init_args": {}},
        {"class_path": 3},
        {"class_path": "torch.nn.Identity", "code": "x"},
        {"class_path": "torch.nn.Identity", "init_args": [1]},
        {"class_path": "torch.nn.Identity", "init_args": {1: 2}},
    ],
)
def test_malformed_specs_are_refused(spec: Any) -> None:
    with pytest.raises(RunError, match="The checkpoint"):
        network_from_spec(spec)


def test_arguments_of_another_version_are_named() -> None:
    with pytest.raises(RunError, match=r"ResUNet cannot be rebuilt: TypeError: .*depth"):
        network_from_spec({"class_path": "fkd_med.networks.ResUNet", "init_args": {"depth": 3}})


def test_count_parameters_counts_bare_and_frozen_ones_and_shared_ones_once() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network.scale = nn.Parameter(torch.ones(5), requires_grad=False)
    network.append(network[0])
    assert count_parameters(network) == 8 + 4 + 5
