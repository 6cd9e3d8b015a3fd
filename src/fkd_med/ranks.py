"""Which of several processes (DDP ranks) this one is: only the first writes files and prints."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only

T = TypeVar("T")


def is_first_rank() -> bool:
    """Return whether this process is rank 0; true where there is only one."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def count_processes() -> int:
    """Return how many processes work together; 1 before they have met."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def of_all_ranks(value: T) -> list[T]:
    """Return what each process has, in the order of the ranks; all ranks must call it."""
    if count_processes() == 1:
        return [value]
    gathered: list[Any] = [None] * count_processes()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def mean_of_ranks(values: dict[str, float]) -> dict[str, float]:
    """Return the mean of what each process has measured on its equal part of the images.

    All ranks must call it, with the same names.
    """
    gathered = of_all_ranks(values)
    return {name: sum(one[name] for one in gathered) / len(gathered) for name in values}


def as_first_rank_says(value: T) -> T:
    """Return the value of rank 0: what lies on the disk may change between two ranks' looks at it.

    All ranks must call it. The values are plain containers; those of other ranks do not count.
    """
    if count_processes() > 1:
        said = [value]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]
    return value
