"""What counts as a change of a configuration, and that somebody has thought about every key there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities.seed import isolate_rng

from building import CONFIGS, Built
from fkd_med.cli.changes import Change, differences, keys_of
from fkd_med.cli.resume import repeatable
from fkd_med.cli.resume_rules import RULES, acting, verdict


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # building sets it; put back at the end
    with isolate_rng():
        yield


def node(cls: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": cls, "init_args": arguments}


def changed(old: Any, new: Any) -> list[str]:
    return [str(change) for change in differences({"a": old}, {"a": new})]


# --- comparing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"b": 1, "c": {"d": 2}}, {"b": 1, "c": {"d": 3}}, ["a.c.d: 2 -> 3"]),
        (node("x.Y", b=1.5, c=None), node("x.Y", b=2.5, c="é"), ["a.b: 1.5 -> 2.5", "a.c: null -> é"]),
        (node("x.Y", b=1), node("x.Z", b=2), ["a: x.Y -> x.Z"]),
        (node("x.Y", b=1), None, ["a: x.Y -> null"]),
        ([node("x.Y", b=1), node("x.Z")], [node("x.Y", b=2), node("x.Z")], ["a.0.b: 1 -> 2"]),
        ([node("x.Y", b=1)], [node("x.Z", b=1), node("x.Y", b=1)], ["a: [x.Y] -> [x.Z, x.Y]"]),
        ([1, 2], [1, 2, 3], ["a: [1, 2] -> [1, 2, 3]"]),
        (10.0, {"north": 5.0}, ["a: 10.0 -> {north: 5.0}"]),
        (1, True, ["a: 1 -> true"]),
        ("1", 1, []),
        ("1", True, ["a: '1' -> true"]),
        ("auto", 1, ["a: auto -> 1"]),
        ({"b": None}, {}, []),
        (1, 1.0, []),
    ],
)
def test_one_line_for_each_key(old: Any, new: Any, lines: list[str]) -> None:
    assert changed(old, new) == lines


def test_a_long_value_stays_one_line() -> None:
    (line,) = changed(list(range(1000)), "x\ny")
    assert "\n" not in line and len(line) < 300


def test_another_way_to_the_same_folder_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    ways = ["~/here/x", str(tmp_path / "here" / "x"), "here/x", "./link/x", "link/../here/x/"]
    assert not [lines for one in ways for other in ways if (lines := changed(one, other))]
    assert changed("here", str(tmp_path / "here")) == []
    assert changed("~/here", "~/there") and changed("here/x", "here/X")


def test_another_name_of_the_same_class_is_no_change() -> None:
    short, long = "fkd_med.aggregation.FedAvg", "fkd_med.aggregation.fedavg.FedAvg"
    assert changed(node(short, b=1), node(long, b=1)) == []
    assert changed(node(short, b=1), node(long, b=2)) == ["a.b: 1 -> 2"]


def test_keys_are_those_of_the_changes() -> None:
    tree = {"a": node("x.Y", b=[node("x.Z", c=1)], d={"e": None}), "f": []}
    assert set(keys_of(tree)) == {"a.class_path", "a.b.0.class_path", "a.b.0.c", "a.d.e", "f"}


def test_a_key_names_what_is_below_it() -> None:
    change = Change("federation.rounds", "1", "2")
    assert change.is_below("federation.rounds") and change.is_below("federation")
    assert not change.is_below("federation.round") and not change.is_below("federation.rounds.x")


# --- classifying ----------------------------------------------------------------------------------------------------


class Parsed(Built):
    """Parses and settles, and builds nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def settled(*files: str) -> dict[str, Any]:
    given = [part for file in files for part in ("--config", str(CONFIGS / file))]
    with ExitStack() as stack:
        built = Parsed(["fit", *given], stack)
    tree: dict[str, Any] = yaml.safe_load(built.parser.dump(built.config, skip_none=False))["fit"]
    return {key: value for key, value in tree.items() if key not in ("config", "ckpt_path", "overwrite", "resume")}


def unknown(tree: Any) -> list[str]:
    refused_as_a_whole = ("federation", "federation.class_path")  # none, or a recipe of one's own
    return [key for key in keys_of(tree) if verdict(key) is None and key not in refused_as_a_whole]


@pytest.mark.parametrize("file", ["quickstart.yaml", "cvc_clinicdb/teacher_resunet.yaml"])
def test_somebody_has_thought_about_every_key_there_is(file: str) -> None:
    assert not unknown(settled(file)), "say in cli/resume_rules.py whether a resume may change these"


FILES = [
    path for path in sorted(CONFIGS.rglob("*.yaml")) if "arms" not in yaml.safe_load(path.read_text())
]  # no studies


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_somebody_has_thought_about_every_key_of_a_file(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if "class_path" in content:  # a part of a configuration: data, or a network
        content = {"data" if content["class_path"].startswith("fkd_med.data.") else "model": content}
    assert content and not unknown(content)


def test_the_table_names_no_key_that_is_not_there() -> None:
    known = set(keys_of(settled("cvc_clinicdb/fkd_resunet.yaml")))
    stale = [rule for rule in RULES if not any(key == rule or key.startswith(f"{rule}.") for key in known)]
    assert not stale


@pytest.mark.parametrize(
    "key", ["trainer.warp", "federation.parallel_universes", "federation", "brand_new", "checkpoint.x"]
)
def test_a_key_that_nobody_thought_about_is_not_harmless(key: str) -> None:
    assert verdict(key) is None


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.optimizer.lr", "decides"), ("data.root", "decides"), ("data.num_workers", "harmless"),
        ("federation.aggregator.fraction", "decides"), ("federation.uplink_mbps.north", "harmless"),
        ("federation.uplink.codec", "decides"), ("trainer.logger.project", "harmless"),
    ],
)  # fmt: skip
def test_the_longest_entry_wins(key: str, expected: str) -> None:
    assert verdict(key) == expected


def test_callbacks_that_watch_are_set_apart_from_those_that_act() -> None:
    bar, early = node("lightning.pytorch.callbacks.RichProgressBar"), node("lightning.pytorch.callbacks.EarlyStopping")
    mine = node("mine.RichProgressBar")
    assert acting([bar, early, mine]) == [early, mine]
    assert acting(early) == [early] and acting(bar) == acting(None) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--resume.allow", "a.b"], ["--resume.allow+=a.b"]),
        (["--resume.allow=a", "--x", "--resume.allow=b"], ["--resume.allow+=a", "--x", "--resume.allow+=b"]),
        (["--resume.allow=[a, b]"], ["--resume.allow+=a", "--resume.allow+=b"]),
        (["--resume.allow", "a,b"], ["--resume.allow+=a", "--resume.allow+=b"]),
        (["--resume.allowed=a"], ["--resume.allowed=a"]),
    ],
)
def test_the_option_may_be_repeated(given: list[str], expected: list[str]) -> None:
    assert repeatable(given) == expected
