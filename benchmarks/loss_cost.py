"""Time of each distillation loss, forward and backward, as a multiple of logit KL; on the CPU, one thread.

The table of docs/distillation.md: ``python benchmarks/loss_cost.py``. Losses take turns, so that a busy machine slows
all of them; the number is the median over the turns of the ratio to logit KL in the same turn. Beside it stand the raw
loss, and the weighted one with the length of its gradient, for an unsure student and a sure teacher.
"""

from __future__ import annotations

import argparse
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


def batch(size: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
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
    return student + truth, 2 * teacher + 5 * truth, mask


def seconds(term: DistillationTerm, student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    """Return the time of one loss and its gradient."""
    student = student.detach().requires_grad_()
    begin = time.perf_counter()
    term(student, teacher, mask).backward()
    return time.perf_counter() - begin


def sizes(term: DistillationTerm, student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[float, float]:
    """Return the raw loss and the length of its gradient with respect to the student's logits."""
    student = student.detach().requires_grad_()
    raw = term(student, teacher, mask)
    (gradient,) = torch.autograd.grad(raw, student)
    return raw.item(), gradient.norm().item()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for classes in (1, 4):
        tensors = batch(options.size, classes)
        turns = [[seconds(term, *tensors) for term in TERMS] for _ in range(options.turns)]
        print(f"\n{classes} logit(s), {options.size} px, batch 8; logit KL {1e3 * min(t[0] for t in turns):.0f} ms")
        for index, term in enumerate(TERMS):
            ratio = statistics.median(turn[index] / turn[0] for turn in turns)
            raw, gradient = sizes(term, *tensors)
            print(
                f"  {type(term).__name__:18} {ratio:4.1f} x   raw {raw:8.1e}   x {term.weight:6} = "
                f"{term.weight * raw:8.1e}, its gradient {term.weight * gradient:8.1e}"
            )


if __name__ == "__main__":
    main()
