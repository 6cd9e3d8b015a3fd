"""The teacher cache: a frozen teacher answers each training image once, not in every epoch of every round.

Its maps lie in a file beside the teachers, found again by a key of the images, the preprocessing, the teacher's
weights and the taps; several runs, all data workers and all ranks read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fkd_med.distillation import Taps, TeacherMaps, maps_bytes, write_maps
from fkd_med.distillation.views import of_views
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.evaluation.tables import human_bytes
from fkd_med.locks import queued
from fkd_med.losses import LOGITS
from fkd_med.modules.settings import is_plain
from fkd_med.modules.teacher import TeacherSource, freeze
from fkd_med.networks import size_divisor
from fkd_med.ranks import is_first_rank

Answers = Iterator[tuple[str, dict[str, NDArray[np.float32]]]]


@dataclass(frozen=True)
class Surroundings:
    """How teachers run in this run.

    Args:
        device: where.
        autocast: gives the context of the run's precision.
        precision: its name, part of the key.
        reporter: shows progress: ``line``, ``show`` and ``advance``.
        barrier: waits for the other ranks.
        is_trial: a trial run (``fast_dev_run``) sees so few images that no cache is made.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    precision: str = "32-true"
    reporter: Any = None
    barrier: Callable[[], Any] = lambda: None
    is_trial: bool = False

    @classmethod
    def of(cls, trainer: L.Trainer) -> Surroundings:
        """Return those of a Trainer whose strategy is set up."""
        return cls(
            device=trainer.strategy.root_device,
            autocast=trainer.precision_plugin.forward_context,
            precision=str(trainer.precision),
            reporter=getattr(trainer, "reporter", None),
            barrier=trainer.strategy.barrier,
            is_trial=bool(getattr(trainer, "fast_dev_run", False)),
        )


def ensure_maps(
    source: TeacherSource, client: str | None, data: Any, taps: Sequence[str], around: Surroundings, views: int = 1
) -> TeacherMaps | None:
    """Return a client's cached teacher maps, made first if there are none; None if there can be none.

    None means that the source keeps no maps, or a trial run.

    Args:
        source: the teacher's source, after ``ensure`` of this client.
        client: the client; None is the pool of all.
        data: the data module, after ``setup``; see `check_carries`.
        taps: what is needed of the teacher besides its logits.
        around: device, precision, progress.
        views: over how many views of each image the teacher's logits are averaged.

    Raises:
        TrainingError: the teacher answers with NaN or infinity; the image is named.
        RunError: the maps cannot be written: disk full, folder read-only.
    """
    store = source.maps_folder()
    if store is None or around.is_trial:
        return None
    key, description = cache_key(source, client, data, taps, around.precision, views)
    folder = store / f"{client or 'all-clients'}-{key[:16]}"
    maps = TeacherMaps.open(folder, key) if is_first_rank() else None
    if maps is not None:
        _say_found(client, data, folder, around)
    elif is_first_rank():
        with queued(
            store / f".{folder.name}.lock", f"The teacher cache {store}", partial(_say_waiting, client, around)
        ):
            maps = TeacherMaps.open(folder, key)
            if maps is None:
                maps = _build(source, client, data, taps, around, folder, key, description, views)
            else:  # another process has just made them
                _say_found(client, data, folder, around)
    around.barrier()
    return maps if maps is not None else TeacherMaps.open(folder, key)


def _say_waiting(client: str | None, around: Surroundings, holder: str) -> None:
    if around.reporter is not None:
        around.reporter.line(f"teacher maps of {client or 'all clients'}: waiting for those that {holder} makes")


def _say_found(client: str | None, data: Any, folder: Path, around: Surroundings) -> None:
    if around.reporter is not None:
        around.reporter.line(f"teacher maps of {client or 'all clients'}: found in {folder}")
        around.reporter.advance(image_count(data, client))


def cache_key(
    source: TeacherSource, client: str | None, data: Any, taps: Sequence[str], precision: str, views: int = 1
) -> tuple[str, dict[str, Any]]:
    """Return the key of a client's maps and, readable, what went into it."""
    architecture = source.architecture()
    description = {
        "images": data.fingerprint(client),
        **unlabelled_images(data, client),
        "teacher": source.digest(client),
        "network": None if architecture is None else signature(architecture),
        "taps": sorted({LOGITS, *taps}),
        "precision": precision,
        **({"views": views} if views > 1 else {}),  # caches of one view keep the key they always had
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest(), description


def unlabelled_images(data: Any, client: str | None) -> dict[str, str]:
    """Return the hash of a client's images without masks under a name; nothing where there are none."""
    tell = getattr(data, "unlabelled_fingerprint", None)
    found = tell(client) if tell is not None else ""
    return {"unlabelled": found} if found else {}


def signature(network: nn.Module) -> str:
    """Return a hash of all of a network that its weights do not say: classes, settings, the size it pads images to.

    The settings are the plain public attributes of every module, such as the number of heads of an attention.
    """
    parts: list[Any] = [size_divisor(network)]
    for path, module in network.named_modules():
        plain = {k: str(v) for k, v in sorted(vars(module).items()) if not k.startswith("_") and is_plain(v)}
        plain.pop("training", None)
        parts.append([path, type(module).__qualname__, module.extra_repr(), plain])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_carries(data: Any) -> None:
    """Refuse a data module whose batches cannot carry teacher maps.

    Raises:
        ConfigError: says what it lacks.
    """
    if data is None:
        raise ConfigError(
            "Cached teacher maps come with a data module, and this fit has only loaders: set teacher_cache: off, or "
            "give fit(datamodule=...)."
        )
    wanted = ("teacher_maps", "client_train_eval_dataloader", "fingerprint", "num_examples")
    lacks = [name for name in wanted if not hasattr(data, name)]
    if lacks:
        raise ConfigError(
            f"{type(data).__name__} cannot carry cached teacher maps (it lacks {' and '.join(lacks)}): set "
            "model.teacher_cache: off, or use fkd_med.data.FederatedDataModule."
        )


def check_precision(precision: str) -> None:
    """Refuse precisions in which Lightning rounds the batches, and with them the places that maps are read at.

    Raises:
        ConfigError: names the precision and the remedy.
    """
    if precision in ("bf16-true", "16-true"):
        raise ConfigError(
            f"trainer.precision: {precision} would round the places that cached teacher maps are read at: use "
            f"{precision.replace('true', 'mixed')}, or model.teacher_cache: off."
        )


def image_count(data: Any, client: str | None) -> int:
    """Return how many images a client's cache holds."""
    more = getattr(data, "num_unlabelled", lambda name: 0)
    return sum(data.num_examples(name) + more(name) for name in ([client] if client else data.client_names()))


def _build(
    source: TeacherSource, client: str | None, data: Any, taps: Sequence[str], around: Surroundings,
    folder: Path, key: str, description: dict[str, Any], views: int,
) -> TeacherMaps:  # fmt: skip
    loader = every_image_once(data.client_train_eval_dataloader(client))
    ids = _ids(loader.dataset)
    network = freeze(of_views(source.load(client), views)).to(around.device)
    tapped = Taps(network, taps, f"the teacher {type(network).__name__}")
    try:
        shapes = _shapes(tapped, loader.dataset[0]["image"][None], around)
        if around.reporter is not None:
            size = human_bytes(maps_bytes(len(ids), shapes))
            what = "images" if views == 1 else f"images in {views} views"
            around.reporter.line(f"teacher maps of {client or 'all clients'}: {len(ids)} {what}, {size} in {folder}")
        return write_maps(folder, key, description, ids, shapes, _answers(tapped, loader, client, around))
    finally:
        tapped.remove()
        network.cpu()


def _ids(dataset: Any) -> list[str]:
    """Return the ids of a data set's images; ours tells them without reading the images."""
    told = getattr(dataset, "ids", None)
    return [str(name) for name in told] if told else [str(dataset[index]["id"]) for index in range(len(dataset))]


def every_image_once(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of the same images without a distributed sampler, which shares them out and pads."""
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(0),  # else a loader draws from torch's own
    )


def _run(taps: Taps, image: Tensor, around: Surroundings) -> dict[str, Tensor]:
    with torch.no_grad(), around.autocast():
        return {tap: maps.float() for tap, maps in taps(image.to(around.device)).items()}


def _shapes(taps: Taps, image: Tensor, around: Surroundings) -> dict[str, tuple[int, int, int]]:
    return {tap: (m.shape[1], m.shape[2], m.shape[3]) for tap, m in _run(taps, image, around).items()}


def _answers(taps: Taps, loader: DataLoader[Any], client: str | None, around: Surroundings) -> Answers:
    """Yield each image's id and maps."""
    for batch in loader:
        maps = _run(taps, batch["image"], around)
        refuse_non_finite(maps, batch)
        arrays = {tap: values.cpu().numpy() for tap, values in maps.items()}
        for position, name in enumerate(batch["id"]):
            yield str(name), {tap: values[position] for tap, values in arrays.items()}
        if around.reporter is not None:
            around.reporter.show(f"teacher maps · {client or 'all clients'}")
            around.reporter.advance(len(batch["id"]))


def refuse_non_finite(maps: dict[str, Tensor], batch: dict[str, Any]) -> None:
    """Refuse a teacher's maps (N, C, h, w) with NaN or infinity in them.

    Raises:
        TrainingError: names the client and the images.
    """
    fine = torch.stack([torch.isfinite(values).flatten(1).all(1) for values in maps.values()]).all(0)
    if bad := [str(name) for name, ok in zip(batch["id"], fine.tolist(), strict=True) if not ok]:
        raise TrainingError(
            f"The teacher of client {batch['client'][0]} answers with NaN or infinity for {', '.join(bad[:4])}: "
            "train it again (delete it from the teacher store) or look at these images."
        )
