"""What lies in a run directory or a teacher store that a run goes on with: damaged tables, caches, locks, journals."""

from __future__ import annotations

import hashlib
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
    """A torn update, one of nobody, and links that lead out of the run."""
    place.file("precious.txt", "precious")
    journal = place.run / "journal"
    (journal / "round-00002").mkdir()
    (journal / "round-00002/hospital-a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{torn")
    (journal / "round-00002/nobody.safetensors").write_bytes(b"rubbish")
    (journal / "round-00000").symlink_to(place.root / "keep", target_is_directory=True)
    (place.root / "keep").mkdir()
    (place.root / "keep/precious.txt").write_text("precious")
    (journal / "round-00001").mkdir(exist_ok=True)
    (journal / "round-00001/hospital-b.safetensors").symlink_to(place.root / "precious.txt")
    return place.resume("--test_after_fit=false")


def maps(spoil: Spoil) -> Callable[[Place], list[str]]:
    def prepare(place: Place) -> list[str]:
        spoil(first_map(place))
        return place.resume("--test_after_fit=false")

    return prepare


def first_map(place: Place) -> Path:
    return next(place.teachers.glob("maps/hospital-a-*/tap-0.npy"))


def maps_are_right(place: Place) -> bool:
    """The maps are again what they were before they were spoilt."""
    template = Place(place.root, place.templates)
    template.__dict__["teachers"] = place.templates / "teachers"
    return first_map(place).read_bytes() == first_map(template).read_bytes()


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def spoilt_teacher(place: Place) -> list[str]:
    flipped(next(place.teachers.glob("hospital-a-*/teacher.safetensors")))
    return place.resume("--test_after_fit=false")


def teacher_is_right(place: Place) -> bool:
    path = next(place.teachers.glob("hospital-a-*/teacher.safetensors"))
    return hashlib.sha256(path.read_bytes()).hexdigest() in path.with_suffix(".json").read_text()


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
    "journal that leads out of the run": Case(hostile_journal, code=0, may_change=GOES_ON),
    "teacher maps altered": Case(maps(flipped), code=0, may_change=GOES_ON, holds=maps_are_right),
    "teacher altered in the store": Case(spoilt_teacher, code=0, may_change=GOES_ON, holds=teacher_is_right),
}
