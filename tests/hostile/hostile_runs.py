"""What lies in a run directory or a teacher store that a run goes on with: damaged tables, caches, locks, journals."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from hostile_place import Case, Place

Spoil = Callable[[Path], object]
GOES_ON = ("run", "teachers", "output")


def table(name: str, spoil: Spoil, *options: str) -> Callable[[Place], list[str]]:
    """Spoil a file of the run and go on with it."""

    def prepare(place: Place) -> list[str]:
        spoil(place.run / name)
        return place.resume(*options)

    return prepare


def rubbish(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def text(content: str) -> Spoil:
    return lambda path: path.write_text(content)


def damaged_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace(",", ";"), *lines[2:]]))


def other_contents(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[-1][:-9] + "deadbeef\n"]))


def no_marker(path: Path) -> None:
    path.unlink()


def of_another_seed(place: Place) -> list[str]:
    path = place.run / "config.yaml"
    path.write_text(path.read_text().replace("seed_everything: 7", "seed_everything: 8"))
    return place.resume()


def other_fit(place: Place) -> list[str]:
    """Go on with the round of a federation as a plain training."""
    return [*place.fit(), "--run_dir", str(place.run), "--ckpt_path", "last"]


def hostile_journal(place: Place) -> list[str]:
    """A torn update with a note, some of nobody, and links that lead out of the run; caches with a flipped bit each."""
    precious = place.file("precious.txt", "precious")
    journal = place.run / "journal"
    open_round, closed = journal / "round-00002", journal / "round-00001"
    open_round.mkdir()
    closed.mkdir(exist_ok=True)
    update = b"\x10\0\0\0\0\0\0\0{torn"
    note = {"opening": "0" * 64, "update": hashlib.sha256(update).hexdigest(), "state": None, "metrics": {"lr": 1e999}}
    for client in ("hospital-a", "nobody"):
        (open_round / f"{client}.update").write_bytes(update)
        (open_round / f"{client}.json").write_text(json.dumps(note))
    (open_round / "hospital-b.update").symlink_to(precious)
    os.mkfifo(open_round / "hospital-b.json")
    (journal / "round-00000").symlink_to(place.root / "keep", target_is_directory=True)
    (place.root / "keep").mkdir()
    (place.root / "keep/precious.txt").write_text("precious")
    (closed / "hospital-b.update").symlink_to(precious)
    flipped(first_map(place))
    flipped(first_teacher(place))
    return place.resume("--test_after_fit=false")


def first_teacher(place: Place) -> Path:
    return next(place.teachers.glob("hospital-a-*/teacher.safetensors"))


def first_map(place: Place) -> Path:
    return next(place.teachers.glob("maps/hospital-a-*/tap-0.npy"))


def journal_is_clean(place: Place) -> bool:
    """Nothing that lay in the journal was taken for an update, or is left; the caches are right again."""
    rounds = {row["round"] for row in csv.DictReader((place.run / "ledger.csv").open())}
    both = {row["client"] for row in csv.DictReader((place.run / "ledger.csv").open()) if row["round"] == "2"}
    left = list((place.run / "journal").iterdir())
    return rounds == {"1", "2"} and both == {"hospital-a", "hospital-b"} and not left and caches_are_right(place)


def caches_are_right(place: Place) -> bool:
    """Teacher and maps are again, bit by bit, what they were before they were spoilt."""
    template = Place(place.root, place.templates)
    template.__dict__["teachers"] = place.templates / "teachers"
    return all(find(place).read_bytes() == find(template).read_bytes() for find in (first_map, first_teacher))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


WANDB = ("--trainer.logger=fkd_med.tracking.WandbLogger", "--trainer.logger.offline=true")

RUNS = {
    "ledger of rubbish": Case(table("ledger.csv", rubbish), ("ledger.csv",)),
    "ledger with a damaged line": Case(table("ledger.csv", damaged_line), ("ledger.csv", "ine 2")),
    "images.csv of rubbish": Case(table("images.csv", rubbish), ("images.csv",)),
    "images.csv with a damaged line": Case(table("images.csv", damaged_line), ("images.csv", "line 2")),
    "metrics.csv of rubbish": Case(table("metrics.csv", rubbish), ("metrics.csv",)),
    "absences.csv of other columns": Case(table("absences.csv", text("a,b\n1,2\n")), ("absences.csv",)),
    "manifest of the run: rubbish": Case(table("manifest.csv", rubbish), ("manifest.csv",)),
    "manifest of the run: other contents": Case(table("manifest.csv", other_contents), ("manifest.csv", "changed")),
    "lock of rubbish": Case(table(".fkd-lock", rubbish), ("lock", "delete")),
    "lock of an absurd process": Case(
        table(".fkd-lock", text('{"pid": 1e999, "host": "", "started": ""}')), ("lock", "delete")
    ),
    "lock a folder": Case(table(".fkd-lock", os.mkdir), ("lock", "delete")),
    "lock a pipe": Case(table(".fkd-lock", os.mkfifo), ("lock", "delete")),
    "W&B id of rubbish": Case(table("wandb-id.txt", rubbish, *WANDB), ("wandb-id.txt", "Remove")),
    "W&B id with a path": Case(table("wandb-id.txt", text("../../x"), *WANDB), ("wandb-id.txt", "Remove")),
    "run without its marker": Case(table(".fkd-run", no_marker), ("run",)),
    "run of another seed": Case(of_another_seed, ("seed",)),
    "round given to plain training": Case(other_fit, ("federation",)),
    "journal that leads out of the run, altered teacher and maps": Case(
        hostile_journal, code=0, may_change=GOES_ON, holds=journal_is_clean
    ),
}
