"""Randomness derives from names and counters, and leaves the caller's alone."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from fkd_med.seeding import derive_seed, global_seed, seeded


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def restart() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


def test_seed_depends_on_every_element_in_order_and_on_its_type() -> None:
    entropies = [
        (1, 2, "a"), (1, "a", 2), (2, 1, "a"), (1, 2, "b"), (1, 2), (1, 2, "a", 0), ("1", 2, "a"), (12, "a"),
        (1, "2a"), (1, "2", "a"), (-1, 2, "a"),
    ]  # fmt: skip
    seeds = [derive_seed(*entropy) for entropy in entropies]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seed_is_the_same_in_every_version() -> None:
    """Changing these numbers changes every run anybody has made: think twice."""
    assert derive_seed(42, 1, "hospital-a") == 3745771408
    assert derive_seed() == 1120186595


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [None, "5"])
def test_seeded_restores_the_caller(monkeypatch, fails, before) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
    restart()
    expected = draw()
    restart()
    error = ValueError("as it was")
    try:
        with seeded(3, "x") as seed:
            assert seed == derive_seed(3, "x") == global_seed()
            assert os.environ["PL_SEED_WORKERS"] == "1"
            inside = draw()
            if fails:
                raise error
    except ValueError as raised:
        assert raised is error
    else:
        assert not fails
    assert draw() == expected != inside
    assert os.environ.get("PL_GLOBAL_SEED") == os.environ.get("PL_SEED_WORKERS") == before


def test_seeded_draws_depend_on_the_entropy_only() -> None:
    draws = []
    for entropy in ((1, "a"), (1, "a"), (1, "b")):
        torch.rand(3)
        with seeded(*entropy):
            draws.append(draw())
    assert draws[0] == draws[1]
    assert all(one != other for one, other in zip(draws[0], draws[2], strict=True))


def test_no_seed_is_zero(monkeypatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert global_seed() == 0
