"""Whole federated runs that differ in one thing, compared image by image: what `codecs.py` and `poisoning.py` share.

Five hospitals: those of phantoms, or real images dealt in unequal shares (`fkd_med.data.Dirichlet`, by site, alpha 1).
All arms of a seed have the same split, the same teachers (trained once, kept in ``OUT/teachers``) and the same budget.
Every run lies in ``OUT/<arm>-<seed>``; one that has finished is not run again, one that was interrupted begins afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from fkd_med.cli import main as fkd
from fkd_med.communication import Ledger
from fkd_med.errors import TrainingError
from fkd_med.evaluation.intervals import bootstrap_difference
from fkd_med.evaluation.rows import ImageRow, ImageTable

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Arm:
    """One way to run: overlays of `configs/` and options of `fkd fit`, and the arm it is compared with."""

    name: str
    options: tuple[str, ...] = ()
    overlays: tuple[str, ...] = ()
    reference: str = ""


def parser(text: str, seeds: int) -> argparse.ArgumentParser:
    """Return the options that both programs have."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--root", type=Path, help="Images; phantoms are made when it is left out.")
    parser.add_argument("--config", default="chest_xray/fkd_resunet.yaml", help="Of configs/; what all arms run.")
    parser.add_argument("--out", type=Path, default=Path("runs/paired"), help="Folder of the runs.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--arms", nargs="+", help="Names of the arms to run; all when left out.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--teacher-epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="Phantoms, one round, a tiny teacher: to try the program.")
    parser.add_argument("options", nargs="*", help="After `--`: further options of `fkd fit`, for all arms.")
    return parser


def measure(arms: Sequence[Arm], given: argparse.Namespace) -> None:
    """Run the arms for every seed; print a line for each run, and one for each arm against its reference."""
    wanted = [arm for arm in arms if not given.arms or arm.name in given.arms or _is_reference(arm, arms, given.arms)]
    common = _common(given)
    for seed in given.seeds:
        for arm in wanted:
            folder = given.out / f"{arm.name}-{seed}"
            _run(arm, seed, folder, common)
            print(json.dumps(_outcome(arm, seed, folder)), flush=True)
    for arm in wanted:
        if arm.reference:
            print(json.dumps(_against(arm, given)), flush=True)


def _is_reference(arm: Arm, arms: Sequence[Arm], names: list[str]) -> bool:
    return any(arm.name == other.reference for other in arms if other.name in names)


def _common(given: argparse.Namespace) -> list[str]:
    """Return what all runs share."""
    given.out.mkdir(parents=True, exist_ok=True)
    if given.quick:
        given.rounds, given.teacher_epochs, given.seeds = 1, 1, given.seeds[:1]
    root = given.root
    if given.quick or root is None:
        root = given.out / "phantoms"
        if not root.exists():
            images = "12" if given.quick else "60"
            with contextlib.redirect_stdout(sys.stderr):
                fkd(["phantoms", str(root), "--hospitals", "5", "--images", images, "--size", "64"])
        given.config = "folder/fkd_resunet.yaml"
        dealt = []
    else:
        dealt = [
            "--data.partitioner",
            "Dirichlet",
            "--data.partitioner.clients",
            "5",
            "--data.partitioner.alpha",
            "1.0",
        ]
    overlays = [given.config, "small.yaml", "small_federated.yaml", "small_teacher.yaml"]
    options = [part for name in overlays for part in ("--config", str(CONFIGS / name))]
    options += ["--data.root", str(root), *dealt, "--federation.rounds", str(given.rounds)]
    options += ["--model.teacher.epochs", str(given.teacher_epochs), "--model.teacher.module.network.width", "16"]
    options += ["--model.teacher.store", str(given.out / "teachers"), "--trainer.logger", "false"]
    if given.quick:
        options += ["--data.image_size", "32", "--data.batch_size", "4", "--federation.local_epochs", "1"]
    return [*options, *given.options]


def _run(arm: Arm, seed: int, folder: Path, common: list[str]) -> None:
    note = beside(folder, ".json")
    if note.exists():
        return
    options = [part for name in arm.overlays for part in ("--config", str(CONFIGS / name))]
    argv = ["fit", *common, *options, *arm.options, "--seed_everything", str(seed), "--run_dir", str(folder)]
    started = time.perf_counter()
    with (
        beside(folder, ".log").open("w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = fkd([*argv, "--overwrite"])
    if code not in (0, TrainingError.exit_code):  # a run that cannot go on is a result; anything else is a mistake
        raise SystemExit(f"{folder}: fkd ended with {code}; see {folder.with_suffix('.log')}")
    note.write_text(json.dumps({"code": code, "seconds": round(time.perf_counter() - started, 1)}))


def beside(folder: Path, suffix: str) -> Path:
    """Return the file beside a run's folder; names of arms have dots in them."""
    return folder.parent / f"{folder.name}{suffix}"


def _rows(folder: Path) -> list[ImageRow]:
    """Return the test rows of the federated student, of the round that validation picked."""
    return ImageTable.read(folder / "images.csv").of("test", "student", "federated")


def _dice(rows: list[ImageRow]) -> float:
    clients = sorted({row.client for row in rows})
    return statistics.fmean(statistics.fmean(r.dice for r in rows if r.client == c) for c in clients)


def _outcome(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    note = json.loads(beside(folder, ".json").read_text())
    said: dict[str, Any] = {
        "program": Path(sys.argv[0]).stem,
        "arm": arm.name,
        "seed": seed,
        "seconds": note["seconds"],
    }
    if note["code"] != 0:
        lines = [x for x in beside(folder, ".log").read_text().splitlines() if x.strip()]
        return said | {"stopped": lines[-1] if lines else ""}
    ledger, rows = Ledger(folder / "ledger.csv"), _rows(folder)
    said |= {"images": len(rows), "dice": round(_dice(rows), 4)}
    return said | {"bytes_" + way: round(ledger.mean_per_message(way)) for way in ("up", "down")}


def _against(arm: Arm, given: argparse.Namespace) -> dict[str, Any]:
    """Return an arm's Dice minus its reference's, in points: per seed with its patients' interval, and over the seeds.

    The interval over seeds is Student's t of the seeds' differences: it holds split, teachers, order and rounding, and
    needs two seeds.
    """
    said: dict[str, Any] = {"program": Path(sys.argv[0]).stem, "arm": arm.name, "minus": arm.reference}
    points = []
    for seed in given.seeds:
        folders = [given.out / f"{name}-{seed}" for name in (arm.reference, arm.name)]
        if any(json.loads(beside(f, ".json").read_text())["code"] != 0 for f in folders):
            return said | {"stopped": True}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # images that are not in both arms
            found = bootstrap_difference(*(_rows(folder) for folder in folders)).mean
        points.append([round(100 * value, 2) for value in (found.estimate, found.low, found.high)])
    mean = statistics.fmean(point[0] for point in points)
    said |= {"points": round(mean, 2), "per_seed": points}
    if len(points) > 1:
        error = statistics.stdev(point[0] for point in points) / math.sqrt(len(points))
        half = float(stats.t.ppf(0.975, len(points) - 1)) * error
        said["interval_over_seeds"] = [round(mean - half, 2), round(mean + half, 2)]
    return said


os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
