"""The test images a run shows: each with its truth and what every model answers for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fkd_med.data.geometry import undo
from fkd_med.evaluation import Sample
from fkd_med.modules import SegmentationModule, TeacherSource, predict_classes
from fkd_med.networks import forward_padded

Predictor = Callable[[Tensor, str], Tensor | None]  # image (C, S, S), client -> logits (K, S, S) if it has a model


def sample(data: Any, client: str, name: str, rank: str, predictors: Mapping[str, Predictor]) -> Sample:
    """Return a test image at its original size, with its truth and the masks of all who predict for its client.

    Args:
        data: the data module.
        client: the image's hospital.
        name: the image's id.
        rank: why it is shown: worst, median or best.
        predictors: by the name under which their masks are shown.
    """
    info, dataset = data.export_info(), data.client_test_dataloader(client).dataset
    item = dataset[next(i for i, record in enumerate(dataset.records) if record.id == name)]
    size = (int(item["size"][0]), int(item["size"][1]))
    mean, std = torch.tensor(info["mean"])[:, None, None], torch.tensor(info["std"])[:, None, None]
    image = undo(item["image"] * std + mean, size, info["resize"]).clamp(0, 1).numpy().transpose(1, 2, 0)
    masks: dict[str, NDArray[Any]] = {}
    for label, predict in predictors.items():
        with torch.no_grad():
            logits = predict(item["image"], client)
        if logits is not None:
            masks[label] = predict_classes(undo(logits.float().cpu(), size, info["resize"])[None])[0].numpy()
    return Sample(client, name, rank, image, item["original"].numpy(), masks)


def module_predictor(module: SegmentationModule) -> Predictor:
    """Return what a module answers for a client's image, with that client's own tensors."""

    def predict(image: Tensor, client: str) -> Tensor:
        module.eval()
        module.personal.enter(client, best=True)
        logits: Tensor = module(image[None].to(module.device))[0]
        module.personal.leave()
        return logits

    return predict


def teacher_predictor(source: TeacherSource, teachers: Mapping[str, str | None]) -> Predictor:
    """Return what each client's teacher answers; nothing for a client without one.

    Args:
        source: where teachers come from.
        teachers: by client, whose teacher it asks; None is the teacher of the pool.
    """
    loaded: dict[str | None, nn.Module] = {}

    def predict(image: Tensor, client: str) -> Tensor | None:
        if client not in teachers:
            return None
        name = teachers[client]
        if name not in loaded:
            loaded.clear()  # one teacher at a time in memory
            loaded[name] = source.load(name).eval()
        return forward_padded(loaded[name], image[None])[0]

    return predict
