"""What the federated loop costs beside the training itself, and whether it keeps memory, files and threads.

``python benchmarks/loop_overhead.py time`` trains the default student for some rounds in our loop, and the same steps
in a bare PyTorch loop: the same loaders, loss, optimizer and averaging, but no Trainer, messages, checkpoints or
ledger. Both run in turns in one process and one thread; `ratio` is the median over the turns of our seconds per round
to the bare loop's in the same turn, `ratio_cpu` the same of processor time, which other programs disturb less.

``python benchmarks/loop_overhead.py flower`` (needs ``pip install '.[benchmark]'``) adds to each turn Flower's
simulation engine with its FedAvg, one client at a time in a worker of one processor and one thread. `ratio_flower` is
Flower to the bare loop, `ratio_ours_flower` ours to Flower: seconds per round, by the time between the beginnings of
rounds, the first left out. `flower_start_s` and `flower_first_round_s` are what that leaves out (ray, the worker's
imports); `ratio_runs` is ours to Flower from the call to its return. Imports of this program count for nobody. `apart`
is the largest difference from the bare loop's student after the first round: all do the same work, and only the mean is
rounded differently.

``python benchmarks/loop_overhead.py parallel`` lets the hospitals of a round train one after another and side by side
(`federation.parallel`, `--beside` of them, one thread each) in turns: `speedup` is the first to the second, seconds per
round without the first round, in which the processes start. Both end with the same bits (`apart` is 0).

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
from torch import nn
from torch.utils.data import DataLoader

from _flower_rounds import MISSING, flower, installed
from _rounds import Measured, Work, apart, bare, hospitals, now, per_round, student
from fkd_med.communication import State
from fkd_med.data.datasets import collate
from fkd_med.federated import FederatedTrainer, Federation, Fraction
from fkd_med.modules import SegmentationModule


class RoundClock(L.Callback):
    """Notes when each round of the server begins, and the student after the first."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.first: State = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self.times.append(now())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the first round's student."""
        self.first = self.first or copy.deepcopy(pl_module.state_dict())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the end of the last round."""
        self.times.append(now())


def federated(work: Work, folder: Path, beside: int = 1) -> Measured:
    """Do the work in our loop, without validation, so many hospitals at a time."""
    began, clock, server = time.perf_counter(), RoundClock(), copy.deepcopy(student())
    trainer = FederatedTrainer(
        federation=Federation(rounds=work.rounds, local_steps=work.steps, parallel=beside), default_root_dir=folder,
        limit_val_batches=0, accelerator="cpu", devices=1, logger=False, callbacks=[clock],
    )  # fmt: skip
    trainer.reporter.enabled = False
    trainer.fit(server, datamodule=hospitals(work))
    wall, cpu = per_round(clock.times)
    return Measured(wall, time.perf_counter() - began, clock.first, cpu)


def measure_time(turns: int, work: Work, beside_flower: bool = False) -> None:
    """Print a line for each turn, and one for all."""
    L.seed_everything(0, verbose=False)
    hospitals(work)
    lines = [one_turn(turn, work, beside_flower) for turn in range(turns)]
    settings = {key: value for key, value in vars(work).items() if key != "folder"}
    medians = {
        name: round(statistics.median(line[name] for line in lines), 4) for name in lines[0] if name.startswith("ratio")
    }
    said = {**settings, "turns": turns, "threads": torch.get_num_threads(), **medians}
    print(json.dumps({"program": "loop_overhead", **said}), flush=True)


def one_turn(turn: int, work: Work, beside_flower: bool) -> dict[str, float]:
    """Do the work once in each way, print what it took and return it."""
    with tempfile.TemporaryDirectory() as folder:
        ours = federated(work, Path(folder))
    plain = bare(work)
    line = {"ours_s": ours.round_s, "bare_s": plain.round_s, "ratio": ours.round_s / plain.round_s}
    line["ratio_cpu"] = ours.round_cpu_s / plain.round_cpu_s
    line |= {"ours_run_s": ours.run_s, "bare_run_s": plain.run_s, "ours_apart": apart(ours.first, plain.first)}
    if beside_flower:
        theirs, start = flower(work)
        line |= {"flower_s": theirs.round_s, "ratio_flower": theirs.round_s / plain.round_s}
        line |= {"ratio_ours_flower": ours.round_s / theirs.round_s, "ratio_runs": ours.run_s / theirs.run_s}
        line |= {"flower_run_s": theirs.run_s, **{f"flower_{name}": seconds for name, seconds in start.items()}}
        line["flower_apart"] = apart(theirs.first, plain.first)
    shown = {name: float(f"{value:.2g}") if "apart" in name else round(value, 4) for name, value in line.items()}
    print(json.dumps({"program": "loop_overhead", "turn": turn, **shown}), flush=True)
    return line


def measure_parallel(turns: int, work: Work, beside: int) -> None:
    """Print a line for each turn of both ways, and one for all."""
    L.seed_everything(0, verbose=False)
    hospitals(work)
    speedups = []
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            alone, together = federated(work, Path(one)), federated(work, Path(other), beside)
        speedups.append(alone.round_s / together.round_s)
        line = {"alone_s": alone.round_s, "beside_s": together.round_s, "speedup": speedups[-1]}
        line |= {
            "alone_run_s": alone.run_s,
            "beside_run_s": together.run_s,
            "apart": apart(alone.first, together.first),
        }
        shown = {name: round(value, 4) for name, value in line.items()}
        print(json.dumps({"program": "loop_overhead", "turn": turn, **shown}), flush=True)
    settings = {key: value for key, value in vars(work).items() if key != "folder"}
    said = {**settings, "turns": turns, "beside": beside, "speedup": round(statistics.median(speedups), 4)}
    print(json.dumps({"program": "loop_overhead", **said}), flush=True)


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
    """Measure what is asked for; time and memory when nothing is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["time", "flower", "parallel", "memory", "all"], default="all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="Rounds per turn; the first is not counted.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", type=int, help="300 for `memory`, 4 for `parallel`, 3 for the others.")
    parser.add_argument("--beside", type=int, default=2, help="Of `parallel`: hospitals at a time.")
    given = parser.parse_args()
    if given.rounds < 2 or given.turns < 1:
        parser.error("--rounds: at least 2, of which the first is not counted; --turns: at least 1")
    if given.what == "flower" and not installed():
        parser.exit(2, f"{MISSING}\n")
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    if given.what != "memory":
        with tempfile.TemporaryDirectory() as folder:
            clients = given.clients or (4 if given.what == "parallel" else 3)
            work = Work(folder, given.rounds, given.steps, given.size, given.batch, clients)
            if given.what == "parallel":
                measure_parallel(given.turns, work, given.beside)
            else:
                measure_time(given.turns, work, given.what == "flower")
    if given.what in ("memory", "all"):
        measure_memory(50, given.clients if given.what == "memory" and given.clients else 300, 0.1)


if __name__ == "__main__":
    sys.exit(main())
