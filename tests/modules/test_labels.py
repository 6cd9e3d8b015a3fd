"""Batches in which some images have no mask: what is learned from them, and what is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fkd_med.distillation import match
from fkd_med.losses import IFVD, BoundaryKL, LogitKL, Pixels, Ramp, RegionAffinity, logit_kl
from fkd_med.modules import DistillationModule, MutualDistillationModule, RunClock, SegmentationModule
from fkd_med.modules.labels import labelled_rows, only_labelled

SIZE = 8


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))


def batch(labelled: list[bool] | None) -> dict[str, Any]:
    """Four images with squares; -1 for the masks of those without one, as the data module gives them."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(4, SIZE, SIZE, dtype=torch.long)
    mask[:, 2:6, 1:5] = 1
    made: dict[str, Any] = {
        "image": torch.randn(4, 3, SIZE, SIZE, generator=generator),
        "mask": mask,
        "id": list("abcd"),
        "client": ["x"] * 4,
    }
    if labelled is not None:
        made["labelled"] = labelled
        mask[[not has for has in labelled]] = -1
    return made


def part(whole: dict[str, Any], places: list[int]) -> dict[str, Any]:
    return {k: v[places] if isinstance(v, Tensor) else [v[i] for i in places] for k, v in whole.items()}


def test_a_batch_says_which_images_have_masks() -> None:
    assert labelled_rows(batch(None)) is None and labelled_rows(batch([True] * 4)) is None
    mixed = batch([True, False, True, False])
    mixed["teacher"] = {"logits": torch.arange(4.0)}
    left = only_labelled(mixed)
    assert left["id"] == ["a", "c"] and left["mask"].amin() == 0 and left["teacher"]["logits"].tolist() == [0, 2]
    whole = batch(None)
    assert only_labelled(whole) is whole


def test_plain_training_passes_over_images_without_a_mask() -> None:
    module = SegmentationModule(network())
    mixed = batch([True, False, True, False])
    alone = module.loss_terms(part(batch(None), [0, 2]))["supervised"]
    torch.testing.assert_close(module.loss_terms(mixed)["supervised"], alone)
    seen: list[int] = []
    module.network.register_forward_hook(lambda net, given, out: seen.append(len(given[0])))
    module.loss_terms(mixed)
    module.learns_from_unlabelled = True  # as GlobalDistillation asks for
    torch.testing.assert_close(module.loss_terms(mixed)["supervised"], alone)
    assert seen == [2, 4]


@pytest.mark.parametrize("kind", [DistillationModule, MutualDistillationModule])
def test_where_no_term_speaks_images_without_a_mask_are_not_even_looked_at(kind: Any) -> None:
    fading = LogitKL(1.0, schedule=Ramp(first=1.0, last=0.0, begin=0.5, end=0.5))
    module = kind(network(), losses={"kd": fading})
    module.attach_teacher(network())
    seen: list[int] = []
    module.network.register_forward_hook(lambda net, given, out: seen.append(len(given[0])))
    mixed = batch([True, False, True, False])
    for round in (1, 2):
        module.clock = RunClock(round=round, step=round - 1, total_steps=2, rounds=2)
        module.loss_terms(mixed)
    module.learns_from_unlabelled = True
    module.loss_terms(mixed)
    assert seen == [4, 2, 4]


def test_distillation_learns_from_all_images_and_masks_from_theirs() -> None:
    student, teacher = network(), network()
    module = DistillationModule(student, losses={"kd": LogitKL(3.0, weight=0.5)}, teacher_cache="off")
    module.attach_teacher(copy.deepcopy(teacher))
    mixed = batch([True, True, False, False])
    terms = module.loss_terms(mixed)
    logits, taught = student(mixed["image"]), teacher(mixed["image"])
    torch.testing.assert_close(terms["supervised"], module.loss(logits[:2], mixed["mask"][:2].float()))
    torch.testing.assert_close(terms["kd"], 0.5 * logit_kl(logits, taught, 3.0))
    sum(terms.values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())


def test_both_learn_in_mutual_distillation() -> None:
    student, teacher = network(), network()
    module = MutualDistillationModule(student, losses={"kd": LogitKL(1.0)})
    module.attach_teacher(teacher)
    terms = module.loss_terms(batch([True, False, False, True]))
    own = module.teacher
    assert own is not None
    expected = module.loss(own(batch(None)["image"])[[0, 3]], batch(None)["mask"][[0, 3]].float())
    torch.testing.assert_close(terms["teacher_supervised"], expected)


@pytest.mark.parametrize(
    "term", [BoundaryKL(band=1), IFVD(), RegionAffinity(), LogitKL(trust="correct"), LogitKL(trust="true_class")]
)
@pytest.mark.parametrize("augmented", [False, True])
def test_terms_that_look_at_masks_do_not_count_images_without_one(term: Any, augmented: bool) -> None:
    """What they say of four images, two without masks, is what they say of the two with masks."""
    assert term.needs_masks()
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(4, 1, SIZE, SIZE, generator=generator) for _ in range(2))
    mask = batch(None)["mask"]
    labelled = torch.tensor([True, False, False, True])
    unknown = torch.where(labelled.view(-1, 1, 1), mask, 0)
    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    grid = torch.stack([line.expand(SIZE, SIZE), line.view(-1, 1).expand(SIZE, SIZE), torch.ones(SIZE, SIZE)])
    grid[2, :, 0] = 0  # a column from outside the image
    coordinates = grid.expand(4, 3, SIZE, SIZE) if augmented else None
    told = term(*match(term, ours, theirs, Pixels(unknown, 2, labelled=labelled), coordinates))
    alone = term(*match(term, ours[labelled], theirs[labelled], Pixels(mask[labelled], 2),
                        None if coordinates is None else coordinates[:2]))  # fmt: skip
    torch.testing.assert_close(told, alone)
    assert float(alone) != 0


def test_pixels_keep_what_they_know_at_another_size() -> None:
    labelled = torch.tensor([True, False])
    pixels = Pixels(torch.zeros(2, 8, 8, dtype=torch.long), 2, labelled=labelled).at((4, 4))
    assert torch.equal(pixels.with_masks().valid, labelled.view(2, 1, 1).expand(2, 4, 4))  # type: ignore[arg-type]
    with_hole = torch.ones(2, 8, 8, dtype=torch.bool)
    with_hole[:, 0, 0] = False
    small = Pixels(torch.zeros(2, 8, 8, dtype=torch.long), 2, with_hole, labelled).at((4, 4)).with_masks()
    assert small.valid is not None and small.valid.sum() == 15
