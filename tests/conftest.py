"""Fixtures every room shares."""

from __future__ import annotations

import os
from pathlib import Path

# Before any import of our stack: no look-ups over the network, no accounts.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: threads that wait for each other cost most

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_xdist_auto_num_workers() -> int:
    """Run the tests in as many processes as cores, and no more than eight: each imports the whole stack (1 GB)."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout under test."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data beside the checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the development data (../shared/data) is not here")
    return folder
