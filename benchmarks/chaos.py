"""Kills a tiny federated run again and again, resumes it, and compares it bit by bit with one that was not killed.

Every second random kill comes at a random time, the others at a random change of a file (a time falls into training
most often, and what can break lies between two files). With ``--points`` the kills come at chosen places instead.
A line of JSON per kill, and one for all; what is in ``OUT/kills.jsonl`` already is not done again.

    python benchmarks/chaos.py --kills 100
    python benchmarks/chaos.py --points
    python benchmarks/chaos.py --ddp          # two processes, one of which is killed at chosen places
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forks must find no threads, and bits depend on their number
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
import torch

from _kills import (
    BASELINE_POINTS,
    COMMAND,
    PICTURES,
    POINTS,
    RANK_POINTS,
    Point,
    at_event,
    differences,
    has_orphan,
    prepare,
    resume,
    run,
)
from fkd_med.cli import lightning  # noqa: F401 - imported before the forks

_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def main() -> int:
    """Kill as often as asked; return 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="How many random kills.")
    parser.add_argument("--points", nargs="*", help="Kill at chosen places: all, or those whose name has this in it.")
    parser.add_argument("--baseline", action="store_true", help="Also train every hospital alone, and kill there too.")
    parser.add_argument("--ddp", action="store_true", help="Two processes; --points chooses among places of its own.")
    parser.add_argument("--pictures", action="store_true", help="Draw the pictures at the end of a run too: slower.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random kills.")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.pictures:
        os.environ[PICTURES] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    whole = _reference(given.out.resolve() / "reference", given.baseline, given.ddp)
    notes = given.out / "kills.jsonl"
    done = {line["kill"]: line for line in map(json.loads, notes.read_text().splitlines())} if notes.exists() else {}
    said = []
    for name, scenario in _scenarios(given, whole).items():
        if name not in done:
            done[name] = _kill(given, name, scenario)
            with notes.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
        print(json.dumps(done[name]), flush=True)
        said.append(done[name])
    good = sum(line["identical"] for line in said)
    killed = sum(line["ended"] != 0 for line in said)
    print(json.dumps({"program": "chaos", "runs": len(said), "killed": killed, "identical": good}), flush=True)
    return int(good < len(said))


def _reference(folder: Path, baseline: bool, ddp: bool) -> dict[str, float]:
    """Make the uninterrupted run, unless it is there; return how long it takes and how many files it changes."""
    note, options = folder / "note.json", {"baseline": baseline, "ddp": ddp, "pictures": PICTURES in os.environ}
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        ended = run(prepare(folder, baseline, ddp), COMMAND)
        counted = folder.with_name("counted")
        shutil.rmtree(counted, ignore_errors=True)
        again = run(prepare(counted, baseline, ddp), COMMAND, at_event(0))
        if ended.code or again.code or differences(folder, counted):
            raise SystemExit(f"Two uninterrupted runs are not the same, or failed: see {folder / 'log'}.")
        events = int(folder.with_name("events").read_text())
        note.write_text(json.dumps({"seconds": ended.seconds, "events": events, **options}))
    stored: dict[str, float] = json.loads(note.read_text())
    if any(stored.get(name, False) != value for name, value in options.items()):
        raise SystemExit(f"{folder.parent} holds runs with other options: give another --out.")
    return stored


def _scenarios(given: argparse.Namespace, whole: dict[str, float]) -> dict[str, Any]:
    """Return the kills by name: a point, a number of seconds, or the number of a change of a file."""
    if given.points is not None or given.ddp:
        points = RANK_POINTS if given.ddp else [*POINTS, *(BASELINE_POINTS if given.baseline else ())]
        wanted = [p for p in points if not given.points or any(part in p.name for part in given.points)]
        return {point.name: point for point in wanted}
    random = np.random.default_rng(given.seed)
    draws = random.random(given.kills)
    return {
        f"random {i}": float(x * whole["seconds"]) if i % 2 == 0 else 1 + int(x * whole["events"])
        for i, x in enumerate(draws)
    }


def _kill(given: argparse.Namespace, name: str, scenario: Any) -> dict[str, Any]:
    """Kill one run, resume it and compare."""
    folder = prepare(given.out.resolve() / f"killed-{os.getpid()}", given.baseline, given.ddp)
    line: dict[str, Any] = {"kill": name}
    if isinstance(scenario, Point):
        ended = run(folder, COMMAND, scenario.install)
        # Of a process that lost another: its own error, or a kill by Lightning, which watches the others.
        wanted: tuple[int, ...] = (3, -9) if scenario.rank else (_CODES[signal.Signals(scenario.signal)],)
    elif isinstance(scenario, float):
        ended, wanted = run(folder, COMMAND, after=scenario), ()
        line["seconds"] = round(scenario, 2)
    else:
        ended, wanted = run(folder, COMMAND, at_event(scenario)), ()
        line["event"] = scenario
    line["ended"] = ended.code
    how, wrong = "was not killed", ["a process is left"] if has_orphan(folder) else []
    if ended.code != 0:
        how, resumed = resume(folder)
        wrong += [f"the resumed run ended with {resumed.code}"] if resumed.code else []
    if wanted and ended.code not in wanted:
        wrong.append(f"the run ended with {ended.code}, not {wanted}")
    wrong = wrong or differences(given.out.resolve() / "reference", folder)
    found = (folder / "log").read_text().count("found in the journal")
    line |= {"resumed": how, "from_journal": found, "identical": not wrong}
    if wrong:
        kept = folder.with_name("wrong-" + "".join(c if c.isalnum() else "-" for c in name))
        shutil.rmtree(kept, ignore_errors=True)
        folder.rename(kept)
        line["wrong"] = wrong[:6]
    shutil.rmtree(folder, ignore_errors=True)
    return line


if __name__ == "__main__":
    sys.exit(main())
