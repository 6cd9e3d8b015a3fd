"""The work that `loop_overhead.py` has done in several ways: hospitals, the steps of one of them, and the bare loop."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fkd_med.communication import State
from fkd_med.data import FederatedDataModule, Phantoms
from fkd_med.losses import supervised_loss
from fkd_med.modules import SegmentationModule
from fkd_med.networks import SlimUNet


@dataclass(frozen=True)
class Work:
    """Phantom hospitals and what each does in a round.

    Args:
        folder: where the phantoms lie; they are made there first if there are none.
        rounds: how many are run; the first, which warms up, is not counted.
        steps: of each hospital in a round.
        size: side of the images, in pixels.
        batch: images in a step.
        clients: number of hospitals.
    """

    folder: str
    rounds: int = 4
    steps: int = 40
    size: int = 128
    batch: int = 8
    clients: int = 3


@dataclass
class Measured:
    """What a way to do the work took, in seconds, and where it led.

    Args:
        round_s: median of the rounds but the first, wall clock.
        run_s: everything, from the call to its return.
        first: the student after the first round.
        round_cpu_s: as `round_s`, of this process's processor time; NaN where others work too.
    """

    round_s: float
    run_s: float
    first: State
    round_cpu_s: float = math.nan


@functools.cache
def hospitals(work: Work) -> FederatedDataModule:
    """Return the hospitals; four images in five are for training, and a few epochs make a round."""
    module = FederatedDataModule(
        work.folder, layout=Phantoms(work.clients, max(20, work.steps * work.batch // 4), work.size),
        image_size=work.size, in_channels=3, batch_size=work.batch, seed=0, val_fraction=0.05, test_fraction=0.05,
    )  # fmt: skip
    module.setup("fit")
    return module


@functools.cache
def student() -> SegmentationModule:
    """Return the student that every way starts from; copy it before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SegmentationModule(SlimUNet())


def now() -> tuple[float, float]:
    """Return wall clock and processor time of this process."""
    return time.perf_counter(), time.process_time()


def per_round(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the median seconds of the rounds but the first, by both clocks, from the times between rounds."""
    spans = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(times)]
    wall, cpu = zip(*spans[1:], strict=True)
    return statistics.median(wall), statistics.median(cpu)


def train(worker: SegmentationModule, work: Work, client: str, round: int) -> None:
    """Train a student on a client's batches."""
    worker.train()
    optimizer = torch.optim.Adam(worker.parameters())
    loader, done = hospitals(work).client_train_dataloader(client, round), 0
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # other draws in each, as Lightning has them
        for batch in loader:
            optimizer.zero_grad()
            supervised_loss(worker.loss, worker(batch["image"]), batch["mask"]).backward()
            optimizer.step()
            done += 1
            if done == work.steps:
                return


def bare(work: Work) -> Measured:
    """Do the work in a bare PyTorch loop."""
    data, server, times, first = hospitals(work), copy.deepcopy(student()), [now()], {}
    weights = [data.num_examples(client) for client in data.client_names()]
    for round in range(1, work.rounds + 1):
        states = [_trained(server, work, client, round) for client in data.client_names()]
        server.load_state_dict(mean(states, weights))
        first = first or copy.deepcopy(server.state_dict())
        times.append(now())
    wall, cpu = per_round(times)
    return Measured(wall, times[-1][0] - times[0][0], first, cpu)


def _trained(server: SegmentationModule, work: Work, client: str, round: int) -> dict[str, Tensor]:
    worker = copy.deepcopy(server)
    train(worker, work, client, round)
    return worker.state_dict()


def mean(states: list[dict[str, Any]], weights: list[int]) -> dict[str, Tensor]:
    """Return the weighted mean of states, in their dtypes."""
    total = sum(weights)
    return {
        name: sum(s[name].double() * (w / total) for s, w in zip(states, weights, strict=True)).to(tensor.dtype)
        for name, tensor in states[0].items()
    }


def apart(one: State, other: State) -> float:
    """Return the largest difference between two students' numbers; counts of batches aside, which Flower averages."""
    names = [name for name, tensor in one.items() if tensor.is_floating_point()]
    return max(float((one[name] - other[name]).abs().max()) for name in names)
