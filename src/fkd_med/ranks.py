"""Which of several processes (DDP ranks) this one is: only the first writes files and prints."""

from __future__ import annotations

from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only

T = TypeVar("T")


def is_first_rank() -> bool:
    """Return whether this process is rank 0; true where there is only one."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def as_first_rank_says(value: T) -> T:
    """Return the value of rank 0: what lies on the disk may change between two ranks' looks at it.

    All ranks must call it. The values are plain containers; those of other ranks do not count.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        said = [value]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]
    return value
