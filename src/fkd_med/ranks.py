"""Which of several processes (DDP ranks) this one is: only the first writes files and prints."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only


def is_first_rank() -> bool:
    """Return whether this process is rank 0; true where there is only one."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0
