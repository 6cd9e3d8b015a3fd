"""What every student promises: the paper's bound, any size, a gradient everywhere, half precision, the same start."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fkd_med.errors import ConfigError
from fkd_med.losses import DiceCE
from fkd_med.networks import (
    PARAMETER_BOUND,
    AxialUNet,
    ContextUNet,
    LargeKernelUNet,
    SlimUNet,
    forward_padded,
    network_from_spec,
)
from slowly import slow_but

STUDENTS = [SlimUNet, LargeKernelUNet, AxialUNet, ContextUNet]
COUNTS = {  # of (in_channels, classes)
    SlimUNet: {(1, 1): 101_417, (1, 2): 101_430, (3, 2): 101_646},
    LargeKernelUNet: {(1, 1): 100_785, (1, 2): 100_794, (3, 2): 100_938},
    AxialUNet: {(1, 1): 101_833, (1, 2): 101_842, (3, 2): 101_986},
    ContextUNet: {(1, 1): 100_394, (1, 2): 100_407, (3, 2): 100_623},
}

every_student = pytest.mark.parametrize("student", STUDENTS, ids=lambda student: student.__name__)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    network(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@every_student
def test_parameters_are_the_documented_ones(student: type[nn.Module]) -> None:
    assert {shape: count(student(*shape)) for shape in COUNTS[student]} == COUNTS[student]


@every_student
@pytest.mark.parametrize(("in_channels", "classes"), itertools.product((1, 2, 3), (1, 2)))
def test_within_the_bound(student: type[nn.Module], in_channels: int, classes: int) -> None:
    assert count(student(in_channels=in_channels, classes=classes)) <= PARAMETER_BOUND == 102_553


@every_student
@pytest.mark.parametrize("size", [(50, 70), (5, 3), (33, 31), (96, 64)])
@torch.no_grad()
def test_any_size_comes_back(student: type[nn.Module], size: tuple[int, int]) -> None:
    assert forward_padded(student(2, 4), torch.randn(2, 2, *size)).shape == (2, 4, *size)


@every_student
def test_gradient_reaches_every_parameter(student: type[nn.Module]) -> None:
    """None is left out, as DistributedDataParallel asks, nor reached only by zeros."""
    torch.manual_seed(0)
    found = gradients(student(3, 2), torch.randn(2, 3, 64, 64))
    assert [name for name, gradient in found.items() if gradient is None or not gradient.any()] == []


@every_student
def test_one_image_trains(student: type[nn.Module]) -> None:
    """Batch norm needs two values per channel: one image of twice the divisor has four at the lowest level."""
    network = student()
    side = 2 * int(network.size_divisor)  # type: ignore[arg-type]
    found = gradients(network, torch.randn(1, 3, side, side))
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())


@every_student
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_finite_in_bfloat16(student: type[nn.Module], scale: float) -> None:
    torch.manual_seed(0)
    x = scale * torch.randn(2, 3, 64, 64)
    network = student()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    logits.float().square().mean().backward()
    assert logits.isfinite().all() and all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    with torch.no_grad():
        logits = network.eval().bfloat16()(x.bfloat16())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@every_student
def test_a_seed_makes_the_same_student(student: type[nn.Module]) -> None:
    def made(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return student().state_dict()

    first, again, other = made(0), made(0), made(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("student", slow_but([SlimUNet], STUDENTS), ids=lambda student: student.__name__)
def test_compiles_in_one_graph(student: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, x = student().eval(), torch.randn(1, 3, 32, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), network(x))


@every_student
def test_sees_the_whole_image(student: type[nn.Module]) -> None:
    """The logit in the middle of a 256-pixel image depends on all four edges."""
    torch.manual_seed(0)
    network = student(in_channels=1).eval()
    x = torch.rand(1, 1, 256, 256, requires_grad=True)
    network(x)[0, 0, 128, 128].backward()
    assert x.grad is not None
    for side in (0, 1):
        seen = x.grad[0, 0].abs().sum(dim=side).nonzero().flatten()
        assert seen.min() < 16 and seen.max() >= 240


@every_student
def test_overfits_a_few_blobs(student: type[nn.Module]) -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[10.0, 12.0], [20.0, 18.0], [14.0, 22.0], [21.0, 9.0]])
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    mask = ((grid[None] - centres[:, :, None, None]).square().sum(1) < 36).long()
    image = mask[:, None] * 0.8 + torch.randn(4, 1, 32, 32) * 0.5
    network, loss = student(in_channels=1), DiceCE()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss(network(image), mask).backward()
        optimizer.step()
    with torch.no_grad():
        found = network(image)[:, 0] > 0
    dice = 2 * (found & (mask == 1)).sum() / (found.sum() + mask.sum())
    assert dice > 0.9


# --- taps -----------------------------------------------------------------------------------------------------------


@every_student
def test_taps_halve_from_level_to_level(student: type[nn.Module]) -> None:
    """`encoder.i` is at 1/2^i of the size, the last of the decoder at full size, those before it at half the next."""
    network = student().eval()
    sides: dict[str, int] = {}
    for part in ("encoder", "decoder"):
        for name, module in network.get_submodule(part).named_children():
            module.register_forward_hook(
                lambda module, inputs, out, key=f"{part}.{name}": sides.update({key: out.shape[-1]})
            )
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    for level in range(len(network.encoder)):  # type: ignore[arg-type]
        assert sides[f"encoder.{level}"] == 64 // 2**level
    levels = len(network.decoder)  # type: ignore[arg-type]
    for level in range(levels):
        assert sides[f"decoder.{level}"] == 64 // 2 ** (levels - 1 - level)


@pytest.mark.parametrize(
    ("student", "tap", "channels"),
    [
        (SlimUNet, "decoder.2", 20),
        (LargeKernelUNet, "decoder.1", 20),
        (AxialUNet, "decoder.2", 32),
        (ContextUNet, "decoder.2", 20),
    ],
)
@torch.no_grad()
def test_quarter_tap_is_the_documented_one(student: type[nn.Module], tap: str, channels: int) -> None:
    network, seen = student().eval(), []
    network.get_submodule(tap).register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    network(torch.randn(1, 3, 64, 64))
    assert seen == [(1, channels, 16, 16)]


# --- one by one -----------------------------------------------------------------------------------------------------


def test_sizes_follow_the_arguments() -> None:
    small = LargeKernelUNet(1, 2, widths=(4, 8), kernels=(3, 5), expansion=2)
    assert small.size_divisor == 2 and small(torch.randn(2, 1, 6, 4)).shape == (2, 2, 6, 4)
    flat = AxialUNet(1, 2, widths=(4, 8, 12), kernel=5)
    assert flat.size_divisor == 4 and flat(torch.randn(2, 1, 8, 4)).shape == (2, 2, 8, 4)
    shallow = ContextUNet(1, 2, widths=(4, 8, 8), plain=1, dilations=(1, 3))
    assert shallow.size_divisor == 4 and shallow(torch.randn(2, 1, 8, 4)).shape == (2, 2, 8, 4)


def test_a_checkpoints_lists_rebuild_them() -> None:
    """Sizes come back from a checkpoint as lists."""
    spec = {"class_path": "fkd_med.networks.LargeKernelUNet", "init_args": {"widths": [4, 8], "kernels": [3, 5]}}
    assert count(network_from_spec(spec)) == count(LargeKernelUNet(widths=(4, 8), kernels=(3, 5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LargeKernelUNet(widths=(4, 8), kernels=(3,)), "LargeKernelUNet: 2 widths and 1 kernels"),
        (lambda: LargeKernelUNet(widths=(4, 8), kernels=(3, 4)), "LargeKernelUNet: kernel 4 is not odd"),
        (lambda: AxialUNet(kernel=6), "AxialUNet: kernel 6 is not odd"),
        (lambda: ContextUNet(widths=(4, 8, 8), plain=3), "ContextUNet: plain 3 of 3 levels; use 1 to 2"),
    ],
)
def test_sizes_that_do_not_fit_are_told(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_global_context_reaches_everywhere_at_once() -> None:
    """One far pixel changes every logit of the context student, also beyond all kernels."""
    torch.manual_seed(0)
    network = ContextUNet(in_channels=1).eval().double()
    x = torch.rand(1, 1, 512, 512, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] += 100
    with torch.no_grad():
        assert (network(changed) != network(x)).float().mean() > 0.99
