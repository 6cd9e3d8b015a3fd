"""Which images of a batch have masks: all of them, unless the batch says which are `labelled`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fkd_med.losses import Pixels, supervised_loss


def labelled_rows(batch: dict[str, Any]) -> Tensor | None:
    """Return the places of the images with masks, on the batch's device; None if all have one."""
    labelled = batch.get("labelled")
    if labelled is None or all(labelled):
        return None
    rows = [place for place, has_mask in enumerate(labelled) if has_mask]
    return torch.tensor(rows, device=batch["image"].device)


def only_labelled(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a batch that has masks; the batch itself if that is all of it."""
    rows = labelled_rows(batch)
    return batch if rows is None else {name: _part(value, rows) for name, value in batch.items()}


def supervised_part(loss: nn.Module, logits: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the supervised loss over the images with masks of logits (N, K, H, W) of the whole batch."""
    rows = labelled_rows(batch)
    mask: Tensor = batch["mask"]
    return supervised_loss(loss, logits, mask) if rows is None else supervised_loss(loss, logits[rows], mask[rows])


def pixels_of(batch: dict[str, Any], logits: Tensor) -> Pixels:
    """Return a batch's pixels for terms that compare maps of all its images; those without a mask show class 0."""
    classes, mask = max(2, logits.shape[1]), batch["mask"]
    rows = labelled_rows(batch)
    if rows is None:
        return Pixels(mask, classes)
    labelled = torch.zeros(len(mask), dtype=torch.bool, device=mask.device).index_fill(0, rows, True)
    return Pixels(mask.clamp(min=0), classes, labelled=labelled)


def _part(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {name: _part(inner, rows) for name, inner in value.items()}
    return [value[place] for place in rows.tolist()]
