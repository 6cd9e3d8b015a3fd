"""The benchmark of the loop compares ways to do the same work, and says what it lacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def overhead(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back what the benchmark's seed leaves in the environment
    import loop_overhead

    return loop_overhead


def test_ours_and_the_bare_loop_do_the_same_work(
    overhead: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = overhead.Work(str(tmp_path), rounds=2, steps=5, size=32, batch=4)  # into a second epoch of four batches
    overhead.measure_time(1, work)
    turn, all_turns = map(json.loads, capsys.readouterr().out.splitlines())
    assert turn["ours_apart"] < 1e-6
    assert turn["ratio"] == pytest.approx(turn["ours_s"] / turn["bare_s"], rel=1e-2)
    assert all_turns["ratio"] == turn["ratio"] and all_turns["ratio_cpu"] > 0
    assert {key: all_turns[key] for key in ("steps", "size", "batch", "clients")} == {
        "steps": 5, "size": 32, "batch": 4, "clients": 3,
    }  # fmt: skip


@pytest.mark.slow
def test_hospitals_side_by_side_end_with_the_same_bits(
    overhead: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = overhead.Work(str(tmp_path), rounds=2, steps=2, size=32, batch=4, clients=2)
    overhead.measure_parallel(1, work, 2)
    turn, all_turns = map(json.loads, capsys.readouterr().out.splitlines())
    assert turn["apart"] == 0 and turn["speedup"] == pytest.approx(turn["alone_s"] / turn["beside_s"], rel=1e-2)
    assert all_turns["beside"] == 2 and all_turns["speedup"] == turn["speedup"]


def test_flower_that_is_not_installed_is_one_line(
    overhead: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "installed", lambda: False)
    monkeypatch.setattr(sys, "argv", ["loop_overhead.py", "flower"])
    with pytest.raises(SystemExit) as stopped:
        overhead.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert said.err.count("\n") == 1 and "pip install '.[benchmark]'" in said.err


def test_medians_leave_out_the_first_round(overhead: Any) -> None:
    times = [(0.0, 0.0), (100.0, 50.0), (101.0, 50.5), (104.0, 52.0), (106.0, 53.0)]
    assert overhead.per_round(times) == (2.0, 1.0)
