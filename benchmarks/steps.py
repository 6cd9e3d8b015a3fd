"""What a training step costs: wall time, a GPU's own time, two memory layouts; and how many processes one GPU holds.

    python benchmarks/steps.py layouts --networks SlimUNet ResUNet TransUNet --precisions float32 bf16    # on a GPU
    python benchmarks/steps.py layouts --device cpu --size 64    # the student on one core
    python benchmarks/steps.py side --processes 12               # so many students train on the GPU at the same time

A step is forward, Dice and cross-entropy, backward and Adam on a batch that lies on the device, and waiting for the
loss; a forward is the answer of a frozen teacher. No images are read. Both layouts are timed in turns. Of small
networks the wall time on a GPU is that of the CPU that starts the kernels; ``gpu_ms`` is what the GPU works meanwhile,
by torch's profiler, ``kernels`` how many it is given. To see what NVIDIA's MPS does for `side`, start its daemon
(``nvidia-cuda-mps-control -d``) between two calls. One JSON object per line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fkd_med.losses import DiceCE
from fkd_med.networks import ResUNet, SlimUNet, TransUNet, channels_last

SECONDS = 4.0  # that `side` counts steps for
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "SlimUNet": lambda size: SlimUNet(in_channels=3, classes=1),
    "ResUNet": lambda size: ResUNet(in_channels=3, classes=1),
    "TransUNet": lambda size: TransUNet(in_channels=3, classes=1, img_size=size),
}


class Training:
    """One network with its batch and optimizer on a device."""

    def __init__(self, network: nn.Module, device: torch.device, bf16: bool, batch: int, size: int) -> None:
        self.network, self.device, self.bf16 = network.to(device), device, bf16
        self.image = torch.randn(batch, 3, size, size, device=device)
        self.mask = (torch.rand(batch, size, size, device=device) > 0.5).long()
        self.optimizer, self.loss = torch.optim.Adam(self.network.parameters(), lr=1e-4), DiceCE()

    def step(self) -> None:
        """Train on the batch, and wait for the loss, as a Trainer does that looks whether it is finite."""
        self.network.train()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.loss(self.network(self.image), self.mask)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        float(loss.detach())

    @torch.no_grad()
    def answer(self) -> None:
        """Answer the batch as a live teacher does, and wait for it."""
        self.network.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            float(self.network(self.image).flatten()[0])

    def on_gpu(self, steps: int = 5) -> dict[str, float]:
        """Return the GPU's own time for a step and the number of kernels; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(steps):
                self.step()
            torch.cuda.synchronize()
        busy = sum(event.self_device_time_total for event in profiled.key_averages())
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())
        return {"gpu_ms": round(busy / 1e3 / steps, 2), "kernels": kernels // steps}


def in_turns(works: list[Callable[[], None]], repeats: int) -> list[float]:
    """Return the median milliseconds of each piece of work; all are done once a turn, the first turns do not count."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + max(1, repeats // 5)):
        for taken, work in zip(times, works, strict=True):
            start = time.perf_counter()
            work()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[-repeats:]) for taken in times]


def layouts(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what a step and a forward of each network cost in both layouts, and the ratio plain / channels last."""
    for name in given.networks:
        for precision in given.precisions:
            made = [NETWORKS[name](given.size), channels_last(NETWORKS[name](given.size))]
            place = (torch.device(given.device), precision == "bf16", given.batch, given.size)
            plain, last = (Training(network, *place) for network in made)
            times = in_turns([plain.step, last.step, plain.answer, last.answer], given.repeats)
            row = {"network": name, "precision": precision, "size": given.size, "batch": given.batch}
            for layout, training, step, forward in zip(
                ("plain", "last"), (plain, last), times[:2], times[2:], strict=True
            ):
                row[layout] = {"step_ms": round(step, 2), "forward_ms": round(forward, 2), **training.on_gpu()}
            yield row | {"step_ratio": round(times[0] / times[1], 2), "forward_ratio": round(times[2] / times[3], 2)}


def train_until(end: float, given: argparse.Namespace) -> None:
    """Train a student in the last `SECONDS` before `end`, and print its steps a second; null if it was not ready."""
    torch.set_num_threads(1)
    network = channels_last(NETWORKS["SlimUNet"](given.size))
    training = Training(network, torch.device(given.device), given.precisions == ["bf16"], given.batch, given.size)
    for _ in range(3):
        training.step()
    late, number = time.time() > end - SECONDS, 0
    time.sleep(max(0.0, end - SECONDS - time.time()))
    while time.time() < end:
        training.step()
        number += 1
    print(json.dumps(None if late else number / SECONDS))


def side(given: argparse.Namespace) -> dict[str, object]:
    """Return the steps a second of so many processes, all together and the slowest."""
    end = time.time() + given.patience + SECONDS
    like = ["--device", given.device, "--size", str(given.size), "--batch", str(given.batch), "--precisions", "bf16"]
    command = [sys.executable, __file__, "one", "--end", repr(end), *like]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(given.processes)]
    rates = [json.loads(one.communicate()[0]) for one in started]
    if None in rates:
        raise SystemExit(f"{rates.count(None)} processes were not ready in time: give a longer --patience.")
    return {"processes": given.processes, "steps_per_second": round(sum(rates), 1), "slowest": round(min(rates), 1)}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="layouts", choices=["layouts", "side", "one"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", default=["SlimUNet"], choices=list(NETWORKS))
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=["float32", "bf16"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds in which processes get ready")
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    if given.what == "one":
        train_until(given.end, given)
    elif given.what == "side":
        print(json.dumps(side(given)))
    else:
        for row in layouts(given):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
