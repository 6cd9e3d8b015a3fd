"""Killed at chosen places and at random, a run goes on and ends bit for bit as if nothing had happened.

`benchmarks/chaos.py` does it: it kills the program itself, in processes of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fkd_med.cli import main
from fkd_med.cli.signals import TerminatedError, interruption


def chaos(repository: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    """Run the program; return its lines, the last of which is the sum."""
    command = [sys.executable, str(repository / "benchmarks" / "chaos.py"), "--out", str(out), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_chosen_points_and_at_random(repository: Path, tmp_path: Path) -> None:
    *points, _ = chaos(repository, tmp_path / "out", "--points")
    assert len(points) > 30
    assert all(line["identical"] and line["ended"] != 0 for line in points)
    journal = {line["kill"]: line["from_journal"] for line in points}
    assert journal["all clients finished"] == 2 and journal["between update and note"] == 1
    assert journal["client fit: second client of round 1"] == 1  # there was nothing to resume: the same command again
    *kills, total = chaos(repository, tmp_path / "out", "--kills", "5")
    assert total["identical"] == len(kills) == 5
    again = chaos(repository, tmp_path / "out", "--kills", "5")
    assert again[:-1] == kills  # nothing is done twice


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_while_every_hospital_trains_alone(repository: Path, tmp_path: Path) -> None:
    *points, _ = chaos(repository, tmp_path / "out", "--baseline", "--points", "alone")
    assert len(points) == 5 and all(line["identical"] for line in points)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_own_code(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Any, root: Path) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("fkd_med.data.Phantoms.prepare", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits an ignored one
    try:
        assert main(["phantoms", str(tmp_path / "x")]) == code
    finally:
        signal.signal(signal.SIGINT, ours)
    assert ("Terminated" if code == 143 else "Interrupted") in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_is_found_behind_what_lightning_makes_of_it() -> None:
    for inside, code in ((KeyboardInterrupt(), 130), (TerminatedError(), 143), (ValueError(), None)):
        try:
            try:
                raise inside
            except BaseException:
                sys.exit(1)
        except SystemExit as ended:
            assert interruption(ended) == code
