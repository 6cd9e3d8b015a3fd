"""The runs of a study: what each is, where it lies, and whether it is done."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fkd_med.errors import ConfigError, RunError, check_known
from fkd_med.files import atomic_write_text
from fkd_med.rundir import RunDir
from fkd_med.study.definition import Settings, define, differing, files_of
from fkd_med.study.design import Arm, Preset, Study, check_seeds, filled

_STOPPED = (0, 130, 143, -2, -15)  # done, by Ctrl-C, because time was up; the same before it could say so


@dataclass(frozen=True)
class Job:
    """One run of `fkd fit`.

    Attributes:
        data: the data set.
        teacher: the teacher; empty for arms that have none, whose run counts for every teacher.
        arm: the arm.
        seed: the seed.
        configs: configuration files.
        settings: what is laid over them.
        decides: the part of the settings that decides the result: without where things lie.
        folder: its folder: the run, its settings, what became of it.
    """

    data: str
    teacher: str
    arm: str
    seed: int
    configs: tuple[Path, ...]
    settings: Settings
    decides: Settings
    folder: Path

    @property
    def name(self) -> str:
        """What the job is, for people."""
        return " ".join(part for part in (self.data, self.teacher, self.arm, f"seed {self.seed}") if part)

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """Where what it says goes, while others run beside it."""
        return self.folder / "log.txt"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, with its test."""
        return bool(self.note().get("finished"))

    @property
    def failed(self) -> bool:
        """Whether the last attempt ended with an error; one that was stopped did not."""
        return self.note().get("exit_code", 0) not in _STOPPED

    def note(self) -> dict[str, Any]:
        """Return what is known of it: `finished`, `seconds` of all its attempts, `exit_code` and `code` of the last."""
        return _note(self.folder)

    def add(self, seconds: float, exit_code: int, code: str) -> None:
        """Write down that an attempt ended, and of which code (`code_of_today`) it was."""
        total = float(self.note().get("seconds", 0.0)) + seconds
        note = {"finished": exit_code == 0, "seconds": round(total, 1), "exit_code": exit_code, "code": code}
        atomic_write_text(self.folder / "outcome.yaml", yaml.safe_dump(note, sort_keys=False))

    def arguments(self) -> list[str]:
        """Return the arguments of `fkd` that begin the run, or go on with it where it is."""
        files = [*self.configs, self.folder / "settings.yaml"]
        arguments = ["fit", *(text for file in files for text in ("--config", str(file)))]
        closed = any(RunDir(self.run).checkpoints.glob("*.ckpt"))
        return [*arguments, "--ckpt_path", "last"] if closed else arguments

    def files(self) -> list[Path]:
        """Return its configuration files and those that they name, see `files_of`."""
        return files_of(self.configs)

    def definition(self) -> Settings:
        """Return what decides the run's result, see `define`."""
        return define(self.configs, self.decides)

    def prepare(self) -> None:
        """Write the settings of a run that is not finished; refuse a folder in which another definition was begun.

        Raises:
            RunError: names what has changed.
        """
        if changed := self.changes():
            raise _another(self.folder, changed)
        atomic_write_text(self.folder / "definition.yaml", yaml.safe_dump(self.definition(), sort_keys=False))
        if not self.finished:
            atomic_write_text(self.folder / "settings.yaml", yaml.safe_dump(self.settings, sort_keys=False))

    def changes(self) -> list[str]:
        """Return the keys in which the run was begun otherwise than it would be now; none if it was not begun.

        Raises:
            RunError: its definition.yaml cannot be read.
        """
        return differing(self.begun_with(), self.definition())

    def begun_with(self) -> Settings:
        """Return the definition that it was begun with; today's if it was not, or failed before it had a run directory.

        Raises:
            RunError: its definition.yaml cannot be read.
        """
        path = self.folder / "definition.yaml"
        begun = path.is_file() and (self.run.is_dir() or self.finished)
        return _own(path, "Delete the folder to make the run anew.") if begun else self.definition()

    def check_kept(self, folder: Path) -> None:
        """Refuse to keep it in a folder that holds the same run of another definition.

        Raises:
            RunError: names what differs.
        """
        path = folder / "definition.yaml"
        if path.is_file():
            kept = _own(path, "Delete the folder to keep the run anew.")
            if changed := differing(kept, self.begun_with()):
                raise _another(folder, changed)


@dataclass(frozen=True)
class Selection:
    """What is asked for of a study.

    Attributes:
        cells: only these cells.
        arms: only these arms.
        seeds: these seeds in place of the preset's.
        roots: folders of data sets, in place of the design's.
        without_images: the images need not be there: nothing is run.
    """

    cells: Sequence[str] | None = None
    arms: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    roots: Mapping[str, str] = field(default_factory=dict)
    without_images: bool = False

    def check(self, study: Study) -> None:
        """Refuse names that the study does not have, and seeds given twice; ConfigError names them."""
        check_known("--data", self.roots, study.data)
        check_known("--cells", self.cells or (), study.cells)
        check_known("--arms", self.arms or (), study.arms)
        if self.seeds is not None:
            check_seeds(self.seeds, "--seeds")


def jobs_of(
    study: Study,
    preset: Preset,
    base: Path,
    output: Path,
    selection: Selection,
) -> list[Job]:
    """Return the runs of a preset, all arms of a seed before the next seed; a run that two teachers share once.

    Args:
        study: the design.
        preset: its size.
        base: the folder that files of arms are relative to.
        output: the study's folder.
        selection: what is asked for of it.

    Raises:
        ConfigError: a name is unknown, a file or a data folder does not exist; it is named.
    """
    selection.check(study)
    cells = selection.cells or preset.cells or study.cells
    arms = selection.arms or preset.arms or list(study.arms)
    found: dict[Path, Job] = {}
    for seed in selection.seeds or preset.seeds:
        for cell in cells:
            for name in arms:
                if study.arms[name].cells is None or cell in (study.arms[name].cells or ()):
                    job = _job(study, preset, base, output, selection, cell, name, seed)
                    found.setdefault(job.folder, job)
    if not found:
        raise ConfigError("No run is left: these arms belong to other cells. See `cells` of the arms in the study.")
    return list(found.values())


def finished_beside(output: Path, jobs: Sequence[Job]) -> list[str]:
    """Return the finished runs in a study's folder that are not among these, by their folder in it."""
    asked = {job.folder for job in jobs}
    places = [path.parent for depth in ("*/*", "*/*/*") for path in output.glob(f"{depth}/seed-*/outcome.yaml")]
    others = [place for place in places if place.resolve() not in asked and _note(place).get("finished")]
    return sorted(str(place.relative_to(output)) for place in others)


def _job(
    study: Study, preset: Preset, base: Path, output: Path, selection: Selection, cell: str, name: str, seed: int
) -> Job:
    data, teacher = cell.split("/")
    arm = study.arms[name]
    teacher = teacher if arm.has_teacher else ""
    place = {"data": study.data[data].configs, "teacher": teacher}
    configs = tuple((base / filled(file, place)).resolve() for file in arm.configs)
    for file in configs:
        if not file.is_file():
            raise ConfigError(f"arms.{name}.configs: {file} does not exist. Files are relative to the study's.")
    folder = output.resolve() / data / teacher / name / f"seed-{seed}"
    settings = _settings(arm, preset, data, teacher, str(output.resolve()))
    inner = settings.setdefault("data", {}).setdefault("init_args", {})
    if "root" not in inner:  # else a preset makes its own images
        inner["root"] = str(_root(study, data, selection))
    merge(settings, {"seed_everything": seed, "run_dir": str(folder / "run")})
    decides = {**_settings(arm, preset, data, teacher, "{output}"), "seed_everything": seed}
    return Job(data, teacher, name, seed, configs, settings, decides, folder)


def _root(study: Study, data: str, selection: Selection) -> Path:
    root = Path(selection.roots.get(data, study.data[data].root)).expanduser().resolve()
    if not (root.is_dir() or selection.without_images):
        raise ConfigError(
            f"The images of {study.data[data].label} are not here: {root} is not a folder. Put them there, or say "
            f"where they are: --data {data}=FOLDER."
        )
    return root


def _settings(arm: Arm, preset: Preset, data: str, teacher: str, output: str) -> Settings:
    values = {"output": output, "data": data, "teacher": teacher}
    settings: Settings = {}
    for group in ("all", data, *arm.settings):
        merge(settings, _replaced(preset.settings.get(filled(group, values), {}), values))
    return settings


def _replaced(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(v, values) for key, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, values) for v in value]
    return _filled(value, values) if isinstance(value, str) else value


def _filled(text: str, values: Mapping[str, str]) -> str:
    """Fill a text's places in; refuse one that nearly has the name of such a place, which would stay as it is."""
    for name in re.findall(r"{(\w+)}", text):
        close = [] if name in values else difflib.get_close_matches(name, values, n=1, cutoff=0.7)
        if close:
            raise ConfigError(f"settings: {{{name}}} in {text!r} stands for nothing. Did you mean {{{close[0]}}}?")
    return filled(text, values)


def merge(into: Settings, other: Mapping[str, Any]) -> None:
    """Lay nested settings over others, in place; lists and values replace."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = _replaced(value, {})


def _note(folder: Path) -> dict[str, Any]:
    """Return what a run's folder says became of it; nothing if it says nothing."""
    path = folder / "outcome.yaml"
    note = _own(path, "Delete it: the run then goes on from its checkpoint.") if path.is_file() else {}
    return note if isinstance(note, dict) else {}


def _own(path: Path, remedy: str) -> Any:
    """Read a YAML file that we have written."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read. {remedy}") from error


def _another(folder: Path, changed: list[str]) -> RunError:
    return RunError(
        f"{folder} was begun with another configuration; changed: {', '.join(changed)}. Give another folder, put it "
        "back, or delete the folder to make it anew."
    )
