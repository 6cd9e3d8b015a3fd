"""What is freed in a step is kept for the next one."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from fkd_med.allocator import keep_memory
from fkd_med.networks import SlimUNet


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_blocks_come_back_without_page_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    network, images = SlimUNet(), torch.rand(8, 3, 128, 128)

    def faults(steps: int) -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(steps):
            network(images).square().mean().backward()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

    assert keep_memory.__wrapped__()
    faults(4)
    assert faults(4) < 3_000  # without it 17,000 and more


def test_settings_of_the_user_and_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not keep_memory.__wrapped__()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_memory.__wrapped__()
