"""Keeps the memory of a training step for the next one: on a CPU, a quarter of the time of a step.

glibc gives large blocks back to the system as soon as they are free, and a step of the student then takes 20,000 page
faults to get them again (128 px, batches of 8). Results do not depend on it.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_GIVEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


@cache
def keep_memory() -> bool:
    """Let glibc keep what is freed, in this process and its forks; return whether it does.

    Nothing is changed where the C library is another, or where the user has given settings in the environment
    (``MALLOC_MMAP_THRESHOLD_`` and the like). Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _GIVEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
