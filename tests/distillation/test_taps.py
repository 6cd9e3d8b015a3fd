"""Taps: any module of any network by its path, what it returned and nothing else, and errors that teach."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from fkd_med.distillation import Taps
from fkd_med.distillation.taps import crop_to_image, tokens_as_map
from fkd_med.errors import ConfigError
from fkd_med.losses import LOGITS
from fkd_med.networks import ResUNet, SlimUNet, TransUNet


class Net(nn.Module):
    """Two layers, a pair and tokens, so that each kind of tap is there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.pair = Pair()
        self.tokens = Tokens()
        self.unused = nn.Conv2d(3, 4, 1)
        self.number = Number()
        self.head = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, _ = self.pair(x)
        self.tokens(x)
        self.number(x)
        return self.head(first)


class Pair(nn.Module):
    """Two maps."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x + 1, x * 2]


class Tokens(nn.Module):
    """Tokens behind a class token."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


class Number(nn.Module):
    """No map at all."""

    def forward(self, x: Tensor) -> float:
        return float(x.shape[0])


SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 4}
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_taps_return_what_the_modules_returned() -> None:
    network = Net()
    taps = Taps(network, ["stem", "pair[1]", "pair[-2]", "tokens", LOGITS])
    maps = taps(IMAGE)
    stem = network.stem(IMAGE)
    assert set(maps) == {LOGITS, "stem", "pair[1]", "pair[-2]", "tokens"}
    assert torch.equal(maps[LOGITS], network(IMAGE))
    assert torch.equal(maps["stem"], stem) and torch.equal(maps["tokens"], stem)
    assert torch.equal(maps["pair[1]"], stem * 2) and torch.equal(maps["pair[-2]"], stem + 1)


@pytest.mark.parametrize(
    ("make", "path", "shape"),
    [
        (lambda: ResUNet(width=4), "bridge", (32, 8, 8)),
        (lambda: SlimUNet(), "decoder.0", (30, 4, 4)),
        (lambda: TransUNet(img_size=64, trunk_args=SMALL), "trunk.norm", (48, 4, 4)),
        (lambda: smp.Unet("resnet18", encoder_weights=None), "encoder.layer4", (512, 2, 2)),
        (lambda: smp.Unet("resnet18", encoder_weights=None), "encoder[3]", (128, 8, 8)),
        (lambda: smp.Unet("resnet18", encoder_weights=None), "decoder.blocks.0", (256, 4, 4)),
        (lambda: smp.Unet("tu-mobilenetv3_small_050", encoder_weights=None), "encoder.model.blocks.0", (8, 16, 16)),
        (lambda: smp.Segformer("mit_b0", encoder_weights=None), "encoder.norm4", (256, 2, 2)),
    ],
)  # fmt: skip
def test_networks_of_every_family(make, path, shape) -> None:
    assert Taps(make().eval(), [path])(torch.randn(1, 3, 64, 64))[path].shape == (1, *shape)


def test_gradients_flow_through_a_tap() -> None:
    network = Net()
    Taps(network, ["stem"])(IMAGE)["stem"].sum().backward()
    assert network.stem.weight.grad is not None and network.head[1].weight.grad is None


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_maps_at_every_step() -> None:
    network = SlimUNet()
    paths = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)][:2]
    image = torch.randn(2, 3, 32, 32)
    network.eval()
    plain = Taps(copy.deepcopy(network), paths)
    compiled = Taps(torch.compile(network, backend="aot_eager"), paths)
    for step in range(3):
        expected, found = plain(image + step), compiled(image + step)
        for path in [LOGITS, *paths]:
            torch.testing.assert_close(found[path], expected[path], rtol=1e-4, atol=1e-5)
    found[paths[0]].sum().backward()
    assert any(p.grad is not None for p in network.parameters())


def test_nothing_is_kept_between_steps_nor_captured_outside() -> None:
    network = Net()
    taps = Taps(network, ["stem"])
    maps = taps(IMAGE)
    kept = weakref.ref(maps["stem"])
    del maps
    network(IMAGE)
    gc.collect()
    assert kept() is None and not taps._captured.outputs


def test_a_failing_forward_leaves_nothing_behind() -> None:
    network = Net()
    taps = Taps(network, ["stem"])
    with pytest.raises(RuntimeError):
        taps(torch.randn(1, 5, 16, 16))
    assert not taps._captured.outputs and not taps._captured.open


def test_copies_capture_for_themselves() -> None:
    owner = nn.Module()
    owner.network = Net()
    owner.taps = Taps(owner.network, ["stem"])
    copied = copy.deepcopy(owner)
    maps = copied.taps(IMAGE)
    assert torch.equal(maps["stem"], copied.network.stem(IMAGE)) and not owner.taps._captured.outputs


def test_removed_hooks_are_gone() -> None:
    network = Net()
    Taps(network, ["stem"]).remove()
    assert not network.stem._forward_hooks


def test_maps_of_a_padded_image_are_of_the_image_alone() -> None:
    class Stride8(nn.Module):
        size_divisor = 8

        def __init__(self) -> None:
            super().__init__()
            self.down = nn.AvgPool2d(4)
            self.up = nn.Upsample(scale_factor=4, mode="bilinear")

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    side = 20  # seen as 24
    ramp = ((torch.arange(side) + 0.5) / side).expand(1, 1, side, side)
    found = Taps(Stride8(), ["down"])(ramp)["down"]
    assert found.shape == (1, 1, 5, 5)
    torch.testing.assert_close(found[0, 0, 0], (torch.arange(5) + 0.5) / 5, atol=0.03, rtol=0)


def test_crop_samples_the_share_of_the_image() -> None:
    ramp = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    assert torch.equal(crop_to_image(ramp, (32, 32), (32, 32)), ramp)
    torch.testing.assert_close(crop_to_image(ramp, (16, 32), (32, 32)), ramp[:, :, :4])
    torch.testing.assert_close(crop_to_image(ramp, (32, 16), (32, 32)), ramp[..., :4])


def test_tokens_that_are_no_square_stay() -> None:
    assert tokens_as_map(torch.zeros(2, 7, 3), (8, 8)).shape == (2, 7, 3)
    assert tokens_as_map(torch.zeros(2, 16, 3), (8, 8)).shape == (2, 3, 4, 4)
    assert tokens_as_map(torch.zeros(2, 17, 3), (8, 8)).shape == (2, 3, 4, 4)
    assert tokens_as_map(torch.zeros(2, 16, 3), (8, 32)).shape == (2, 3, 2, 8)


def test_channels_last_are_not_taken_for_rows() -> None:
    class Swin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(3, 1, 1)
            self.last = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.last(self.layer(x).movedim(1, -1))
            return self.head(x)

    with pytest.raises(ConfigError, match=r"returns \(2, 4, 4, 6\).*channels last"):
        Taps(Swin(), ["last"])(IMAGE)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("stam", "the teacher Net has no module 'stam' to tap; the nearest are stem"),
        ("head.7", r"head holds head\.0, head\.1|nearest are head\.[01]"),
        ("nothing.like.it", "it holds stem, pair, tokens"),
        ("pair", r"returns 2 things; tap one, pair\[0\] to pair\[1\]"),
        ("pair[2]", "asks for one of 2 things"),
        ("stem[0]", "returns one Tensor; tap it without"),
        ("unused", "did not run"),
        ("number", "needs a map"),
        ("stem[x]", "is no tap"),
        ("", "is no tap"),
    ],
)
def test_wrong_taps_are_explained(path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Taps(Net(), [path], "the teacher Net")(IMAGE)
