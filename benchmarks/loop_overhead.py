"""What the federated loop costs beside the training itself, and whether it keeps memory, files and threads.

``python benchmarks/loop_overhead.py time`` trains the default student for some rounds in our loop, and the same steps
in a bare PyTorch loop: the same loaders, loss, optimizer and averaging, but no Trainer, messages, checkpoints or
ledger. Both run in turns in one process; `ratio` is the median over the turns of our seconds per round to the bare
loop's in the same turn.

``python benchmarks/loop_overhead.py memory`` runs 50 rounds of a federation of 300 clients, 30 a round, and prints
resident memory, open files and threads by round; `slope_percent` is the rise of a line through rounds 10 to 50, in
percent of the memory at round 10.

One JSON object per line.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fkd_med.data import FederatedDataModule, Phantoms
from fkd_med.data.datasets import collate
from fkd_med.federated import FederatedTrainer, Federation, Fraction
from fkd_med.losses import supervised_loss
from fkd_med.modules import SegmentationModule
from fkd_med.networks import SlimUNet


class RoundClock(L.Callback):
    """Notes when each round of the server begins."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the end of the last round."""
        self.times.append(time.perf_counter())


def data(folder: Path, clients: int, images: int, size: int, batch: int) -> FederatedDataModule:
    """Return phantom hospitals whose first `images` are for training."""
    module = FederatedDataModule(
        folder, layout=Phantoms(clients, images, size), image_size=size, in_channels=3, batch_size=batch, seed=0,
        val_fraction=0.05, test_fraction=0.05,
    )  # fmt: skip
    module.setup("fit")
    return module


def federated_round(module: SegmentationModule, hospitals: Any, rounds: int, steps: int, folder: Path) -> float:
    """Return the median seconds of a round of ours, without validation."""
    clock = RoundClock()
    trainer = FederatedTrainer(
        federation=Federation(rounds=rounds, local_steps=steps), default_root_dir=folder, limit_val_batches=0,
        accelerator="cpu", devices=1, logger=False, callbacks=[clock],
    )  # fmt: skip
    trainer.reporter.enabled = False
    trainer.fit(copy.deepcopy(module), datamodule=hospitals)
    return statistics.median(np.diff(clock.times)[1:].tolist())


def bare_round(module: SegmentationModule, hospitals: Any, rounds: int, steps: int) -> float:
    """Return the median seconds of a round of the bare loop."""
    student, times = copy.deepcopy(module), []
    for round in range(1, rounds + 1):
        started = time.perf_counter()
        states = [bare_client(student, hospitals, client, round, steps) for client in hospitals.client_names()]
        weights = [hospitals.num_examples(client) for client in hospitals.client_names()]
        student.load_state_dict(mean(states, weights))
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def bare_client(student: SegmentationModule, hospitals: Any, client: str, round: int, steps: int) -> dict[str, Tensor]:
    """Train a copy of the student on a client's batches."""
    worker = copy.deepcopy(student).train()
    optimizer = torch.optim.Adam(worker.parameters())
    loader, done = hospitals.client_train_dataloader(client, round), 0
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            supervised_loss(worker.loss, worker(batch["image"]), batch["mask"]).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return worker.state_dict()


def mean(states: list[dict[str, Tensor]], weights: list[int]) -> dict[str, Tensor]:
    """Return the weighted mean of states, in their dtypes."""
    total = sum(weights)
    return {
        name: sum(s[name].double() * (w / total) for s, w in zip(states, weights, strict=True)).to(tensor.dtype)
        for name, tensor in states[0].items()
    }


def measure_time(turns: int, rounds: int, steps: int, size: int, batch: int) -> None:
    """Print a line for each turn, and one for all."""
    L.seed_everything(0, verbose=False)
    module, ratios = SegmentationModule(SlimUNet()), []
    with tempfile.TemporaryDirectory() as folder:
        hospitals = data(Path(folder) / "phantoms", 3, max(20, steps * batch // 4), size, batch)
        for turn in range(turns):
            ours = federated_round(module, hospitals, rounds, steps, Path(folder) / f"run-{turn}")
            bare = bare_round(module, hospitals, rounds, steps)
            ratios.append(ours / bare)
            said = {"ours_s": round(ours, 3), "bare_s": round(bare, 3), "ratio": round(ratios[-1], 4)}
            print(json.dumps({"program": "loop_overhead", "turn": turn, **said}), flush=True)
    settings = {"rounds": rounds, "clients": 3, "steps": steps, "size": size, "batch": batch, "turns": turns}
    print(json.dumps({"program": "loop_overhead", **settings, "ratio": round(statistics.median(ratios), 4)}))


class Watch(L.Callback):
    """Notes resident memory, open files and threads after each round."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the process as it is."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = {
            "round": len(self.rows) + 1,
            "resident_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1),
            "open_files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }
        self.rows.append(row)


class Dots(L.LightningDataModule):
    """Many clients with a few random images each, from memory."""

    def __init__(self, clients: int, size: int) -> None:
        super().__init__()
        self.names = [f"hospital-{number:04d}" for number in range(clients)]
        self.size = size

    def client_names(self) -> list[str]:
        """Return the clients."""
        return self.names

    def num_examples(self, client: str) -> int:
        """Return how many images a client has."""
        return 8

    def fingerprint(self, client: str | None) -> str:
        """Return nothing: there are no teachers."""
        return ""

    def client_train_dataloader(self, client: str | None, round: int = 0) -> DataLoader[Any]:
        """Return the batches of a client."""
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(8, 3, self.size, self.size, generator=draw)
        items = [
            {"image": image, "mask": (image[0] > 0.5).long(), "id": str(number), "client": client}
            for number, image in enumerate(images)
        ]
        return DataLoader(items, batch_size=4, collate_fn=collate, generator=draw)  # type: ignore[arg-type]

    client_val_dataloader = client_test_dataloader = client_train_dataloader


def measure_memory(rounds: int, clients: int, share: float) -> None:
    """Print a line per round, and the slope."""
    L.seed_everything(0, verbose=False)
    watch = Watch()
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = FederatedTrainer(
            federation=Federation(rounds=rounds, optimizer_state="keep", participation=Fraction(share)),
            default_root_dir=folder, limit_val_batches=0, accelerator="cpu", devices=1, logger=False, callbacks=[watch],
        )  # fmt: skip
        trainer.reporter.enabled = False
        trainer.fit(SegmentationModule(network), datamodule=Dots(clients, 16))
    for row in watch.rows:
        print(json.dumps({"program": "loop_overhead", **row}))
    rows = watch.rows[min(9, len(watch.rows) // 2) :]
    memory = [row["resident_mb"] for row in rows]
    slope = float(np.polyfit(range(len(rows)), memory, 1)[0]) * (len(rows) - 1)
    said = {"rounds": rounds, "clients": clients, "a_round": round(clients * share)}
    files = {name: rows[-1][name] - rows[0][name] for name in ("open_files", "threads")}
    said |= {"slope_percent": round(100 * slope / memory[0], 3), **{f"more_{k}": v for k, v in files.items()}}
    print(json.dumps({"program": "loop_overhead", **said}))


def main() -> None:
    """Measure what is asked for; both when nothing is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["time", "memory", "all"], default="all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="Rounds per turn; the first is not counted.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", type=int, default=300)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    if given.what in ("time", "all"):
        measure_time(given.turns, given.rounds, given.steps, given.size, given.batch)
    if given.what in ("memory", "all"):
        measure_memory(50, given.clients, 0.1)


if __name__ == "__main__":
    sys.exit(main())
