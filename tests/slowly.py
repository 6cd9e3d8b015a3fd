"""Which of many parameters run always: CI has fifteen minutes, `make test-all` runs all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_where(names: Iterable[Any], is_slow: Callable[[Any], bool]) -> list[Any]:
    """Return parameters, those of which `is_slow` is true with the mark of slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] if is_slow(name) else []) for name in names]


def slow_but(quick: Iterable[Any], names: Iterable[Any]) -> list[Any]:
    """Return parameters, all but `quick` with the mark of slow tests."""
    always = list(quick)
    assert all(name in names for name in always)
    return slow_where(names, lambda name: name not in always)
