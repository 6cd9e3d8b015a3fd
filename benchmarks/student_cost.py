"""What each student costs: parameters, multiply-adds, and time on one thread of a CPU; the table of docs/students.md.

``python benchmarks/student_cost.py``. Students take turns, so that a busy machine slows all of them; a ratio is the
median over the turns of the ratio to SlimUNet in the same turn, times are medians. Another network is added by its
class: ``--network segmentation_models_pytorch.Unet``. One JSON object per line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fkd_med.losses import DiceCE
from fkd_med.networks import AxialUNet, ContextUNet, LargeKernelUNet, SlimUNet, count_parameters

STUDENTS: list[type[nn.Module]] = [SlimUNet, LargeKernelUNet, AxialUNet, ContextUNet]  # the first is the reference


def named(path: str) -> type[nn.Module]:
    """Return the class of a class_path."""
    module, _, name = path.rpartition(".")
    found: type[nn.Module] = getattr(importlib.import_module(module), name)
    return found


def multiply_adds(network: nn.Module, size: int) -> int:
    """Return the multiply-adds of one forward pass of one image, as PyTorch counts convolutions and products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, size, size))
    return int(counter.get_total_flops()) // 2


def forward(network: nn.Module, size: int) -> Callable[[], object]:
    """Return one forward pass of one image, to be timed."""
    x = torch.randn(1, 3, size, size)

    def run() -> object:
        with torch.no_grad():
            return network.eval()(x)

    return run


def training_step(network: nn.Module, size: int, batch: int) -> Callable[[], object]:
    """Return one training step, loss, gradient and Adam included, to be timed."""
    x, mask = torch.randn(batch, 3, size, size), torch.randint(2, (batch, size, size))
    loss, optimizer = DiceCE(), torch.optim.Adam(network.parameters())

    def run() -> object:
        optimizer.zero_grad()
        loss(network.train()(x), mask).backward()
        return optimizer.step()

    return run


def turns(works: list[Callable[[], object]], count: int) -> list[list[float]]:
    """Return the milliseconds of each work in each turn, after a turn to warm up."""
    measured = []
    for _ in range(count + 1):
        row = []
        for work in works:
            begin = time.perf_counter()
            work()
            row.append(1e3 * (time.perf_counter() - begin))
        measured.append(row)
    return measured[1:]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="of the image of the forward pass, in pixels")
    parser.add_argument("--step_size", type=int, default=64, help="of the images of the training step, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images of the training step")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--network", action="append", default=[], help="class_path of one more, with classes=2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    networks = [kind(in_channels=3, classes=2) for kind in (*STUDENTS, *map(named, options.network))]
    passes = turns([forward(network, options.size) for network in networks], options.turns)
    steps = turns([training_step(network, options.step_size, options.batch) for network in networks], options.turns)
    for index, network in enumerate(networks):
        figures = {
            "student": type(network).__name__,
            "parameters": count_parameters(network),
            "gmac": round(multiply_adds(network, options.size) / 1e9, 3),
            "size": options.size,
            "forward_ms": round(statistics.median(row[index] for row in passes), 1),
            "forward_ratio": round(statistics.median(row[index] / row[0] for row in passes), 2),
            "step_size": options.step_size,
            "batch": options.batch,
            "step_ms": round(statistics.median(row[index] for row in steps), 1),
            "step_ratio": round(statistics.median(row[index] / row[0] for row in steps), 2),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
