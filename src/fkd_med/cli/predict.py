"""`fkd predict`: one mask per image from a checkpoint alone, at the image's own size.

A long prediction is not lost to one bad file: images that cannot be read are passed over and listed at the end, with
an exit code that is not 0. Nothing is overwritten unasked, and an input image never.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from jsonargparse import ArgumentParser, Namespace
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from fkd_med.cli.configuration_files import check_configurations
from fkd_med.cli.data_parser import build_data, data_parser
from fkd_med.cli.prediction_jobs import MARK, Job, check_targets, hospital_images, images_in, targets
from fkd_med.cli.segmenter import Fitted, Segmenter, choose_device, read_or_fault
from fkd_med.data.images import read_image
from fkd_med.errors import ConfigError, DataError
from fkd_med.evaluation import overlay
from fkd_med.files import atomic_write_bytes

_DESCRIPTION = """Segment images with a checkpoint alone: no configuration, teacher or training data is needed.

Each image gets a mask of its name, a PNG of its own size (upright, if the file says how it is turned), in the same
sub-folder. Masks have the values of the training masks, such as 0 and 255; with several classes, each class its own.
With --config, the test images of that configuration are predicted, in a folder per hospital."""


def predict(arguments: list[str]) -> None:
    """Segment new images with a checkpoint.

    Raises:
        DataError: There is no image, or some could not be read; all others have been written then.
        ConfigError: Arguments that do not go together, or outputs that exist.
        RunError: The checkpoint cannot be used.
    """
    given = _parser().parse_args(arguments)
    output = Path(given.output).expanduser()
    segmenter = Segmenter(Path(given.ckpt_path).expanduser(), choose_device(given.device), given.trusted_packages)
    jobs, faults = _jobs(given, output)
    _check_client(given, segmenter, jobs)
    check_targets(jobs, output, given.overlay, given.overwrite)
    damaged = _run(segmenter, jobs, output, given)
    faults, written = faults + damaged, len(jobs) - len(damaged)
    meaning = ", ".join(f"{value} is class {index}" for index, value in enumerate(segmenter.values))
    print(f"{written} masks in {output} ({meaning})")
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise DataError(f"{len(faults)} images were passed over; the other {written} are done:\n{listed}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fkd predict", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument(
        "--ckpt_path", type=str, required=True, help="A student.ckpt, or any checkpoint of a run; all that is needed."
    )
    parser.add_argument("--data.images", type=str | None, default=None, help="Folder of images, or one image.")
    parser.add_argument("--output", type=str, required=True, help="Folder for the masks; made when absent.")
    parser.add_argument("--overlay", type=bool, default=False, help=f"Also write <name>{MARK}.png: mask over image.")
    parser.add_argument("--overwrite", action="store_true", help="Replace masks of an earlier prediction.")
    parser.add_argument("--batch_size", type=int, default=4, help="Images at once.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument(
        "--client", type=str | None, default=None, help="Whose network, where a checkpoint holds one per hospital."
    )
    parser.add_argument(
        "--trusted_packages", type=str, nargs="+", default=[], help="Packages of your own networks to import from."
    )
    parser.add_argument(
        "--config", type=str, action="append", help="Predict the test images of this configuration; may be repeated."
    )
    parser.add_argument("--data.root", type=str | None, default=None, help="With --config: where its data lie.")
    return parser


def _jobs(given: Namespace, output: Path) -> tuple[list[Job], list[str]]:
    """Return what to predict, and what is wrong with files that cannot be."""
    if given.batch_size < 1:
        raise ConfigError(f"--batch_size {given.batch_size}: give 1 or more.")
    if (given.data.images is None) == (not given.config):
        raise ConfigError("Give either --data.images with a folder or an image, or --config with a configuration.")
    if given.data.images is not None and given.data.root is not None:
        raise ConfigError("--data.root belongs to --config; with --data.images, leave it out.")
    if given.data.images is not None:
        return images_in(Path(given.data.images).expanduser(), output)
    arguments = [part for file in given.config for part in ("--config", file)]
    check_configurations(arguments)
    arguments += [] if given.data.root is None else ["--data.root", given.data.root]
    data = build_data(data_parser("fkd predict", _DESCRIPTION).parse_args(arguments))
    return hospital_images(data, given.client), []


def _check_client(given: Namespace, segmenter: Segmenter, jobs: Sequence[Job]) -> None:
    """Refuse a client that is missing, unknown or without meaning, before the first image."""
    if given.client is not None and not given.config and not segmenter.clients:
        raise ConfigError(f"--client {given.client}: {segmenter.path} is one network for all; leave --client out.")
    for client in dict.fromkeys(job.client or given.client for job in jobs):
        segmenter.enter(client)


def _run(segmenter: Segmenter, jobs: Sequence[Job], output: Path, given: Namespace) -> list[str]:
    """Segment and write everything; return what was wrong with images that could not be read."""
    faults = []
    client: str | None = None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"Segmenting on {segmenter.device}", total=len(jobs))
        for batch, read in _read_ahead(segmenter, _batches(jobs, given.batch_size)):
            wanted = batch[0].client or given.client
            if wanted != client:
                segmenter.enter(wanted)
                client = wanted
            good = [(job, item) for job, item in zip(batch, read, strict=True) if isinstance(item, Fitted)]
            faults += [str(item) for item in read if isinstance(item, DataError)]
            masks = segmenter.segment([item for _, item in good]) if good else []
            for (job, _), indices in zip(good, masks, strict=True):
                _write(job, indices, segmenter, output, given.overlay)
            progress.advance(bar, len(batch))
    return faults


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Yield batches of one client each."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == size or job.client != batch[0].client):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _read_ahead(
    segmenter: Segmenter, batches: Iterator[list[Job]]
) -> Iterator[tuple[list[Job], list[Fitted | DataError]]]:
    """Read the next batches while the network works on one."""
    waiting: deque[tuple[list[Job], list[Future[Fitted | DataError]]]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for batch in batches:
            waiting.append((batch, [pool.submit(read_or_fault, segmenter, job.image) for job in batch]))
            if len(waiting) > 2:
                done, futures = waiting.popleft()
                yield done, [future.result() for future in futures]
        for done, futures in waiting:
            yield done, [future.result() for future in futures]


def _write(job: Job, indices: NDArray[np.uint8], segmenter: Segmenter, output: Path, overlays: bool) -> None:
    """Write a mask, and the overlay if wanted."""
    mask, *rest = targets(job, output, overlays)
    atomic_write_bytes(mask, _png(segmenter.mask(indices)))
    for path in rest:
        picture = overlay(read_image(job.image, 3), indices)
        atomic_write_bytes(path, _png(picture[..., ::-1]))  # cv2 writes BGR


def _png(pixels: NDArray[Any]) -> bytes:
    return cv2.imencode(".png", np.ascontiguousarray(pixels))[1].tobytes()
