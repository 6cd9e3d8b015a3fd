"""What distillation costs: the step of a student with each loss, live and cached, and a whole small FKD run.

``python benchmarks/kd_cost.py steps`` times one training step (forward, losses, backward, Adam) of the plain student
and of the student with each loss, with a teacher that runs (``live``) or whose answers lie in a cache (``cached``).
Within one turn every variant runs once; ``ratio`` is the median over the turns of the ratio to the plain step then.
``ratio_with_data`` adds the reading and augmenting of the batch's images to both sides (no data workers).

``python benchmarks/kd_cost.py run`` times `fkd fit` with a full-size teacher that is already trained: live, cached (the
cache is made), and cached again (it is found), each in a process of its own, with its peak memory.

One JSON object per line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fkd_med.data.augmentation import default_augmentation
from fkd_med.distillation import Taps
from fkd_med.losses import (
    CWD,
    IFVD,
    LOGITS,
    AttentionTransfer,
    BoundaryKL,
    DistillationTerm,
    DISTIntra,
    HintMSE,
    LogitKL,
    PairwiseAffinity,
    RegionAffinity,
)
from fkd_med.modules import DistillationModule, SegmentationModule
from fkd_med.networks import ResUNet, SlimUNet, TransUNet

TAPS = {"ResUNet": ("decoder.2", "decoder.0"), "TransUNet": ("decoder.2", "decoder.1")}  # of student, teacher: 1/4
TEACHERS: dict[str, Callable[[int], nn.Module]] = {
    "ResUNet": lambda size: ResUNet(),
    "TransUNet": lambda size: TransUNet(img_size=size),
}


def recipes(teacher: str) -> dict[str, dict[str, DistillationTerm]]:
    """Return the terms to time, by name; those on features end in ``features``."""
    ours, theirs = TAPS[teacher]
    tapped = {"student_tap": ours, "teacher_tap": theirs}
    return {
        "logit_kl": {"a": LogitKL()},
        "cwd": {"a": CWD()},
        "pairwise_affinity": {"a": PairwiseAffinity(pool=0.0625)},
        "ifvd": {"a": IFVD()},
        "region_affinity": {"a": RegionAffinity()},
        "attention_transfer": {"a": AttentionTransfer(p=4)},
        "dist_intra": {"a": DISTIntra()},
        "boundary_kl": {"a": BoundaryKL()},
        "logit_kl + attention_transfer features": {"a": LogitKL(), "b": AttentionTransfer(**tapped)},
        "logit_kl + hint_mse features": {"a": LogitKL(), "b": HintMSE(**tapped)},
        "logit_kl + region_affinity features": {"a": LogitKL(), "b": RegionAffinity(**tapped)},
    }


def images(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random images (count, size, size, 3) and masks with a disc."""
    y, x = np.mgrid[:size, :size]
    disc = ((y - size / 2) ** 2 + (x - size / 3) ** 2 < (size / 5) ** 2).astype(np.uint8)
    return np.random.default_rng(0).random((count, size, size, 3), dtype=np.float32), np.stack([disc] * count)


class Variant:
    """One way to train: its module, its optimizer and its batch.

    Args:
        module: the module.
        batch: a batch, with the teacher's maps in it or without.
    """

    def __init__(self, module: SegmentationModule, batch: dict[str, Any]) -> None:
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
        self.module, self.batch = module, batch
        self.optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def seconds(self) -> float:
        """Do one step and return how long it took."""
        _wait(self.batch["image"])
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        torch.stack(list(self.module.loss_terms(self.batch).values())).sum().backward()
        self.optimizer.step()
        _wait(self.batch["image"])
        return time.perf_counter() - begin


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def data_seconds(size: int, count: int) -> tuple[float, float]:
    """Return the time of augmenting one batch, without and with the coordinates that cached maps need."""
    augment, (pictures, masks) = default_augmentation(), images(count, size)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(7):
        for spent, run in zip(times, (augment, augment.with_coordinates), strict=True):
            begin = time.perf_counter()
            for index in range(count):
                run(pictures[index], masks[index], turn * count + index)
            spent.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def step_figures(name: str, size: int, options: argparse.Namespace) -> None:
    """Print the figures of one teacher at one image size."""
    device = torch.device(options.device)
    teacher = TEACHERS[name](size).to(device)
    pictures, masks = images(options.batch, size)
    batch = {
        "image": torch.from_numpy(pictures).movedim(-1, 1).contiguous().to(device),
        "mask": torch.from_numpy(masks).long().to(device),
        "id": [str(index) for index in range(options.batch)],
        "client": ["a"] * options.batch,
    }
    moved = [default_augmentation().with_coordinates(pictures[i], masks[i], i)[2] for i in range(options.batch)]
    coordinates = torch.from_numpy(np.stack(moved)).to(device)
    variants = {("plain", ""): Variant(SegmentationModule(SlimUNet().to(device)), batch)}
    for label, terms in recipes(name).items():
        module = DistillationModule(SlimUNet(), losses=terms, teacher_cache="off").to(device)
        module.rehearse(batch["image"][:1].cpu(), teacher)
        module.attach_teacher(teacher)
        with torch.no_grad():
            answers = Taps(teacher, module.teacher_taps)(batch["image"])
        cached = {"teacher": {tap: maps.half() for tap, maps in answers.items()}, "coordinates": coordinates}
        variants[label, "cached"] = Variant(module, {**batch, **cached})
        if label in ("logit_kl", "logit_kl + attention_transfer features"):  # live, all cost what the teacher does
            live = DistillationModule(SlimUNet(), losses=terms, teacher_cache="off").to(device)
            live.attach_teacher(teacher)
            variants[label, "live"] = Variant(live, batch)
    _print_steps(name, size, variants, options)


def _print_steps(name: str, size: int, variants: dict[tuple[str, str], Variant], options: argparse.Namespace) -> None:
    turns: list[dict[tuple[str, str], float]] = []
    for turn in range(options.turns + 1):  # the first warms up
        slow = turn < 1 + options.live_turns
        turns.append({key: v.seconds() for key, v in variants.items() if slow or key[1] != "live"})
    plain_data, cached_data = data_seconds(size, options.batch)
    for label, mode in variants:
        seen = [turn for turn in turns[1:] if (label, mode) in turn]
        data = cached_data if mode == "cached" else plain_data
        pairs = [(turn[label, mode], turn["plain", ""]) for turn in seen]
        figures = {
            "benchmark": "kd_cost steps", "teacher": name, "size": size, "batch": options.batch,
            "device": options.device, "threads": torch.get_num_threads(), "loss": label, "teacher_runs": mode,
            "milliseconds": round(1e3 * statistics.median(own for own, _ in pairs), 2),
            "ratio": round(statistics.median(own / plain for own, plain in pairs), 3),
            "ratio_with_data": round(
                statistics.median((own + data) / (plain + plain_data) for own, plain in pairs), 3
            ),
            "tapped_features": label.endswith("features"), "cache_bytes_per_image": _cache_bytes(variants[label, mode]),
        }  # fmt: skip
        print(json.dumps(figures), flush=True)


def _cache_bytes(variant: Variant) -> int:
    maps = variant.batch.get("teacher", {LOGITS: torch.empty(0)})
    return sum(m[:1].numel() * 2 for m in maps.values())


def run_figures(options: argparse.Namespace) -> None:
    """Print time and peak memory of a whole small run, live and cached."""
    with tempfile.TemporaryDirectory() as folder:
        _fkd(folder, options, "prepare", "--federation.rounds", "1", "--model.teacher_cache", "off")
        times = {}
        for label, cache in (("live", "off"), ("cached, made", "logits"), ("cached, found", "logits")):
            seconds, peak = _fkd(folder, options, label, "--model.teacher_cache", cache)
            times[label] = seconds
            figures = {
                "benchmark": "kd_cost run", "teacher": options.teacher, "size": options.sizes[0],
                "rounds": options.rounds, "local_epochs": 2, "teacher_runs": label, "seconds": round(seconds, 1),
                "live_over_this": round(times["live"] / seconds, 2), "peak_memory_mb": round(peak),
            }  # fmt: skip
            print(json.dumps(figures), flush=True)


def _fkd(folder: str, options: argparse.Namespace, label: str, *arguments: str) -> tuple[float, float]:
    """Run `fkd fit` on phantom hospitals in a new process; return its seconds and its peak memory in MB."""
    base = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
    network = ["--model.teacher.module.network", f"fkd_med.networks.{options.teacher}"]
    full = ("width", 64) if options.teacher == "ResUNet" else ("img_size", options.sizes[0])  # quickstart's is narrow
    network += [f"--model.teacher.module.network.{full[0]}", str(full[1])]
    command = [
        sys.executable, "-m", "fkd_med", "fit", "--config", str(base), *network, "--model.teacher.epochs", "1",
        "--data.root", f"{folder}/phantoms", "--model.teacher.store", f"{folder}/teachers",
        "--data.layout.size", str(options.sizes[0]), "--data.image_size", str(options.sizes[0]),
        "--run_dir", f"{folder}/{label.replace(', ', '-')}", "--federation.rounds", str(options.rounds),
        "--federation.local_epochs", "2", "--federation.local_baseline", "false", "--trainer.logger", "false",
        *arguments,
    ]  # fmt: skip
    with open(f"{folder}/log", "w") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"fkd fit failed:\n{Path(folder, 'log').read_text()[-2000:]}")
    return seconds, _megabytes(usage)


def _megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "run", "all"], nargs="?", default="all")
    parser.add_argument("--teachers", nargs="+", choices=sorted(TEACHERS), default=sorted(TEACHERS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--live-turns", type=int, default=3, help="live steps are slow, and their ratio is large")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--teacher", choices=sorted(TEACHERS), default="ResUNet", help="of the whole run")
    parser.add_argument("--rounds", type=int, default=20, help="of the whole run")
    options = parser.parse_args()
    if options.what != "run":
        for name in options.teachers:
            for size in options.sizes:
                step_figures(name, size, options)
    if options.what != "steps":
        run_figures(options)


if __name__ == "__main__":
    main()
