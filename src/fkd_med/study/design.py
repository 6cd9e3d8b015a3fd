"""What a study is: the file that `fkd reproduce --config` takes, and what is wrong with one before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fkd_med.errors import ConfigError, check_known


@dataclass
class Images:
    """A data set of a study.

    Args:
        label: its name in tables.
        configs: what `{data}` stands for in the files of arms: the folder of its configurations.
        root: the folder of the images; another is given on the command line, `--data NAME=FOLDER`.
    """

    label: str
    configs: str
    root: str


@dataclass
class Arm:
    """One way of training: configurations of `fkd fit`, laid over each other.

    Args:
        label: its name in tables.
        configs: files, relative to the study's; `{data}` and `{teacher}` are replaced. An arm without `{teacher}` in
            its files and settings is trained once per data set and counts for all teachers.
        settings: groups of the preset's settings that are laid over the files, in this order, after `all` and the
            data set's own.
        cells: the only cells, as ``data/teacher``; all when left out.
    """

    label: str
    configs: list[str]
    settings: list[str] = field(default_factory=list)
    cells: list[str] | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether the arm differs between teachers."""
        return any("{teacher}" in text for text in (*self.configs, *self.settings))


@dataclass
class Difference:
    """A column of paired differences in Dice points: `of` minus `over`, image by image.

    Args:
        label: what the difference says, such as "gain of distillation".
        of: an arm.
        over: the arm it is compared with.
        model: whose scores: the students', or those of the hospitals' teachers, which only some arms have.
    """

    label: str
    of: str
    over: str
    model: Literal["student", "teacher"] = "student"


@dataclass
class Preset:
    """How large a study is.

    Args:
        seeds: one run each; a seed deals the images, draws the first weights and orders the batches.
        settings: by group, what is laid over the arms' files; `{output}` stands for the study's folder.
        cells: the cells to run, as ``data/teacher``; all when left out.
        arms: the arms to run; all when left out.
    """

    seeds: list[int]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[str] | None = None
    arms: list[str] | None = None


@dataclass
class Study:
    """A design: every arm, on every cell of data set and teacher, with every seed of a preset.

    Args:
        data: data sets by name.
        teachers: labels of the teachers by name, which `{teacher}` stands for.
        arms: arms by name, in the order of the tables.
        differences: what the tables compare.
        presets: sizes by name.
    """

    data: dict[str, Images]
    teachers: dict[str, str]
    arms: dict[str, Arm]
    differences: list[Difference]
    presets: dict[str, Preset]

    @property
    def cells(self) -> list[str]:
        """Every data set with every teacher, as ``data/teacher``."""
        return [f"{data}/{teacher}" for data in self.data for teacher in self.teachers]

    def preset(self, name: str) -> Preset:
        """Return a preset; ConfigError names those there are."""
        check_known("preset", [name], self.presets)
        return self.presets[name]

    def check(self) -> None:
        """Refuse what names something that is not there, and seeds that are given twice.

        Raises:
            ConfigError: names the key.
        """
        for name, arm in self.arms.items():
            check_known(f"arms.{name}.cells", arm.cells or (), self.cells)
            if not arm.configs:
                raise ConfigError(f"arms.{name}.configs is empty: name the configurations that make this arm.")
        for difference in self.differences:
            check_known(f"differences, {difference.label!r}", [difference.of, difference.over], self.arms)
        for name, preset in self.presets.items():
            check_seeds(preset.seeds, f"presets.{name}.seeds")
            check_known(f"presets.{name}.cells", preset.cells or (), self.cells)
            check_known(f"presets.{name}.arms", preset.arms or (), self.arms)
            check_known(f"presets.{name}.settings", preset.settings, self._groups())
        for name, arm in self.arms.items():
            self._check_groups(name, arm)

    def _check_groups(self, name: str, arm: Arm) -> None:
        """Refuse a group of settings that no preset has, for any data set or teacher: the arm would train otherwise."""
        there = {group for preset in self.presets.values() for group in preset.settings}
        for group in arm.settings:
            if not self._fillings(group) & there:
                check_known(f"arms.{name}.settings", [group], there)

    def _groups(self) -> set[str]:
        named = {group for arm in self.arms.values() for group in arm.settings}
        return {"all", *self.data}.union(*(self._fillings(group) for group in named))

    def _fillings(self, group: str) -> set[str]:
        """Return what a group is called for each data set and teacher."""
        places = [{"data": data, "teacher": teacher} for data in self.data for teacher in self.teachers]
        return {filled(group, place) for place in places}


def check_seeds(seeds: Iterable[int], where: str) -> None:
    """Refuse seeds that are given twice, negative, or none at all; ConfigError names them."""
    seeds = list(seeds)
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ConfigError(f"{where} has {twice} more than once: a run that is repeated is no further evidence.")
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"{where} is {seeds}: give one seed or more, none below 0.")


def filled(text: str, values: Mapping[str, str]) -> str:
    """Replace each `{name}` in a text by its value."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text
