"""Matching: which of two maps is brought to the other's size, and cached maps through flips, turns and scalings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fkd_med.distillation import match
from fkd_med.distillation.matching import resized, sampled
from fkd_med.errors import ConfigError
from fkd_med.losses import CWD, AttentionTransfer, Pixels

PIXELS = Pixels(torch.zeros(2, 16, 16, dtype=torch.long), 2)


def maps(channels: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(seed))


def grid(side: int) -> Tensor:
    """Coordinates of an image that was not moved (2, 3, side, side)."""
    centres = (2 * torch.arange(side) + 1) / side - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).expand(2, 3, side, side)


@pytest.mark.parametrize(("resize", "side"), [("student", 8), ("teacher", 4)])
def test_the_term_says_who_is_resized(resize: str, side: int) -> None:
    student, teacher = maps(3, 8), maps(5, 4)
    ours, theirs, pixels = match(AttentionTransfer(resize=resize), student, teacher, PIXELS)
    assert ours.shape[2:] == theirs.shape[2:] == pixels.mask.shape[1:] == (side, side)
    kept, given = (ours, student) if resize == "student" else (theirs, teacher)
    assert torch.equal(kept, given)


def test_no_resizing_is_refused_or_not_needed() -> None:
    with pytest.raises(ConfigError, match=r"student's map is \(8, 8\) and the teacher's \(4, 4\)"):
        match(CWD(resize="none"), maps(3, 8), maps(3, 4), PIXELS)
    assert torch.equal(match(CWD(resize="none"), maps(3, 8), maps(3, 8, 1), PIXELS)[1], maps(3, 8, 1))


def test_a_connector_is_applied_to_the_student() -> None:
    layer = nn.Conv2d(3, 5, 1)
    ours, theirs, _ = match(AttentionTransfer(), maps(3, 8), maps(5, 8), PIXELS, None, layer)
    assert torch.equal(ours, layer(maps(3, 8))) and torch.equal(theirs, maps(5, 8))


@pytest.mark.parametrize(("side", "size"), [(16, 16), (4, 16), (16, 4), (8, 16), (5, 16), (16, 8)])
def test_cached_maps_of_an_unmoved_image_are_what_a_live_teacher_gives(side: int, size: int) -> None:
    teacher = maps(3, side)
    found = sampled(teacher.half(), grid(16), (size, size))
    torch.testing.assert_close(found, resized(teacher, (size, size)), atol=4e-3, rtol=0)


@pytest.mark.parametrize("turn", [lambda t: t.flip(-1), lambda t: t.flip(-2), lambda t: t.rot90(1, (-2, -1))])
def test_flips_and_turns_of_cached_maps_are_exact(turn) -> None:
    teacher, student = maps(3, 16), maps(3, 16, 1)
    _, theirs, pixels = match(CWD(), student, teacher, PIXELS, turn(grid(16)))
    torch.testing.assert_close(theirs, turn(teacher), atol=1e-5, rtol=0)
    assert pixels.valid is not None and pixels.valid.all()


def test_a_crop_that_is_enlarged_shows_the_enlarged_map() -> None:
    smooth = F.interpolate(maps(1, 4), size=(16, 16), mode="bicubic", align_corners=False)
    cropped = F.interpolate(grid(16)[:, :, 4:12, 4:12], size=(16, 16), mode="bilinear", align_corners=False)
    found = sampled(smooth, cropped, (16, 16))
    expected = F.interpolate(smooth[:, :, 4:12, 4:12], size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-4, rtol=0)


def test_pixels_from_outside_the_image_are_invalid_at_every_resolution() -> None:
    coordinates = grid(16).clone()
    coordinates[:, 2, :, 13:] = 0
    _, _, pixels = match(CWD(), maps(3, 8), maps(3, 4), PIXELS, coordinates)
    assert pixels.valid is not None
    assert pixels.valid[:, :, :6].all() and not pixels.valid[:, :, 6:].any()


def test_the_students_gradient_passes_a_resize() -> None:
    student = maps(3, 8).requires_grad_()
    ours, _, _ = match(AttentionTransfer(resize="teacher"), student, maps(5, 4), PIXELS)
    ours.sum().backward()
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_a_torn_image_is_invalid_where_a_coarse_cell_spans_the_tear() -> None:
    torn = torch.cat([grid(16)[..., 9:], grid(16)[..., :9]], dim=-1)  # the right part now lies left
    _, _, fine = match(CWD(), maps(3, 16), maps(3, 16), PIXELS, torn)
    _, _, coarse = match(CWD(), maps(3, 4), maps(3, 4), PIXELS, torn)
    assert fine.valid is not None and fine.valid.all() and coarse.valid is not None
    assert coarse.valid[:, :, [0, 2, 3]].all() and not coarse.valid[:, :, 1].any()  # columns 4 to 7 hold the tear
