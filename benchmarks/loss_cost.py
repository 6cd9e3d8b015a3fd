"""Time of each distillation loss, forward and backward, as a multiple of logit KL; on the CPU, one thread.

The table of docs/distillation.md: ``python benchmarks/loss_cost.py``. Losses take turns, so that a busy machine slows
all of them; ``ratio`` is the median over the turns of the ratio to logit KL in the same turn. Beside it stand the raw
loss, and the weighted one with the length of its gradient, for an unsure student and a sure teacher. One JSON object
per line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor

from fkd_med.losses import (
    CWD,
    IFVD,
    AttentionTransfer,
    BoundaryKL,
    DistillationTerm,
    DISTIntra,
    LogitKL,
    PairwiseAffinity,
    Pixels,
    RegionAffinity,
)

TERMS: list[DistillationTerm] = [
    LogitKL(),
    CWD(),
    PairwiseAffinity(pool=0.0625),
    IFVD(),
    RegionAffinity(),
    AttentionTransfer(p=2),
    AttentionTransfer(p=4),
    DISTIntra(),
    BoundaryKL(),
]


def batch(size: int, classes: int) -> tuple[Tensor, Tensor, Pixels]:
    """Return 8 images' logits of an unsure student and a sure teacher, and their masks: a disc per class."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    mask = torch.zeros(8, size, size, dtype=torch.int64)
    for k in range(1, max(2, classes)):
        centre = size * k / (max(2, classes))
        mask[:, (y - centre) ** 2 + (x - centre) ** 2 < (size / 8) ** 2] = k
    truth = torch.nn.functional.one_hot(mask, max(2, classes)).movedim(-1, 1)[:, -classes:] * 2.0 - 1
    noise = torch.nn.functional.interpolate(torch.randn(2, 8 * classes, size // 8, size // 8), size=(size, size))
    student, teacher = noise.reshape(2, 8, classes, size, size)
    return student + truth, 2 * teacher + 5 * truth, Pixels(mask, max(2, classes))


def seconds(term: DistillationTerm, student: Tensor, teacher: Tensor, pixels: Pixels) -> float:
    """Return the time of one loss and its gradient."""
    student = student.detach().requires_grad_()
    begin = time.perf_counter()
    term(student, teacher, pixels).backward()
    return time.perf_counter() - begin


def sizes(term: DistillationTerm, student: Tensor, teacher: Tensor, pixels: Pixels) -> tuple[float, float]:
    """Return the raw loss and the length of its gradient with respect to the student's logits."""
    student = student.detach().requires_grad_()
    raw = term(student, teacher, pixels)
    (gradient,) = torch.autograd.grad(raw, student)
    return raw.item(), gradient.norm().item()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for classes in (1, 4):
        tensors = batch(options.size, classes)
        turns = [[seconds(term, *tensors) for term in TERMS] for _ in range(options.turns)]
        for index, term in enumerate(TERMS):
            raw, gradient = sizes(term, *tensors)
            figures = {
                "loss": type(term).__name__ + (f" p {term.p}" if isinstance(term, AttentionTransfer) else ""),
                "classes": classes,
                "size": options.size,
                "ratio": round(statistics.median(turn[index] / turn[0] for turn in turns), 2),
                "milliseconds": round(1e3 * min(turn[index] for turn in turns), 2),
                "raw": raw,
                "weight": term.weight,
                "weighted": term.weight * raw,
                "weighted_gradient": term.weight * gradient,
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
