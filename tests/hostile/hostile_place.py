"""What a case of the corpus is, and the place where it happens: data, run and teachers that it may spoil."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

Picture = dict[Path, bytes | str]


@dataclass
class Place:
    """A folder of one case, with copies of the templates, made when they are first asked for.

    Args:
        root: empty folder of the case.
        templates: holds ``data``, ``runs/run``, ``teachers``, ``plain.yaml`` and ``run.yaml``.
    """

    root: Path
    templates: Path

    @cached_property
    def data(self) -> Path:
        """Images, masks and clients.csv of two hospitals."""
        return self._copied("data")

    @cached_property
    def run(self) -> Path:
        """A federated run that was killed in its second round; its configuration names this place."""
        run = self._copied("runs/run")
        text = (run / "config.yaml").read_text().replace(f"{self.templates}/runs/", f"{self.root}/")
        (run / "config.yaml").write_text(text.replace(str(self.templates), str(self.root)))
        return run

    @cached_property
    def teachers(self) -> Path:
        """The store of its teachers and their maps."""
        return self._copied("teachers")

    @property
    def output(self) -> Path:
        """Where a command may write."""
        return self.root / "output"

    @property
    def sentinel(self) -> Path:
        """What code in a hostile file would make."""
        return self.root / "executed"

    @property
    def images(self) -> list[Path]:
        """The images, sorted."""
        return sorted((self.data / "images").iterdir())

    @property
    def masks(self) -> list[Path]:
        """The masks, in the order of the images."""
        return sorted((self.data / "masks").iterdir())

    def file(self, name: str, content: str | bytes) -> Path:
        """Write a file of the case and return it."""
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def fit(self, *options: str) -> list[str]:
        """Train one network on the pooled data."""
        return [*self._fit("plain.yaml"), "--run_dir", str(self.output / "run"), *options]

    def federate(self, *options: str) -> list[str]:
        """Begin the federated run anew."""
        store = f"--model.teacher.init_args.store={self.teachers}"
        return [*self._fit("run.yaml"), "--run_dir", str(self.output / "run"), store, *options]

    def resume(self, *options: str) -> list[str]:
        """Go on with the killed run."""
        store = f"--model.teacher.init_args.store={self.teachers}"
        return [*self._fit("run.yaml"), "--run_dir", str(self.run), store, "--ckpt_path", "last", *options]

    def predict(self, checkpoint: Path | None = None, images: Path | None = None) -> list[str]:
        """Segment images."""
        checkpoint = self.templates / "runs/run/student.ckpt" if checkpoint is None else checkpoint
        images = self.data / "images" if images is None else images
        return ["predict", "--ckpt_path", str(checkpoint), "--data.images", str(images), "--output", str(self.output)]

    def check_data(self) -> list[str]:
        """Look at the data only."""
        return ["check-data", *self._fit("plain.yaml")[1:], "--output", str(self.output)]

    def overlay(self, name: str, content: object) -> list[str]:
        """Return the option of a further configuration file."""
        return ["--config", str(self.file(name, yaml.safe_dump(content)))]

    def _fit(self, configuration: str) -> list[str]:
        return ["fit", "--config", str(self.templates / configuration), f"--data.root={self.data}"]

    def _copied(self, name: str) -> Path:
        target = self.root / Path(name).name
        shutil.copytree(self.templates / name, target, symlinks=True)
        return target


@dataclass(frozen=True)
class Case:
    """A bad input, or an odd one that must work.

    Args:
        prepare: spoils something in a place and returns the command line.
        says: what the error must say besides; nothing for an input that must work.
        code: the exit code.
        may_change: names of the place's folders in which files may change.
        holds: what must be true in the place afterwards.
    """

    prepare: Callable[[Place], list[str]]
    says: tuple[str, ...] = ()
    code: int = 2
    may_change: tuple[str, ...] = ("output",)
    holds: Callable[[Place], bool] = lambda place: True


def picture(root: Path) -> Picture:
    """Return what lies below a folder: bytes of files, kind of everything else; no link is followed."""
    found: Picture = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[path.relative_to(root)] = path.read_bytes()
            elif not stat.S_ISDIR(mode):
                found[path.relative_to(root)] = os.readlink(path) if stat.S_ISLNK(mode) else str(stat.S_IFMT(mode))
    return found


def lost(before: Picture, after: Picture, may_change: tuple[str, ...]) -> list[str]:
    """Return the files that are gone or changed, and new ones, outside the folders that may change."""
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    return sorted(str(path) for path in changed if path.parts[0] not in may_change)
